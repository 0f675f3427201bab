"""Column after column of a quantized matrix, where each passes on to those behind it what it did not hit.

Both loops of the init have this form. `propagate` is that of GPTQ (Frantar et al.,
https://arxiv.org/abs/2210.17323), `descend` one pass of cyclic coordinate descent on
`tr((W - Q) H (W - Q)^T)`. They take a block of columns at a time. What a column passes on takes its
place in the block, so that one matrix product spreads it over all columns behind the block.

Blocks are `[batch, rows, n]`, float32, and may be columns of something wider, or transposed. Levels
are plain numbers, ascending. This is the plain PyTorch version; it turns a block around, so that a
CPU reads and writes long runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gsq.kernels.dispatch import triton_runs

LEVELS = 256  # at most: codes have 8 bits
SPAN = 1 << 31  # from one end of a block's row to the other, at most: a kernel counts it in 32 bits
COUNTED = 15  # bounds between levels that are compared one by one
Levels = tuple[float, ...]


def propagate(left: Tensor, upper: Tensor, scale: Tensor, offset: Tensor, levels: Levels, count: int) -> Tensor:
    """Codes uint8 `[batch, rows, count]` of the first columns of `left` `[batch, rows, n]`, which share a group.

    `upper` `[batch, n, n]` is the block's part of the upper triangular `U` with `inverse(H) = U^T U`;
    `scale` and `offset` are `[batch, rows]`. In place, column `c` of those becomes its error
    `(w - q) / U_cc`, and every column behind it loses `error * U_c`. Under a zero scale, the code is
    the one nearest to 0. Raises `ValueError` for tensors that a kernel does not take.
    """
    batch, rows, n = _block_shape(left, "left", levels)
    if not 0 < count <= n:
        raise ValueError(f"propagate quantizes 1 to {n} columns of a block of {n}, not {count}")
    _check(upper, "upper", (batch, n, n), contiguous=1)
    _check(scale, "scale", (batch, rows), contiguous=2)
    _check(offset, "offset", (batch, rows), contiguous=2)
    if triton_runs(left, upper, scale, offset):
        from gsq.kernels import columns_triton

        return columns_triton.propagate(left, upper, scale, offset, levels, count)
    return _propagate(left, upper, scale, offset, levels, count)


def descend(
    gradient: Tensor,
    values: Tensor,
    hessian: Tensor,
    scales: Tensor,
    offsets: Tensor,
    levels: Levels,
    group: int,
    first: int,
) -> Tensor:
    """Codes uint8 `[batch, rows, n]` of a block, each the best one given all other codes as they are then.

    `gradient` `[batch, rows, n]` is the block's part of `(W - Q) H`, `values` that of `Q`, `hessian`
    `[batch, n, n]` that of `H`. `scales` and `offsets` `[batch, rows, groups]` are of whole rows, in
    which `group` columns share one, and the block begins at column `first`. In place, column `c` of
    `gradient` becomes its move (old value minus new), and every column behind it gains `move * H_c`.
    Under a zero scale, the code is the one nearest to 0. Raises `ValueError` for tensors that a
    kernel does not take.
    """
    batch, rows, n = _block_shape(gradient, "gradient", levels)
    _check(values, "values", (batch, rows, n))
    _check(hessian, "hessian", (batch, n, n), contiguous=1)
    groups = scales.shape[-1]
    if not 0 <= first <= first + n <= group * groups:
        raise ValueError(f"columns {first} to {first + n} do not lie in {groups} groups of {group}")
    _check(scales, "scales", (batch, rows, groups), contiguous=3)
    _check(offsets, "offsets", (batch, rows, groups), contiguous=3)
    if triton_runs(gradient, values, hessian, scales, offsets):
        from gsq.kernels import columns_triton

        return columns_triton.descend(gradient, values, hessian, scales, offsets, levels, group, first)
    return _descend(gradient, values, hessian, scales, offsets, levels, group, first)


def nearest(x: Tensor, levels: Levels) -> Tensor:
    """Code (uint8) of the level nearest to each `x`, of any shape.

    Halfway between two evenly spaced levels, the even code is taken; between others, the lower one.
    """
    even = spacing(levels)
    if even:
        low, step = even
        return ((x - low) / step).round_().clamp_(0, len(levels) - 1).to(torch.uint8)
    bounds = tables(levels, x.device, x.dtype)[1]
    if x.device.type != "cpu" or len(bounds) > COUNTED:
        return torch.bucketize(x, bounds).to(torch.uint8)
    code, above = torch.zeros_like(x), torch.empty_like(x)
    for bound in bounds.tolist():  # on a CPU faster than a search, and numbers are compared faster into their like
        code.add_(torch.gt(x, bound, out=above))
    return code.to(torch.uint8)


@lru_cache(maxsize=256)
def spacing(levels: Levels) -> tuple[float, float] | None:
    """The lowest level and the distance from each to the next; None if that differs."""
    low, step = levels[0], (levels[-1] - levels[0]) / (len(levels) - 1)
    return (low, step) if all(level == low + i * step for i, level in enumerate(levels)) else None


@lru_cache(maxsize=256)
def tables(levels: Levels, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Levels `[K]` and the bounds between them `[K - 1]`, which must not be changed."""
    table = torch.tensor(levels, device=device, dtype=dtype)
    return table, (table[1:] + table[:-1]) / 2


