"""Refine the targets of one stage: anneal, step, and keep the best hard result that was ever seen.

The result is never worse than the start by the objective's own held-out measure, whatever the
budget: the start is the first candidate, and each target goes back to it if that is better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gsq.codebook import QuantizedTensor
from gsq.memory import Memory
from gsq.refine.gumbel import Relaxation, Temperature
from gsq.refine.objective import Objective, Weights, cosine

Quantized = dict[str, QuantizedTensor]


@dataclass(frozen=True)
class Schedule:
    """How a stage is annealed over `steps`; the schedules fit any number of steps exactly."""

    steps: int
    lr: float = 0.001  # of logits, at the start
    scale_lr: float = 0.004  # of scales, relative to their size
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    tau: tuple[float, float] = (0.5, 0.05)
    kappa: tuple[float, float] = (100.0, 500.0)
    gap: float = 0.06  # starting logit of a level one scale away from the wanted weight, negated
    noise: float = 0.0  # amplitude of the Gumbel noise
    checks: int = 4  # times that the hard result is judged on the way
    logits: Literal["float32", "bfloat16"] = "float32"  # half the memory costs some of the gain

    def at(self, step: int) -> Temperature:
        """Temperatures and learning rates of a step in `0 .. steps - 1`."""
        progress = step / max(self.steps - 1, 1)
        tau = self.tau[0] * (self.tau[1] / self.tau[0]) ** progress
        kappa = self.kappa[0] + (self.kappa[1] - self.kappa[0]) * progress
        rate = cosine(step / self.steps)
        return Temperature(tau, kappa, self.lr * rate, self.scale_lr * rate)

    def judged(self, step: int) -> bool:
        """Whether the hard result is judged after this step: `checks` times, the last step included."""
        return (step + 1) * self.checks // self.steps > step * self.checks // self.steps


@dataclass
class Refined:
    """Outcome of a stage: the targets, held-out errors before and after, and the step that gave the best."""

    targets: Quantized
    error_init: float
    error_final: float
    best_step: int


def refine(
    start: Quantized,
    wanted: Callable[[str], Tensor],
    objective: Objective,
    schedule: Schedule,
    seed: int,
    streams: dict[str, int],
    on_step: Callable[[int, float, Temperature], None] = lambda step, loss, at: None,
    firsts: dict[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    memory: Memory | None = None,
) -> Refined:
    """Refine `start` against `objective`.

    `wanted` gives a target's free values (see `Relaxation`), which are as large as it and needed once;
    `streams` gives what is drawn for each target a number of its own, and `firsts` says, where `start` is a
    process's own rows, the number of the first weight in the whole target. `dtype` is that of the
    weights that the objective is given; what moves is held in `memory`.
    """
    error_init = objective.error(_weights(start, dtype))
    best, error_best, best_step = start, error_init, 0
    relaxed = {
        name: Relaxation(
            q, wanted(name), schedule.gap, schedule.weight_decay, schedule.betas, seed, streams[name], schedule.noise,
            (firsts or {}).get(name, 0), getattr(torch, schedule.logits), memory,
        )
        for name, q in start.items()
    }  # fmt: skip
    for step in range(schedule.steps):
        at = schedule.at(step)
        loss, gradients = objective.gradients(step, {name: r.soft(step, at, dtype) for name, r in relaxed.items()})
        for name, relaxation in relaxed.items():
            relaxation.update(gradients[name], at)
        on_step(step, loss, at)
        if schedule.judged(step):
            hard = {name: relaxation.hard() for name, relaxation in relaxed.items()}
            error = objective.error(_weights(hard, dtype))
            if error < error_best:
                best, error_best, best_step = hard, error, step + 1
    best, error_best = _accept(start, best, error_best, objective, dtype)
    return Refined(best, error_init, error_best, best_step)


def _accept(
    start: Quantized, best: Quantized, error: float, objective: Objective, dtype: torch.dtype
) -> tuple[Quantized, float]:
    """Give back its start to every target that is better off with it."""
    for name in start:
        if best[name] is not start[name] and len(start) > 1:
            trial = best | {name: start[name]}
            trial_error = objective.error(_weights(trial, dtype))
            if trial_error < error:
                best, error = trial, trial_error
    return best, error


def _weights(quantized: Quantized, dtype: torch.dtype) -> Weights:
    return {name: q.dequantize(dtype) for name, q in quantized.items()}
