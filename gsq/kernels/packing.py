"""Bit packing of codes along the input dimension, least significant bit first, no bit unused.

A row of codes is one stream of bits. `pack_bytes` stores it as bytes, as TQ and MLX checkpoints do;
`pack_dense` as int32 words, 32 codes of `bits` bits in `bits` words, as Humming checkpoints and
GSQ's own run directory do: the same bytes, since words are little-endian.
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
    octets = codes.contiguous().view(-1).view(torch.int64)  # eight codes, one in each byte
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