def levels_of(codes: Tensor, table: Tensor) -> Tensor:
    """Those of `table` `[K]` that `codes`, of any shape, name; on a CPU four times as fast as indexing."""
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


def _propagate(left: Tensor, upper: Tensor, scale: Tensor, offset: Tensor, levels: Levels, count: int) -> Tensor:
    block, factor = _turned(left), upper.permute(1, 2, 0)[..., None]  # [n, batch, rows], [n, n, batch, 1]
    table, _ = tables(levels, left.device, left.dtype)
    codes = torch.empty(count, *scale.shape, dtype=torch.uint8, device=left.device)
    divisor, spread = _never_zero(scale), torch.empty_like(block)
    for c in range(count):
        weight, behind = block[c], block[c + 1 :]
        codes[c] = nearest((weight - offset) / divisor, levels)
        weight.sub_(levels_of(codes[c], table).mul_(scale)).sub_(offset).div_(factor[c, c])
        behind.sub_(torch.mul(factor[c, c + 1 :], weight, out=spread[c + 1 :]))
    left.copy_(block.permute(1, 2, 0))
    return codes.permute(1, 2, 0)


def _descend(
    gradient: Tensor,
    values: Tensor,
    hessian: Tensor,
    scales: Tensor,
    offsets: Tensor,
    levels: Levels,
    group: int,
    first: int,
) -> Tensor:
    block, old, factor = _turned(gradient), _turned(values), hessian.permute(1, 2, 0)[..., None]
    table, _ = tables(levels, gradient.device, gradient.dtype)
    codes = torch.empty(block.shape, dtype=torch.uint8, device=gradient.device)
    spread = torch.empty_like(block)
    for c in range(len(block)):
        scale, offset = (t[..., (first + c) // group] for t in (scales, offsets))
        move, behind = block[c], block[c + 1 :]
        wanted = move.div_(factor[c, c]).add_(old[c])
        codes[c] = nearest(wanted.sub_(offset).div_(_never_zero(scale)), levels)
        torch.sub(old[c], levels_of(codes[c], table).mul_(scale).add_(offset), out=move)
        behind.add_(torch.mul(factor[c, c + 1 :], move, out=spread[c + 1 :]))
    gradient.copy_(block.permute(1, 2, 0))
    return codes.permute(1, 2, 0)


def _turned(block: Tensor) -> Tensor:
    """A block `[batch, rows, n]` as contiguous `[n, batch, rows]`."""
    return block.permute(2, 0, 1).contiguous()


def _never_zero(scale: Tensor) -> Tensor:
    """Scales to divide by: infinity instead of zero."""
    return torch.where(scale == 0, torch.inf, scale)


def _block_shape(block: Tensor, name: str, levels: Levels) -> torch.Size:
    """Shape of a block, if kernels take it and the levels; else a `ValueError`."""
    if not 2 <= len(levels) <= LEVELS:
        raise ValueError(f"codes of 8 bits tell 2 to {LEVELS} levels apart, not {len(levels)}; use a shorter codebook")
    if block.ndim != 3:
        raise ValueError(f"{name} is a batch of blocks [batch, rows, n], not {list(block.shape)}; add dimensions of 1")
    _check(block, name, block.shape)
    if block.shape[-1] * block.stride(-1) >= SPAN:
        raise ValueError(
            f"the columns of {name} lie too far apart (strides {block.stride()}); pass {name}.contiguous()"
        )
    return block.shape


def _check(tensor: Tensor, name: str, shape: Sequence[int], contiguous: int = 0) -> None:
    """A `ValueError` unless `tensor` is float32, of this shape, and its last so many dimensions are contiguous."""
    if tensor.dtype != torch.float32:
        raise ValueError(f"{name} must be float32, not {tensor.dtype}; pass {name}.float()")
    if list(tensor.shape) != list(shape):
        raise ValueError(f"{name} must be {list(shape)}, not {list(tensor.shape)}")
    if contiguous and not tensor[(0,) * (tensor.ndim - contiguous)].is_contiguous():
        raise ValueError(f"{name} has gaps between neighbours (strides {tensor.stride()}); pass {name}.contiguous()")
