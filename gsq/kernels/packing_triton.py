"""Bit packing on a GPU: every byte is read from memory once and written once.

A program of the dense stream works on groups of 32 codes in `bits` words, so that it begins and ends
at whole words whatever the width. It takes eight codes at once, as an int64, and closes the gaps
between them in three steps (neighbours, pairs, fours); a word is made of the few octets of codes that
its bits come from, and an octet of the few words.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1 << 10  # words, octets or codes of a program, at most
GROUP = 32  # codes that fill whole words


def pack_dense(octets: Tensor, words: Tensor, bits: int) -> None:
    """Octets of codes, int64 `[4 * n]`, into int32 words `[bits * n]`."""
    groups = BLOCK // bits // 4 * 4  # of a program, which begins where a vector may
    span = max((4 * word + 3) // bits - 4 * word // bits + 1 for word in range(bits))
    if len(words):
        grid = (triton.cdiv(len(words), groups * bits),)
        _pack_dense[grid](octets, words, len(words), BITS=bits, SPAN=span, USED=groups * bits, BLOCK=BLOCK)


def unpack_dense(words: Tensor, octets: Tensor, bits: int) -> None:
    """Inverse of `pack_dense`: int32 words `[bits * n]` into octets of codes, int64 `[4 * n]`."""
    span = max(-(-(octet * bits % 4 + bits) // 4) for octet in range(4))
    if len(octets):
        grid = (triton.cdiv(len(octets), BLOCK),)
        _unpack_dense[grid](words, octets, len(octets), BITS=bits, SPAN=span, BLOCK=BLOCK)


def pack_words(codes: Tensor, words: Tensor, bits: int) -> None:
    """Codes uint8 `[n * (32 // bits)]` into int32 words `[n]`, none of which shares a code with another."""
    if len(words):
        _pack_words[(triton.cdiv(len(words), BLOCK),)](codes, words, len(words), BITS=bits, BLOCK=BLOCK)


def unpack_words(words: Tensor, codes: Tensor, bits: int) -> None:
    """Inverse of `pack_words`: int32 words `[n]` into codes uint8 `[n * (32 // bits)]`."""
    used = BLOCK // (32 // bits) // 16 * 16 * (32 // bits)  # codes of a program: whole words, whole vectors
    if len(codes):
        grid = (triton.cdiv(len(codes), used),)
        _unpack_words[grid](words, codes, len(codes), BITS=bits, USED=used, BLOCK=BLOCK)


@triton.jit
def _pack_dense(
    octets_ptr, words_ptr, count,
    BITS: tl.constexpr, SPAN: tl.constexpr, USED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`USED` of the `count` words; a word's bits come from at most `SPAN` octets."""
    begin = tl.program_id(0).to(tl.int64) * USED
    word = tl.arange(0, BLOCK)
    inside = (word < USED) & (begin + word < count)
    first = word * 4 // BITS  # octet in which the word's lowest byte lies
    packed = tl.zeros([BLOCK], tl.int64)
    for i in tl.static_range(SPAN):
        shift = (first + i) * (8 * BITS) - word * 32  # from the word's lowest bit to the octet's
        x = tl.load(octets_ptr + begin // BITS * 4 + first + i, mask=inside & (shift < 32), other=0)
        x = _close(_close(_close(x, BITS, 8), BITS, 16), BITS, 32)
        packed |= tl.where(shift > 0, x << tl.maximum(shift, 0), x >> tl.maximum(-shift, 0))
    tl.store(words_ptr + begin + word, packed.to(tl.int32), mask=inside)


@triton.jit
def _unpack_dense(
    words_ptr, octets_ptr, count, BITS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """`BLOCK` of the `count` octets; the bits of one lie in at most `SPAN` words."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    octet = tl.arange(0, BLOCK)
    inside = begin + octet < count
    byte = octet * BITS
    shift = byte % 4 * 8  # from the first word's lowest bit to the octet's
    x = tl.zeros([BLOCK], tl.int64)
    for i in tl.static_range(SPAN):
        needed = inside & (32 * i < shift + 8 * BITS)
        word = tl.load(words_ptr + begin // 4 * BITS + byte // 4 + i, mask=needed, other=0)
        word = word.to(tl.uint32, bitcast=True).to(tl.int64)
        x |= word >> shift if i == 0 else word << tl.where(needed, 32 * i - shift, 0)
    x = _open(_open(_open(x, BITS, 32), BITS, 16), BITS, 8)
    tl.store(octets_ptr + begin + octet, x, mask=inside)


@triton.jit
def _close(x, BITS: tl.constexpr, LANE: tl.constexpr):
    """The upper of every two lanes of an int64 moves down to where the bits in use of the lower one end."""
    USED: tl.constexpr = BITS * LANE // 8
    LOWER: tl.constexpr = ((1 << USED) - 1) * (((1 << 64) - 1) // ((1 << 2 * LANE) - 1))
    return (x & LOWER) | (((x >> LANE) & LOWER) << USED)


@triton.jit
def _open(x, BITS: tl.constexpr, LANE: tl.constexpr):
    """Undoes `_close`; what lies above the bits in use is dropped."""
    USED: tl.constexpr = BITS * LANE // 8
    LOWER: tl.constexpr = ((1 << USED) - 1) * (((1 << 64) - 1) // ((1 << 2 * LANE) - 1))
    return (x & LOWER) | (((x >> USED) & LOWER) << LANE)


@triton.jit
def _pack_words(codes_ptr, words_ptr, count, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """`BLOCK` of the `count` words."""
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    packed = tl.zeros([BLOCK], tl.int32)
    for lane in tl.static_range(32 // BITS):
        code = tl.load(codes_ptr + word * (32 // BITS) + lane, mask=word < count, other=0)
        packed |= code.to(tl.int32) << (lane * BITS)
    tl.store(words_ptr + word, packed, mask=word < count)


@triton.jit
def _unpack_words(words_ptr, codes_ptr, count, BITS: tl.constexpr, USED: tl.constexpr, BLOCK: tl.constexpr):
    """`USED` of the `count` codes."""
    begin = tl.program_id(0).to(tl.int64) * USED
    code = tl.arange(0, BLOCK)
    inside = (code < USED) & (begin + code < count)
    word = tl.load(words_ptr + begin // (32 // BITS) + code // (32 // BITS), mask=inside, other=0)
    word = word >> (code % (32 // BITS) * BITS)
    tl.store(codes_ptr + begin + code, (word & ((1 << BITS) - 1)).to(tl.uint8), mask=inside)
