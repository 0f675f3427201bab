"""What one process holds at each point of a run, item by item."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor
from torch.utils._pytree import tree_leaves

from gsq.calib import hessian as moments
from gsq.calib.tokens import SELF_BATCH
from gsq.estimate.places import DEVICE, FAR, HOST, NEAR, Item, Moment, Working
from gsq.estimate.shapes import Group, Layer, Matrix, Shapes, Stage, logits_per_weight
from gsq.eval.quality import DEVICE_LOGIT_BYTES, LOGIT_BYTES
from gsq.init import gptq, polish
from gsq.kernels import relaxation
from gsq.memory import WINDOWS
from gsq.plan.rules import flexible
from gsq.quantize import experts_at_once
from gsq.refine import gumbel

CODE = 1.1  # bytes of a code with its share of scales


class Inventory:
    """Lists what is held; each process takes `base` bytes before it has done anything."""

    def __init__(self, shapes: Shapes, base: float):
        self.shapes, self.config, self.windows = shapes, shapes.config, shapes.windows
        self.base = Item("Python and its libraries", base, HOST)

    def working(self) -> Working:
        """All points of the run."""
        found = self._outside()
        for layer in self.shapes.layers:
            found |= {f"layer {layer.index}, {point}": held for point, held in self._points(layer).items()}
        return Working(found, self.shapes.on_device)

    def _points(self, layer: Layer) -> dict[str, Moment]:
        """Points of the work on a layer, in their order."""
        found, walked = {}, [*self._always(), *self._of_layer(layer)]
        read = Item("layer as it was read", self.shapes.width * layer.weights, DEVICE)
        found["load"] = (*self._always(), read, replace(read, name="layer", place=NEAR))
        for stage in layer.stages:
            always, held = [*walked, *self._calls(layer, stage)], []
            for group in (group for group in layer.groups if group.first in stage):
                name = group.first.name
                found[f"hessian {name}"] = (*always, *held, *self._while_observed(layer, group))
                held += self._problems(group)
                found[f"init {name}"] = (*always, *held, *self._while_initialized(group))
            if self.config.refine.enabled:
                state = self._state(stage)
                where = " ".join(["", *filter(None, [self.shapes.module(stage)])])
                found["start" + where] = (*always, *held, *state, *self._while_started(stage))
                found["step" + where] = (*always, *held, *state, *self._while_stepping(layer, stage))
                found["check" + where] = (*always, *held, *state, *self._while_judged(layer, stage))
        return {**found, "push": (*walked, self._activations(layer, self.windows.largest))}

    # As long as something goes on

    def _always(self) -> list[Item]:
        """Held as long as layers are walked."""
        shapes, refine = self.shapes, self.config.refine
        streams = 1 + shapes.needs_original
        behind = shapes.needs_original or (refine.enabled and refine.target == "layer")
        kwargs = shapes.outline.calls(self.windows.largest, shapes.length)[1]
        unique = {id(leaf): leaf for leaf in tree_leaves(kwargs) if isinstance(leaf, Tensor)}
        tokens = 8 * shapes.length * (self.config.calib.windows + streams * self.windows.count)
        return [
            self.base,
            Item("calibration tokens", tokens, HOST),
            Item("embedding", shapes.width * shapes.head_weights, DEVICE),
            Item("masks and positions", streams * 2 * sum(leaf.nbytes for leaf in unique.values()), DEVICE),
            Item("hidden states", (streams + behind) * shapes.stream, FAR),
        ]

    def _of_layer(self, layer: Layer) -> list[Item]:
        """Held as long as a layer is at work: the original, the one that becomes quantized, and the next one."""
        weights = self.shapes.width * layer.weights
        coming = [Item("next layer", weights, HOST)] if self.shapes.on_device else []
        return [
            Item("layer, original and quantized", 2 * weights, NEAR),
            Item("codes", CODE * layer.codes, DEVICE), *coming,
        ]  # fmt: skip

    def _calls(self, layer: Layer, stage: Stage) -> list[Item]:
        """Recorded calls of the module that a stage refines, if that is not the layer: what it reads and puts out."""
        module = self.shapes.module(stage)
        if not self.config.refine.enabled or not module:
            return []
        one = self.shapes.trace(layer.index, 1, module=module).called
        return [Item("calls of the module", one * self.windows.count, FAR)]

    def _activations(self, layer: Layer, windows: int) -> Item:
        return Item("activations", self.shapes.trace(layer.index, windows).peak, DEVICE)

    # Groups

    def _while_observed(self, layer: Layer, group: Group) -> list[Item]:
        """Sums of what a group reads, and a forward pass."""
        shapes, first, largest = self.shapes, group.first, self.windows.largest
        sums, square = 1 + shapes.crossed(group), first.inputs**2
        at_once = min(first.batch, max(1, moments.OBSERVED.get(shapes.device.type, moments.ELSEWHERE) // square))
        live = _live(self.windows.lanes) + 2 * (shapes.ranks.count > 1)
        read = min(moments.CHUNK, largest * shapes.length) * first.inputs * 4 * sums
        return [
            Item("Hessians", 4 * sums * first.batch * square, NEAR),
            Item("Hessians of lanes", 4 * sums * live * at_once * square, DEVICE),
            Item("inputs in float32", read, DEVICE),
            self._activations(layer, largest),
        ]

    def _problems(self, group: Group) -> list[Item]:
        """What refinement wants to know of a group."""
        own = sum(self.shapes.own(member) for member in group.members)
        divided = group.first.fused and group.first.columns != group.first.inputs
        share = self.shapes.ranks.count if divided else 1
        return [Item("wanted weights", 4 * own, NEAR), Item("Hessians", 4 * group.squared / share, NEAR)]

    def _while_initialized(self, group: Group) -> list[Item]:
        """Temporaries of some experts, or of all rows, at their most: factoring, or polish."""
        shapes, first, crossed = self.shapes, group.first, self.shapes.crossed(group)
        own = -(-first.batch // shapes.ranks.count) if first.fused else 1
        count = min(own, experts_at_once(shapes.device, group.rows, first.columns))
        square, weights = 4 * count * first.columns**2, 4 * count * group.rows * first.columns
        work = weights if first.fused else weights / shapes.ranks.count
        answering = (3 * square + weights) * crossed
        most = max(self._factoring(square, work), answering, self._polishing(first, work))
        aims = weights * (1 + crossed + (first.codebook.rotation is not None))
        return [
            Item("moments", 4 * first.batch * first.inputs**2 * crossed, NEAR),
            Item("aims and Hessians of an init", aims + square, DEVICE),
            Item("GPTQ and polish", most, DEVICE),
        ]

    def _factoring(self, square: float, work: float) -> float:
        """Bytes of GPTQ beside Hessians of `square` bytes and weights of `work`."""
        factored = min(square, 4 * gptq.FACTORED)
        return square + 3 * factored + 0.5 * work if self.config.init.method == "gptq" else 0.0

    def _polishing(self, matrix: Matrix, work: float) -> float:
        """Bytes of descent and of least squares for the scales, or of what judges the result."""
        if not self.config.init.polish:
            return 3 * work
        groups = matrix.codebook.groups(matrix.columns) * (1 + matrix.codebook.offset)
        refitted = min(work, 4 * polish.PRODUCTS)
        systems = 2 * min(work / matrix.columns * groups**2, 4 * polish.SYSTEMS)
        return max(3.5 * work, 2 * work + 3 * refitted + systems)

    # Stages

    def _state(self, stage: Stage) -> list[Item]:
        """Held as long as a stage is refined."""
        own = self.shapes.own
        moved = self.shapes.logit_width + gumbel.MOMENTUM.get(self.shapes.device.type, gumbel.ELSEWHERE).itemsize
        logits = sum(own(matrix) * logits_per_weight(matrix.codebook) for matrix in stage)
        window = sum(own(matrix) for matrix in stage if len(matrix.codebook.levels) > gumbel.FULL)
        return [
            Item("logits and momentum", moved * logits, NEAR),
            Item("windows of levels", window, DEVICE),
            Item("best codes", CODE * sum(map(own, stage)), DEVICE),
        ]

    def _while_started(self, stage: Stage) -> list[Item]:
        """When logits are made."""
        own, device = self.shapes.own, self.shapes.device
        finding = max(min(own(m), experts_at_once(device, m.rows, m.columns) * m.rows * m.columns) for m in stage)
        return [
            Item("free weights", 4 * max(map(own, stage)), NEAR),
            Item("finding free weights", 12 * finding, DEVICE),
        ]

    def _while_stepping(self, layer: Layer, stage: Stage) -> list[Item]:
        """While a step is taken."""
        shapes, own = self.shapes, [self.shapes.own(matrix) for matrix in stage]
        whole, output = sum(matrix.codes for matrix in stage), self.config.refine.objective != "hessian"
        relaxed = [
            Item("soft weights", shapes.width * whole * output + 4 * sum(own) * (not output), DEVICE),
            Item("soft weights before they are rounded", self._soft(stage), DEVICE),
            Item("tape of the relaxation", self._tape(stage), DEVICE),
        ]
        if not output:
            return [*relaxed, Item("gradients", 4 * (sum(own) + 3 * max(own)), DEVICE)]
        exchanged = 8 * max(matrix.codes for matrix in stage) * (shapes.ranks.count > 1)
        return [
            *relaxed,
            Item("activations", shapes.learned(layer, stage).peak, DEVICE),
            Item("sums of gradients", 4 * whole * _live(self.windows.step_lanes), NEAR),
            Item("exchange of gradients", exchanged, DEVICE),
        ]

    def _while_judged(self, layer: Layer, stage: Stage) -> list[Item]:
        """When the hard result is judged."""
        shapes, output = self.shapes, self.config.refine.objective != "hessian"
        whole, own = sum(matrix.codes for matrix in stage), sum(map(shapes.own, stage))
        width = shapes.width if output else 4
        passed = [self._activations(layer, max(self.windows.judges(), default=1))] if output else []
        return [
            Item("hard weights", width * (whole + own * (shapes.ranks.count > 1)), DEVICE),
            Item("judged codes", CODE * own, DEVICE), *passed,
        ]  # fmt: skip

    def _soft(self, stage: Stage) -> float:
        """Bytes of soft weights in float32, which exist beside those of the activations' dtype."""
        copies = lambda book: (book.rotation is not None) + 2 * book.offset  # noqa: E731
        return max(4.0 * self.shapes.own(matrix) * copies(matrix.codebook) for matrix in stage)

    def _tape(self, stage: Stage) -> float:
        """Bytes that a CPU keeps for the way back."""
        if self.shapes.on_device:
            return 0.0
        sizes = [(self.shapes.own(matrix), logits_per_weight(matrix.codebook)) for matrix in stage]
        return sum(4.0 * size * (logits + 1) for size, logits in sizes if size <= relaxation.KEPT)

    # Before and behind the walk

    def _outside(self) -> dict[str, Moment]:
        found = {"tokens": self._while_writing(), "plan": self._while_measuring(), "evaluate": self._while_evaluating()}
        return {point: (self.base, *items) for point, items in found.items() if items}

    def _while_writing(self) -> list[Item]:
        """When the model itself writes the calibration text."""
        shapes, calib = self.shapes, self.config.calib
        if calib.source != "self":
            return []
        model = sum(p.numel() for p in shapes.skeleton.model.parameters()) * shapes.width
        logits = 16 * min(SELF_BATCH, calib.windows) * shapes.vocabulary
        return [Item("whole model", model, DEVICE), Item("logits", logits, DEVICE)]

    def _while_measuring(self) -> list[Item]:
        """When sensitivities are measured for the plan."""
        shapes, settings = self.shapes, self.config.plan.sensitivity
        streams = len(flexible(shapes.skeleton, self.config.plan.all_rules, settings.widths))
        if not streams:
            return []
        hidden = 4 * (streams + 2) * settings.windows * settings.length * shapes.hidden_size
        largest = max(layer.weights for layer in shapes.layers)
        peak = max(shapes.trace(layer.index, WINDOWS, settings.length).peak for layer in shapes.layers)
        active = peak * 4 / shapes.width  # in float32
        return [
            Item("hidden states of each unit", hidden, DEVICE), Item("layer", 8 * largest, DEVICE),
            Item("activations", active, DEVICE),
        ]  # fmt: skip

    def _while_evaluating(self) -> list[Item]:
        """When export and original are compared."""
        shapes, settings = self.shapes, self.config.eval
        if not (self.config.export.format and settings.text):
            return []
        hidden = 3 * settings.windows * settings.length * shapes.hidden_size * shapes.width
        largest = max(layer.weights for layer in shapes.layers) * shapes.width
        return [
            Item("hidden states", hidden, HOST),
            Item("layer", largest, DEVICE),
            Item("embeddings and heads", 4 * shapes.head_weights * shapes.width, DEVICE),
            Item("logits", DEVICE_LOGIT_BYTES if shapes.on_device else LOGIT_BYTES, DEVICE),
        ]


def _live(lanes: int) -> int:
    """Sums of lanes that exist at once in `gsq.ranks.tree_sum`: one at each branch, and one that is made."""
    return max(1, math.ceil(math.log2(max(lanes, 1))) + 1)
