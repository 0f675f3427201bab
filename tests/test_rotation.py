"""Hadamard rotations and Lloyd-Max levels, against whole matrices and against the readers' own code."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jang_tools.turboquant import rotation as jang
from jang_tools.turboquant.codebook import compute_codebook
from jang_tools.turboquant.linear import tq_quantize_experts
from torch import Tensor
from turboquant_vllm.torch_ops import PolarQuantTorch

from gsq.codebook import Codebook, CodebookError, QuantizedTensor
from gsq.init.rtn import match_norms
from gsq.kernels import hadamard as kernel
from gsq.kernels.hadamard import hadamard
from gsq.levels import gaussian_levels, sphere_levels
from gsq.rotation import Rotation


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(size: int) -> Tensor:
    """The Hadamard matrix by its definition: the sign is the parity of the bits that row and column share."""
    parity = [[(row & column).bit_count() % 2 for column in range(size)] for row in range(size)]
    return 1.0 - 2.0 * torch.tensor(parity, dtype=torch.float64)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 8), st.integers(0, 5), st.integers(0, 100))
def test_the_transform_is_the_matrix(power: int, rows: int, seed: int):
    x = random(rows, 1 << power, seed=seed)
    torch.testing.assert_close(hadamard(x).double(), x.double() @ matrix(1 << power), atol=1e-4, rtol=1e-5)


def test_the_transform_leaves_its_input_alone_and_does_not_see_chunks(monkeypatch: pytest.MonkeyPatch):
    x = random(3, 7, 64)
    before, whole = x.clone(), hadamard(x)
    monkeypatch.setitem(kernel.CHUNK, "cpu", 128)
    assert torch.equal(hadamard(x), whole)
    assert torch.equal(hadamard(x[1, :1]), whole[1, :1])
    assert torch.equal(x, before)


def test_the_transform_needs_a_power_of_two():
    with pytest.raises(ValueError, match="power of two"):
        hadamard(random(2, 12))


ROTATIONS = [Rotation("tq", 64, 16), Rotation("tq", 70, 32), *(Rotation("jangtq", w, w) for w in (64, 72, 81))]


@pytest.mark.parametrize("rotation", ROTATIONS, ids=str)
def test_a_rotation_keeps_lengths_and_is_undone(rotation: Rotation):
    x = random(5, rotation.width)
    y = rotation.rotate(x)
    assert y.shape == (5, rotation.columns)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(rotation.unrotate(y), x, atol=1e-5, rtol=0)


def test_a_rotation_takes_rows_of_its_width():
    rotation = Rotation("tq", 70, 32)
    with pytest.raises(ValueError, match="rows of 70 does not take rows of 96"):
        rotation.rotate(random(2, 96))
    with pytest.raises(ValueError, match="rows of 96 does not take rows of 70"):
        rotation.unrotate(random(2, 70))


@pytest.mark.parametrize("rotation", ROTATIONS, ids=str)
def test_moments_turn_with_the_inputs(rotation: Rotation):
    x = random(200, rotation.width).double()
    turned = rotation.rotate_moments((x.T @ x).float()).double()
    basis = rotation.rotate(torch.eye(rotation.width)).double()  # [width, columns]
    inputs = x @ basis
    torch.testing.assert_close(basis @ turned @ basis.T, x.T @ x, atol=1e-2, rtol=1e-4)
    free = torch.eye(rotation.columns, dtype=torch.float64) - basis.T @ basis  # where nothing is ever read
    ridge = 0.01 * (x.T @ x).diagonal().mean()
    torch.testing.assert_close(turned, inputs.T @ inputs + ridge * free, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [8, 32, 64, 128, 256])
def test_tq_is_what_its_reader_computes(bits: int, size: int):
    reader = PolarQuantTorch(size, bits, device="cpu")
    codebook = Codebook.tq(bits, size, 3 * size)
    assert torch.equal(codebook.level_table(), reader.centroids)
    x = random(20, 3 * size)
    assert torch.equal(codebook.rotate(x).view(-1, size), reader._rotate(x.view(-1, size)))
    codes = torch.randint(0, 1 << bits, (20, 3 * size), dtype=torch.uint8)
    norms = random(20, 3)
    decoded = reader.dequantize(codes.view(-1, size).long(), norms.view(-1))
    assert torch.equal(QuantizedTensor(codes, norms, codebook).dequantize().view(-1, size), decoded)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("width", [64, 192, 576, 768, 2048])
def test_jangtq_is_what_its_reader_computes(bits: int, width: int):
    codebook = Codebook.jangtq(bits, width)
    assert np.array_equal(np.float32(codebook.levels), np.float32(compute_codebook(width, bits)))
    x, signs = random(7, width), jang.generate_random_signs(width, seed=42)
    given = mx.array(x.numpy())
    assert np.array_equal(codebook.rotate(x).numpy(), np.array(jang.hadamard_rotate(given, signs)))
    assert np.array_equal(codebook.unrotate(x).numpy(), np.array(jang.hadamard_inverse(given, signs)))


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_levels_are_the_means_of_what_is_rounded_to_them(bits: int):
    d, count = 256, 400_000
    draws = random(count, d // 128, seed=bits).div(d**0.5).view(-1)
    sphere = random(count // d, d, seed=bits)
    sphere = (sphere / sphere.norm(dim=1, keepdim=True)).view(-1)
    for levels, x in ((gaussian_levels(bits, d), draws), (sphere_levels(bits, d), sphere)):
        table = torch.tensor(levels)
        nearest = Codebook(levels, d).nearest(x).long()
        means = torch.zeros(len(levels)).index_add_(0, nearest, x) / nearest.bincount(minlength=len(levels))
        torch.testing.assert_close(means, table, atol=0.02 / d**0.5, rtol=0.02)


def test_comparing_bounds_finds_the_same_codes_as_a_search():
    for codebook in (Codebook.tq(2, 16, 16), Codebook.lloyd(3, 64), Codebook.jangtq(4, 96)):
        table = codebook.level_table()
        bounds = (table[1:] + table[:-1]) / 2
        x = torch.cat([random(1000) * 0.3, bounds, table, torch.tensor([torch.inf, -torch.inf])])
        assert torch.equal(codebook.nearest(x), torch.bucketize(x, bounds).to(torch.uint8))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("width", [64, 96, 256])
@pytest.mark.parametrize("rows", [1, 2, 5, 300])
def test_matched_norms_are_what_jang_writes(bits: int, width: int, rows: int):
    weights = random(2, rows, width, seed=bits).bfloat16()
    weights[0, 0] = 0
    wanted = tq_quantize_experts(weights.float().numpy(), bits=bits)
    found = match_norms(weights, Codebook.jangtq(bits, width))
    assert np.array_equal(found.scales[..., 0].numpy(), wanted["norms"])
    shifts = np.arange(32 // bits, dtype=np.uint32) * bits
    codes = wanted["packed"][..., None] >> shifts & ((1 << bits) - 1)
    assert np.array_equal(found.codes.numpy(), codes.reshape(weights.shape))


def test_a_codebook_describes_itself():
    for codebook in (Codebook.tq(3, 32, 100), Codebook.jangtq(2, 96), Codebook.lloyd(4, 64), Codebook.integer(2, 64)):
        assert Codebook.from_dict(codebook.to_dict()) == codebook
    assert Codebook.tq(3, 32, 100).nbytes((10, 100)) == 10 * (128 * 3 // 8 + 4 * 4)
    assert Codebook.jangtq(2, 96).nbytes((4, 10, 96)) == 40 * (24 + 2)


def test_a_rotated_group_is_a_power_of_two():
    with pytest.raises(CodebookError, match="use 64 or 128"):
        Codebook.tq(3, 96, 192)
    with pytest.raises(CodebookError, match="not 1; use 2 or 4"):
        Codebook.tq(3, 1, 64)
    with pytest.raises(CodebookError, match="mostly padding of rows of 64"):
        Codebook.tq(3, 256, 64)
