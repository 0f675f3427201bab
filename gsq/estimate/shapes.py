"""What there is to do in a run, in shapes: its layers and their targets, and runs of a layer without weights.

Knows nothing of bytes that must be somewhere, nor of seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gsq.codebook import Codebook
from gsq.config import Config
from gsq.estimate.windows import Windows
from gsq.model.skeleton import Skeleton
from gsq.plan.rules import Plan, PlanEntry
from gsq.quantize import common_module
from gsq.ranks import Ranks
from gsq.refine import gumbel
from gsq.trace import Outline, Trace, Work


@dataclass(frozen=True)
class Matrix:
    """A target `[batch, rows, inputs]` of a layer by its name there; `fused` are experts, else `batch` is 1."""

    name: str
    batch: int
    rows: int
    inputs: int
    codebook: Codebook
    fused: bool

    @classmethod
    def of(cls, name: str, entry: PlanEntry) -> Matrix:
        """What a plan says of it."""
        fused = len(entry.shape) == 3
        batch, rows, inputs = entry.shape if fused else (1, *entry.shape)
        return cls(name, batch, rows, inputs, entry.codebook, fused)

    @property
    def columns(self) -> int:
        """In the codebook's basis."""
        return self.codebook.columns(self.inputs)

    @property
    def codes(self) -> int:
        """How many."""
        return self.batch * self.rows * self.columns

    @property
    def reader(self) -> str:
        """Path of the Linear whose weight it is."""
        return self.name.removesuffix(".weight")


Stage = tuple[Matrix, ...]  # targets that are refined together


@dataclass(frozen=True)
class Group:
    """Targets that read one tensor, and share a codebook."""

    members: tuple[Matrix, ...]

    @property
    def first(self) -> Matrix:
        """One of them, all of which have its batch, inputs and codebook."""
        return self.members[0]

    @property
    def rows(self) -> int:
        """Of all together."""
        return sum(member.rows for member in self.members)

    @property
    def codes(self) -> int:
        """Of all together."""
        return sum(member.codes for member in self.members)

    @property
    def squared(self) -> int:
        """Entries of all Hessians."""
        return self.first.batch * self.first.columns**2


@dataclass(frozen=True)
class Layer:
    """Layer `index`, which stands for `times` alike: all its parameters' `weights`, the targets by group and stage."""

    index: int
    times: int
    weights: int
    groups: tuple[Group, ...]
    stages: tuple[Stage, ...]

    @property
    def codes(self) -> int:
        """Of all targets."""
        return sum(group.codes for group in self.groups)


