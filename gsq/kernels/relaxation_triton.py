"""`gsq.kernels.relaxation` in Triton: one kernel forward, one for backward and step.

A program works on `BLOCK` neighbouring weights, held as a tile `[ROWS, BLOCK]` of logits in registers;
`ROWS` is the power of two that holds K, and rows beyond K have no probability. Each logit is read
once per kernel, and nothing of the size of the logits is written but themselves and their momentum.

Sizes are fixed, not tuned: all of it is streaming, bound by memory, and eight weights for each thread are
what a load of 16 bytes brings of a plane of bfloat16. Sums are then always added in the same order, and a
step, which changes what it reads, need not be tried several times on copies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gsq.kernels.relaxation import ROUNDING, Draw

BLOCK = 512
WARPS = 2
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}
DRAWN = ["first", "seed", "stream", "step"]  # numbers that change all the time are no reason to compile again
_ROUNDING = tl.constexpr(ROUNDING)


def soften(logits: Tensor, draw: Draw, dtype: torch.dtype) -> Tensor:
    """Soft weights `[N]` in `dtype`."""
    count, size = logits.shape
    weights = torch.empty(size, dtype=dtype, device=logits.device)
    _soften_kernel[_grid(size)](logits, weights, size, *_arguments(draw), **_constants(draw, count), **OPTIONS)
    return weights


def lion_step(
    logits: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    draw: Draw,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Step in place; gradients of log-scales and offsets `[groups]`, float32."""
    count, size = logits.shape
    tile = _tile(draw.group)
    sums = torch.empty(2, len(draw.scales), draw.group // tile, device=logits.device)
    _lion_kernel[_grid(size)](
        logits, momentum, gradient, *sums, size, 1.0 - lr * weight_decay, float(lr), 1.0 - betas[0], 1.0 - betas[1],
        *_arguments(draw), **_constants(draw, count), TILE=tile, **OPTIONS,
    )  # fmt: skip
    by_scale, by_offset = sums.sum(-1)
    return by_scale, by_offset


def _grid(size: int) -> tuple[int]:
    return (-(-size // BLOCK),)


def _tile(group: int) -> int:
    """Neighbours whose gradients a kernel adds up: all in one group, and in one block."""
    return min(group & -group, BLOCK)


def _arguments(draw: Draw) -> tuple:
    """What `_expected` reads of a draw, in the kernels' order."""
    amplitude = draw.amplitude / draw.tau
    return (draw.levels, draw.window, draw.scales, draw.sharpness, amplitude, draw.first, *draw.noise)


def _constants(draw: Draw, count: int) -> dict[str, int | bool]:
    """What the kernels are compiled for."""
    rows = 1 << (count - 1).bit_length()
    return {"GROUP": draw.group, "NOISE": draw.amplitude != 0, "K": count, "ROWS": rows, "BLOCK": BLOCK}


@triton.jit(do_not_specialize=DRAWN)
def _soften_kernel(
    logits, weights, size, levels, window, scales, sharpness, amplitude, first, seed, stream, step,
    GROUP: tl.constexpr, NOISE: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    weight = start + tl.arange(0, BLOCK)
    inside = weight < size
    k = tl.arange(0, ROWS)[:, None]
    here = k.to(tl.int64) * size + weight[None, :]
    x = tl.load(logits + here, mask=(k < K) & inside[None, :], other=0.0).to(tl.float32)
    noise = (first, seed, stream, step)
    _, _, mean = _expected(x, k, weight, inside, levels, window, sharpness, amplitude, noise, NOISE, K, ROWS)
    scale = _by_group(scales, start, inside, GROUP, BLOCK)
    tl.store(weights + weight, (mean * scale).to(weights.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=DRAWN)
def _lion_kernel(
    logits, momentum, gradient, scale_sums, offset_sums, size, kept, lr, share, momentum_share,
    levels, window, scales, sharpness, amplitude, first, seed, stream, step,
    GROUP: tl.constexpr, NOISE: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """`kept` is what weight decay leaves; `share` and `momentum_share` are 1 - beta: the weights of the gradient."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    weight = start + tl.arange(0, BLOCK)
    inside = weight < size
    k = tl.arange(0, ROWS)[:, None]
    here = k.to(tl.int64) * size + weight[None, :]
    held = (k < K) & inside[None, :]
    x = tl.load(logits + here, mask=held, other=0.0).to(tl.float32)
    m = tl.load(momentum + here, mask=held, other=0.0).to(tl.float32)
    dw = tl.load(gradient + weight, mask=inside, other=0.0).to(tl.float32)
    noise = (first, seed, stream, step)
    p, level, mean = _expected(x, k, weight, inside, levels, window, sharpness, amplitude, noise, NOISE, K, ROWS)
    outer = dw * _by_group(scales, start, inside, GROUP, BLOCK)
    _store_sums(scale_sums, outer * mean, start, size, BLOCK, TILE)
    _store_sums(offset_sums, dw, start, size, BLOCK, TILE)
    toward = p * (level - mean[None, :]) * (outer * sharpness)[None, :] - m
    update = m + toward * share
    x = x * kept - tl.where(update > 0, lr, 0.0) + tl.where(update < 0, lr, 0.0)
    tl.store(momentum + here, (m + toward * momentum_share).to(momentum.dtype.element_ty), mask=held)
    if logits.dtype.element_ty == tl.bfloat16:
        x = _rounded(x, k, weight, noise)
    tl.store(logits + here, x.to(logits.dtype.element_ty), mask=held)


@triton.jit
def _expected(
    x, k, weight, inside, levels, window, sharpness, amplitude, noise,
    NOISE: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Probabilities and levels `[ROWS, BLOCK]` (or levels `[ROWS, 1]`), and the mean level `[BLOCK]`."""
    z = x * sharpness
    if NOISE:
        z += amplitude * _gumbel(k, weight, noise, ROWS)
    z = tl.where(k < K, z, float("-inf"))
    p = tl.exp(z - tl.max(z, axis=0)[None, :])
    if window is None:
        level = tl.load(levels + k, mask=k < K, other=0.0)
    else:
        lowest = tl.load(window + weight, mask=inside, other=0).to(tl.int32)
        # Levels of one weight are neighbours in memory, but threads must lie along the weights as in all else.
        place = tl.max_contiguous(lowest[None, :] + k, [1, 1])
        level = tl.load(levels + place, mask=(k < K) & inside[None, :], other=0.0)
    norm = 1.0 / tl.sum(p, axis=0)
    return p * norm[None, :], level, tl.sum(p * level, axis=0) * norm


@triton.jit
def _by_group(values, start, inside, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The value of each weight's group; its number is a division of 64 bits once, and of 32 bits for the rest."""
    place = (start % GROUP).to(tl.int32) + tl.arange(0, BLOCK)
    return tl.load(values + start // GROUP + place // GROUP, mask=inside, other=0.0)


@triton.jit
def _store_sums(sums, x, start, size, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Sum `x` `[BLOCK]` over tiles of neighbours."""
    tile = start // TILE + tl.arange(0, BLOCK // TILE)
    tl.store(sums + tile, tl.sum(tl.reshape(x, [BLOCK // TILE, TILE]), axis=1), mask=tile * TILE < size)


@triton.jit
def _gumbel(k, weight, noise, ROWS: tl.constexpr):
    """Noise `[ROWS, BLOCK]`."""
    a, b, c, d = random_words(weight[None, :], noise, 0)
    word = _pick(k, a, b, c, d)
    if ROWS > 4:
        a, b, c, d = random_words(weight[None, :], noise, 1)
        word = tl.where(k < 4, word, _pick(k - 4, a, b, c, d))
    uniform = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2**-23
    return -tl.log(-tl.log(uniform))


@triton.jit
def _rounded(x, k, weight, noise):
    """Float32 that bfloat16 holds, up or down by chance; what is not a number stays so."""
    a, b, c, d = random_words(weight[None, :], noise, _ROUNDING)
    bits = (_pick(k // 2, a, b, c, d) >> (k % 2 * 16).to(tl.uint32)) & 0xFFFF
    rounded = (x.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def random_words(weight, noise, NUMBER: tl.constexpr):
    """Block `NUMBER` of four random uint32 of each weight: the counters of `gsq.kernels.relaxation.philox`."""
    first, seed, stream, step = noise
    weight += first
    high = (weight >> 32).to(tl.uint32) << 20
    return tl.philox(seed, weight.to(tl.uint32), step.to(tl.uint32) ^ high, stream.to(tl.uint32), NUMBER)


@triton.jit
def _pick(k, a, b, c, d):
    """The k-th of four; k is known to the compiler for every register, so nothing is left of this."""
    return tl.where(k == 0, a, tl.where(k == 1, b, tl.where(k == 2, c, d)))
