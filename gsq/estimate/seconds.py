"""Seconds by phase, of a layer and of a run."""

from __future__ import annotations

from collections import Counter

from gsq.calib import hessian as moments
from gsq.calib.tokens import SELF_BATCH
from gsq.estimate.init import GroupInit
from gsq.estimate.pace import PASS, Pace
from gsq.estimate.refine import StageRefinement
from gsq.estimate.search import Search
from gsq.estimate.shapes import Group, Layer, Shapes
from gsq.hardware import Speed
from gsq.trace import Work

PHASES = ("load", "teacher", "hessian", "init", "refine", "push")  # of a layer, as a run's journal has them
READ = 4  # times that a layer reads or writes what lies in files
SHOWN = 8  # passes over hidden states: sizes of tokens, and how far two streams are apart
PACK = 12  # passes over codes, to pack them


class Seconds:
    """What one process takes at a `speed`."""

    def __init__(self, shapes: Shapes, speed: Speed):
        self.shapes, self.config = shapes, shapes.config
        self.speed, self.pace = speed, Pace(speed)

    def by_phase(self, files: float) -> dict[str, dict[str, float]]:
        """Of a layer on average (`layer`), and of the run (`run`), which has so many bytes in files."""
        totals, count = Counter(), self.shapes.skeleton.num_layers
        for layer in self.shapes.layers:
            for phase, seconds in self._layer(layer).items():
                totals[phase] += seconds * layer.times
        averages = {phase: totals[phase] / count for phase in PHASES}
        read = {"files": READ * count * files / self.speed.disk} if files else {}
        return {"layer": averages, "run": {**self._before(), **totals, **read, **self._behind()}}

    def _layer(self, layer: Layer) -> dict[str, float]:
        counted = {
            "load": self._load(layer),
            "teacher": self._teacher(layer),
            "hessian": sum(self._hessian(layer, group) for group in layer.groups),
            "init": sum(GroupInit(self.shapes, self.pace, group).seconds() for group in layer.groups),
            "refine": sum(StageRefinement(self.shapes, self.pace, layer, stage).seconds() for stage in layer.stages),
            "push": self._push(layer),
        }
        return {phase: counted[phase] for phase in PHASES}

    def _load(self, layer: Layer) -> float:
        """A layer from disk, its codes back there, and how far the two streams are apart."""
        shapes, codes = self.shapes, layer.codes
        compared = shapes.needs_original * SHOWN * shapes.stream / shapes.width
        moved = (shapes.width * layer.weights + codes) / self.speed.disk
        return moved + self.pace.over(codes, PACK, codes) + self.pace.over(compared, 1, compared)

    def _push(self, layer: Layer) -> float:
        """One stream through the layer."""
        return self.pace.modules(self.shapes.walk(layer, self.shapes.windows.parts()))

    def _teacher(self, layer: Layer) -> float:
        """The original stream behind the layer, and what is wanted of each stage."""
        shapes, config = self.shapes, self.config.refine
        if not layer.groups:
            return self._push(layer) * shapes.needs_original
        passes, sizes = float(shapes.needs_original), 0.0
        if config.enabled:
            passes += sum(bool(shapes.module(stage)) or config.target == "layer" for stage in layer.stages)
            sizes = self.pace.over(shapes.stream / shapes.width, SHOWN / 2, shapes.stream)
        sample = shapes.walk(layer, [min(self.config.calib.batch, shapes.windows.largest)])
        return sizes + self.pace.modules(shapes.walk(layer, shapes.windows.parts()) * passes + sample)

    def _hessian(self, layer: Layer, group: Group) -> float:
        """Forward passes up to where a group reads, and the sums of what it reads."""
        shapes, first, streams = self.shapes, group.first, 1 + self.shapes.crossed(group)
        parts = shapes.windows.parts(shapes.windows.training)
        at_once = max(1, moments.OBSERVED.get(shapes.device.type, moments.ELSEWHERE) // first.inputs**2)
        turns = -(-first.batch // at_once)
        forward = shapes.walk(layer, parts, None if first.fused else first.reader) * (streams * turns)
        tokens = sum(parts) * shapes.length
        if first.fused:
            tokens *= max(1, shapes.trace(layer.index, 1).routed / shapes.length)
        sums = streams * first.batch * first.inputs**2
        observed = Work(
            exact=2.0 * tokens * first.inputs**2 * streams, bytes=PASS * tokens * first.inputs,
            calls=len(parts) * first.batch * streams * 3,
        )  # fmt: skip
        summed = self.pace.over(sums, 2 * shapes.windows.lanes + 3, sums)
        return self.pace.modules(forward) + self.speed.seconds(observed) + summed

    def _before(self) -> dict[str, float]:
        """Calibration text that the model writes itself, and the search for bits."""
        searched = Search(self.shapes, self.pace).seconds()
        found = {"tokens": self._written()} if self.config.calib.source == "self" else {}
        return {**found, "plan": searched} if searched else found

    def _written(self) -> float:
        """Calibration text, token by token."""
        shapes, calib = self.shapes, self.config.calib
        token = sum((shapes.trace(layer.index, 1, 1).work * layer.times for layer in shapes.layers), Work())
        batches = -(-calib.windows // SELF_BATCH)
        heads = 2.0 * shapes.head_weights * calib.windows * calib.length
        flops = token.flops * calib.windows * calib.length + heads
        read = batches * calib.length * shapes.width * (shapes.layer_weights + shapes.head_weights)
        return self.pace.modules(Work(flops, bytes=read, calls=token.calls * batches * calib.length))

    def _behind(self) -> dict[str, float]:
        """Export, its verification, and the evaluation of two models."""
        if not self.config.export.format:
            return {}
        summary = self.shapes.plan.summary()
        before, after, weights = (summary[key] for key in ("bytes_before", "bytes_after", "quantized_weights"))
        packed = self.pace.over(weights, PACK, 1 << 24)
        found = {
            "export": (before + 2 * after) / self.speed.disk + packed,
            "verify": (before + after) / self.speed.disk + 2 * packed,
        }
        return {**found, "evaluate": self._evaluated()} if self.config.eval.text else found

    def _evaluated(self) -> float:
        shapes, settings = self.shapes, self.config.eval
        work = Work()
        for layer in shapes.layers:
            work += shapes.trace(layer.index, 1, settings.length).work * (layer.times * settings.windows)
        predicted = settings.windows * settings.length
        head = Work(2.0 * shapes.head_weights * predicted, bytes=PASS * predicted * shapes.vocabulary * 5)
        loaded = 2 * shapes.width * (shapes.layer_weights + 2 * shapes.head_weights) / self.speed.disk
        return 2 * self.pace.modules(work + head) + loaded