class Shapes:
    """What one process of a run has to do, with `plan`, on a `device` that need not be there."""

    def __init__(self, config: Config, skeleton: Skeleton, plan: Plan, device: torch.device, processes: int):
        self.config, self.skeleton, self.plan, self.device = config, skeleton, plan, device
        self.ranks = Ranks(0, processes)
        self.windows = Windows(config, self.ranks)
        self.length, self.width = config.calib.length, skeleton.dtype.itemsize  # tokens; bytes of an activation
        self.outline = Outline(skeleton.checkpoint, skeleton.dtype, config.model.max_layers)
        self._traces: dict[tuple, Trace] = {}

    @property
    def on_device(self) -> bool:
        """Whether there is an accelerator."""
        return self.device.type != "cpu"

    # Layers

    @cached_property
    def layers(self) -> list[Layer]:
        """The kinds of layers that are walked."""
        kinds: dict[tuple, list[int]] = {}
        for index in range(self.skeleton.num_layers):
            shapes = [(name, tuple(p.shape)) for name, p in self._parameters(index)]
            books = [(matrix.name, matrix.codebook) for matrix in self._matrices(index)]
            kinds.setdefault((*shapes, *books), []).append(index)
        return [self._layer(indices) for indices in kinds.values()]

    def _parameters(self, index: int) -> Iterator[tuple[str, Tensor]]:
        return self.skeleton.model.get_submodule(self.skeleton.layer_names[index]).named_parameters()

    def _matrices(self, index: int) -> list[Matrix]:
        prefix = self.skeleton.layer_names[index] + "."
        return [Matrix.of(entry.name.removeprefix(prefix), entry) for entry in self.plan.targets(index)]

    def _layer(self, indices: list[int]) -> Layer:
        index = indices[0]
        matrices, inputs = self._matrices(index), self.trace(index, 1).inputs
        read = lambda matrix: matrix.name if matrix.fused else inputs.get(matrix.reader, matrix.name)  # noqa: E731
        groups = _alike(matrices, lambda matrix: (read(matrix), matrix.codebook, self._stage(matrix)))
        stages = _alike(matrices, self._stage)
        weights = sum(parameter.numel() for _, parameter in self._parameters(index))
        return Layer(index, len(indices), weights, tuple(map(Group, groups)), tuple(stages))

    def _stage(self, matrix: Matrix) -> str:
        return "" if self.config.refine.stage == "layer" else matrix.name.split(".")[0]

    def module(self, stage: Stage) -> str:
        """Path of the module that a stage runs; "" is the layer."""
        return common_module([matrix.name for matrix in stage])

    def own(self, matrix: Matrix) -> float:
        """Codes of this process."""
        return matrix.codes / self.ranks.count

    @property
    def logit_width(self) -> int:
        """Bytes of a logit."""
        return getattr(torch, self.config.refine.logits).itemsize

    # What of the original is needed

    @property
    def needs_original(self) -> bool:
        """Whether the original stream is walked, too."""
        refine = self.config.refine
        return self.config.init.answer_original or (refine.enabled and refine.target == "stream")

    def crossed(self, group: Group) -> bool:
        """Whether the init of a group looks at what it reads in the original model, too."""
        return self.config.init.answer_original and not group.first.fused

    # Sizes of the model

    @property
    def hidden_size(self) -> int:
        """Features of hidden states."""
        return self.skeleton.model.get_input_embeddings().weight.shape[1]

    @property
    def vocabulary(self) -> int:
        """Tokens that there are."""
        return self.skeleton.model.get_input_embeddings().weight.shape[0]

    @property
    def head_weights(self) -> int:
        """Of the head, or of the embedding."""
        return self.vocabulary * self.hidden_size

    @property
    def layer_weights(self) -> int:
        """Of all layers together."""
        return sum(layer.weights * layer.times for layer in self.layers)

    @property
    def stream(self) -> int:
        """Bytes of the hidden states of this process's windows."""
        return self.windows.count * self.length * self.hidden_size * self.width

    # Runs of a layer

    def trace(
        self, index: int, windows: int, length: int | None = None, learned: tuple[str, ...] = (), module: str = ""
    ) -> Trace:
        """A pass of so many windows through a layer or a module in it, and back to the parameters `learned`."""
        key = (index, windows, length or self.length, learned, module)
        if key not in self._traces:
            self._traces[key] = self.outline.trace(*key)
        return self._traces[key]

    def learned(self, layer: Layer, stage: Stage) -> Trace:
        """A forward and backward pass of one micro-batch of a refinement step."""
        names = tuple(matrix.name for matrix in stage)
        return self.trace(layer.index, self.windows.step_part, learned=names, module=self.module(stage))

    def walk(self, layer: Layer, parts: Iterable[int], until: str | None = None, module: str = "") -> Work:
        """Forward passes of micro-batches, through a layer or a module in it, or until the Linear `until` reads."""
        total, largest = Work(), self.windows.largest
        ends = [self.trace(layer.index, windows, module=module) for windows in sorted({1, largest})]
        works = [trace.reached.get(until, trace.work) for trace in ends]
        for size, count in Counter(parts).items():
            share = (size - 1) / max(largest - 1, 1)
            total += (works[0] * (1 - share) + works[-1] * share) * count
        return total


def logits_per_weight(codebook: Codebook) -> int:
    """Logits that a relaxation has of each weight."""
    return len(codebook.levels) if len(codebook.levels) <= gumbel.FULL else gumbel.WINDOW


def _alike(matrices: Iterable[Matrix], key: Callable[[Matrix], object]) -> list[tuple[Matrix, ...]]:
    """Matrices with one key together, in the order in which keys come."""
    found: dict[object, list[Matrix]] = {}
    for matrix in matrices:
        found.setdefault(key(matrix), []).append(matrix)
    return [tuple(members) for members in found.values()]
