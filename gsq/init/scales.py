"""Scales of groups, and offsets, by search: the smallest weighted squared error of rounding to nearest.

Some candidates are tried, and the best goes through regressions of the weights on their levels. Most of the time
of every initializer is spent here, so groups are turned around, `[g, n]`: all that differs between them is a row of
`n` numbers, and every operation reads and writes long runs. Sums follow one tree, whatever the number of groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsq.codebook import Codebook
from gsq.kernels.columns import levels_of, spacing

CHUNK = {"cpu": 1 << 19}  # weights tried at once: small for a CPU's cache, large beside the cost of a call;
ELSEWHERE = 1 << 27  # elsewhere half a gigabyte, of which there are some copies
CANDIDATES = 24  # scales tried per sign
REGRESSIONS = 3  # of a group's weights on their levels and an offset
# range of the candidates, relative to the scale at which the longest level reaches the largest weight
SHRINK = (0.25, 1.3)


def search_groups(
    weights: Tensor, codebook: Codebook, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales `[..., out, groups]` and, if the codebook has them, offsets of `weights` `[..., out, in]`.

    Both are rounded to the codebook's dtype. `importance` `[..., 1 or out, in]` weighs the squared errors.
    """
    size = codebook.group_size
    shape = *weights.shape[:-1], codebook.groups(weights.shape[-1])
    given = (weights,) if importance is None else (weights, importance.expand(weights.shape))
    flat = [t.reshape(-1, size) for t in given]
    step = max(1, CHUNK.get(weights.device.type, ELSEWHERE) // size)
    search = search_affine if codebook.offset else search_scales
    found = [search(Groups(codebook, *some)) for some in zip(*(t.split(step) for t in flat), strict=True)]
    scales, *offsets = (torch.cat(parts).to(codebook.scale_dtype).view(shape) for parts in zip(*found, strict=True))
    return scales, offsets[0] if offsets else None


class Groups:
    """Groups of weights, what they would become under given scales, and at which error.

    Scales and offsets are `[n]`, float32, as they will be stored.
    """

    def __init__(self, codebook: Codebook, weights: Tensor, importance: Tensor | None = None):
        """Of `weights` `[n, g]`, with the `importance` of each."""
        self.codebook, self.levels = codebook, codebook.level_table(weights.device)
        self.weights = weights.float().T.contiguous()  # [g, n]
        self.importance = None if importance is None else importance.float().T.contiguous()
        self._buffer = torch.empty_like(self.weights)
        self._shifted = torch.empty_like(self.weights) if codebook.offset else None
        low, step = spacing(codebook.levels) or (0.5, 1.0)
        self._even = step if (low / step).is_integer() else None  # levels are multiples of it

    def stored(self, values: Tensor) -> Tensor:
        """As the codebook's dtype holds them, at most its largest number."""
        largest = torch.finfo(self.codebook.scale_dtype).max
        return values.clamp(-largest, largest).to(self.codebook.scale_dtype).float()

    def error(self, scales: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Weighted squared error `[n]` of rounding."""
        weights = self.weights if offsets is None else torch.sub(self.weights, offsets, out=self._shifted)
        values = self._levels(weights, scales).mul_(scales)
        return self.total(torch.sub(weights, values, out=values).square_())

    def reached(self, scales: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Levels `[g, n]` that the weights round to, until the next call."""
        weights = self.weights if offsets is None else torch.sub(self.weights, offsets, out=self._shifted)
        return self._levels(weights, scales)

    def total(self, values: Tensor) -> Tensor:
        """Sum `[n]` over each group of `values` `[g, n]`, weighted by importance; they are used up."""
        if self.importance is not None:
            values.mul_(self.importance)
        count = len(values)
        while count > 1:
            half = count // 2
            values[:half].add_(values[count - half : count])
            count -= half
        return values[0].clone()

    def _levels(self, weights: Tensor, scales: Tensor) -> Tensor:
        """Of weights under scales; a zero scale reaches the level next to zero."""
        inverse = torch.where(scales == 0, 0, 1 / scales)
        if self._even is None:
            ratio = torch.mul(weights, inverse, out=self._buffer)
            return levels_of(self.codebook.nearest(ratio), self.levels)
        first, last = (self.codebook.levels[end] / self._even for end in (0, -1))
        ratio = torch.mul(weights, inverse / self._even, out=self._buffer).round_().clamp_(first, last)
        return ratio if self._even == 1 else ratio.mul_(self._even)


def search_scales(groups: Groups) -> tuple[Tensor]:
    """Scales `[n]`: shrink factors of both signs (one sign if the levels are symmetric), then one regression."""
    w, levels = groups.weights, groups.codebook.levels
    unit = w.abs().amax(0) / max(map(abs, levels))
    symmetric = levels == tuple(-level for level in reversed(levels))
    best, best_error = torch.zeros_like(unit), groups.total(w.square())  # of scale zero

    def keep_better(scale: Tensor) -> None:
        nonlocal best, best_error
        scale = scale.to(groups.codebook.scale_dtype).float()
        error = groups.error(scale)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)

    for shrink in _shrinks():
        for sign in (1.0,) if symmetric else (1.0, -1.0):
            keep_better(sign * shrink * unit)
    reached = groups.reached(best)
    keep_better(_divide(groups.total(w * reached), groups.total(reached.square())))
    return (best,)


def search_affine(groups: Groups) -> tuple[Tensor, Tensor]:
    """Scales and offsets `[n]`: the range shrinks toward the mean; the best one goes through some regressions."""
    w, codebook, stored = groups.weights, groups.codebook, groups.stored
    low, high = w.aminmax(dim=0)
    weight = groups.total(torch.ones_like(w))
    mean, middle = _divide(groups.total(w.clone()), weight), (high + low) / 2
    best, offset = torch.zeros_like(mean), stored(mean)
    best_error = groups.total((w - offset).square_())

    def keep_better(scale: Tensor, shift: Tensor) -> None:
        nonlocal best, offset, best_error
        error = groups.error(scale, shift)
        better = error < best_error
        best, offset = torch.where(better, scale, best), torch.where(better, shift, offset)
        best_error = torch.where(better, error, best_error)

    longest = codebook.levels[-1]
    keep_better(stored((high - low) / longest), stored(low))  # coarse offsets may favour the plain range
    for shrink in _shrinks():
        scale = stored(shrink * (high - low) / longest)
        keep_better(scale, stored(torch.lerp(mean, middle, min(shrink, 1.0)) - scale * codebook.center))
    for _ in range(REGRESSIONS):
        reached = groups.reached(best, offset)
        level = _divide(groups.total(reached.clone()), weight)  # on average
        apart = reached - level
        scale = stored(_divide(groups.total(w * apart), groups.total(apart.square_())))
        keep_better(scale, stored(mean - scale * level))
    return best, offset


def _shrinks() -> tuple[float, ...]:
    return 1.0, *torch.linspace(*SHRINK, CANDIDATES).tolist()  # 1 is best where nothing need be clipped


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and zero where the denominator is zero."""
    return torch.where(denominator == 0, 0, numerator / torch.where(denominator == 0, 1, denominator))
