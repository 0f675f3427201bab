"""The Gumbel-Softmax relaxation of a quantized weight: forward, and backward fused with the Lion step.

    w = scale * sum_k p_k level_k,   p = softmax((kappa * logits + amplitude * gumbel) / tau)

Weights are flat, `[N]`, with logits `[K, N]` over K levels and one scale per `group` neighbours.
Whatever is drawn is counter-based: the same (seed, stream, step, weight) gives the same number on any
device and in any order, so it is never stored.

Logits may be bfloat16. A step is then often smaller than the distance to the next bfloat16, and
rounding to the nearest would undo it, so logits are rounded up or down by chance, right on average.
Momentum is rounded to the nearest: a step moves it by the share `1 - beta` of its distance from the
gradient, so it stalls within some percent of the gradient, and only the sign of the two counts.

This is the plain PyTorch version, which works through chunks that fit a CPU's cache and keeps what
the backward pass needs, unless that is too much; the Triton version keeps nothing and computes it a second time.

Sources: Jang et al., https://arxiv.org/abs/1611.01144 (Gumbel-Softmax); Chen et al.,
https://arxiv.org/abs/2302.06675 (Lion); Salmon et al., SC 2011 (Philox); Gupta et al.,
https://arxiv.org/abs/1502.02551 (stochastic rounding).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gsq.kernels.dispatch import triton_runs

CHUNK = {"cpu": 1 << 17}  # weights worked on at once: on a CPU they stay in its cache, and threads have enough to do,
ELSEWHERE = 1 << 24  # elsewhere what is computed stays small beside logits and momentum
LANES = 64  # a multiple of all numbers of float32 that a CPU works on at once
MOST = 8  # logits of a weight
TABLE = 256  # levels that a window, of bytes, can point into
FLOAT32 = (torch.float32,)
LOGITS = (torch.float32, torch.bfloat16)
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
PHILOX_ROUNDS = 10
KEPT = 1 << 27  # weights up to which a CPU keeps what the backward pass needs, 4 (K + 1) bytes each
ROUNDING = 1 << 30  # block of draws that round logits, out of reach of the noise
_M0, _M1, _W0, _W1, _MASK = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


@dataclass(frozen=True, eq=False)
class Draw:
    """What the soft weights of one step depend on beside their logits.

    `levels` float32 `[table]` and `window` uint8 `[N]`: logit k of a weight stands for
    `levels[window + k]`, which must be in the table, or for `levels[k]` where `window` is None.
    `scales` float32 `[N / group]`. `noise` is (seed, stream, step), of 64, 32 and 32 bits; `first` is
    the number of the first weight, where these are a part of all that share the stream.

    Raises `ValueError` for tensors of another dtype, shape or layout.
    """

    levels: Tensor
    window: Tensor | None
    scales: Tensor
    group: int
    tau: float
    kappa: float
    amplitude: float
    noise: tuple[int, int, int]
    first: int = 0

    def __post_init__(self) -> None:
        _check("levels", self.levels, (self.levels.numel(),), FLOAT32)
        _check("scales", self.scales, (self.scales.numel(),), FLOAT32)
        if self.group < 1:
            raise ValueError(f"a group has at least one weight, not {self.group}")
        if self.tau <= 0:
            raise ValueError(f"tau must be positive, got {self.tau}; anneal it to a small number, not to 0")
        if self.window is not None:
            _check("window", self.window, (self.size,), (torch.uint8,))
            if len(self.levels) > TABLE:
                raise ValueError(f"a window of bytes points into at most {TABLE} levels, not {len(self.levels)}")

    @property
    def size(self) -> int:
        """Number of weights."""
        return len(self.scales) * self.group

    @property
    def sharpness(self) -> float:
        """How much a softmax argument changes with its logit."""
        return self.kappa / self.tau


@dataclass(frozen=True, eq=False)
class Tape:
    """What the backward pass would otherwise compute once more.

    `slope` `[K, N]` is `p_k (level_k - mean level)`, `weights` `[N]` are the soft weights; both float32.
    """

    slope: Tensor
    weights: Tensor


def soften(logits: Tensor, draw: Draw, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tape | None]:
    """Soft weights `[N]` in `dtype`, and what `lion_step` wants to know of them.

    `logits` `[K, N]` are float32 or bfloat16, and 2 to 8 for each weight. Raises `ValueError` for
    logits that do not fit the draw, and for a `dtype` that is not float32, bfloat16 or float16.
    """
    _check_logits(logits, draw)
    if dtype not in WEIGHTS:
        raise ValueError(f"soft weights are {_names(WEIGHTS)}, not {dtype}")
    if triton_runs(logits, *_tensors(draw)):
        from gsq.kernels import relaxation_triton

        return relaxation_triton.soften(logits, draw, dtype), None
    return _soften(logits, draw, dtype)


def lion_step(
    logits: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    draw: Draw,
    tape: Tape | None,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Backward through `soften` and one Lion step on `logits` and `momentum` `[K, N]`, in place.

    `gradient` `[N]` is dL/dw, `draw` that of the soft weights and `tape` what came with them. Returns the
    gradients of the scales' logarithms and of one offset per group, `sum dL/dw * w` and `sum dL/dw` over
    each group, both float32 `[groups]`. Raises `ValueError` for tensors that do not fit.
    """
    _check_logits(logits, draw)
    _check("momentum", momentum, logits.shape, LOGITS)
    _check("gradient", gradient, (draw.size,), WEIGHTS)
    if triton_runs(logits, momentum, gradient, *_tensors(draw)):
        from gsq.kernels import relaxation_triton

        return relaxation_triton.lion_step(logits, momentum, gradient, draw, lr, weight_decay, betas)
    return _lion_step(logits, momentum, gradient.float(), draw, tape, lr, weight_decay, betas)


