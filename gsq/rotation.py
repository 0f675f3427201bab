"""Orthogonal changes of basis along a weight's input dimension: signs, Hadamard blocks, signs.

After a random rotation the weights of a group look like draws of one known distribution, for which
one fixed table of levels is the best. `y = R x` multiplies by signs, transforms blocks by
Walsh-Hadamard, and perhaps multiplies by signs again; `R^T` undoes it exactly but for rounding.
Readers of TQ and JANGTQ checkpoints compute the signs and the order of operations that are written
here, and each kind rounds as its reader does.

Sources: TurboQuant, https://arxiv.org/abs/2504.19874; `turboquant_vllm.torch_ops` (kind `tq`) and
`jang_tools.turboquant.rotation` (kind `jangtq`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gsq.kernels.hadamard import DTYPES, hadamard

SEED = 42  # of the signs, in both formats


@dataclass(frozen=True)
class Rotation:
    """Rows of `width` weights, rotated in Hadamard blocks.

    `tq`: equal blocks of `block`, the row padded with zeros to a whole number of them; signs before
    and after, the same for every block. `jangtq`: the row as one block, or, if `width` is no power of
    two, as its descending powers of two (`block` is the row); signs before only.
    """

    kind: Literal["tq", "jangtq"]
    width: int
    block: int

    @cached_property
    def blocks(self) -> list[int]:
        """Sizes of the blocks, in order; all powers of two."""
        if self.kind == "tq":
            return [self.block] * -(-self.width // self.block)
        return [1 << bit for bit in reversed(range(self.width.bit_length())) if self.width >> bit & 1]

    @property
    def scales_first(self) -> bool:
        """Whether the format's reader scales before it rotates back, or after."""
        return self.kind == "jangtq"

    @property
    def columns(self) -> int:
        """Width of a rotated row, padding included."""
        return sum(self.blocks)

    def of_group(self) -> Rotation:
        """The rotation of a single block of `tq`, which all blocks share."""
        return Rotation(self.kind, self.block, self.block)

    def rotate(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """`x` `[..., width]` in the new basis, `[..., columns]` in `dtype`; the arithmetic is float32."""
        before, after = _signs(self, x.device)
        return self._transform(x, before, after, self.width, self.columns, dtype)

    def unrotate(self, y: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Back from `y` `[..., columns]` to `[..., width]` in `dtype`; what was padded is dropped."""
        before, after = _signs(self, y.device)
        return self._transform(y, after, before, self.columns, self.width, dtype)

    def rotate_moments(self, h: Tensor) -> Tensor:
        """`R H R^T` `[..., columns, columns]` of a symmetric `h` `[..., width, width]`.

        Padded inputs are always zero, so errors there cost nothing; a small ridge stands for that.
        """
        whole, padding = Rotation(self.kind, self.columns, self.block), self.columns - self.width
        turned = torch.empty(*h.shape[:-2], self.columns, self.columns, device=h.device)
        matrices = zip(h.reshape(-1, *h.shape[-2:]), turned.view(-1, *turned.shape[-2:]), strict=True)
        for source, target in matrices:  # one by one, for memory's sake
            padded = torch.nn.functional.pad(source, (0, padding, 0, padding))
            padded.diagonal()[self.width :] = 0.01 * source.diagonal().mean()
            both = whole.rotate(whole.rotate(padded).mT)
            torch.add(both, both.mT, out=target).div_(2)  # rounding must not leave it lopsided
        return turned

    def _transform(
        self, x: Tensor, before: Tensor | None, after: Tensor | None, width: int, columns: int, dtype: torch.dtype
    ) -> Tensor:
        """Orthogonal Hadamard transform of every block of `x` `[..., width]`, between signs, cut to `columns`."""
        if x.shape[-1] != width:
            raise ValueError(f"a rotation of rows of {width} does not take rows of {x.shape[-1]}")
        x = x if x.dtype in DTYPES else x.float()
        out = torch.empty(*x.shape[:-1], columns, dtype=dtype, device=x.device)
        divides, start = self.kind == "tq", 0
        for size, block in self._runs:
            run, first = slice(start, start + size), slice(start, start + block)
            hadamard(
                x[..., run],
                block,
                None if before is None else before[first],
                None if after is None else after[first],
                factor=1.0 if divides else 1.0 / block**0.5,
                divisor=math.sqrt(block) if divides else 1.0,
                out=out[..., run],
            )
            start += size
        return out

    @property
    def _runs(self) -> list[tuple[int, int]]:
        """Parts of a row that are transformed alike: their width, and the size of their blocks."""
        return [(self.columns, self.block)] if self.kind == "tq" else [(size, size) for size in self.blocks]

    @cached_property
    def signs(self) -> tuple[Tensor, Tensor | None]:
        """Signs `[columns]` before and after the transform, on the CPU."""
        if self.kind == "jangtq":
            drawn = np.random.default_rng(SEED).choice([-1.0, 1.0], size=self.width)
            return torch.from_numpy(drawn.astype(np.float32)), None
        generator = torch.Generator().manual_seed(SEED)
        draw = lambda: (torch.randint(0, 2, (self.block,), generator=generator) * 2 - 1).float()  # noqa: E731
        before, after = draw(), draw()
        return before.repeat(len(self.blocks)), after.repeat(len(self.blocks))


@lru_cache(maxsize=64)
def _signs(rotation: Rotation, device: torch.device) -> tuple[Tensor, Tensor | None]:
    before, after = rotation.signs
    return before.to(device), None if after is None else after.to(device)
