"""`gsq.kernels.columns` in Triton: a warp takes some rows of one matrix through all columns of a block.

It works on panels of a few columns, in registers: a panel takes what earlier columns of the block
pass on, one after the other, and then its own columns have their turn. So every weight sees the
operations of the plain version in the same order and with the same rounding (division rounded
correctly, no fused multiply-add), and a column is picked by a sum of which all terms but one are
zero: the same bits. The sizes are fixed, because the loop is bound by instructions: with one warp
to a program barriers cost nothing, and with as many rows as it has threads each row is rounded once.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from gsq.kernels.columns import Levels, spacing, tables

PANEL = 16  # columns in registers at once: more of them make the picking dearer
ROWS = 32  # of a warp: 16 numbers of a panel in each thread
WHOLE = tl.constexpr(8388608.0)  # 2^23, beyond which float32 holds whole numbers only


def propagate(left: Tensor, upper: Tensor, scale: Tensor, offset: Tensor, levels: Levels, count: int) -> Tensor:
    """See `gsq.kernels.columns.propagate`."""
    batch, rows, n = left.shape
    codes = torch.empty(batch, rows, count, dtype=torch.uint8, device=left.device)
    _propagate[_grid(batch, rows)](
        left, upper, scale, offset, codes, *left.stride(), *upper.stride()[:2], rows, n, count,
        *_lookup(levels, left.device), **_options(levels),
    )  # fmt: skip
    return codes


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
    """See `gsq.kernels.columns.descend`."""
    batch, rows, n = gradient.shape
    codes = torch.empty(batch, rows, n, dtype=torch.uint8, device=gradient.device)
    _descend[_grid(batch, rows)](
        gradient, values, hessian, scales, offsets, codes, *gradient.stride(), *values.stride(),
        *hessian.stride()[:2], rows, n, scales.shape[-1], group, first,
        *_lookup(levels, gradient.device), **_options(levels),
    )  # fmt: skip
    return codes


def _grid(batch: int, rows: int) -> tuple[int]:
    return (batch * triton.cdiv(rows, ROWS),)


def _options(levels: Levels) -> dict[str, int | bool]:
    """What the kernels are compiled for; `DEPTH` is the number of steps of the search for a level."""
    depth = 0 if spacing(levels) else _depth(levels)
    return {"ROWS": ROWS, "PANEL": PANEL, "DEPTH": depth, "num_warps": 1, "enable_fp_fusion": False}


def _depth(levels: Levels) -> int:
    return (len(levels) - 1).bit_length()


@lru_cache(maxsize=256)
def _lookup(levels: Levels, device: torch.device) -> tuple[Tensor, Tensor, float, float | None, float]:
    """Levels, bounds between them filled up to `2^depth - 1`, the lowest level, their distance if not 1, the last code.

    Lowest level and distance are those of evenly spaced levels, and not used for others.
    """
    table, bounds = tables(levels, device, torch.float32)
    padding = (1 << _depth(levels)) - len(levels)
    low, step = spacing(levels) or (0.0, 1.0)
    padded = torch.nn.functional.pad(bounds, (0, padding), value=torch.inf)
    return table, padded, float(low), None if step == 1 else float(step), float(len(levels) - 1)


@triton.jit
def _propagate(
    left, upper, scale, offset, codes, left_batch, left_row, left_column, upper_batch, upper_row, rows, n, count,
    table, bounds, low, step, top, ROWS: tl.constexpr, PANEL: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    matrix, row, held = _my_rows(rows, ROWS)
    line = matrix * rows + row
    s, o = tl.load(scale + line, mask=held, other=0.0), tl.load(offset + line, mask=held, other=0.0)
    divisor = _never_zero(s)
    weights = left + matrix * left_batch + row * left_row
    for start in range(0, n, PANEL):
        column = start + tl.arange(0, PANEL)
        inside = column < n
        place = weights[:, None] + column[None, :] * left_column  # in 32 bits, for half the registers
        whole = held[:, None] & inside[None, :]
        panel = tl.load(place, mask=whole, other=0.0)  # [ROWS, PANEL]
        earlier, of_column = weights, upper + matrix * upper_batch
        for _ in range(0, tl.minimum(start, count)):
            error = tl.load(earlier, mask=held, other=0.0)  # [ROWS]
            share = tl.load(of_column + column, mask=inside, other=0.0)  # [PANEL]
            panel -= error[:, None] * share[None, :]
            earlier += left_column
            of_column += upper_row
        for c in range(start, tl.minimum(start + PANEL, count)):
            here = (column == c)[None, :]
            weight = tl.sum(tl.where(here, panel, 0.0), axis=1)
            code = _nearest(tl.div_rn(weight - o, divisor), bounds, low, step, top, DEPTH)
            tl.store(codes + line * count + c, code.to(tl.uint8), mask=held)
            error = tl.div_rn(weight - tl.load(table + code) * s - o, tl.load(of_column + c))
            share = tl.load(of_column + column, mask=inside & (column > c), other=0.0)
            panel = tl.where(here, error[:, None], panel - error[:, None] * share[None, :])
            of_column += upper_row
        tl.store(place, panel, mask=whole)
        tl.debug_barrier()  # other threads read these errors for the next panels


@triton.jit
def _descend(
    gradient, values, hessian, scales, offsets, codes, gradient_batch, gradient_row, gradient_column,
    values_batch, values_row, values_column, hessian_batch, hessian_row, rows, n, groups, group, first,
    table, bounds, low, step, top, ROWS: tl.constexpr, PANEL: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    matrix, row, held = _my_rows(rows, ROWS)
    line = matrix * rows + row
    slopes = gradient + matrix * gradient_batch + row * gradient_row
    olds = values + matrix * values_batch + row * values_row
    for start in range(0, n, PANEL):
        column = start + tl.arange(0, PANEL)
        inside = column < n
        place = slopes[:, None] + column[None, :] * gradient_column  # in 32 bits, for half the registers
        whole = held[:, None] & inside[None, :]
        panel = tl.load(place, mask=whole, other=0.0)  # [ROWS, PANEL]
        earlier, of_column = slopes, hessian + matrix * hessian_batch
        for _ in range(0, start):
            move = tl.load(earlier, mask=held, other=0.0)  # [ROWS]
            share = tl.load(of_column + column, mask=inside, other=0.0)  # [PANEL]
            panel += move[:, None] * share[None, :]
            earlier += gradient_column
            of_column += hessian_row
        for c in range(start, tl.minimum(start + PANEL, n)):
            here = (column == c)[None, :]
            which = line * groups + (first + c) // group
            s, o = tl.load(scales + which, mask=held, other=0.0), tl.load(offsets + which, mask=held, other=0.0)
            old = tl.load(olds, mask=held, other=0.0)
            wanted = tl.div_rn(tl.sum(tl.where(here, panel, 0.0), axis=1), tl.load(of_column + c)) + old
            code = _nearest(tl.div_rn(wanted - o, _never_zero(s)), bounds, low, step, top, DEPTH)
            tl.store(codes + line * n + c, code.to(tl.uint8), mask=held)
            move = old - (tl.load(table + code) * s + o)
            share = tl.load(of_column + column, mask=inside & (column > c), other=0.0)
            panel = tl.where(here, move[:, None], panel + move[:, None] * share[None, :])
            olds += values_column
            of_column += hessian_row
        tl.store(place, panel, mask=whole)
        tl.debug_barrier()  # other threads read these moves for the next panels


@triton.jit
def _my_rows(rows, ROWS: tl.constexpr):
    """The matrix that a program works on, its rows there, int64, and which of them exist."""
    tiles = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    row = (program % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return (program // tiles).to(tl.int64), row, row < rows


@triton.jit
def _nearest(x, bounds, low, step, top, DEPTH: tl.constexpr):
    """Codes int32 of the levels nearest to `x`: a search of `DEPTH` steps in the bounds, or, for 0, by arithmetic."""
    if DEPTH == 0:
        place = x - low
        if step is not None:
            place = tl.div_rn(place, step)
        place = tl.minimum(tl.maximum(place, 0.0), top)
        return ((place + WHOLE) - WHOLE).to(tl.int32)  # a sum so large is rounded, half to even
    code = tl.zeros_like(x).to(tl.int32)
    for bit in tl.static_range(DEPTH):
        half = 1 << (DEPTH - 1 - bit)
        code += tl.where(x > tl.load(bounds + (code + (half - 1))), half, 0)
    return code


@triton.jit
def _never_zero(scale):
    """Scales to divide by: infinity instead of zero."""
    return tl.where(scale == 0, float("inf"), scale)
