"""The calibration windows of one process, and the micro-batches in which they run."""

from __future__ import annotations

import math

from gsq.config import Config
from gsq.ranks import LANES, Ranks


class Windows:
    """Windows of one process among `ranks`."""

    def __init__(self, config: Config, ranks: Ranks):
        self._calib, self._refine, self._ranks = config.calib, config.refine, ranks
        self._share = ranks.share(config.calib.windows)

    @property
    def count(self) -> int:
        """All windows of this process."""
        return len(self._share.numbers)

    @property
    def lanes(self) -> int:
        """Lanes in which they run."""
        return len(self._share.lanes)

    @property
    def training(self) -> int:
        """Windows of all processes that are not held out, which are the first."""
        return self._calib.windows - self._calib.validation

    def parts(self, below: int | None = None) -> list[int]:
        """Windows of each micro-batch of this process, over the first `below` of all windows, or over all."""
        lanes = self._share.lanes if below is None else self._share.below(below)
        return [size for lane in lanes for size in _split(len(lane), self._calib.batch)]

    def judges(self) -> list[int]:
        """Windows of each micro-batch of this process over those that are held out."""
        lanes = self._share.places(range(self.training, self._calib.windows))
        return [size for lane in lanes for size in _split(len(lane), self._calib.batch)]

    @property
    def largest(self) -> int:
        """Windows in the largest micro-batch of a pass over all of them."""
        return max(self.parts())

    @property
    def step(self) -> int:
        """Windows of this process in a refinement step."""
        return math.ceil(self._step / self._ranks.count)

    @property
    def step_lanes(self) -> int:
        """Lanes of this process that have windows in a refinement step."""
        return max(1, min(self.lanes, math.ceil(self._refine.windows * self.lanes / LANES)))

    @property
    def step_part(self) -> int:
        """Windows in the largest micro-batch of a refinement step."""
        return min(self._calib.batch, -(-self._step // LANES))

    @property
    def _step(self) -> int:
        return min(self._refine.windows, self.training)


def _split(total: int, step: int) -> list[int]:
    """Sizes of the parts of `total`, all of which are `step` but the last."""
    return [min(step, total - start) for start in range(0, total, step)]
