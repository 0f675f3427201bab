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

from gsq.ranks import Ranks, tree_sum

T = TypeVar("T")

CHUNK = 8192  # tokens turned to float32 at once


class Moments:
    """Accumulates `hessian` `[batch, in, in]`, `cross` of the same shape or None, and `tokens` `[batch]`."""

    def __init__(self, batch: int, in_features: int, device: torch.device, cross: bool = False):
        self._sums = torch.zeros(1 + cross, batch, in_features, in_features, device=device)
        self.tokens = torch.zeros(batch, dtype=torch.int64)

    @property
    def hessian(self) -> Tensor:
        """`sum x x^T`."""
        return self._sums[0]

    @property
    def cross(self) -> Tensor | None:
        """`sum x' x^T`."""
        return self._sums[1] if len(self._sums) > 1 else None

    def add(self, index: int, x: Tensor, original: Tensor | None = None) -> None:
        """Count `x` `[tokens, in]`, read by matrix `index` of the batch, and what the original model's reads."""
        self.tokens[index] += len(x)
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            read = x[part].float()
            self.hessian[index].addmm_(read.T, read)
            if self.cross is not None:
                self.cross[index].addmm_(original[part].float().T, read)

    @classmethod
    def over(
        cls, lanes: Sequence[T], observe: Callable[[Moments, T], None], ranks: Ranks,
        batch: int, in_features: int, device: torch.device, cross: bool,
    ) -> Moments:  # fmt: skip
        """What all processes see: `observe(moments, lane)` counts what one lane of this process does."""
        tokens = torch.zeros(batch, dtype=torch.int64)

        def of_lane(lane: T) -> Tensor:
            moments = cls(batch, in_features, device, cross)
            observe(moments, lane)
            tokens.add_(moments.tokens)
            return moments._sums

        whole = cls(0, 0, device)
        whole._sums = ranks.sum(tree_sum([partial(of_lane, lane) for lane in lanes]))
        whole.tokens = torch.tensor(ranks.total(*tokens.tolist())).long()
        return whole

    def shrunk(self, prior: float) -> Tensor:
        """Hessians per token, those of matrices that saw few tokens drawn toward the mean of all, `[batch, in, in]`.

        `prior` is the number of tokens at which a matrix's own tokens and the mean weigh the same.
        A matrix that saw none gets the mean.
        """
        tokens = self.tokens.to(self.hessian.device).float()[:, None, None]
        if len(tokens) == 1:
            return self.hessian / tokens.clamp_min(1)
        mean = self.hessian.sum(0) / tokens.sum().clamp_min(1)
        prior = max(prior, 1e-6)  # zero would leave a matrix that saw none with 0 / 0
        return (self.hessian + prior * mean) / (tokens + prior)


def answer_original(weights: Tensor, moments: Moments, hessian: Tensor) -> Tensor:
    """Weights `[batch, out, in]` whose outputs on the quantized prefix come nearest to the original's.

    Minimizes `sum |W x' - V x|^2` plus the ridge that `hessian` (damped, per token) carries on `|V - W|^2`.
    """
    tokens = moments.tokens.to(weights.device).float().clamp_min(1)[:, None, None]
    ridge = hessian - moments.hessian / tokens
    wanted = weights.float() @ (moments.cross / tokens + ridge)  # [batch, out, in]
    return torch.cholesky_solve(wanted.mT, torch.linalg.cholesky(hessian)).mT
