"""Bit packing of codes along the input dimension, least significant bit first.

A row of codes is one stream of bits, none unused. `pack_bytes` stores it as bytes, as TQ and MLX
checkpoints do; `pack_dense` as int32 words, 32 codes of `bits` bits in `bits` words, as Humming
checkpoints and GSQ's own run directory do: the same bytes, since words are little-endian.

`pack_words`, for JANGTQ checkpoints, lets no code straddle two words: `32 // bits` codes a word,
and the bits that are left at its high end are zero.

Triton takes whole groups of 32 codes; the last few of a tensor, and on a CPU all, are left to the
plain version.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsq.kernels.dispatch import triton_runs

WORD = 32
OCTET = 8  # codes packed together: they fill `bits` whole bytes
CHUNK = 1 << 15  # octets worked on at once, so that little memory is needed beside the result


def pack_dense(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 `[..., in]`, each below `2**bits`, to int32 words `[..., in * bits / 32]`.

    Raises `ValueError` if `in` is not a multiple of 32 or a code needs more than `bits` bits.
    """
    if codes.shape[-1] % WORD:
        raise ValueError(f"packing needs a multiple of {WORD} codes in a row, got {codes.shape[-1]}")
    return pack_bytes(codes, bits).view(torch.int32)


def unpack_dense(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_dense`: int32 words `[..., in * bits / 32]` to codes uint8 `[..., in]`."""
    if words.shape[-1] % bits:
        raise ValueError(f"{words.shape[-1]} words are no whole number of {bits}-bit blocks")
    return unpack_bytes(words.contiguous().view(torch.uint8), bits)


def pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 `[..., in]`, each below `2**bits`, to uint8 `[..., in * bits / 8]`.

    Raises `ValueError` if `in` is not a multiple of 8 or a code needs more than `bits` bits.
    """
    if codes.shape[-1] % OCTET:
        raise ValueError(f"packing needs a multiple of {OCTET} codes in a row, got {codes.shape[-1]}")
    _check(codes, bits)
    octets = _aligned(codes, OCTET).view(-1).view(torch.int64)  # eight codes, one in each byte
    packed = torch.empty(len(octets) * bits, dtype=torch.uint8, device=codes.device)
    done = 0
    if triton_runs(codes):
        from gsq.kernels import packing_triton

        done = _whole(len(octets))
        packing_triton.pack_dense(octets[:done], packed[: done * bits].view(torch.int32), bits)
    _pack(octets[done:], packed[done * bits :].view(-1, bits), bits)
    return packed.view(*codes.shape[:-1], codes.shape[-1] // OCTET * bits)


def unpack_bytes(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_bytes`: uint8 `[..., in * bits / 8]` to codes uint8 `[..., in]`."""
    if packed.shape[-1] % bits:
        raise ValueError(f"{packed.shape[-1]} bytes are no whole number of {bits}-bit blocks")
    stream = packed.contiguous().view(-1)
    octets = torch.empty(len(stream) // bits, dtype=torch.int64, device=packed.device)
    done = 0
    if triton_runs(packed):
        from gsq.kernels import packing_triton

        done = _whole(len(octets))
        words = _aligned(stream[: done * bits], WORD // 8).view(torch.int32)
        packing_triton.unpack_dense(words, octets[:done], bits)
    _unpack(stream[done * bits :].view(-1, bits), octets[done:], bits)
    return octets.view(torch.uint8).view(*packed.shape[:-1], packed.shape[-1] // bits * OCTET)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 `[..., in]`, each below `2**bits`, to uint32 words `[..., in / (32 // bits)]`.

    Raises `ValueError` if `in` is no whole number of words or a code needs more than `bits` bits.
    """
    lanes = WORD // bits
    if codes.shape[-1] % lanes:
        raise ValueError(f"packing needs a multiple of {lanes} codes in a row, got {codes.shape[-1]}")
    if _dense(bits):
        return pack_bytes(codes, bits).view(torch.uint32)
    _check(codes, bits)
    flat = codes.contiguous().view(-1)
    words = torch.empty(len(flat) // lanes, dtype=torch.int32, device=codes.device)
    pack = _pack_words
    if triton_runs(codes):
        from gsq.kernels.packing_triton import pack_words as pack
    pack(flat, words, bits)
    return words.view(torch.uint32).view(*codes.shape[:-1], codes.shape[-1] // lanes)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_words`: uint32 words `[..., n]` to codes uint8 `[..., n * (32 // bits)]`."""
    if _dense(bits):
        return unpack_bytes(words.contiguous().view(torch.uint8), bits)
    lanes = WORD // bits
    flat = words.contiguous().view(torch.int32).view(-1)
    codes = torch.empty(len(flat) * lanes, dtype=torch.uint8, device=words.device)
    unpack = _unpack_words
    if triton_runs(words):
        from gsq.kernels.packing_triton import unpack_words as unpack
    unpack(flat, codes, bits)
    return codes.view(*words.shape[:-1], words.shape[-1] * lanes)


def _pack(octets: Tensor, packed: Tensor, bits: int) -> None:
    """The plain version: octets int64 `[n]` into their bytes `[n, bits]`."""
    for start in range(0, len(octets), CHUNK):
        x = octets[start : start + CHUNK]
        for low, high, shift in _moves(bits):
            x = (x & low) | ((x >> shift) & high)
        packed[start : start + CHUNK] = x.view(torch.uint8).view(-1, OCTET)[:, :bits]


def _unpack(packed: Tensor, octets: Tensor, bits: int) -> None:
    """The plain version: bytes `[n, bits]` into octets int64 `[n]`."""
    for start in range(0, len(octets), CHUNK):
        x = torch.nn.functional.pad(packed[start : start + CHUNK], (0, OCTET - bits)).view(-1).view(torch.int64)
        for low, high, shift in reversed(_moves(bits)):
            x = (x & low) | ((x & high) << shift)
        octets[start : start + CHUNK] = x


def _pack_words(codes: Tensor, words: Tensor, bits: int) -> None:
    """The plain version: codes uint8 `[n * (32 // bits)]` into int32 words `[n]`."""
    grouped = codes.view(-1, WORD // bits)
    words.zero_()
    for lane in range(WORD // bits):
        words |= grouped[:, lane].int() << (lane * bits)


def _unpack_words(words: Tensor, codes: Tensor, bits: int) -> None:
    """The plain version: int32 words `[n]` into codes uint8 `[n * (32 // bits)]`."""
    grouped = codes.view(-1, WORD // bits)
    for lane in range(WORD // bits):
        grouped[:, lane] = (words >> (lane * bits)) & ((1 << bits) - 1)


def _check(codes: Tensor, bits: int) -> None:
    """Raise `ValueError` unless all codes are bytes below `2**bits`."""
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, got {codes.dtype}")
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit in {bits} bits")


def _dense(bits: int) -> bool:
    """Whether words without straddling codes waste nothing, so that they are the dense stream."""
    return WORD % bits == 0 and (WORD // bits) % OCTET == 0


def _whole(octets: int) -> int:
    """As many of the octets as fill whole words at any width, as Triton takes them."""
    return octets // (WORD // OCTET) * (WORD // OCTET)


def _aligned(data: Tensor, size: int) -> Tensor:
    """Contiguous bytes that start where a number of `size` bytes may."""
    data = data.contiguous()
    return data.clone() if data.storage_offset() % size else data


def _moves(bits: int) -> list[tuple[int, int, int]]:
    """Steps that close the gaps between eight codes: neighbours first, then pairs, then fours.

    Each step keeps the bits of mask `low`, and moves others down by `shift`, to where mask `high` is.
    """
    moves = []
    for lane in (8, 16, 32):
        used = bits * lane // 8  # bits in use at the low end of a lane
        low = sum(((1 << used) - 1) << place for place in range(0, 64, 2 * lane))
        moves.append((_signed(low), _signed(low << used), lane - used))
    return moves


def _signed(mask: int) -> int:
    """64 bits as the number that an int64 tensor takes them for."""
    mask &= (1 << 64) - 1
    return mask - (1 << 64) if mask >> 63 else mask
