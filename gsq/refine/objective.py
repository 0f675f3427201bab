"""What refinement minimizes. An objective takes weights by name and gives the loss and its gradients by name.

`OutputObjective`: the stage's module must reproduce its wanted output, token by token.
`HessianObjective`: `tr((W - Q) H (W - Q)^T)` of each target, exact over all calibration tokens
at a cost that does not grow with them.

Weights and gradients that cross this interface are a process's own rows (`gsq.ranks`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gsq.codebook import Codebook
from gsq.init.polish import quadratic
from gsq.memory import Batch, Memory
from gsq.ranks import Ranks, Share, tree_sum

Weights = dict[str, Tensor]
Calls = Callable[[Callable, Tensor], Tensor]  # output `[n, length, H]` of a module for the windows with n indices


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
    ranks: Ranks = field(default_factory=Ranks)

    def __post_init__(self) -> None:
        own = [float(quadratic(w, self.hessians[name]).sum()) for name, w in self.wanted.items()]
        self._size = {name: max(size, 1e-30) for name, size in zip(self.wanted, self.ranks.total(*own), strict=True)}

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
        return self.ranks.total(loss / len(weights))[0], gradients

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
        batch: Batch,
        order: Callable[[int, int, int], list[int]],
        ranks: Ranks | None = None,
        share: Share | None = None,
        memory: Memory | None = None,
    ):
        """`wanted` `[windows, length, H]` and `token_weights` `[windows, length]` of this process's `share`.

        Of all windows the last `held_out` judge, or all if there are none. Each step takes `per_step` of the
        others: `order(step, per_step, windows)` gives their numbers. `token_weights` are on the device where the
        module runs, `wanted` is anywhere; sums of gradients are as large as the weights, and held in `memory`.
        """
        self.module, self.calls, self.wanted, self.token_weights = module, calls, wanted, token_weights
        self.ranks, self.batch, self.order = ranks or Ranks(), batch, order
        self.share, self.memory = share or Share.whole(len(wanted)), memory or Memory(token_weights.device)
        windows = self.share.total
        self.training = windows - held_out
        self.per_step = min(per_step, self.training)
        self.judges = range(self.training, windows) if held_out else range(windows)
        self._size = self._norm(range(windows)) / windows  # of one window, on average
        self._judged = self._norm(self.judges)

    def gradients(self, step: int, weights: Weights) -> tuple[float, Weights]:
        """Loss over this step's windows, relative to the size of the wanted output."""
        leaves = {name: weight.requires_grad_() for name, weight in self._whole(weights).items()}
        losses: list[float] = []
        lanes = self.share.places(self.order(step, self.per_step, self.training))
        whole = tree_sum([partial(self._lane_gradients, leaves, lane, losses) for lane in lanes])
        if whole is None:  # the step has no window of this process
            whole = self._nothing(leaves)
        sums = {name: self.ranks.own_sum(part) for name, part in _views(whole, leaves).items()}
        return self.ranks.total(sum(losses))[0], sums

    def _lane_gradients(self, leaves: Weights, lane: list[int], losses: list[float]) -> Tensor | None:
        """Sums over one lane's windows of all gradients, side by side; None if it has no windows.

        In float32, so that the micro-batch's size does not matter.
        """
        if not lane:
            return None
        sums = self._nothing(leaves)
        views = _views(sums, leaves)
        rest = torch.tensor(lane)

        def add() -> None:
            nonlocal rest
            while len(rest):
                windows = rest[: self.batch.windows]
                loss = self._squared_error(leaves, windows) / (self._size * self.per_step)
                gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
                for view, gradient in zip(views.values(), gradients, strict=True):
                    if gradient is not None:
                        view += gradient
                losses.append(float(loss.detach()))
                rest = rest[len(windows) :]

        self.batch.fitted(add)
        return sums

    @torch.no_grad()
    def error(self, weights: Weights) -> float:
        """Relative error on the held-out windows."""
        leaves = self._whole(weights)
        judged = lambda: [float(self._squared_error(leaves, windows)) for windows in self._batches(self.judges)]  # noqa: E731
        return self.ranks.total(sum(self.batch.fitted(judged)))[0] / self._judged

    def _whole(self, weights: Weights) -> Weights:
        """The weights that the module multiplies with: the rows of all processes, in the activations' dtype."""
        parts = {name: weight.detach().to(self.wanted.dtype) for name, weight in weights.items()}
        return {n: self.ranks.joined(part, len(self.module.get_parameter(n))) for n, part in parts.items()}

    def _nothing(self, leaves: Weights) -> Tensor:
        return self.memory.zeros((sum(leaf.numel() for leaf in leaves.values()),), torch.float32, near=True)

    def _batches(self, numbers: Iterable[int]) -> Iterator[Tensor]:
        """Places of those windows, of these `numbers`, that are this process's, in micro-batches."""
        for lane in self.share.places(numbers):
            if lane:
                yield from torch.tensor(lane).split(self.batch.windows)

    def _squared_error(self, weights: Weights, windows: Tensor) -> Tensor:
        output = self.calls(lambda *args, **kwargs: functional_call(self.module, weights, args, kwargs), windows)
        difference = (output - self._wanted(windows)).float().square().sum(-1)
        return (difference * self.token_weights[windows]).sum()

    def _wanted(self, windows: Tensor) -> Tensor:
        return self.wanted[windows].to(self.token_weights.device)

    def _norm(self, numbers: Iterable[int]) -> float:
        sizes = [
            float((self._wanted(windows).float().square().sum(-1) * self.token_weights[windows]).sum())
            for windows in self._batches(numbers)
        ]
        return max(self.ranks.total(sum(sizes))[0], 1e-30)


def _views(flat: Tensor, leaves: Weights) -> Weights:
    """`flat` `[n]` as tensors of the shapes of `leaves`, one behind the other."""
    parts = flat.split([leaf.numel() for leaf in leaves.values()])
    return {name: part.view(leaf.shape) for (name, leaf), part in zip(leaves.items(), parts, strict=True)}


def token_sizes(residual: Tensor) -> Tensor:
    """Mean square of each token's hidden state, float32 `[...]` for `[..., H]`."""
    return residual.float().square().mean(-1)


def token_weights(size: Tensor, ranks: Ranks) -> Tensor:
    """Weights `[windows, length]`, 1 on average, of tokens of this `size` (`token_sizes`) behind the layer.

    About equal for ordinary tokens, falling with the square of the size for massive ones. The average is that
    of all processes' windows.
    """
    median = ranks.concatenated(size).median()
    weights = 1 / (size + median)
    total, count = ranks.total(float(weights.sum(dtype=torch.float64)), weights.numel())
    return weights * (count / total)


def epochs(seed: int) -> Callable[[int, int, int], list[int]]:
    """An order for `OutputObjective`: each window once, shuffled, then each once more, shuffled anew, and so on.

    A step takes one window of every class of numbers that are alike modulo `per_step`, and each class has epochs
    of its own: so processes that share out the windows in turns have equal shares of a step, whenever
    their number divides `per_step`. Depends on (seed, step) alone.
    """

    def order(step: int, per_step: int, windows: int) -> list[int]:
        chosen = []
        for start in range(per_step):
            alike = range(start, windows, per_step)
            epoch, place = divmod(step, len(alike))
            generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 1009 + start)
            chosen.append(alike[int(torch.randperm(len(alike), generator=generator)[place])])
        return chosen

    return order


def cosine(progress: float) -> float:
    """From 1 at `progress` 0 to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))
