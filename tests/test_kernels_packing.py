"""Packing kernels against NumPy's bits, and against their plain version, whatever the width."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hopper import compiled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gsq.kernels import packing
from gsq.kernels.packing import pack_bytes, pack_dense, pack_words, unpack_bytes, unpack_dense, unpack_words

on_kernels = settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


def draw(bits: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def stream(codes: Tensor, bits: int) -> np.ndarray:
    """Bytes `[..., in * bits / 8]` of one stream of bits per row, least significant bit first."""
    ones = (codes.numpy()[..., None] >> np.arange(bits)) & 1
    return np.packbits(ones.reshape(*codes.shape[:-1], codes.shape[-1] * bits), -1, "little")


def plain(run: Callable[[Tensor, int], Tensor], tensor: Tensor, bits: int) -> Tensor:
    """What `run` gives without Triton."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "triton_runs", lambda *tensors: False)
        return run(tensor, bits)


@on_kernels
@given(st.integers(1, 8), st.integers(0, 3), st.integers(1, 700), st.integers(0, 99))
def test_a_stream_is_that_of_the_plain_version(kernels: torch.device, bits: int, rows: int, octets: int, seed: int):
    codes = draw(bits, 2, rows, 8 * octets, seed=seed)
    packed = pack_bytes(codes.to(kernels), bits)
    assert (packed.dtype, packed.shape) == (torch.uint8, (2, rows, octets * bits))
    assert np.array_equal(packed.cpu().numpy(), stream(codes, bits))
    assert torch.equal(packed.cpu(), plain(pack_bytes, codes, bits))
    assert torch.equal(unpack_bytes(packed, bits).cpu(), codes)
    assert torch.equal(plain(unpack_bytes, packed.cpu(), bits), codes)


@on_kernels
@given(st.integers(1, 8), st.integers(0, 3), st.integers(1, 600), st.integers(0, 99))
def test_whole_words_are_those_of_the_plain_version(kernels: torch.device, bits: int, rows: int, count: int, seed: int):
    codes = draw(bits, 2, rows, count * (32 // bits), seed=seed)
    words = pack_words(codes.to(kernels), bits)
    assert (words.dtype, words.shape) == (torch.uint32, (2, rows, count))
    assert torch.equal(words.cpu(), plain(pack_words, codes, bits))
    assert torch.equal(unpack_words(words, bits).cpu(), codes)
    assert torch.equal(plain(unpack_words, words.cpu(), bits), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_all_bits_set(kernels: torch.device, bits: int):
    codes = torch.full((3, 1120), (1 << bits) - 1, dtype=torch.uint8, device=kernels)
    packed = pack_dense(codes, bits)
    assert packed.dtype == torch.int32
    assert (packed == -1).all()
    assert torch.equal(unpack_dense(packed, bits), codes)
    codes = codes[:, : 1120 // (32 // bits) * (32 // bits)]
    words = pack_words(codes, bits)
    assert (words.cpu().long() == (1 << 32 // bits * bits) - 1).all()
    assert torch.equal(unpack_words(words, bits), codes)


@pytest.mark.parametrize("bits", [3, 4])
def test_any_part_of_a_tensor_is_packed_and_unpacked(kernels: torch.device, bits: int):
    codes = draw(bits, 5, 203).to(kernels)[1:, 3:]  # rows of 200, not contiguous
    assert torch.equal(pack_bytes(codes, bits), pack_bytes(codes.clone(), bits))
    shifted = draw(bits, 1 + 96).to(kernels)[1:]  # contiguous, but no int64 starts where it does
    packed = pack_bytes(shifted, bits)
    assert torch.equal(unpack_bytes(torch.cat([packed[:1], packed])[1:], bits), shifted)


def test_codes_must_fit(kernels: torch.device):
    for pack, bits in ((pack_bytes, 3), (pack_words, 3), (pack_words, 4)):
        codes = torch.zeros(2, 160, dtype=torch.uint8, device=kernels)
        codes[1, 7] = 17
        with pytest.raises(ValueError, match=f"code 17 does not fit in {bits} bits"):
            pack(codes, bits)
        with pytest.raises(ValueError, match=r"uint8, got torch\.int64"):
            pack(codes.long(), bits)


@pytest.mark.skipif(torch.cuda.is_available(), reason="all other tests compile the kernels")
def test_the_kernels_compile(tmp_path: Path):
    body = """
import torch
from gsq.kernels.packing import pack_bytes, pack_words, unpack_bytes, unpack_words
pack_bytes(torch.zeros(1, 32, dtype=torch.uint8), 3)
unpack_bytes(torch.zeros(1, 4 * 7, dtype=torch.uint8), 7)
pack_words(torch.zeros(1, 30, dtype=torch.uint8), 3)
unpack_words(torch.zeros(1, 3, dtype=torch.int32).view(torch.uint32), 3)
"""
    assert compiled(body, tmp_path) == ["_pack_dense", "_unpack_dense", "_pack_words", "_unpack_words"]
