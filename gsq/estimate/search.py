"""Seconds of the search for bits by sensitivity, which the first process does alone before the walk.

As `gsq.plan.sensitivity.measure` does it: every unit has a stream behind its layer, in which it alone is rough, and
all streams go through all layers to come, in float32.
"""

from __future__ import annotations

import math
from dataclasses import replace

from gsq.estimate.init import GroupInit
from gsq.estimate.pace import PASS, Pace
from gsq.estimate.shapes import Group, Layer, Shapes
from gsq.memory import WINDOWS
from gsq.plan.rules import flexible
from gsq.prepare import units_of
from gsq.trace import Work

LOGIT = 5  # passes over logits, of which a divergence is made


class Search:
    """What is measured where bits are solved for; nothing if they are not."""

    def __init__(self, shapes: Shapes, pace: Pace):
        self.shapes, self.pace, self.settings = shapes, pace, shapes.config.plan.sensitivity
        self.widths = flexible(shapes.skeleton, shapes.config.plan.all_rules, self.settings.widths)
        self.units = units_of(self.widths, shapes.config.export.format)
        self.tokens = self.settings.windows * self.settings.length

    def seconds(self) -> float:
        """Of the whole search."""
        if not self.units:
            return 0.0
        layers = [(layer, self._observed(layer) + self._tried(layer)) for layer in self.shapes.layers]
        return self._walked() + sum(seconds * layer.times for layer, seconds in layers) + self._judged()

    @property
    def passes(self) -> int:
        """Streams through a layer, of all layers together; the original one goes twice, since it is observed."""
        streams, passes, skeleton = 0, 0, self.shapes.skeleton
        for name in skeleton.layer_names[: skeleton.num_layers]:
            streams += sum(unit[0].startswith(name + ".") for unit in self.units)
            passes += 2 + streams
        return passes

    def _walked(self) -> float:
        """All streams through layers that are alike on average."""
        shapes, once = self.shapes, Work()
        for layer in shapes.layers:
            trace = shapes.trace(layer.index, min(WINDOWS, self.settings.windows), self.settings.length)
            once += trace.work * (layer.times / shapes.skeleton.num_layers)
        work, wider = once * (self.passes * math.ceil(self.settings.windows / WINDOWS)), 4 / shapes.width
        exact, nbytes, small = work.exact + work.flops, work.bytes * wider, work.small * wider
        return self.pace.modules(Work(exact=exact, bytes=nbytes, small=small, calls=work.calls))

    def _observed(self, layer: Layer) -> float:
        """Hessians of one layer."""
        routed = max(1, self.shapes.trace(layer.index, 1).routed / self.shapes.length)
        read = lambda group: self.tokens * (routed if group.first.fused else 1)  # noqa: E731
        groups = [group for group in layer.groups if self._name(layer, group.first.name) in self.widths]
        return self.pace.products(sum(2.0 * read(group) * group.first.inputs**2 for group in groups))

    def _tried(self, layer: Layer) -> float:
        """GPTQ of one layer's tensors at every width."""
        seconds = 0.0
        for matrix in (matrix for group in layer.groups for matrix in group.members):
            books = self.widths.get(self._name(layer, matrix.name), {})
            for number, book in enumerate(books.values()):
                init = GroupInit(self.shapes, self.pace, Group((replace(matrix, codebook=book),)))
                seconds += init.trial(factored=not number) * self.shapes.ranks.count
        return seconds

    def _judged(self) -> float:
        """Divergences of all streams from the original one."""
        streams, shapes = len(self.units) + 1, self.shapes
        logits = PASS * LOGIT * self.tokens * shapes.vocabulary
        return self.pace.speed.seconds(
            Work(exact=2.0 * shapes.head_weights * self.tokens * streams, bytes=logits * streams)
        )

    def _name(self, layer: Layer, short: str) -> str:
        return f"{self.shapes.skeleton.layer_names[layer.index]}.{short}"
