"""The Walsh-Hadamard transform: against the whole matrix, and kernels against the plain version, bit for bit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hopper import compiled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gsq.kernels import hadamard as kernel
from gsq.kernels.hadamard import hadamard
from gsq.rotation import Rotation

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative error of one rounding. Triton's interpreter cuts numbers off where they are rounded to bfloat16.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8 if torch.cuda.is_available() else 2.0**-7}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def signs(count: int, seed: int) -> Tensor:
    return random(count, seed=seed).sign()


def matrix(size: int) -> Tensor:
    """The Hadamard matrix in natural order by its recursion, float64."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), h)
    return h


def plain(run, *args, **options) -> Tensor:
    """What `run` gives without Triton, on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "triton_runs", lambda *tensors: False)
        return run(*(arg.cpu() if isinstance(arg, Tensor) else arg for arg in args), **options)


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Equal to the last bit, signs of zeros included."""
    return torch.equal(ours.cpu().contiguous().view(torch.int32), theirs.contiguous().view(torch.int32))


@pytest.fixture(params=["plain", "triton"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the transform runs, first as the plain version on a CPU, then as kernels."""
    return CPU if request.param == "plain" else request.getfixturevalue("kernels")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [32, 128, 2048])
def test_the_transform_is_the_matrix_between_signs(device: torch.device, size: int, dtype: torch.dtype):
    x, before, after = random(3, 5, size).to(dtype), signs(size, 1), signs(size, 2)
    wanted = (x.double() * before) @ matrix(size) * after / math.sqrt(size)
    found = hadamard(x.to(device), before=before.to(device), after=after.to(device), divisor=math.sqrt(size))
    assert (found.dtype, found.shape, found.device.type) == (dtype, x.shape, device.type)
    torch.testing.assert_close(found.cpu().double(), wanted, atol=1e-5, rtol=ROUNDING.get(dtype, 0))


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_kernels_give_the_bits_of_the_plain_version(kernels: torch.device, data: st.DataObject):
    block, rows, blocks = 1 << data.draw(st.integers(0, 8)), data.draw(st.integers(0, 40)), data.draw(st.integers(1, 3))
    width, columns = (block * blocks - data.draw(st.integers(0, block - 1)) for _ in range(2))
    x = random(rows, width, seed=data.draw(st.integers(0, 99))).to(data.draw(st.sampled_from(DTYPES)))
    before, after = (signs(block, seed) if data.draw(st.booleans()) else None for seed in (1, 2))
    scale = {"factor": data.draw(st.sampled_from([1.0, 0.3])), "divisor": data.draw(st.sampled_from([1.0, 11.3]))}

    def run(x: Tensor) -> Tensor:
        given = [None if vector is None else vector.to(x.device) for vector in (before, after)]
        return hadamard(x, block, *given, **scale, out=torch.full((rows, columns), torch.nan, device=x.device))

    assert same(run(x.to(kernels)), plain(run, x))


@pytest.mark.parametrize("size", [4096, 16384])
def test_large_blocks_give_the_bits_of_the_plain_version(kernels: torch.device, size: int):
    x = random(2, size)
    assert same(hadamard(x.to(kernels), factor=1 / size**0.5), plain(hadamard, x, factor=1 / size**0.5))


def test_a_few_programs_do_the_work_of_many(kernels: torch.device, monkeypatch: pytest.MonkeyPatch):
    from gsq.kernels import hadamard_triton

    monkeypatch.setattr(hadamard_triton, "PROGRAMS", 2)
    monkeypatch.setattr(hadamard_triton, "TILE", 64)
    x = random(11, 32)
    assert same(hadamard(x.to(kernels)), plain(hadamard, x))


def test_blocks_too_large_for_a_program_are_transformed_without(kernels: torch.device, monkeypatch: pytest.MonkeyPatch):
    from gsq.kernels import hadamard_triton

    monkeypatch.setattr(kernel, "LARGEST", 32)
    monkeypatch.setattr(hadamard_triton, "transform", None)
    x = random(3, 64)
    torch.testing.assert_close(hadamard(x.to(kernels)).cpu().double(), x.double() @ matrix(64), atol=1e-4, rtol=0)


def test_any_strides_are_read_and_parts_of_rows_written(device: torch.device):
    x = random(6, 64, 5).to(device)
    wanted = plain(hadamard, x.mT.contiguous())
    torch.testing.assert_close(hadamard(x.mT).cpu(), wanted)
    out = torch.full((6, 5, 100), 7.0, device=device)
    assert hadamard(x.mT, out=out[..., 20:84]).data_ptr() == out[..., 20:].data_ptr()
    torch.testing.assert_close(out[..., 20:84].cpu(), wanted)
    assert (out[..., :20] == 7).all()
    assert (out[..., 84:] == 7).all()


ROTATIONS = [
    Rotation("tq", 256, 128), Rotation("tq", 70, 32), Rotation("tq", 96, 32),
    Rotation("jangtq", 256, 256), Rotation("jangtq", 72, 72), Rotation("jangtq", 81, 81),
]  # fmt: skip


@pytest.mark.parametrize("rotation", ROTATIONS, ids=str)
def test_rotations_have_the_bits_of_the_plain_version(kernels: torch.device, rotation: Rotation):
    x = random(2, 3, rotation.width)
    y, wanted = rotation.rotate(x.to(kernels)), plain(rotation.rotate, x)
    assert same(y, wanted)
    assert same(rotation.unrotate(y), plain(rotation.unrotate, wanted))
    torch.testing.assert_close(rotation.unrotate(y).cpu(), x, atol=1e-5, rtol=0)
    h = x[0].T @ x[0]
    assert same(rotation.rotate_moments(h.to(kernels)), plain(rotation.rotate_moments, h))


@pytest.mark.parametrize("rotation", ROTATIONS, ids=str)
def test_activations_are_rotated_in_their_own_dtype(device: torch.device, rotation: Rotation):
    x = random(4, rotation.width).bfloat16()
    wanted = plain(rotation.rotate, x)
    y = rotation.rotate(x.to(device), torch.bfloat16)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.cpu().float(), wanted, atol=1e-6, rtol=ROUNDING[torch.bfloat16])
    back = rotation.unrotate(wanted.to(device), torch.float16)
    torch.testing.assert_close(back.cpu(), x.half(), atol=1e-5, rtol=2e-3)


def test_what_does_not_fit_is_said(device: torch.device):
    x = torch.zeros(2, 64, device=device)
    with pytest.raises(ValueError, match="power of two, got 12"):
        hadamard(x, 12)
    with pytest.raises(ValueError, match="power of two, got 0"):
        hadamard(x[:, :0])
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        hadamard(x.double())
    with pytest.raises(ValueError, match=r"\[2, 64\] in blocks of 32 does not fit into \[2, 96\]"):
        hadamard(x, 32, out=x.new_empty(2, 96))
    with pytest.raises(ValueError, match=r"signs must be float32 \[32\], got torch\.float32 \[64\]"):
        hadamard(x, 32, after=x[0])
    with pytest.raises(ValueError, match="dense along its rows"):
        hadamard(x, out=x.new_empty(64, 2).mT)
    with pytest.raises(ValueError, match="no gradient"):
        hadamard(x.requires_grad_())


@pytest.mark.skipif(torch.cuda.is_available(), reason="all other tests compile the kernel")
def test_the_kernel_compiles(tmp_path: Path):
    body = """
import torch
from gsq.kernels import hadamard_triton
from gsq.kernels.hadamard import hadamard
signs = torch.ones(128)
hadamard(torch.ones(9, 250).bfloat16(), 128, signs, signs, divisor=11.3, out=torch.empty(9, 240))
hadamard_triton.WARP = 128  # so that even a small block is held by several warps
hadamard(torch.ones(3, 512).half())
"""
    assert compiled(body, tmp_path) == ["_transform"] * 2
