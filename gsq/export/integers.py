"""Symmetric integers in densely packed words and one scale per group, which several formats store alike.

A weight is `(code - 2**(bits - 1)) * scale`: codes in int32 words `[out, in * bits / 32]`, scales
in bfloat16 `[out, in / group]`. It knows no names and no config: those are what the formats differ in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gsq.codebook import Codebook, CodebookError, QuantizedTensor
from gsq.errors import UserError
from gsq.export.base import PackedTensor, PlanEntry
from gsq.kernels.packing import WORD, pack_dense, unpack_dense
from gsq.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class Setting:
    """How a module is quantized: bits of a stored code, weights that share a scale."""

    bits: int
    group_size: int

    def codebook(self) -> Codebook:
        """What a reader decodes with."""
        return Codebook.integer(self.bits, self.group_size)

    def __str__(self) -> str:
        return f"uint{self.bits} g{self.group_size}"


def integer_bits(levels: tuple[float, ...]) -> int | None:
    """Fewest bits (2 to 8) whose two's complement integers include all `levels`; None if there are none."""
    if any(level != int(level) for level in levels):
        return None
    return next((b for b in range(2, 9) if -(1 << (b - 1)) <= min(levels) and max(levels) < 1 << (b - 1)), None)


def integer_setting(entry: PlanEntry, format: str) -> Setting:
    """The narrowest setting that holds a planned codebook; raises `UserError` if there is none."""
    codebook, in_features = entry.codebook, entry.shape[-1]
    bits = integer_bits(codebook.levels)
    problem = None
    if codebook.rotation:
        problem = "holds no rotated weights; use an integer codebook"
    elif codebook.offset:
        problem = "holds no offsets; use an integer codebook"
    elif bits is None:
        problem = f"holds integer levels between -128 and 127, not {codebook.levels}; use an integer codebook"
    elif codebook.scale_dtype != torch.bfloat16:
        problem = f"stores bfloat16 scales, not {codebook.scale_dtype}; set the scale dtype to bfloat16"
    elif in_features % WORD:
        problem = f"packs rows of a multiple of {WORD}, and this one has {in_features}; keep this tensor unquantized"
    if problem:
        raise UserError(f"{entry.name}: format {format} {problem}")
    try:
        codebook.groups(in_features)
    except CodebookError as error:
        raise UserError(f"{entry.name}: {error}") from None
    return Setting(bits, codebook.group_size)


def pack_levels(quantized: QuantizedTensor, bits: int) -> Tensor:
    """int32 words `[out, in * bits / 32]` of a Linear; ternary {-1, 0, 1} takes the two-bit codes 1 to 3."""
    stored = torch.tensor([int(level) + (1 << (bits - 1)) for level in quantized.codebook.levels], dtype=torch.uint8)
    return pack_dense(stored.to(quantized.codes.device)[quantized.codes.int()], bits)


def integer_bytes(entry: PlanEntry, setting: Setting) -> int:
    """Bytes of words and scales of a planned tensor."""
    *rows, columns = entry.shape
    scales = columns // setting.group_size * entry.codebook.scale_dtype.itemsize
    return math.prod(rows) * (columns * setting.bits // 8 + scales)


def packed_integers(checkpoint: Checkpoint, setting: Setting, words: str, scales: str, *others: str) -> PackedTensor:
    """The Linear in tensors of these names, of which `others` are not read; raises `UserError` if they do not fit."""
    rows, width = checkpoint.tensors[words].shape
    shape = (rows, width * WORD // setting.bits)
    found = checkpoint.tensors.get(scales)
    if found is None or found.shape != (rows, shape[1] // setting.group_size):
        raise UserError(f"{words} needs scales for {setting}, but has {found and found.shape}; export again")
    decode = partial(_decode, checkpoint, setting, words, scales)
    return PackedTensor(shape, (words, scales, *others), str(setting), decode, codebook=setting.codebook())


def _decode(checkpoint: Checkpoint, setting: Setting, words: str, scales: str, part: int | None) -> Tensor:
    """bfloat16 weights `[out, in]`, or row `part`.

    Integer level times bfloat16 scale has at most 16 significant bits, so the float32 product is
    exact, and rounding it to bfloat16 is the only rounding there is; for 2 bits, whose levels are
    powers of two or zero, there is none.
    """
    codes = unpack_dense(checkpoint.read(words, part), setting.bits)
    return setting.codebook().decode(codes, checkpoint.read(scales, part)).to(torch.bfloat16)
