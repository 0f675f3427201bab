"""An estimate as people ask for it: seconds by phase, memory by item, bytes on disk."""

from __future__ import annotations

from collections import Counter
from functools import cached_property

import torch

from gsq import units
from gsq.config import Config
from gsq.estimate.memory import Inventory
from gsq.estimate.places import PLACES, Working
from gsq.estimate.seconds import Seconds
from gsq.estimate.shapes import Shapes
from gsq.hardware import Hardware
from gsq.model.skeleton import Skeleton
from gsq.plan.rules import Plan
from gsq.run import EXPORT


class Estimate:
    """What `config` takes on `hardware`, with this plan; of one process, unless it says otherwise."""

    def __init__(self, config: Config, skeleton: Skeleton, plan: Plan, hardware: Hardware):
        self.config, self.plan, self.hardware = config, plan, hardware
        device = torch.device("cpu" if hardware.accelerator is None else "cuda")
        self.shapes = Shapes(config, skeleton, plan, device, hardware.processes)

    @cached_property
    def working(self) -> Working:
        """What a process holds, by point of the run."""
        return Inventory(self.shapes, self.hardware.base).working()

    @property
    def _files(self) -> float:
        """Bytes of a process that lie in files."""
        return self.working.peak(self.hardware, "file")

    def seconds(self) -> dict[str, dict[str, float]]:
        """Seconds by phase: of a layer on average (`layer`), and of the run (`run`)."""
        return Seconds(self.shapes, self.hardware.speed).by_phase(self._files)

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return sum(self.seconds()["run"].values())

    def disk(self) -> dict[str, float]:
        """Bytes on disk: the run folder, the export, hidden states that lie in files (of all processes here)."""
        layers = sum(entry.codebook.nbytes(entry.shape) for entry in self.plan.targets())
        export = self.plan.summary()["bytes_after"] if self.config.export.format else 0
        tokens = 8 * self.config.calib.windows * self.config.calib.length
        return {"run": layers + tokens, EXPORT: export, "files": self._files * self.hardware.local}

    def phase_rows(self) -> list[dict[str, str]]:
        """Seconds of each phase, as people read them: of a layer on average, and of the run."""
        found = self.seconds()
        return [
            {
                "phase": phase,
                "a layer": units.duration(found["layer"].get(phase)),
                "the run": units.duration(seconds),
            }
            for phase, seconds in found["run"].items()
        ]

    def memory_rows(self) -> list[dict[str, str]]:
        """Items at the point where most is held, largest first, and where they may be; sums and budgets last."""
        working, hardware = self.working, self.hardware
        placed, where = working.placed(hardware), PLACES[working.on_device]
        point = max(placed, key=lambda point: placed[point]["device" if working.on_device else "host"])
        sums = Counter()
        for item in working.moments[point]:
            sums[item.name, where[item.place]] += item.bytes
        rows = [
            {"held in " + point: name, "bytes": units.size(nbytes), "on": place}
            for (name, place), nbytes in sums.most_common()
            if nbytes
        ]
        budgets = {"device": hardware.accelerator, "host": hardware.share, "file": hardware.disk}
        for place, nbytes in placed[point].items():
            if budgets[place] is not None:
                text = f"{units.size(nbytes)} of {units.size(budgets[place])}"
                rows.append({"held in " + point: f"in all, {place}", "bytes": text, "on": ""})
        return rows
