"""`gsq.kernels.packed` in Triton: one kernel, which decodes a tile in registers and multiplies on tensor cores.

Codes are read in windows: as many as fit 32 bits, a power of two of them, so that 3-bit codes come
eight at a time, from two neighbouring words if need be. A window is loaded once and spread to its
codes in the registers of the thread that loaded it, by interleaving it with its shifted self until
every element starts with a code of its own; a scale is spread in the same way.

Few rows of x are padded to a tile: what they cost is reading and decoding the weight, whatever multiplies.
Where there are too few tiles to fill a GPU, several programs share the columns of each, and their
float32 parts are added in a fixed order.

With experts the grid is as large as any distribution of the rows may need, so that the host need not
know it; programs find their expert from `ends`, and those without work return at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from gsq.kernels.packed import PackedWeight
from gsq.kernels.packing import WORD

PROGRAMS = 512  # a few for each multiprocessor of a large GPU
NOMINAL = 64  # rows of the weight that a program is taken to have, where programs are counted
SHORTEST = 512  # columns that are worth a program
LOWEST, HIGHEST = 16, 128  # rows of x in a tile
LARGEST_TILE = 1 << 14  # numbers of x in it: 32 KiB in each stage of the pipeline
INTERPRETED = tl.constexpr(knobs.runtime.interpret)
TWO_23 = tl.constexpr(8388608.0)  # from here on, the last bits of a float32 count its ones
TWO_23_BITS = tl.constexpr(0x4B000000)

CONFIGS = [
    triton.Config({"BLOCK_N": block_n, "BLOCK_K": block_k}, num_warps=warps, num_stages=stages)
    for block_n, block_k, warps, stages in ((64, 128, 4, 3), (32, 256, 4, 3), (128, 64, 8, 3))
]
if INTERPRETED.value:  # nothing is timed
    del CONFIGS[1:]


def packed_matmul(x: Tensor, weight: PackedWeight) -> Tensor:
    """`gsq.kernels.packed.packed_matmul` behind its checks."""
    return _product(x, None, weight)


def packed_grouped_matmul(x: Tensor, ends: Tensor, weight: PackedWeight) -> Tensor:
    """`gsq.kernels.packed.packed_grouped_matmul` behind its checks."""
    return _product(x, ends, weight)


def _product(x: Tensor, ends: Tensor | None, weight: PackedWeight) -> Tensor:
    """All rows of `x` times their expert, or times the only weight if `ends` is None."""
    rows, columns = x.shape
    *stack, out, groups = weight.scales.shape
    experts = stack[0] if stack else 1
    if not rows or not out or not experts:
        return x.new_zeros(rows, out)
    height = _tile_height(rows, experts)
    slots = triton.cdiv(rows, height) if ends is None else rows // height + experts
    splits = _splits(min(rows, slots) * triton.cdiv(out, NOMINAL), columns)
    new = torch.empty if ends is None else torch.zeros  # rows of no expert stay zero
    y = new(splits, rows, out, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    words = weight.words.view(torch.int32)
    table = weight.table if weight.first_integer is None else None
    codes = _window_codes(weight.bits, weight.group_size)
    with torch.cuda.device_of(x):
        _kernel[lambda meta: (slots * triton.cdiv(out, meta["BLOCK_N"]), splits)](
            x, words, weight.scales, weight.offsets, table, ends, y,
            rows, out, columns, words.shape[-1], groups, experts, slots,
            BITS=weight.bits, DOUBLINGS=codes.bit_length() - 1, FIRST=weight.first_integer or 0,
            WINDOWS_PER_GROUP=weight.group_size // codes, EXPERTS=triton.next_power_of_2(experts), BLOCK_M=height,
            enable_fp_fusion=False,  # product and offset are rounded one after the other, as everywhere else
        )  # fmt: skip
    return y[0] if splits == 1 else y.sum(0).to(x.dtype)


def _tile_height(rows: int, experts: int) -> int:
    """Rows of x that a program takes: as many as an expert has on average, within limits."""
    return min(max(triton.next_power_of_2(triton.cdiv(rows, experts)), LOWEST), HIGHEST)


def _splits(tiles: int, columns: int) -> int:
    """Programs that share the columns of a tile, of which there are `tiles`."""
    return max(1, min(PROGRAMS // tiles, columns // SHORTEST))


def _window_codes(bits: int, group_size: int) -> int:
    """Codes in a window: the largest power of two that fits a word and divides a group."""
    fitting = 1 << ((WORD // bits).bit_length() - 1)
    return min(fitting, group_size & -group_size)


@triton.jit
def _decode(
    words, scales, offsets, table, rows, wanted, window, columns, row_words, groups,
    BITS: tl.constexpr, DOUBLINGS: tl.constexpr, FIRST: tl.constexpr, WINDOWS_PER_GROUP: tl.constexpr,
):  # fmt: skip
    """Weights float32 `[n, w * codes]` of `rows` int64 `[n]` in windows `window` int32 `[w]`.

    Zero where a row is not `wanted` `[n]`, and behind the last column.
    """
    CODES: tl.constexpr = 1 << DOUBLINGS
    SPAN: tl.constexpr = CODES * BITS
    mask = wanted[:, None] & (window * CODES < columns)[None, :]
    stream = words + rows[:, None] * row_words
    if SPAN == 32:
        bits = tl.load(stream + window[None, :], mask=mask, other=0).to(tl.uint32, bitcast=True)
    else:
        word = (window * SPAN // 32)[None, :]
        shift = (window * SPAN % 32)[None, :]
        low = tl.load(stream + word, mask=mask, other=0).to(tl.uint32, bitcast=True)
        bits = low >> shift.to(tl.uint32)
        if 32 % SPAN != 0:
            straddles = mask & (shift + SPAN > 32)
            high = tl.load(stream + word + 1, mask=straddles, other=0).to(tl.uint32, bitcast=True)
            bits |= high << ((32 - shift) % 32).to(tl.uint32)  # a shift of zero never straddles
    place = rows[:, None] * groups + (window // WINDOWS_PER_GROUP)[None, :]
    scale = tl.load(scales + place, mask=mask, other=0).to(tl.float32)
    for i in tl.static_range(DOUBLINGS):
        bits = tl.interleave(bits, bits >> (BITS * (CODES >> (i + 1))))
        scale = tl.interleave(scale, scale)
    codes = bits & ((1 << BITS) - 1)
    if table is None:
        levels = (codes | TWO_23_BITS).to(tl.float32, bitcast=True) - (TWO_23 - FIRST)
    else:
        entries = tl.load(table + tl.arange(0, 1 << BITS))
        flat = tl.reshape(codes.to(tl.int32), [codes.numel])
        levels = tl.reshape(tl.gather(entries, flat, 0), codes.shape)
    values = levels * scale
    if offsets is not None:
        offset = tl.load(offsets + place, mask=mask, other=0).to(tl.float32)
        for _ in tl.static_range(DOUBLINGS):
            offset = tl.interleave(offset, offset)
        values += offset
    return values


def _fitting(configs: list[triton.Config], arguments: dict, BLOCK_M: int, **meta: int) -> list[triton.Config]:
    """Configs whose tiles of x leave shared memory for a pipeline."""
    return [config for config in configs if BLOCK_M * config.kwargs["BLOCK_K"] <= LARGEST_TILE]


@triton.autotune(
    CONFIGS,
    key=["out", "columns", "groups", "experts", "BITS", "BLOCK_M"],
    prune_configs_by={"early_config_prune": _fitting},
)
@triton.jit(do_not_specialize=["rows", "slots"])
def _kernel(
    x, words, scales, offsets, table, ends, y,
    rows, out, columns, row_words, groups, experts, slots,
    BITS: tl.constexpr, DOUBLINGS: tl.constexpr, FIRST: tl.constexpr, WINDOWS_PER_GROUP: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`y` `[splits, rows, out]`: a tile of x times `BLOCK_N` rows of its expert, over this program's columns.

    An expert's slots begin at `start // BLOCK_M + e`, where `start` is its first row: that ascends, and
    leaves enough for each, however the rows are distributed.
    """
    slot = (tl.program_id(0) % slots).to(tl.int64)
    n = ((tl.program_id(0) // slots) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    if ends is None:
        row, end, weight_rows = slot * BLOCK_M, rows, n
    else:
        index = tl.arange(0, EXPERTS)
        starts = tl.load(ends + index - 1, mask=(index > 0) & (index < experts), other=0).to(tl.int64)
        begun = (index < experts) & (starts // BLOCK_M + index <= slot)
        expert = tl.sum(begun.to(tl.int32), 0) - 1
        start = tl.load(ends + expert - 1, mask=expert > 0, other=0).to(tl.int64)
        end = tl.load(ends + expert).to(tl.int64)
        row = start + (slot - start // BLOCK_M - expert) * BLOCK_M
        if row >= end:
            return
        weight_rows = expert.to(tl.int64) * out + n
    m = row + tl.arange(0, BLOCK_M)
    share = tl.cdiv(tl.cdiv(columns, BLOCK_K), tl.num_programs(1))
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, tl.cdiv(columns, BLOCK_K))
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(first, last):
        window = block * (BLOCK_K >> DOUBLINGS) + tl.arange(0, BLOCK_K >> DOUBLINGS)
        weight = _decode(
            words, scales, offsets, table, weight_rows, n < out, window, columns, row_words, groups,
            BITS, DOUBLINGS, FIRST, WINDOWS_PER_GROUP,
        )  # fmt: skip
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (m < end)[:, None] & (k < columns)[None, :]
        inputs = tl.load(x + m[:, None] * columns + k[None, :], mask=inside, other=0)
        weight = weight.to(inputs.dtype)
        if INTERPRETED:  # its dot takes a bfloat16 for the integer of the same bits
            inputs, weight = inputs.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(inputs, tl.trans(weight), total)
    target = y + (m + tl.program_id(1).to(tl.int64) * rows)[:, None] * out + n[None, :]
    tl.store(target, total.to(y.dtype.element_ty), mask=(m < end)[:, None] & (n < out)[None, :])
