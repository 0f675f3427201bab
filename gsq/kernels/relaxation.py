"""The Gumbel-Softmax relaxation of a quantized weight: forward, and backward fused with the Lion step.

    w = scale * sum_k p_k level_k,   p = softmax((kappa * logits + amplitude * gumbel) / tau)

Weights are flat, `[N]`, with logits `[K, N]` over K levels and one scale per `group` neighbours.
Noise is counter-based: the same (seed, stream, step, element) gives the same number on any device
and in any order, so it is never stored. This is the plain PyTorch version, which works through
chunks that fit a CPU's cache.

Sources: Jang et al., https://arxiv.org/abs/1611.01144 (Gumbel-Softmax); Chen et al.,
https://arxiv.org/abs/2302.06675 (Lion); Salmon et al., SC 2011 (Philox).
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 15  # weights worked on at once
PHILOX_ROUNDS = 10
_M0, _M1, _W0, _W1, _MASK = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def philox(seed: int, stream: int, step: int, first: int, count: int, draws: int, device: torch.device) -> Tensor:
    """Random 32-bit integers `[draws, count]` (int64) of elements `first .. first + count`; Philox-4x32-10.

    Key: `seed` (64 bits). Counter: element, step, stream, and the number of the block of four draws.
    """
    blocks = []
    for block in range(-(-draws // 4)):
        c0 = torch.arange(first, first + count, device=device)
        c1 = torch.full_like(c0, step & _MASK) ^ ((c0 >> 32) << 20)
        c0 = c0 & _MASK
        c2, c3 = torch.full_like(c0, stream & _MASK), torch.full_like(c0, block)
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


def soften(
    logits: Tensor,
    levels: Tensor,
    window: Tensor | None,
    scales: Tensor,
    group: int,
    tau: float,
    kappa: float,
    noise: tuple[int, int, int],
    amplitude: float,
) -> tuple[Tensor, Tensor]:
    """Soft weights `[N]` and the slope `p_k (level_k - mean level)` `[K, N]`, which the backward pass needs.

    `levels` `[table]` and `window` uint8 `[N]`: logit k of a weight stands for `levels[window + k]`
    (`levels[k]` where `window` is None). `scales` `[N / group]`. `noise` is (seed, stream, step).
    """
    count, size = logits.shape
    weights, slope = torch.empty(size, device=logits.device), torch.empty_like(logits)
    for start in range(0, size, CHUNK):
        part = slice(start, min(start + CHUNK, size))
        z = logits[:, part] * kappa
        if amplitude:
            z.add_(gumbel_noise(*noise, start, z.shape[1], count, z.device), alpha=amplitude)
        p = torch.softmax(z.div_(tau), dim=0)
        level = levels[:count, None] if window is None else _window_levels(levels, window[part], count)
        mean = (p * level).sum(0)
        torch.mul(p, level - mean, out=slope[:, part])
        weights[part] = mean
    return weights.view(-1, group).mul_(scales[:, None]).view(-1), slope


def lion_step(
    logits: Tensor,
    momentum: Tensor,
    slope: Tensor,
    gradient: Tensor,
    scales: Tensor,
    group: int,
    sharpness: float,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
) -> None:
    """Backward through `soften` and one Lion step on the logits, in place.

    `gradient` `[N]` is dL/dw, `sharpness` is kappa / tau; `logits`, `momentum`, `slope` are `[K, N]`.
    """
    size = logits.shape[1]
    outer = (gradient.view(-1, group) * (scales[:, None] * sharpness)).view(-1)
    for start in range(0, size, CHUNK):
        part = slice(start, min(start + CHUNK, size))
        g = slope[:, part] * outer[part]
        m, x = momentum[:, part], logits[:, part]
        x.mul_(1 - lr * weight_decay).sub_(torch.lerp(g, m, betas[0]).sign_(), alpha=lr)
        m.lerp_(g, 1 - betas[1])


def likeliest(logits: Tensor) -> Tensor:
    """Index uint8 `[N]` of the largest logit of each weight, the first of equals."""
    index = torch.empty(logits.shape[1], dtype=torch.uint8, device=logits.device)
    for start in range(0, len(index), CHUNK):  # argmax over a dimension that is not the last one is slow on a CPU
        part = slice(start, start + CHUNK)
        best = logits[0, part].clone()
        index[part] = 0
        for k in range(1, len(logits)):
            index[part].masked_fill_(logits[k, part] > best, k)
            torch.maximum(best, logits[k, part], out=best)
    return index


def _window_levels(levels: Tensor, window: Tensor, count: int) -> Tensor:
    """Levels `[count, n]` that the logits of a chunk stand for."""
    return levels[window.int()[None] + torch.arange(count, device=window.device, dtype=torch.int32)[:, None]]
