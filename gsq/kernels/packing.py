"""Bit packing of codes along the input dimension, least significant bit first.

A row of codes is one stream of bits, none unused. `pack_bytes` stores it as bytes, as TQ and MLX
checkpoints do; `pack_dense` as int32 words, 32 codes of `bits` bits in `bits` words, as Humming
checkpoints and GSQ's own run directory do: the same bytes, since words are little-endian.

`pack_words`, for JANGTQ checkpoints, lets no code straddle two words: `32 // bits` codes a word,
and the bits that are left at its high end are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit in {bits} bits")
    octets = _aligned(codes).view(-1).view(torch.int64)  # eight codes, one in each byte
    packed = torch.empty(len(octets), bits, dtype=torch.uint8, device=codes.device)
    for start in range(0, len(octets), CHUNK):
        x = octets[start : start + CHUNK]
        for low, high, shift in _moves(bits):
            x = (x & low) | ((x >> shift) & high)
        packed[start : start + CHUNK] = x.view(torch.uint8).view(-1, OCTET)[:, :bits]
    return packed.view(*codes.shape[:-1], codes.shape[-1] // OCTET * bits)


def unpack_bytes(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_bytes`: uint8 `[..., in * bits / 8]` to codes uint8 `[..., in]`."""
    if packed.shape[-1] % bits:
        raise ValueError(f"{packed.shape[-1]} bytes are no whole number of {bits}-bit blocks")
    blocks = packed.contiguous().view(-1, bits)
    codes = torch.empty(len(blocks), OCTET, dtype=torch.uint8, device=packed.device)
    for start in range(0, len(blocks), CHUNK):
        octets = torch.nn.functional.pad(blocks[start : start + CHUNK], (0, OCTET - bits))
        x = octets.view(-1).view(torch.int64)
        for low, high, shift in reversed(_moves(bits)):
            x = (x & low) | ((x & high) << shift)
        codes[start : start + CHUNK] = x.view(torch.uint8).view(-1, OCTET)
    return codes.view(*packed.shape[:-1], packed.shape[-1] // bits * OCTET)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 `[..., in]`, each below `2**bits`, to uint32 words `[..., in / (32 // bits)]`.

    Raises `ValueError` if `in` is no whole number of words or a code needs more than `bits` bits.
    """
    lanes = WORD // bits
    if codes.shape[-1] % lanes:
        raise ValueError(f"packing needs a multiple of {lanes} codes in a row, got {codes.shape[-1]}")
    if lanes * bits == WORD and lanes % OCTET == 0:  # nothing is wasted, so this is the dense stream
        return pack_bytes(codes, bits).view(torch.uint32)
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit in {bits} bits")
    grouped = codes.reshape(-1, lanes)
    words = torch.zeros(len(grouped), dtype=torch.int32, device=codes.device)
    for lane in range(lanes):
        words |= grouped[:, lane].int() << (lane * bits)
    return words.view(torch.uint32).view(*codes.shape[:-1], codes.shape[-1] // lanes)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_words`: uint32 words `[..., n]` to codes uint8 `[..., n * (32 // bits)]`."""
    lanes, mask = WORD // bits, (1 << bits) - 1
    flat = words.contiguous().view(torch.int32).view(-1)
    codes = torch.empty(len(flat), lanes, dtype=torch.uint8, device=words.device)
    for lane in range(lanes):
        codes[:, lane] = (flat >> (lane * bits)) & mask
    return codes.view(*words.shape[:-1], words.shape[-1] * lanes)


def _aligned(codes: Tensor) -> Tensor:
    """Contiguous bytes that start where an int64 may."""
    codes = codes.contiguous()
    return codes.clone() if codes.storage_offset() % OCTET else codes


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
