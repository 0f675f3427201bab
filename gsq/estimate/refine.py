"""Seconds that the refinement of a stage takes: steps, and checks of the hard result."""

from __future__ import annotations

from collections.abc import Iterator

from gsq.estimate.pace import DECODE, ERROR, ROTATE, Pace
from gsq.estimate.shapes import Layer, Matrix, Shapes, Stage, logits_per_weight
from gsq.kernels import relaxation
from gsq.refine import gumbel
from gsq.trace import Work

# Passes, as in `pace`
SOFT, STEP = 4, 6  # of a logit: forward; backward and Lion
BESIDE = 3  # of a weight, in each of these
NOISE = 30  # of a logit: counters and logarithms


class StageRefinement:
    """Steps and checks of all objectives of a stage, as far as they are this process's."""

    def __init__(self, shapes: Shapes, pace: Pace, layer: Layer, stage: Stage):
        self.shapes, self.pace, self.layer, self.stage = shapes, pace, layer, stage
        self.config, self.processes = shapes.config.refine, shapes.ranks.count
        self.codes = sum(matrix.codes for matrix in stage)
        self.own = self.codes / self.processes
        self.checks = 2 + self.config.checks + len(stage) * (len(stage) > 1)

    def seconds(self) -> float:
        """Of the whole stage."""
        return sum(self._terms()) if self.config.enabled and self.stage else 0.0

    def _terms(self) -> Iterator[float]:
        config, pace, shapes = self.config, self.pace, self.shapes
        relaxed = config.steps * sum(self._relaxed(matrix) for matrix in self.stage)
        judged = pace.over(self.own, (DECODE + 3) * self.checks, self.own)
        product = sum(2.0 * matrix.codes * matrix.columns for matrix in self.stage)  # of all rows with their Hessians
        if config.objective != "hessian":
            checked = shapes.walk(self.layer, shapes.windows.judges(), module=shapes.module(self.stage))
            yield config.steps * self._step() + relaxed + judged
            yield self.checks * pace.modules(checked)
        if config.objective != "output":
            evaluations = config.steps + self.checks
            yield relaxed + judged + pace.products(evaluations * (product / self.processes))
            yield pace.over(self.own, 6 * evaluations, self.own)
        yield pace.products(product * 3 / self.processes)  # free weights, and errors before and behind
        yield pace.over(self.own, 3 * ERROR, self.own)

    def _step(self) -> float:
        """Gradients of one step by this process's windows."""
        windows = self.shapes.windows
        lanes = windows.step_lanes
        batches = max(lanes, -(-windows.step // windows.step_part))
        once = self.shapes.learned(self.layer, self.stage).work
        if windows.step_part * batches != windows.step:
            once = once * (windows.step / (windows.step_part * batches))
        summed = self.pace.over(self.codes, 1.5 * batches + lanes + 1.5 * (lanes - 1), self.codes)
        return self.pace.modules(once * batches) + summed

    def _relaxed(self, matrix: Matrix) -> float:
        """Soft weights and the Lion step of one target's own rows."""
        weights, count = self.shapes.own(matrix), logits_per_weight(matrix.codebook)
        if self.pace.speed.ahead:  # one kernel each, which read and write logits and momentum once
            held = count * self.shapes.logit_width
            nbytes = weights * (3 * held + 2 * count * gumbel.ELSEWHERE.itemsize + self.shapes.width + 8)
            return self.pace.speed.seconds(Work(bytes=nbytes, calls=4))
        passes = count * (SOFT + STEP) + 2 * BESIDE
        if matrix.codebook.rotation:
            passes += 2 * ROTATE
        if self.config.noise:
            passes += count * NOISE
        chunk = relaxation.CHUNK.get(self.shapes.device.type, relaxation.ELSEWHERE)
        return self.pace.over(weights, passes, chunk)
