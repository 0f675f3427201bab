"""Packing against an oracle that adds every code into one big Python integer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from gsq.kernels.packing import pack_dense, pack_words, unpack_dense, unpack_words


def oracle(row: list[int], bits: int) -> list[int]:
    """Signed 32-bit words of one row: code i lies at bit `i * bits` of a little-endian integer."""
    stream = sum(code << (position * bits) for position, code in enumerate(row))
    unsigned = [stream >> (32 * word) & 0xFFFFFFFF for word in range(len(row) * bits // 32)]
    return [word - (1 << 32) if word >> 31 else word for word in unsigned]


@st.composite
def coded(draw: DrawFn) -> tuple[Tensor, int]:
    """Random codes `[out, in]` and their width."""
    bits = draw(st.integers(1, 8))
    rows, blocks = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    code = st.integers(0, 2**bits - 1)
    values = draw(st.lists(code, min_size=rows * blocks * 32, max_size=rows * blocks * 32))
    return torch.tensor(values, dtype=torch.uint8).reshape(rows, blocks * 32), bits


@settings(deadline=None, max_examples=60)
@given(coded())
def test_packing_matches_the_oracle_and_unpacks(case: tuple[Tensor, int]):
    codes, bits = case
    words = pack_dense(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (codes.shape[0], codes.shape[1] * bits // 32)
    assert words.tolist() == [oracle(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_dense(words, bits), codes)


def aligned(row: list[int], bits: int) -> list[int]:
    """Unsigned words of one row when no code straddles two: each word is a little integer of its own."""
    lanes = 32 // bits
    words = [row[start : start + lanes] for start in range(0, len(row), lanes)]
    return [sum(code << (lane * bits) for lane, code in enumerate(word)) for word in words]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(0, 3), st.integers(1, 4), st.integers(0, 2**16))
def test_whole_words_match_their_oracle_and_unpack(bits: int, rows: int, count: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2, rows, count * (32 // bits)), dtype=torch.uint8, generator=generator)
    words = pack_words(codes, bits)
    assert (words.dtype, words.shape) == (torch.uint32, (2, rows, count))
    assert words.tolist() == [[aligned(row, bits) for row in batch] for batch in codes.tolist()]
    assert torch.equal(unpack_words(words, bits), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_extreme_codes_at_every_width(bits: int):
    codes = torch.tensor([[0, 2**bits - 1] * 32, [2**bits - 1] * 64], dtype=torch.uint8)
    assert pack_dense(codes, bits).tolist() == [oracle(row, bits) for row in codes.tolist()]


def test_a_batch_of_experts_is_packed_row_by_row():
    codes = torch.randint(0, 8, (3, 5, 64), dtype=torch.uint8)
    words = pack_dense(codes, 3)
    assert words.shape == (3, 5, 6)
    assert torch.equal(words[1], pack_dense(codes[1], 3))
    assert torch.equal(unpack_dense(words, 3), codes)


def test_rows_must_be_whole_blocks():
    with pytest.raises(ValueError, match="multiple of 32"):
        pack_dense(torch.zeros(1, 33, dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="multiple of 10"):
        pack_words(torch.zeros(1, 32, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="whole number"):
        unpack_dense(torch.zeros(1, 4, dtype=torch.int32), 3)


def test_codes_must_fit():
    with pytest.raises(ValueError, match="code 4 does not fit in 2 bits"):
        pack_dense(torch.full((1, 32), 4, dtype=torch.uint8), 2)
    for bits in (2, 3):
        with pytest.raises(ValueError, match=f"code 9 does not fit in {bits} bits"):
            pack_words(torch.full((1, 160), 9, dtype=torch.uint8), bits)
