"""Levels, encoding against brute force, and the errors of groups that do not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsq.codebook import Codebook, CodebookError, QuantizedTensor

CODEBOOKS = {
    "2 bits": Codebook.integer(2, 4),
    "4 bits": Codebook.integer(4, 4),
    "ternary": Codebook.ternary(4),
    "not uniform": Codebook((-1.51, -0.453, 0.453, 1.51), 4),
    "no zero, asymmetric": Codebook((-3.0, 0.5, 1.0), 4),
}


def test_integer_levels_are_twos_complement():
    assert Codebook.integer(2, 64).levels == (-2, -1, 0, 1)
    assert Codebook.integer(8, 64).levels == tuple(range(-128, 128))
    assert Codebook.ternary(64).levels == (-1, 0, 1)


@pytest.mark.parametrize(("levels", "bits"), [(2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4), (256, 8)])
def test_bits_of_a_packed_code(levels: int, bits: int):
    assert Codebook(tuple(map(float, range(levels))), 64).bits == bits


def test_bits_per_weight_count_the_scales():
    assert Codebook.integer(2, 128).bits_per_weight == 2.125
    assert Codebook.integer(2, 64, torch.float32).bits_per_weight == 2.5


@pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS)
@settings(deadline=None, max_examples=50)
@given(
    weights=st.lists(st.floats(-10, 10, width=16), min_size=8, max_size=8),
    scales=st.lists(st.floats(0.0625, 4, width=16), min_size=2, max_size=2),
    signs=st.tuples(st.sampled_from([-1, 1]), st.sampled_from([-1, 1])),
)
def test_encode_takes_the_nearest_level(codebook: Codebook, weights: list, scales: list, signs: tuple):
    weight = torch.tensor([weights])
    scale = (torch.tensor(scales) * torch.tensor(signs))[None]
    decoded = codebook.decode(codebook.encode(weight, scale), scale)
    every = codebook.level_table()[:, None, None] * codebook.expand(scale)  # [K, out, in]
    torch.testing.assert_close((decoded - weight).abs(), (every - weight).abs().amin(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS)
def test_a_zero_scale_decodes_to_zero(codebook: Codebook):
    weights, scales = torch.randn(3, 8), torch.zeros(3, 2)
    codes = codebook.encode(weights, scales)
    assert torch.equal(codebook.decode(codes, scales), torch.zeros(3, 8))
    nearest_to_zero = min(abs(level) for level in codebook.levels)
    assert codebook.level_table()[codes.int()].abs().eq(torch.tensor(nearest_to_zero)).all()


def test_a_negative_scale_turns_the_levels_around():
    codebook = Codebook.integer(2, 4)
    weights, scales = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([[-1.0]])
    assert torch.equal(codebook.decode(codebook.encode(weights, scales), scales), weights)


def test_experts_are_a_batch():
    codebook = Codebook.integer(3, 8)
    weights, scales = torch.randn(4, 6, 16), torch.rand(4, 6, 2) + 0.1
    codes = codebook.encode(weights, scales)
    assert codes.shape == weights.shape
    assert codes.dtype == torch.uint8
    assert torch.equal(codes[2], codebook.encode(weights[2], scales[2]))


def test_values_are_rounded_once():
    codebook = Codebook.integer(8, 4)
    codes, scales = torch.tensor([[1, 2, 130, 255]], dtype=torch.uint8), torch.tensor([[0.1]], dtype=torch.bfloat16)
    exact = codebook.level_table(dtype=torch.float64)[codes.int()] * scales.double()
    quantized = QuantizedTensor(codes, scales, codebook)
    assert torch.equal(quantized.dequantize().double(), exact)
    assert torch.equal(quantized.dequantize(torch.bfloat16), exact.to(torch.bfloat16))


def test_a_group_size_that_does_not_divide_names_those_that_do():
    with pytest.raises(CodebookError, match=r"128 does not divide in_features 576; use 64 or 32 or 16"):
        Codebook.integer(2, 128).groups(576)
    with pytest.raises(CodebookError, match="keep this tensor unquantized"):
        Codebook.integer(2, 128).groups(10)


@pytest.mark.parametrize(
    ("levels", "group_size", "message"),
    [((1.0,), 64, "2 to 256"), ((1.0, 0.0), 64, "ascend"), ((0.0, 0.0), 64, "ascend"), ((0.0, 1.0), 0, "positive")],
)
def test_impossible_codebooks(levels: tuple, group_size: int, message: str):
    with pytest.raises(CodebookError, match=message):
        Codebook(levels, group_size)


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_integer_widths(bits: int):
    with pytest.raises(CodebookError, match="2 to 8 bits"):
        Codebook.integer(bits, 64)


@pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS)
def test_description_is_read_back(codebook: Codebook):
    assert Codebook.from_dict(codebook.to_dict()) == codebook