def likeliest(logits: Tensor) -> Tensor:
    """Index uint8 `[N]` of the largest logit of each weight, the first of equals."""
    index = torch.zeros(logits.shape[1], dtype=torch.uint8, device=logits.device)
    for part in parts(len(index), logits.device):  # argmax over a dimension that is not the last one is slow on a CPU
        best = logits[0, part].clone()
        for k in range(1, len(logits)):
            index[part].masked_fill_(logits[k, part] > best, k)
            torch.maximum(best, logits[k, part], out=best)
    return index


def parts(size: int, device: torch.device, multiple: int = 1) -> Iterator[slice]:
    """`size` weights in parts to be worked on one after the other, each but the last a `multiple` of weights long.

    And of `LANES`: where fewer than a CPU takes at once are left over, it rounds differently.
    """
    step, multiple = CHUNK.get(device.type, ELSEWHERE), math.lcm(multiple, LANES)
    step = max(step - step % multiple, multiple)
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def philox(
    seed: int, stream: int, step: int, first: int, count: int, draws: int, device: torch.device, block: int = 0
) -> Tensor:
    """Random 32-bit integers `[draws, count]` (int64) of weights `first .. first + count`; Philox-4x32-10.

    Key: `seed` (64 bits). Counter: weight, step, stream, and the number of the block of four draws,
    of which `block` is the first.
    """
    blocks = []
    for number in range(block, block - (-draws // 4)):
        c0 = torch.arange(first, first + count, device=device)
        c1 = torch.full_like(c0, step & _MASK) ^ ((c0 >> 32) << 20)
        c0 = c0 & _MASK
        c2, c3 = torch.full_like(c0, stream & _MASK), torch.full_like(c0, number)
        k0, k1 = seed & _MASK, (seed >> 32) & _MASK
        for _ in range(PHILOX_ROUNDS):
            product0, product1 = c0 * _M0, c2 * _M1
            c0 = ((product1 >> 32) & _MASK) ^ c1 ^ k0
            c2 = ((product0 >> 32) & _MASK) ^ c3 ^ k1
            c1, c3 = product1 & _MASK, product0 & _MASK
            k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
        blocks += [c0, c1, c2, c3]
    return torch.stack(blocks[:draws])


def gumbel_noise(seed: int, stream: int, step: int, first: int, count: int, draws: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise `[draws, count]`, float32, at most 16.6: uniforms of 23 bits, centred, are never 0 or 1."""
    uniform = ((philox(seed, stream, step, first, count, draws, device) >> 9).float() + 0.5) * 2**-23
    return uniform.log_().neg_().log_().neg_()


def round_by_chance(x: Tensor, noise: tuple[int, int, int], first: int) -> Tensor:
    """Float32 `x` `[K, n]` of weights `first .. first + n` as bfloat16, up or down, each as likely as it is near.

    16 random bits are added to the 16 that are cut off. A Philox block has them for 8 logits of a weight:
    logit k takes the lower half of word k // 2, or the upper half if it is odd.
    """
    count, size = x.shape
    words = philox(*noise, first, size, -(-count // 2), x.device, ROUNDING)
    halves = torch.stack([words & 0xFFFF, words >> 16], 1).flatten(0, 1)[:count]
    rounded = halves.add_(x.view(torch.int32)).bitwise_and_(-1 << 16).int().view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()


def _soften(logits: Tensor, draw: Draw, dtype: torch.dtype) -> tuple[Tensor, Tape | None]:
    count, size = logits.shape
    kept = size <= KEPT
    weights = torch.empty(size, device=logits.device, dtype=torch.float32 if kept else dtype)
    slope = torch.empty(count, size, device=logits.device) if kept else None
    for part in parts(size, logits.device, draw.group):
        own, mean = _part(logits, draw, part)
        groups = slice(part.start // draw.group, part.stop // draw.group)
        weights[part] = mean.view(-1, draw.group).mul_(draw.scales[groups, None]).view(-1)
        if kept:
            slope[:, part] = own
    return weights.to(dtype), Tape(slope, weights) if kept else None


def _part(logits: Tensor, draw: Draw, part: slice) -> tuple[Tensor, Tensor]:
    """Slope `[K, n]`, and mean level `[n]`, of a part of the weights."""
    count = len(logits)
    z = logits[:, part].float() * draw.kappa
    if draw.amplitude:
        noise = gumbel_noise(*draw.noise, draw.first + part.start, z.shape[1], count, z.device)
        z.add_(noise, alpha=draw.amplitude)
    p = torch.softmax(z.div_(draw.tau), dim=0)
    level = _levels(draw, part, count)
    mean = (p * level).sum(0)
    return p.mul_(level - mean), mean


def _lion_step(
    logits: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    draw: Draw,
    tape: Tape | None,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    by_scale, by_offset = (torch.empty(len(draw.scales), device=logits.device) for _ in range(2))
    for part in parts(draw.size, logits.device, draw.group):
        groups = slice(part.start // draw.group, part.stop // draw.group)
        own, scales = gradient[part].view(-1, draw.group), draw.scales[groups, None]
        if tape is None:
            slope, mean = _part(logits, draw, part)
            weights = (mean.view(-1, draw.group) * scales).view(-1)
        else:
            slope, weights = tape.slope[:, part], tape.weights[part]
        by_scale[groups], by_offset[groups] = (own * weights.view_as(own)).sum(1), own.sum(1)
        g = slope * (own * (scales * draw.sharpness)).view(-1)
        m, x = momentum[:, part], logits[:, part]
        new_m, new_x = m.float(), x.float()  # themselves if they are float32
        new_x.mul_(1 - lr * weight_decay).sub_(torch.lerp(g, new_m, betas[0]).sign_(), alpha=lr)
        m.copy_(new_m.lerp_(g, 1 - betas[1]))
        if x.dtype != torch.float32:
            x.copy_(round_by_chance(new_x, draw.noise, draw.first + part.start))
    return by_scale, by_offset


def _levels(draw: Draw, part: slice, count: int) -> Tensor:
    """Levels `[count, n]`, or `[count, 1]`, that the logits of a part stand for."""
    if draw.window is None:
        return draw.levels[:count, None]
    window = draw.window[part].int()
    return draw.levels[window[None] + torch.arange(count, device=window.device, dtype=torch.int32)[:, None]]


def _tensors(draw: Draw) -> tuple[Tensor, ...]:
    return (draw.levels, draw.scales) if draw.window is None else (draw.levels, draw.scales, draw.window)


def _check_logits(logits: Tensor, draw: Draw) -> None:
    count, table = len(logits) if logits.ndim else 0, len(draw.levels)
    if not 2 <= count <= MOST:
        raise ValueError(f"logits are of 2 to {MOST} levels, not {count}; relax a window of a larger table")
    if draw.window is None and count != table:
        raise ValueError(f"logits of {count} levels do not fit a table of {table}; without a window all have a logit")
    if count > table:
        raise ValueError(f"logits of {count} levels do not fit a table of {table}; relax fewer")
    _check("logits", logits, (count, draw.size), LOGITS)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{name} must be of shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {_names(dtypes)}, got {_names((tensor.dtype,))}; convert them")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}; call contiguous() first")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
