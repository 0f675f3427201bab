"""The Walsh-Hadamard transform on a GPU: one read and one write, the butterfly in registers.

Bit for bit the plain version: the same sums and differences in the same order (strides 1, 2, 4, ...),
no fused multiply-add, division rounded correctly; only results that are stored in 16 bits multiply
by the reciprocal of the divisor instead.

A warp holds whole blocks as far as it can, because what is exchanged inside a warp costs neither
shared memory nor barriers that others wait for. That is why programs are small, and go on to another tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1 << 10  # numbers of a program whose blocks are small: 32 in each thread of its one warp
WARP = 1 << 11  # numbers of a large block that a warp can hold
PROGRAMS = 1 << 15  # beyond so many, a program works on several tiles


def transform(
    x: Tensor, out: Tensor, block: int, before: Tensor | None, after: Tensor | None, factor: float, divisor: float
) -> None:
    """Rows `x` `[n, in]` into `out` `[n, columns]`; see `gsq.kernels.hadamard`."""
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    before, after = (signs if signs is None else signs.contiguous() for signs in (before, after))
    blocks, rows = -(-out.shape[-1] // block), max(1, TILE // block)
    if divisor != 1 and out.dtype != torch.float32:
        factor, divisor = factor / divisor, 1.0
    ragged = x.shape[-1] != blocks * block or out.shape[-1] != blocks * block
    tiles = triton.cdiv(len(x), rows)
    if not tiles:
        return
    _transform[min(tiles, PROGRAMS), blocks](
        x, out, before, after, tiles, len(x), x.stride(0), out.stride(0), x.shape[-1], out.shape[-1],
        float(factor), None if divisor == 1 else float(divisor),
        SIZE=block, POWER=block.bit_length() - 1, ROWS=rows, RAGGED=ragged,
        num_warps=max(1, block // WARP), enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tiles", "rows"])
def _transform(
    x_ptr, out_ptr, before_ptr, after_ptr, tiles, rows, x_stride, out_stride, x_width, out_width, factor, divisor,
    SIZE: tl.constexpr, POWER: tl.constexpr, ROWS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One block of each of `ROWS` rows at a time; axis 1 of the grid is the block's place in the row."""
    place = tl.arange(0, SIZE)
    column = tl.program_id(1) * SIZE + place
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tl.arange(0, ROWS).to(tl.int64) + tile * ROWS
        given = (row < rows)[:, None]
        wanted = given
        if RAGGED:
            given = given & (column < x_width)[None, :]
            wanted = wanted & (column < out_width)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=given, other=0.0).to(tl.float32)
        if before_ptr is not None:
            x = x * tl.load(before_ptr + place)[None, :]
        x = tl.reshape(_butterfly(x, SIZE, POWER, ROWS), (ROWS, SIZE)) * factor
        if divisor is not None:
            x = tl.div_rn(x, divisor)
        if after_ptr is not None:
            x = x * tl.load(after_ptr + place)[None, :]
        tl.store(out_ptr + row[:, None] * out_stride + column[None, :], x.to(out_ptr.dtype.element_ty), mask=wanted)


@triton.jit
def _butterfly(x, SIZE: tl.constexpr, POWER: tl.constexpr, ROWS: tl.constexpr):
    """`x` `[ROWS, SIZE]` transformed along its rows, in whatever shape the last stride leaves it."""
    for i in tl.static_range(POWER):
        x = tl.reshape(x, (ROWS * (SIZE >> (i + 1)), 2, 1 << i))
        first, second = tl.split(tl.permute(x, (0, 2, 1)))
        x = tl.permute(tl.join(first + second, first - second), (0, 2, 1))
    return x
