"""Second moments of what targets read: `H = sum x x^T` over the calibration tokens, in float32.

`C = sum x' x^T` beside it, where `x'` is what the same Linear reads in the original model, turns
the layer-wise problem into "answer the original model": the best weights for the quantized
prefix's inputs are then `W C H^-1` (as in GPTAQ, https://arxiv.org/abs/2504.02692).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from gsq.memory import Memory
from gsq.ranks import Ranks, tree_sum

T = TypeVar("T")

CHUNK = 8192  # tokens turned to float32 at once
OBSERVED = {"cpu": 1 << 27}  # entries of matrices observed at once, of which there are up to four sums: 2 GB
ELSEWHERE = 1 << 31


class Moments:
    """Accumulates `hessian` `[batch, in, in]`, `cross` of the same shape or None, and `tokens` `[batch]`."""

    def __init__(self, batch: int, in_features: int, device: torch.device, cross: bool = False, first: int = 0):
        """Of matrices number `first` to `first + batch`; others are not counted."""
        self._sums = torch.zeros(1 + cross, batch, in_features, in_features, device=device)
        self.tokens = torch.zeros(batch, dtype=torch.int64)
        self._first = first

    @property
    def hessian(self) -> Tensor:
        """`sum x x^T`."""
        return self._sums[0]

    @property
    def cross(self) -> Tensor | None:
        """`sum x' x^T`."""
        return self._sums[1] if len(self._sums) > 1 else None

    def add(self, index: int, x: Tensor, original: Tensor | None = None) -> None:
        """Count `x` `[tokens, in]`, read by matrix number `index`, and what the original model's reads."""
        index -= self._first
        if not 0 <= index < len(self.tokens):
            return
        self.tokens[index] += len(x)
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            read = x[part].float()
            self.hessian[index].addmm_(read.T, read)
            if self.cross is not None:
                self.cross[index].addmm_(original[part].float().T, read)

    def forget(self) -> None:
        """Count from zero again."""
        self._sums.zero_()
        self.tokens.zero_()

    @classmethod
    def over(
        cls, lanes: Sequence[T], observe: Callable[[Moments, T], None], ranks: Ranks,
        batch: int, in_features: int, memory: Memory, cross: bool,
    ) -> Moments:  # fmt: skip
        """What all processes see: `observe(moments, lane)` counts what one lane of this process does.

        Hundreds of large matrices are not all observed at once: `observe` is called for all lanes again and again.
        """
        whole = cls(0, 0, torch.device("cpu"))
        whole._sums = memory.empty((1 + cross, batch, in_features, in_features), torch.float32, near=True)
        counts = []
        step = max(1, OBSERVED.get(memory.device.type, ELSEWHERE) // in_features**2)
        for first in range(0, batch, step):
            size = min(step, batch - first)
            tokens = torch.zeros(size, dtype=torch.int64)

            def of_lane(lane: T, first: int = first, size: int = size, tokens: Tensor = tokens) -> Tensor:
                moments = cls(size, in_features, memory.device, cross, first)
                observe(moments, lane)
                tokens.add_(moments.tokens)
                return moments._sums

            whole._sums[:, first : first + size] = ranks.sum(tree_sum([partial(of_lane, lane) for lane in lanes]))
            counts += ranks.total(*tokens.tolist())
        whole.tokens = torch.tensor(counts).long()
        return whole

    def shrunk(self, prior: float) -> Tensor:
        """Hessians per token, those of matrices that saw few tokens drawn toward the mean of all, `[batch, in, in]`.

        `prior` is the number of tokens at which a matrix's own tokens and the mean weigh the same.
        A matrix that saw none gets the mean. Without `cross`, the sums of several become the result, for want of room.
        """
        tokens = self.tokens.to(self.hessian.device).float()[:, None, None]
        if len(tokens) == 1:
            return self.hessian / tokens.clamp_min(1)
        mean = self.hessian.sum(0) / tokens.sum().clamp_min(1)
        prior = max(prior, 1e-6)  # zero would leave a matrix that saw none with 0 / 0
        hessian = self.hessian if self.cross is None else self.hessian.clone()
        return hessian.add_(prior * mean).div_(tokens + prior)


def answer_original(weights: Tensor, moments: Moments, hessian: Tensor) -> Tensor:
    """Weights `[batch, out, in]` whose outputs on the quantized prefix come nearest to the original's.

    Minimizes `sum |W x' - V x|^2` plus the ridge that `hessian` (damped, per token) carries on `|V - W|^2`.
    """
    tokens = moments.tokens.to(weights.device).float().clamp_min(1)[:, None, None]
    ridge = hessian - moments.hessian / tokens
    wanted = weights.float() @ (moments.cross / tokens + ridge)  # [batch, out, in]
    return torch.cholesky_solve(wanted.mT, torch.linalg.cholesky(hessian)).mT
