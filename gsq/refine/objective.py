"""What refinement minimizes. An objective takes weights by name and gives the loss and its gradients by name.

`OutputObjective`: the stage's module must reproduce its wanted output, token by token.
`HessianObjective`: `tr((W - Q) H (W - Q)^T)` of each target, exact over all calibration tokens
at a cost that does not grow with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gsq.calib.stream import Calls
from gsq.codebook import Codebook

Weights = dict[str, Tensor]


class Objective(Protocol):
    """What the refinement loop asks of an objective."""

    def gradients(self, step: int, weights: Weights) -> tuple[float, Weights]:
        """Loss at `weights`, and dL/dw of each, for the data of this step."""
        ...

    def error(self, weights: Weights) -> float:
        """Relative error of hard weights on data that no step saw."""
        ...


@dataclass
class HessianObjective:
    """Mean over targets of `tr(D H D^T) / tr(W H W^T)`; `W` and `H` by target, in the basis of its codebook.

    `wanted` `[batch, out, columns]`, `hessians` `[batch, columns, columns]`.
    """

    wanted: Weights
    hessians: Weights
    codebooks: dict[str, Codebook]

    def __post_init__(self) -> None:
        self._size = {
            name: float(((w.float() @ self.hessians[name]) * w.float()).sum().clamp_min(1e-30))
            for name, w in self.wanted.items()
        }

    def gradients(self, step: int, weights: Weights) -> tuple[float, Weights]:
        """Exact, the same at every step."""
        loss, gradients = 0.0, {}
        for name, weight in weights.items():
            codebook = self.codebooks[name]
            rotated = codebook.rotate(weight.float())
            difference = rotated.view_as(self.wanted[name]) - self.wanted[name].float()
            product = difference @ self.hessians[name]
            loss += float((product * difference).sum()) / self._size[name]
            gradient = product * (2 / self._size[name] / len(weights))
            gradients[name] = codebook.unrotate(gradient.view_as(rotated))
        return loss / len(weights), gradients

    def error(self, weights: Weights) -> float:
        """The objective itself: a Hessian has no held-out part."""
        return self.gradients(0, weights)[0]


class OutputObjective:
    """Error of a module's output over tokens, each token weighed by the size of the residual stream there.

    A few tokens carry activations thousands of times larger than the rest; unweighted, a mean
    squared error sees only them.
    """

    def __init__(
        self,
        module: nn.Module,
        calls: Calls,
        wanted: Tensor,
        token_weights: Tensor,
        held_out: int,
        per_step: int,
        micro_batch: int,
        order: Callable[[int, int, int], Tensor],
    ):
        """`wanted` `[windows, length, H]`; `token_weights` `[windows, length]`; the last `held_out` windows judge.

        Each step takes `per_step` windows: `order(step, per_step, windows)` gives their indices.
        """
        self.module, self.calls, self.wanted, self.token_weights = module, calls, wanted, token_weights
        self.training = len(wanted) - held_out
        self.judges = torch.arange(self.training, len(wanted)) if held_out else torch.arange(len(wanted))
        self.per_step, self.micro_batch, self.order = min(per_step, self.training), micro_batch, order
        self._size = self._norm(torch.arange(len(wanted))) / len(wanted)  # of one window, on average

    def gradients(self, step: int, weights: Weights) -> tuple[float, Weights]:
        """Loss over this step's windows, relative to the size of the wanted output."""
        dtype = self.wanted.dtype
        leaves = {name: weight.detach().to(dtype).requires_grad_() for name, weight in weights.items()}
        chosen = self.order(step, self.per_step, self.training)
        total, sums = 0.0, {name: torch.zeros_like(leaf, dtype=torch.float32) for name, leaf in leaves.items()}
        for windows in chosen.split(self.micro_batch):
            loss = self._squared_error(leaves, windows) / (self._size * len(chosen))
            loss.backward()
            total += float(loss.detach())
            for name, leaf in leaves.items():  # in float32, so that the micro-batch's size does not matter
                if leaf.grad is not None:
                    sums[name] += leaf.grad
                leaf.grad = None
        return total, sums

    @torch.no_grad()
    def error(self, weights: Weights) -> float:
        """Relative error on the held-out windows."""
        dtype = self.wanted.dtype
        leaves = {name: weight.to(dtype) for name, weight in weights.items()}
        parts = self.judges.split(self.micro_batch)
        return float(sum(self._squared_error(leaves, windows) for windows in parts)) / self._norm(self.judges)

    def _squared_error(self, weights: Weights, windows: Tensor) -> Tensor:
        output = self.calls(lambda *args, **kwargs: functional_call(self.module, weights, args, kwargs), windows)
        difference = (output - self.wanted[windows]).float().square().sum(-1)
        return (difference * self.token_weights[windows]).sum()

    def _norm(self, windows: Tensor) -> float:
        size = self.wanted[windows].float().square().sum(-1)
        return max(float((size * self.token_weights[windows]).sum()), 1e-30)


def token_weights(residual: Tensor) -> Tensor:
    """Weights `[windows, length]`, 1 on average, of tokens with `residual` `[windows, length, H]` behind the layer.

    About equal for ordinary tokens, falling with the square of the size for massive ones.
    """
    size = residual.float().square().mean(-1)
    weights = 1 / (size + size.median())
    return weights / weights.mean()


def epochs(seed: int) -> Callable[[int, int, int], Tensor]:
    """An order for `OutputObjective`: all windows, shuffled, then all of them shuffled anew, and so on.

    Each step takes up where the one before it stopped; it depends on (seed, step) alone.
    """

    def order(step: int, per_step: int, windows: int) -> Tensor:
        first, last = step * per_step // windows, ((step + 1) * per_step - 1) // windows
        shuffled = [
            torch.randperm(windows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
            for epoch in range(first, last + 1)
        ]
        place = step * per_step - first * windows
        return torch.cat(shuffled)[place : place + per_step]

    return order


def cosine(progress: float) -> float:
    """From 1 at `progress` 0 to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))
