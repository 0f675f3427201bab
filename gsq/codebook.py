"""What a low-bit weight format stores: codes into a short list of levels, and one scale per group.

A weight group of `group_size` neighbours along the input dimension is `scale * levels[code]`.
Every format that GSQ writes differs only in `levels`, in `group_size` and in how codes are packed,
so initialization and refinement are written once, against this file. It knows tensors and
nothing else: no model, no file, no config.

Shapes, with `...` an optional batch of experts: weights and codes `[..., out, in]`,
scales `[..., out, groups]`, where `groups = in / group_size`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

SCALE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class CodebookError(ValueError):
    """A codebook that cannot exist, or that does not fit a tensor. The message says what would."""


@dataclass(frozen=True)
class Codebook:
    """`levels` ascending, at most 256 of them; scales are stored in `scale_dtype` and may be negative."""

    levels: tuple[float, ...]
    group_size: int
    scale_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if not 2 <= len(self.levels) <= 256:
            raise CodebookError(f"a codebook has 2 to 256 levels, not {len(self.levels)}")
        if list(self.levels) != sorted(set(self.levels)):
            raise CodebookError(f"levels must ascend without repeats, got {self.levels}")
        if self.group_size < 1:
            raise CodebookError(f"group size must be positive, got {self.group_size}")

    @classmethod
    def integer(cls, bits: int, group_size: int, scale_dtype: torch.dtype = torch.bfloat16) -> Codebook:
        """Symmetric integers in two's complement: 2 bits are {-2, -1, 0, 1}."""
        if not 2 <= bits <= 8:
            raise CodebookError(f"integer codebooks have 2 to 8 bits, not {bits}")
        half = 1 << (bits - 1)
        return cls(tuple(float(level) for level in range(-half, half)), group_size, scale_dtype)

    @classmethod
    def ternary(cls, group_size: int, scale_dtype: torch.dtype = torch.bfloat16) -> Codebook:
        """{-1, 0, 1}, stored in 2 bits."""
        return cls((-1.0, 0.0, 1.0), group_size, scale_dtype)

    @cached_property
    def bits(self) -> int:
        """Bits that a packed code takes."""
        return (len(self.levels) - 1).bit_length()

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk per weight, scales included."""
        return self.bits + 8 * self.scale_dtype.itemsize / self.group_size

    def groups(self, in_features: int) -> int:
        """Number of scale groups of a row; raises `CodebookError` if the group size does not divide it."""
        if in_features % self.group_size:
            fitting = [size for size in (256, 128, 64, 32, 16) if in_features % size == 0]
            advice = f"use {' or '.join(map(str, fitting))}" if fitting else "keep this tensor unquantized"
            raise CodebookError(f"group size {self.group_size} does not divide in_features {in_features}; {advice}")
        return in_features // self.group_size

    def level_table(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """Levels as a tensor `[K]`."""
        return torch.tensor(self.levels, device=device, dtype=dtype)

    def nearest(self, x: Tensor) -> Tensor:
        """Code (uint8) of the level nearest to each `x`, a weight divided by its scale. Any shape."""
        low, high = self.levels[0], self.levels[-1]
        step = (high - low) / (len(self.levels) - 1)
        if all(level == low + i * step for i, level in enumerate(self.levels)):
            return ((x - low) / step).round_().clamp_(0, len(self.levels) - 1).to(torch.uint8)
        table = self.level_table(x.device, x.dtype)
        return torch.bucketize(x, (table[1:] + table[:-1]) / 2).to(torch.uint8)

    def expand(self, scales: Tensor) -> Tensor:
        """Scales `[..., out, groups]` repeated to one per weight `[..., out, in]`."""
        return scales.repeat_interleave(self.group_size, dim=-1)

    def encode(self, weights: Tensor, scales: Tensor) -> Tensor:
        """Codes `[..., out, in]` of the levels nearest to `weights` under `scales` `[..., out, groups]`.

        A zero scale can express only zero, whatever the code; it takes the code of the level next to zero.
        """
        per_weight = self.expand(scales.to(weights.dtype))
        ratio = torch.where(per_weight == 0, 0, weights / torch.where(per_weight == 0, 1, per_weight))
        return self.nearest(ratio)

    def decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Weights `[..., out, in]` that `codes` and `scales` stand for; the product is taken in float32."""
        levels = self.level_table(codes.device)[codes.int()]
        return levels.mul_(self.expand(scales.float())).to(dtype)

    def to_dict(self) -> dict:
        """JSON description; `from_dict` reads it back."""
        name = next(name for name, dtype in SCALE_DTYPES.items() if dtype == self.scale_dtype)
        return {"levels": list(self.levels), "group_size": self.group_size, "scale_dtype": name}

    @classmethod
    def from_dict(cls, fields: dict) -> Codebook:
        """The codebook that `to_dict` described."""
        return cls(tuple(fields["levels"]), fields["group_size"], SCALE_DTYPES[fields["scale_dtype"]])


@dataclass
class QuantizedTensor:
    """One quantized target: `codes` uint8 `[..., out, in]`, `scales` in the codebook's dtype `[..., out, groups]`."""

    codes: Tensor
    scales: Tensor
    codebook: Codebook

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights `[..., out, in]` that a server computes with."""
        return self.codebook.decode(self.codes, self.scales, dtype)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same on another device."""
        return QuantizedTensor(self.codes.to(device), self.scales.to(device), self.codebook)
