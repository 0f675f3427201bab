"""What a low-bit weight format stores: codes into a short list of levels, and one scale per group.

A weight group of `group_size` neighbours along the input dimension is `scale * levels[code]`,
perhaps plus an offset, perhaps in a rotated basis. Every format that GSQ writes differs only in
`levels`, `group_size`, `offset`, `rotation` and in how codes are packed, so initialization and
refinement are written once, against this file. It knows tensors and nothing else: no model, no
file, no config.

Shapes, with `...` an optional batch of experts: weights `[..., out, in]`, codes `[..., out, columns]`,
scales and offsets `[..., out, groups]`, where `columns` is `in` (rounded up where a rotation pads) and
`groups = columns / group_size`. "In the codebook's basis" means: rotated, if it has a rotation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from gsq.kernels.columns import levels_of, nearest
from gsq.levels import gaussian_levels, sphere_levels
from gsq.rotation import Rotation

CHUNK = {"cpu": 1 << 19}  # weights decoded at once: small for a CPU's cache, large beside the cost of a call;
ELSEWHERE = 1 << 27  # elsewhere half a gigabyte, of which there are some copies
SCALE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class CodebookError(ValueError):
    """A codebook that cannot exist, or that does not fit a tensor. The message says what would."""


@dataclass(frozen=True)
class Codebook:
    """`levels` ascending, at most 256 of them; scales are stored in `scale_dtype` and may be negative.

    With `offset` every group has one, in the dtype of its scale, added to `scale * level`. Without
    `rotation` levels apply to the weights as they are. A codebook with one fits tensors of its width only.
    """

    levels: tuple[float, ...]
    group_size: int
    scale_dtype: torch.dtype = torch.bfloat16
    rotation: Rotation | None = None
    offset: bool = False

    def __post_init__(self) -> None:
        if not 2 <= len(self.levels) <= 256:
            raise CodebookError(f"a codebook has 2 to 256 levels, not {len(self.levels)}")
        if list(self.levels) != sorted(set(self.levels)):
            raise CodebookError(f"levels must ascend without repeats, got {self.levels}")
        if self.group_size < 1:
            raise CodebookError(f"group size must be positive, got {self.group_size}")
        if self.rotation and self.offset:  # no format has both, and rotated values are scaled last
            raise CodebookError("a rotated codebook has no offsets; drop the rotation or the offset")

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

    @classmethod
    def affine(cls, bits: int, group_size: int, scale_dtype: torch.dtype = torch.bfloat16) -> Codebook:
        """Unsigned integers and an offset per group, as MLX has them."""
        if not 2 <= bits <= 8:
            raise CodebookError(f"affine codebooks have 2 to 8 bits, not {bits}")
        return cls(tuple(float(level) for level in range(1 << bits)), group_size, scale_dtype, offset=True)

    @classmethod
    def lloyd(cls, bits: int, group_size: int, scale_dtype: torch.dtype = torch.bfloat16) -> Codebook:
        """Lloyd-Max levels of a Gaussian, for weights as they are."""
        return cls(gaussian_levels(bits, group_size), group_size, scale_dtype)

    @classmethod
    def tq(cls, bits: int, group_size: int, in_features: int) -> Codebook:
        """TQ native: every group rotated by itself, Lloyd-Max levels of a Gaussian, a float32 norm per group."""
        _check_block(group_size, in_features)
        rotation = Rotation("tq", in_features, group_size)
        return cls(gaussian_levels(bits, group_size), group_size, torch.float32, rotation)

    @classmethod
    def jangtq(cls, bits: int, in_features: int) -> Codebook:
        """JANGTQ: whole rows rotated, Lloyd-Max levels of a point on the unit sphere, a float16 norm per row."""
        rotation = Rotation("jangtq", in_features, in_features)
        return cls(sphere_levels(bits, in_features), in_features, torch.float16, rotation)

    @cached_property
    def bits(self) -> int:
        """Bits that a packed code takes."""
        return (len(self.levels) - 1).bit_length()

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk per stored code, scales and offsets included."""
        return self.bits + (1 + self.offset) * 8 * self.scale_dtype.itemsize / self.group_size

    @property
    def center(self) -> float:
        """Where scale and offset do not depend on each other: the middle of the levels; 0 without an offset."""
        return (self.levels[0] + self.levels[-1]) / 2 if self.offset else 0.0

    def columns(self, in_features: int) -> int:
        """Codes in a row of `in_features` weights."""
        return self.rotation.columns if self.rotation else in_features

    def groups(self, columns: int) -> int:
        """Number of scale groups of a row; raises `CodebookError` if the group size does not divide it."""
        if columns % self.group_size:
            fitting = [size for size in (256, 128, 64, 32, 16) if columns % size == 0]
            advice = f"use {' or '.join(map(str, fitting))}" if fitting else "keep this tensor unquantized"
            raise CodebookError(f"group size {self.group_size} does not divide in_features {columns}; {advice}")
        return columns // self.group_size

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes on disk of a weight `[..., out, in]` at exact width, scales and padding included."""
        return round(math.prod(shape[:-1]) * self.columns(shape[-1]) * self.bits_per_weight / 8)

    def level_table(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """Levels as a tensor `[K]`, which must not be changed."""
        return _level_table(self.levels, torch.device(device), dtype)

    def nearest(self, x: Tensor) -> Tensor:
        """Code (uint8) of the level nearest to each `x`, a weight divided by its scale. Any shape."""
        return nearest(x, self.levels)

    def rotate(self, weights: Tensor) -> Tensor:
        """Weights `[..., in]` in the codebook's basis, `[..., columns]`."""
        return weights if self.rotation is None else self.rotation.rotate(weights)

    def unrotate(self, values: Tensor) -> Tensor:
        """Back from the codebook's basis."""
        return values if self.rotation is None else self.rotation.unrotate(values)

    def rotate_moments(self, hessian: Tensor) -> Tensor:
        """Second moments `[..., in, in]` of inputs in the codebook's basis, `[..., columns, columns]`."""
        return hessian if self.rotation is None else self.rotation.rotate_moments(hessian)

    def expand(self, scales: Tensor) -> Tensor:
        """Scales `[..., out, groups]` repeated to one per weight `[..., out, in]`."""
        return scales.repeat_interleave(self.group_size, dim=-1)

    def encode(self, weights: Tensor, scales: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Codes `[..., out, in]` of the levels nearest to `weights` under `scales`, `offsets` `[..., out, groups]`.

        A zero scale can express only its offset, whatever the code; it takes the code of the level next to zero.
        """
        per_weight = self.expand(scales.to(weights.dtype))
        if offsets is not None:
            weights = weights - self.expand(offsets.to(weights.dtype))
        ratio = torch.where(per_weight == 0, 0, weights / torch.where(per_weight == 0, 1, per_weight))
        return self.nearest(ratio)

    def decode(self, codes: Tensor, scales: Tensor, offsets: Tensor | None = None) -> Tensor:
        """What codes, scales and offsets stand for in the codebook's basis; computed in float32."""
        values = levels_of(codes, self.level_table(codes.device))
        groups = values.unflatten(-1, (-1, self.group_size)).mul_(scales.float()[..., None])
        if offsets is not None:
            groups.add_(offsets.float()[..., None])
        return values

    def to_dict(self) -> dict:
        """JSON description; `from_dict` reads it back."""
        name = next(name for name, dtype in SCALE_DTYPES.items() if dtype == self.scale_dtype)
        rotation = self.rotation and {"kind": self.rotation.kind, "width": self.rotation.width}
        return {
            "levels": list(self.levels), "group_size": self.group_size, "scale_dtype": name, "rotation": rotation,
            "offset": self.offset,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, fields: dict) -> Codebook:
        """The codebook that `to_dict` described."""
        rotation = fields.get("rotation") and Rotation(**fields["rotation"], block=fields["group_size"])
        dtype, offset = SCALE_DTYPES[fields["scale_dtype"]], fields.get("offset", False)
        return cls(tuple(fields["levels"]), fields["group_size"], dtype, rotation, offset)


def _check_block(size: int, in_features: int) -> None:
    near = max(2, 1 << (size.bit_length() - 1))
    if size & (size - 1) or size < 2:
        raise CodebookError(f"a rotated group's size must be a power of two, not {size}; use {near} or {2 * near}")
    if size > 2 * in_features:
        raise CodebookError(f"group size {size} would be mostly padding of rows of {in_features}; use a smaller one")


@lru_cache(maxsize=256)
def _level_table(levels: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(levels, device=device, dtype=dtype)


@dataclass
class QuantizedTensor:
    """One quantized target: `codes` uint8 `[..., out, columns]`, `scales` `[..., out, groups]` as they are stored.

    `offsets`, of the shape and dtype of the scales, belong to codebooks with an offset.
    """

    codes: Tensor
    scales: Tensor
    codebook: Codebook
    offsets: Tensor | None = None

    def values(self) -> Tensor:
        """What it stands for in the codebook's basis, `[..., out, columns]`, float32."""
        return self.codebook.decode(self.codes, self.scales, self.offsets)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights `[..., out, in]` that a server computes with, in its order of operations.

        Computed in float32, some rows at a time, so that little is held beside the result.
        """
        rows, rotation = self.shaped(-1), self.codebook.rotation
        width = rotation.width if rotation else self.codes.shape[-1]
        result = torch.empty(len(rows.codes), width, dtype=dtype, device=self.codes.device)
        step = max(1, CHUNK.get(self.codes.device.type, ELSEWHERE) // self.codes.shape[-1])
        for start in range(0, len(result), step):
            part = rows.rows(start, start + step)
            result[start : start + step] = part._dequantized()
        return result.view(*self.codes.shape[:-1], width)

    def _dequantized(self) -> Tensor:
        codebook = self.codebook
        if codebook.rotation is None or codebook.rotation.scales_first:
            return codebook.unrotate(self.values())
        units = codebook.unrotate(levels_of(self.codes, codebook.level_table(self.codes.device)))
        return units.mul_(codebook.expand(self.scales.float())[..., : codebook.rotation.width])

    def centers(self) -> Tensor:
        """What the middle of the levels stands for, `[..., out, groups]`, float32: offsets as they are optimized."""
        return self.scales.float() * self.codebook.center + self.offsets.float()

    def offsets_for(self, centers: Tensor) -> Tensor:
        """Stored offsets that, under these scales, put the middle of the levels at `centers`."""
        return (centers - self.scales.float() * self.codebook.center).to(self.codebook.scale_dtype)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Codes, scales and, if there are any, offsets."""
        return (self.codes, self.scales) if self.offsets is None else (self.codes, self.scales, self.offsets)

    @classmethod
    def stacked(cls, parts: Sequence[QuantizedTensor], dim: int = -2) -> QuantizedTensor:
        """The rows (or along another `dim`, the matrices) of all `parts`, which share a codebook."""
        codes, scales, *offsets = (
            torch.cat(tensors, dim=dim) for tensors in zip(*(p.tensors for p in parts), strict=True)
        )
        return cls(codes, scales, parts[0].codebook, *offsets)

    def map(self, change: Callable[[Tensor], Tensor]) -> QuantizedTensor:
        """`change` applied to codes, scales and offsets."""
        offsets = None if self.offsets is None else change(self.offsets)
        return QuantizedTensor(change(self.codes), change(self.scales), self.codebook, offsets)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same on another device."""
        return self.map(lambda t: t.to(device))

    def shaped(self, *rows: int) -> QuantizedTensor:
        """The same with other dimensions in front of the last one, `[*rows, columns]`."""
        return self.map(lambda t: t.reshape(*rows, t.shape[-1]))

    def rows(self, start: int, end: int) -> QuantizedTensor:
        """Rows `start .. end` of every matrix."""
        return self.map(lambda t: t[..., start:end, :])
