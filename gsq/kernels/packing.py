"""Bit packing of codes along the input dimension, least significant bit first.

`pack_dense` leaves no bit unused: 32 codes of `bits` bits fill `bits` int32 words, and a code may
straddle two words. It is the rule of Humming checkpoints and of GSQ's own run directory.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32


def pack_dense(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 `[..., in]`, each below `2**bits`, to int32 words `[..., in * bits / 32]`.

    Raises `ValueError` if `in` is not a multiple of 32 or a code needs more than `bits` bits.
    """
    if codes.shape[-1] % WORD:
        raise ValueError(f"packing needs a multiple of {WORD} codes in a row, got {codes.shape[-1]}")
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit in {bits} bits")
    blocks = codes.unflatten(-1, (-1, WORD))
    words = torch.zeros(*blocks.shape[:-1], bits, dtype=torch.int64, device=codes.device)
    for position in range(WORD):
        word, shift = divmod(position * bits, WORD)
        code = blocks[..., position].to(torch.int64) << shift
        words[..., word] |= code & 0xFFFFFFFF
        if shift + bits > WORD:  # the high part of a straddling code opens the next word
            words[..., word + 1] |= code >> WORD
    return _to_int32(words).flatten(-2)


def unpack_dense(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_dense`: int32 words `[..., in * bits / 32]` to codes uint8 `[..., in]`."""
    if words.shape[-1] % bits:
        raise ValueError(f"{words.shape[-1]} words are no whole number of {bits}-bit blocks")
    blocks = words.unflatten(-1, (-1, bits)).to(torch.int64) & 0xFFFFFFFF
    codes = torch.empty(*blocks.shape[:-1], WORD, dtype=torch.uint8, device=words.device)
    for position in range(WORD):
        word, shift = divmod(position * bits, WORD)
        code = blocks[..., word] >> shift
        if shift + bits > WORD:
            code = code | (blocks[..., word + 1] << (WORD - shift))
        codes[..., position] = (code & ((1 << bits) - 1)).to(torch.uint8)
    return codes.flatten(-2)


def _to_int32(words: Tensor) -> Tensor:
    """Unsigned 32-bit values held in int64, reinterpreted as int32."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
