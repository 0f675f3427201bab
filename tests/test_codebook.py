"""Levels, encoding against brute force, and the errors of groups that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

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
    "affine, 2 bits": Codebook.affine(2, 4),
    "affine, 4 bits": Codebook.affine(4, 4, torch.float16),
}


def test_integer_levels_are_twos_complement():
    assert Codebook.integer(2, 64).levels == (-2, -1, 0, 1)
    assert Codebook.integer(8, 64).levels == tuple(range(-128, 128))
    assert Codebook.ternary(64).levels == (-1, 0, 1)


def test_affine_levels_count_from_the_offset():
    assert Codebook.affine(2, 64).levels == (0, 1, 2, 3)
    assert Codebook.affine(8, 64).levels == tuple(range(256))
    assert Codebook.affine(2, 64).offset
    assert not Codebook.integer(2, 64).offset


@pytest.mark.parametrize(("levels", "bits"), [(2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4), (256, 8)])
def test_bits_of_a_packed_code(levels: int, bits: int):
    assert Codebook(tuple(map(float, range(levels))), 64).bits == bits


def test_bits_per_weight_count_the_scales_and_offsets():
    assert Codebook.integer(2, 128).bits_per_weight == 2.125
    assert Codebook.integer(2, 64, torch.float32).bits_per_weight == 2.5
    assert Codebook.affine(2, 64).bits_per_weight == 2.5
    assert Codebook.affine(4, 32, torch.float32).bits_per_weight == 6
    assert Codebook.affine(2, 64).nbytes((3, 8, 128)) == 3 * 8 * 128 * 2.5 / 8


@pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS)
@settings(deadline=None, max_examples=50)
@given(
    weights=st.lists(st.floats(-10, 10, width=16), min_size=8, max_size=8),
    scales=st.lists(st.floats(0.0625, 4, width=16), min_size=2, max_size=2),
    signs=st.tuples(st.sampled_from([-1, 1]), st.sampled_from([-1, 1])),
    offsets=st.lists(st.floats(-10, 10, width=16), min_size=2, max_size=2),
)
def test_encode_takes_the_nearest_level(codebook: Codebook, weights: list, scales: list, signs: tuple, offsets: list):
    weight = torch.tensor([weights])
    scale = (torch.tensor(scales) * torch.tensor(signs))[None]
    offset = torch.tensor([offsets]) if codebook.offset else None
    decoded = codebook.decode(codebook.encode(weight, scale, offset), scale, offset)
    every = codebook.level_table()[:, None, None] * codebook.expand(scale)  # [K, out, in]
    if codebook.offset:
        every += codebook.expand(offset)
    torch.testing.assert_close((decoded - weight).abs(), (every - weight).abs().amin(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS)
def test_a_zero_scale_decodes_to_zero_or_to_the_offset(codebook: Codebook):
    weights, scales = torch.randn(3, 8), torch.zeros(3, 2)
    offsets = torch.randn(3, 2) if codebook.offset else None
    codes = codebook.encode(weights, scales, offsets)
    expected = torch.zeros(3, 8) if offsets is None else codebook.expand(offsets)
    assert torch.equal(codebook.decode(codes, scales, offsets), expected)
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


@pytest.mark.parametrize("codebook", [Codebook.integer(8, 4), Codebook.affine(8, 4)], ids=["integer", "affine"])
def test_values_are_rounded_once(codebook: Codebook):
    codes, scales = torch.tensor([[1, 2, 130, 255]], dtype=torch.uint8), torch.tensor([[0.1]], dtype=torch.bfloat16)
    offsets = torch.tensor([[-7.7]]).bfloat16() if codebook.offset else None
    exact = codebook.level_table(dtype=torch.float64)[codes.int()] * scales.double()
    exact += 0 if offsets is None else offsets.double()
    quantized = QuantizedTensor(codes, scales, codebook, offsets)
    assert torch.equal(quantized.dequantize().double(), exact)  # float32 holds it
    assert torch.equal(quantized.dequantize(torch.bfloat16), exact.to(torch.bfloat16))


def any_codes(codebook: Codebook) -> QuantizedTensor:
    """Experts `[4, 6, 16]`."""
    codes = torch.randint(0, len(codebook.levels), (4, 6, 16)).to(torch.uint8)
    scales, offsets = torch.randn(2, 4, 6, 4).to(codebook.scale_dtype)
    return QuantizedTensor(codes, scales, codebook, offsets if codebook.offset else None)


@pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS)
def test_a_quantized_tensor_is_cut_and_shaped_as_its_weights(codebook: Codebook):
    q = any_codes(codebook)
    weights = q.dequantize()
    assert torch.equal(q.rows(1, 3).dequantize(), weights[:, 1:3])
    assert torch.equal(q.shaped(2, 12).dequantize(), weights.view(2, 12, 16))
    assert torch.equal(q.map(lambda part: part[2]).dequantize(), weights[2])
    assert (q.offsets is not None) == codebook.offset


@pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_decode_as_the_whole_does(codebook: Codebook, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    q = any_codes(codebook)
    whole = q.dequantize(dtype)
    assert torch.equal(whole, q.dequantize().to(dtype))
    monkeypatch.setattr("gsq.codebook.CHUNK", {"cpu": 80})  # five of 24 rows at once
    assert torch.equal(q.dequantize(dtype), whole)


def test_the_middle_of_the_levels_stays_when_the_scale_changes():
    q = any_codes(Codebook.affine(2, 4, torch.float32))
    middle = (q.codebook.decode(torch.full_like(q.codes, 1), q.scales, q.offsets)
              + q.codebook.decode(torch.full_like(q.codes, 2), q.scales, q.offsets))[..., ::4] / 2  # fmt: skip
    torch.testing.assert_close(q.centers(), middle)
    torch.testing.assert_close(q.offsets_for(middle), q.offsets)
    wider = QuantizedTensor(q.codes, 3 * q.scales, q.codebook)
    wider.offsets = wider.offsets_for(middle)
    torch.testing.assert_close(wider.centers(), middle)


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


def test_rotated_weights_have_no_offsets():
    with pytest.raises(CodebookError, match="a rotated codebook has no offsets"):
        replace(Codebook.tq(2, 32, 64), offset=True)


@pytest.mark.parametrize("bits", [0, 1, 9])
@pytest.mark.parametrize("kind", [Codebook.integer, Codebook.affine], ids=["integer", "affine"])
def test_integer_widths(kind: Callable, bits: int):
    with pytest.raises(CodebookError, match="2 to 8 bits"):
        kind(bits, 64)


@pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS)
def test_description_is_read_back(codebook: Codebook):
    assert Codebook.from_dict(json.loads(json.dumps(codebook.to_dict()))) == codebook


def test_a_description_from_before_there_were_offsets_is_read():
    fields = Codebook.integer(2, 4).to_dict()
    del fields["offset"]
    assert Codebook.from_dict(fields) == Codebook.integer(2, 4)
