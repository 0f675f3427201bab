"""What a run will take, before it starts: memory by item, seconds by phase, bytes on disk.

Nothing but headers of the checkpoint is read. Layers are run on the meta device (`gsq.trace`), which gives the work
of a forward and a backward pass and what they hold; what the method adds (Hessians, GPTQ, polish, relaxation) is
counted from shapes, in the order in which `gsq.quantize` does it. Layers of one shape are counted once.

Memory has two sorts of items. Some must be where they are: weights, activations, temporaries. The others
`gsq.memory.Memory` hands out: on a CPU all of them may lie in files, on an accelerator those that kernels do not
work on. `rooms` is what a budget leaves for these; `refuse_unfit` ends a run whose fixed items are too much.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gsq import units
from gsq.calib import hessian as moments
from gsq.calib.tokens import SELF_BATCH
from gsq.codebook import Codebook
from gsq.config import Config
from gsq.device import keep_freed_memory, pick_device
from gsq.errors import UserError
from gsq.eval.quality import DEVICE_LOGIT_BYTES, LOGIT_BYTES
from gsq.hardware import Hardware, Speed
from gsq.init import gptq, polish, scales
from gsq.kernels import relaxation
from gsq.memory import Rooms
from gsq.model.skeleton import Skeleton
from gsq.plan.rules import Plan, candidates, flexible
from gsq.prepare import opened, planner, run_folder
from gsq.quantize import common_module, together
from gsq.ranks import LANES, Ranks
from gsq.refine import gumbel
from gsq.run import EXPORT
from gsq.trace import CACHED, Outline, Trace, UntracedError, Work

PHASES = ("load", "teacher", "hessian", "init", "refine", "push")  # of a layer, as a run's journal has them
DEVICE, HOST, NEAR, FAR = "device", "host", "near", "far"  # fixed in two places; handed out, for kernels or not
PLACES = {  # in words, by whether there is an accelerator
    True: {DEVICE: "device", NEAR: "device", FAR: "device, host or files", HOST: "host"},
    False: {DEVICE: "host", NEAR: "host or files", FAR: "host or files", HOST: "host"},
}
UNKNOWN_KURTOSIS = 3.0  # a Gaussian's, where a plan asks for what only weights tell

# Passes over memory that one evaluation of a formula makes, each a read and a write of float32. Counted in the code,
# then corrected by runs on a CPU: see bench/estimate.py.
PASS = 8  # bytes
SEARCH, SHIFTED = 4, 2  # of one candidate for a scale; more where there are offsets
BOUND = 1.4  # more of these for each bound between uneven levels
COLUMN = 18  # calls for one column of GPTQ or descent, and passes over it
ROTATE = 4  # of a Hadamard transform
DECODE = 1  # from codes to values
ERROR = 4  # rows' errors, beside the product
SOFT, STEP = 4, 6  # of a logit: forward; backward and Lion
BESIDE = 3  # of a weight, in each of these
READ = 4  # times that a layer reads or writes what lies in files
SHOWN = 8  # of hidden states: sizes of tokens, and how far two streams are apart
KERNELS = 1024  # products of bfloat16 that oneDNN keeps, one for each number of tokens of an expert,
KERNEL = 42e3  # bytes of each, times the root of that number: measured with 24 to 1024 tokens
MODULE = 9.0  # calls of Python for each that is dispatched by a module,
PLAIN = 0.5  # and what its passes, which add and multiply, take of one that rounds and looks up
FACTOR = 4 / 3  # of n^3: a Cholesky factor, the inverse by it, and the factor of that


@dataclass(frozen=True)
class Matrix:
    """A target `[batch, rows, inputs]` of a layer by its name there; `fused` are experts, else `batch` is 1."""

    name: str
    batch: int
    rows: int
    inputs: int
    codebook: Codebook
    fused: bool

    @property
    def columns(self) -> int:
        """In the codebook's basis."""
        return self.codebook.columns(self.inputs)

    @property
    def codes(self) -> int:
        """How many."""
        return self.batch * self.rows * self.columns


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
    stages: tuple[tuple[Matrix, ...], ...]


@dataclass(frozen=True)
class Item:
    """Something held at some point of a run, and where it may be."""

    name: str
    bytes: float
    place: str


Moment = tuple[Item, ...]  # all that is held at one point of a run


@dataclass(frozen=True)
class Working:
    """What one process holds, by the point of the run."""

    moments: Mapping[str, Moment]
    on_device: bool

    def most(self, *places: str) -> float:
        """Bytes in these places together, at the point where they are most."""
        return max(sum(item.bytes for item in held if item.place in places) for held in self.moments.values())

    @property
    def fixed_host(self) -> float:
        """Bytes that must be in the host's memory."""
        return self.most(HOST) if self.on_device else self.most(HOST, DEVICE)

    @property
    def fixed_device(self) -> float:
        """Bytes that must be on the accelerator, together with what kernels work on."""
        return self.most(DEVICE, NEAR) if self.on_device else 0.0

    def rooms(self, hardware: Hardware) -> Rooms:
        """What is left of the budgets for tensors that are handed out.

        Whatever kernels work on is counted when it is there, so that its place is kept free for it.
        """
        host = max(0.0, hardware.share - self.fixed_host)
        device = max(0.0, (hardware.accelerator or 0.0) - self.fixed_device)
        return Rooms(device if self.on_device else math.inf, host)

    def placed(self, hardware: Hardware) -> dict[str, dict[str, float]]:
        """Bytes by point and by where they end up, `device`, `host` and `file`, if budgets are kept."""
        room, found = self.rooms(hardware), {}
        for point, held in self.moments.items():
            sums = Counter()
            for item in held:
                sums[item.place] += item.bytes
            if self.on_device:
                on_device = min(sums[FAR], room.device)
                rest = sums[FAR] - on_device
                device, host = sums[DEVICE] + sums[NEAR] + on_device, sums[HOST]
            else:
                device, rest, host = 0.0, sums[NEAR] + sums[FAR], sums[DEVICE] + sums[HOST]
            in_host = min(rest, room.host)
            found[point] = {"device": device, "host": host + in_host, "file": rest - in_host}
        return found

    def peak(self, hardware: Hardware, place: str) -> float:
        """Bytes at the worst point."""
        return max(sums[place] for sums in self.placed(hardware).values())


class Estimate:
    """What `config` takes on `hardware`, with this plan; of one process, unless it says otherwise."""

    def __init__(self, config: Config, skeleton: Skeleton, plan: Plan, hardware: Hardware):
        self.config, self.skeleton, self.plan, self.hardware = config, skeleton, plan, hardware
        self.on_device = hardware.accelerator is not None
        self.kind = "cuda" if self.on_device else "cpu"
        self.device = torch.device(self.kind)
        self.ranks = Ranks(0, hardware.processes)
        self.share = self.ranks.share(config.calib.windows)
        self.length, self.width = config.calib.length, skeleton.dtype.itemsize
        self.outline = Outline(skeleton.checkpoint, skeleton.dtype, config.model.max_layers)
        self._traces: dict[tuple, Trace] = {}

    # Shapes

    @cached_property
    def layers(self) -> list[Layer]:
        """The kinds of layers that are walked."""
        kinds: dict[tuple, list[int]] = {}
        for index in range(self.skeleton.num_layers):
            prefix = self.skeleton.layer_names[index] + "."
            shapes = [(n, tuple(p.shape)) for n, p in self._parameters(index)]
            books = [(entry.name.removeprefix(prefix), entry.codebook) for entry in self.plan.targets(index)]
            kinds.setdefault((*shapes, *books), []).append(index)
        return [self._layer(indices) for indices in kinds.values()]

    def _parameters(self, index: int) -> Iterator[tuple[str, Tensor]]:
        return self.skeleton.model.get_submodule(self.skeleton.layer_names[index]).named_parameters()

    def _layer(self, indices: list[int]) -> Layer:
        index = indices[0]
        prefix = self.skeleton.layer_names[index] + "."
        entries = {entry.name.removeprefix(prefix): entry for entry in self.plan.targets(index)}
        matrices = {}
        for name, entry in entries.items():
            batch, rows, inputs = entry.shape if len(entry.shape) == 3 else (1, *entry.shape)
            matrices[name] = Matrix(name, batch, rows, inputs, entry.codebook, len(entry.shape) == 3)
        inputs = self.forward(index, 1).inputs
        groups: dict[tuple, list[Matrix]] = {}
        for name, matrix in matrices.items():
            read = name if matrix.fused else inputs.get(name.removesuffix(".weight"), name)
            groups.setdefault((read, matrix.codebook, self._stage(name)), []).append(matrix)
        stages: dict[str, list[Matrix]] = {}
        for name, matrix in matrices.items():
            stages.setdefault(self._stage(name), []).append(matrix)
        weights = sum(parameter.numel() for _, parameter in self._parameters(index))
        return Layer(
            index, len(indices), weights, tuple(Group(tuple(members)) for members in groups.values()),
            tuple(map(tuple, stages.values())),
        )  # fmt: skip

    def _stage(self, name: str) -> str:
        return "" if self.config.refine.stage == "layer" else name.split(".")[0]

    # Runs of a layer

    def forward(self, index: int, windows: int, module: str = "") -> Trace:
        """A forward pass of so many windows, through the layer or a module in it."""
        return self._trace(index, windows, self.length, (), module)

    def _trace(self, index: int, windows: int, length: int, learned: tuple[str, ...] = (), module: str = "") -> Trace:
        key = (index, windows, length, learned, module)
        if key not in self._traces:
            self._traces[key] = self.outline.trace(index, windows, length, learned, module)
        return self._traces[key]

    def parts(self, windows: int | None = None) -> list[int]:
        """Windows of each micro-batch of this process, over the first `windows` of all, or over all."""
        lanes = self.share.lanes if windows is None else self.share.below(windows)
        batch = self.config.calib.batch
        return [size for lane in lanes for size in _split(len(lane), batch)]

    @property
    def micro(self) -> int:
        """Windows in the largest micro-batch of a refinement step."""
        return min(self.config.calib.batch, -(-min(self.config.refine.windows, self._training) // LANES))

    @property
    def _training(self) -> int:
        return self.config.calib.windows - self.config.calib.validation

    @property
    def step_lanes(self) -> int:
        """Lanes of this process that have windows in a refinement step."""
        lanes = len(self.share.lanes)
        return max(1, min(lanes, math.ceil(self.config.refine.windows * lanes / LANES)))

    @property
    def needs_original(self) -> bool:
        """Whether the original stream is walked, too."""
        refine = self.config.refine
        return self.config.init.answer_original or (refine.enabled and refine.target == "stream")

    def _walk(self, index: int, parts: Iterable[int], until: str | None = None, module: str = "") -> Work:
        """Forward passes of micro-batches, through a layer or a module in it, or until the Linear `until` reads."""
        total, largest = Work(), max(self.parts())
        ends = [self.forward(index, windows, module) for windows in sorted({1, largest})]
        works = [trace.reached.get(until, trace.work) for trace in ends]
        for size, count in Counter(parts).items():
            share = (size - 1) / max(largest - 1, 1)
            total += (works[0] * (1 - share) + works[-1] * share) * count
        return total

    # Seconds

    def seconds(self) -> dict[str, dict[str, float]]:
        """Seconds by phase: of a layer on average (`layer`), and of the run (`run`)."""
        speed, totals = self.hardware.speed, Counter()
        for layer in self.layers:
            for phase, seconds in self.layer_seconds(layer, speed).items():
                totals[phase] += seconds * layer.times
        count = self.skeleton.num_layers
        averages = {phase: totals[phase] / count for phase in PHASES}
        files = READ * count * self.working.peak(self.hardware, "file") / speed.disk
        read = {"files": files} if files else {}
        return {"layer": averages, "run": {**self._before(speed), **totals, **read, **self._behind(speed)}}

    def layer_seconds(self, layer: Layer, speed: Speed) -> dict[str, float]:
        """Seconds by phase of one layer."""
        counted = {
            "load": self._load(layer, speed), "teacher": self._teacher(layer, speed),
            "hessian": sum(self._hessian(layer, group, speed) for group in layer.groups),
            "init": sum(self._init(group, speed) for group in layer.groups),
            "refine": sum(self._refine(layer, stage, speed) for stage in layer.stages),
            "push": self._passes(self._walk(layer.index, self.parts()), speed),
        }  # fmt: skip
        return {phase: counted[phase] for phase in PHASES}

    def _passes(self, work: Work, speed: Speed) -> float:
        """Seconds of modules at work, whose own code takes time between calls."""
        plain = replace(work, bytes=PLAIN * work.bytes, small=PLAIN * work.small, calls=MODULE * work.calls)
        return speed.seconds(plain)

    def _load(self, layer: Layer, speed: Speed) -> float:
        kept = self.width * layer.weights
        codes = sum(group.codes for group in layer.groups)
        compared = self.needs_original * SHOWN * self.stream / self.width
        return (kept + codes) / speed.disk + _over(codes, 12, codes, speed) + _over(compared, 1, compared, speed)

    def _teacher(self, layer: Layer, speed: Speed) -> float:
        """The original stream behind the layer, and what is wanted of each stage."""
        if not layer.groups:
            return self._passes(self._walk(layer.index, self.parts()), speed) * self.needs_original
        config, passes = self.config.refine, float(self.needs_original)
        if config.enabled:
            passes += sum(bool(self._module(stage)) or config.target == "layer" for stage in layer.stages)
        sample = self._walk(layer.index, [min(self.config.calib.batch, max(self.parts()))])
        sizes = _over(self.stream / self.width, SHOWN / 2, self.stream, speed) if config.enabled else 0.0
        return sizes + self._passes(self._walk(layer.index, self.parts()) * passes + sample, speed)

    def _hessian(self, layer: Layer, group: Group, speed: Speed) -> float:
        """Forward passes up to where a group reads, and the sums of what it reads."""
        first, parts = group.first, self.parts(self._training)
        until = None if first.fused else first.name.removesuffix(".weight")
        cross = self._cross(group)
        together = max(1, moments.OBSERVED.get(self.kind, moments.ELSEWHERE) // first.inputs**2)
        turns = -(-first.batch // together)
        forward = self._walk(layer.index, parts, until) * ((1 + cross) * turns)
        tokens = sum(parts) * self.length
        if first.fused:
            tokens *= max(1, self.forward(layer.index, 1).routed / self.length)
        sums = (1 + cross) * first.batch * first.inputs**2
        calls = len(parts) * first.batch * (1 + cross) * 3
        products = 2.0 * tokens * first.inputs**2 * (1 + cross)
        counted = Work(exact=products, bytes=PASS * tokens * first.inputs, calls=calls)
        lanes = len(self.share.lanes)
        return self._passes(forward, speed) + speed.seconds(counted) + _over(sums, 2 * lanes + 3, sums, speed)

    def _init(self, group: Group, speed: Speed) -> float:
        """GPTQ and polish of this process's share, with the errors that are reported."""
        first, init, book = group.first, self.config.init, group.first.codebook
        columns, weights = first.columns, group.codes / self.ranks.count
        rows = weights / columns
        squares = first.batch / (self.ranks.count if first.fused else 1)
        product = 2.0 * weights * columns  # of all rows with their Hessians
        levels = book.levels
        asymmetric = not book.offset and [-level for level in levels[::-1]] != list(levels)
        uneven = gptq_uneven(book)
        tries = (scales.CANDIDATES + 1) * (1 + asymmetric) + (scales.REGRESSIONS if book.offset else 1)
        search = tries * (SEARCH + SHIFTED * book.offset + BOUND * (min(len(levels), 16) - 1) * uneven)
        chunk = scales.CHUNK.get(self.kind, scales.ELSEWHERE)
        seconds = _over(weights, search, chunk, speed)
        products, passes, calls, factored = 2.0, 2.0 * ERROR, 0.0, 0.0
        if init.method == "gptq":
            seconds += _over(weights, search, min(rows * book.group_size, chunk), speed)
            seconds += self._columns(rows, columns, gptq.BLOCK, speed)
            products, passes, factored = products + 1.5, passes + ERROR + 6, factored + FACTOR * squares * columns**3
        if self._cross(group):
            products, factored = products + 2, factored + squares * columns**3 / 3
        if init.polish:
            sweeps, groups = 2 * (init.polish + 1), book.groups(columns) * (1 + book.offset)
            products += 1 + 1.5 * sweeps + 2 * init.polish
            passes += ERROR + (DECODE + 4) * sweeps + init.polish * (DECODE + 2)
            seconds += sweeps * self._columns(rows, columns, polish.BLOCK, speed)
            seconds += init.polish * _over(weights, 1.5 * groups, min(weights, polish.PRODUCTS), speed)
            systems = init.polish * rows
            calls += 0 if speed.ahead else systems  # of a library that factors one after the other
            factored += systems * groups**3
        seconds += speed.seconds(Work(exact=products * product, calls=calls)) + factored / speed.factors
        if book.rotation:
            passes += ROTATE
            seconds += _over(squares * columns**2, 2 * ROTATE, squares * columns**2, speed)
        return seconds + _over(weights, passes, weights, speed)

    def _columns(self, rows: float, columns: int, block: int, speed: Speed) -> float:
        """A loop over columns: each goes through some operations, and then into the others of its block."""
        if speed.ahead:  # a kernel that keeps the block at hand
            return _over(rows * columns, 4, rows * columns, speed) + rows * columns * block / speed.exact
        own = _over(rows * columns, COLUMN, rows, speed)
        return own + _over(rows * columns, block / 2 * 12 / PASS, rows * block / 2, speed)

    def _refine(self, layer: Layer, stage: tuple[Matrix, ...], speed: Speed) -> float:
        """Steps and checks of all objectives of a stage."""
        config = self.config.refine
        if not config.enabled or not stage:
            return 0.0
        codes = sum(matrix.codes for matrix in stage)
        own = codes / self.ranks.count
        relaxed = config.steps * sum(self._relaxed(matrix, speed) for matrix in stage)
        hard = 2 + config.checks + len(stage) * (len(stage) > 1)
        judged = _over(own, (DECODE + 3) * hard, own, speed)
        seconds = 0.0
        if config.objective != "hessian":
            seconds += config.steps * self._step(layer, stage, speed) + relaxed + judged
            seconds += hard * self._passes(self._walk(layer.index, self._judges(), module=self._module(stage)), speed)
        if config.objective != "output":
            product = sum(2.0 * matrix.codes * matrix.columns for matrix in stage) / self.ranks.count
            evaluations = config.steps + hard
            seconds += relaxed + judged + speed.seconds(Work(exact=evaluations * product))
            seconds += _over(own, 6 * evaluations, own, speed)
        free = sum(2.0 * matrix.codes * matrix.columns for matrix in stage) * 3 / self.ranks.count
        return seconds + speed.seconds(Work(exact=free)) + _over(own, 3 * ERROR, own, speed)

    def _step(self, layer: Layer, stage: tuple[Matrix, ...], speed: Speed) -> float:
        """Gradients of one step by this process's windows."""
        codes, lanes = sum(matrix.codes for matrix in stage), self.step_lanes
        windows = math.ceil(min(self.config.refine.windows, self._training) / self.ranks.count)
        batches = max(lanes, -(-windows // self.micro))
        once = self._learned(layer, stage).work
        if self.micro * batches != windows:
            once = once * (windows / (self.micro * batches))
        summed = _over(codes, 1.5 * batches + lanes + 1.5 * (lanes - 1), codes, speed)
        return self._passes(once * batches, speed) + summed

    def _judges(self) -> list[int]:
        lanes = self.share.places(range(self._training, self.config.calib.windows))
        return [size for lane in lanes for size in _split(len(lane), self.config.calib.batch)]

    def _relaxed(self, matrix: Matrix, speed: Speed) -> float:
        """Soft weights and the Lion step of one target's own rows."""
        weights = matrix.codes / self.ranks.count
        count = _logits(matrix.codebook)
        if speed.ahead:  # one kernel each, which read and write logits and momentum once
            held = count * (torch.float32 if self.config.refine.logits == "float32" else torch.bfloat16).itemsize
            nbytes = weights * (3 * held + 2 * count * gumbel.ELSEWHERE.itemsize + self.width + 8)
            return speed.seconds(Work(bytes=nbytes, calls=4))
        passes = count * (SOFT + STEP) + 2 * BESIDE
        if matrix.codebook.rotation:
            passes += 2 * ROTATE
        if self.config.refine.noise:
            passes += count * 30  # of counters and logarithms
        return _over(weights, passes, relaxation.CHUNK.get(self.kind, relaxation.ELSEWHERE), speed)

    def _module(self, stage: tuple[Matrix, ...]) -> str:
        """Path of the module that a stage runs; "" is the layer."""
        return common_module([matrix.name for matrix in stage])

    def _learned(self, layer: Layer, stage: tuple[Matrix, ...]) -> Trace:
        """A forward and backward pass of one micro-batch of a step."""
        names = tuple(matrix.name for matrix in stage)
        return self._trace(layer.index, self.micro, self.length, names, self._module(stage))

    def _before(self, speed: Speed) -> dict[str, float]:
        """Calibration text that the model writes itself."""
        calib = self.config.calib
        if calib.source != "self":
            return {}
        token = sum((self._trace(layer.index, 1, 1).work * layer.times for layer in self.layers), Work())
        batches = -(-calib.windows // SELF_BATCH)
        heads = 2.0 * self._head_weights * calib.windows * calib.length
        flops = token.flops * calib.windows * calib.length + heads
        read = batches * calib.length * self.width * (self._layer_weights + self._head_weights)
        return {"tokens": self._passes(Work(flops, bytes=read, calls=token.calls * batches * calib.length), speed)}

    def _behind(self, speed: Speed) -> dict[str, float]:
        """Export, its verification, and the evaluation of two models."""
        if not self.config.export.format:
            return {}
        summary = self.plan.summary()
        before, after, weights = (summary[key] for key in ("bytes_before", "bytes_after", "quantized_weights"))
        packed = _over(weights, 12, 1 << 24, speed)
        found = {
            "export": (before + 2 * after) / speed.disk + packed,
            "verify": (before + after) / speed.disk + 2 * packed,
        }
        settings = self.config.eval
        if settings.text:
            batches, rest = divmod(settings.windows, 8)
            work = Work()
            for layer in self.layers:
                once = self._trace(layer.index, 1, settings.length).work
                work += once * (layer.times * (8 * batches + rest))
            predicted = settings.windows * settings.length
            head = Work(2.0 * self._head_weights * predicted, bytes=PASS * predicted * self._vocabulary * 5)
            loaded = 2 * self.width * (self._layer_weights + 2 * self._head_weights) / speed.disk
            found["evaluate"] = 2 * self._passes(work + head, speed) + loaded
        return found

    # Memory

    @cached_property
    def working(self) -> Working:
        """What a process holds, by point of the run."""
        found = self._outside()
        for layer in self.layers:
            walked, held = [*self._always(), *self._of_layer(layer)], []
            where = f"layer {layer.index}"
            for stage in layer.stages:
                always = [*walked, *self._calls(layer, stage)]
                for group in (group for group in layer.groups if group.first in stage):
                    seen, name = [*always, *held], group.first.name
                    found[f"{where}, hessian {name}"] = (*seen, *self._while_observed(layer, group))
                    held += self._problems(group)
                    found[f"{where}, init {name}"] = (*always, *held, *self._while_initialized(group))
                if self.config.refine.enabled:
                    for name, more in self._while_refined(layer, stage).items():
                        found[f"{where}, {name}"] = (*always, *held, *more)
            found.setdefault(f"{where}, push", (*walked, *self._activations(layer, max(self.parts()))))
        return Working(found, self.on_device)

    @property
    def _hidden_size(self) -> int:
        return self.skeleton.model.get_input_embeddings().weight.shape[1]

    @property
    def _vocabulary(self) -> int:
        return self.skeleton.model.get_input_embeddings().weight.shape[0]

    @property
    def _head_weights(self) -> int:
        return self._vocabulary * self._hidden_size

    @property
    def _layer_weights(self) -> int:
        return sum(layer.weights * layer.times for layer in self.layers)

    @property
    def stream(self) -> int:
        """Bytes of the hidden states of this process's windows."""
        return len(self.share.numbers) * self.length * self._hidden_size * self.width

    def _base(self) -> Item:
        return Item("Python and its libraries", self.hardware.base, HOST)

    def _always(self) -> list[Item]:
        """Held as long as layers are walked."""
        calib, streams = self.config.calib, 1 + self.needs_original
        refine = self.config.refine
        behind = self.needs_original or (refine.enabled and refine.target == "layer")
        kwargs = self.outline.calls(max(self.parts()), self.length)[1]
        unique = {id(leaf): leaf for leaf in tree_leaves(kwargs) if isinstance(leaf, Tensor)}
        tokens = 8 * self.length * (calib.windows + streams * len(self.share.numbers))
        return [
            self._base(),
            Item("calibration tokens", tokens, HOST),
            Item("embedding", self.width * self._head_weights, DEVICE),
            Item("masks and positions", streams * 2 * sum(leaf.nbytes for leaf in unique.values()), DEVICE),
            Item("hidden states", (streams + behind) * self.stream, FAR),
            Item("products by shape", self._kernels(), HOST),
        ]

    def _kernels(self) -> float:
        """Bytes of what a CPU's library keeps for each number of tokens that an expert gets, in bfloat16.

        Numbers are spread over about one and a half times their mean; there are two products, and two more for the
        gradients of each.
        """
        if self.on_device or self.width == 4:
            return 0.0
        experts = [m.batch for layer in self.layers for stage in layer.stages for m in stage if m.fused]
        if not experts:
            return 0.0
        routed = max(self.forward(layer.index, 1).routed for layer in self.layers) / max(experts)
        back = 6 * self.micro if self.config.refine.enabled else 0
        each = KERNEL * math.sqrt(routed * max(self.parts()))
        return each * min(KERNELS, 1.5 * routed * (2 * max(self.parts()) + back))

    def _of_layer(self, layer: Layer) -> list[Item]:
        """Held as long as a layer is at work: the original, the one that becomes quantized, and the next one."""
        weights = self.width * layer.weights
        coming = [Item("next layer", weights, HOST)] if self.on_device else []
        codes = sum(group.codes for group in layer.groups)
        return [
            Item("layer, original and quantized", 2 * weights, NEAR),
            Item("codes", 1.1 * codes, DEVICE), *coming,
        ]  # fmt: skip

    def _calls(self, layer: Layer, stage: tuple[Matrix, ...]) -> list[Item]:
        """Recorded calls of the module that a stage refines, if that is not the layer: what it reads and puts out."""
        if not self.config.refine.enabled or not self._module(stage):
            return []
        one = self.forward(layer.index, 1, self._module(stage)).called
        return [Item("calls of the module", one * len(self.share.numbers), FAR)]

    def _activations(self, layer: Layer, windows: int) -> list[Item]:
        return [Item("activations", self.forward(layer.index, windows).peak, DEVICE)]

    def _cross(self, group: Group) -> bool:
        return self.config.init.answer_original and not group.first.fused

    def _own(self, matrix: Matrix) -> float:
        """Codes of this process."""
        return matrix.codes / self.ranks.count

    def _while_observed(self, layer: Layer, group: Group) -> list[Item]:
        first, sums = group.first, 1 + self._cross(group)
        square = first.inputs**2
        at_once = min(first.batch, max(1, moments.OBSERVED.get(self.kind, moments.ELSEWHERE) // square))
        live = _live(len(self.share.lanes)) + 2 * (self.ranks.count > 1)
        largest = max(self.parts())
        read = min(moments.CHUNK, largest * self.length) * first.inputs * 4 * sums
        return [
            Item("Hessians", 4 * sums * first.batch * square, NEAR),
            Item("Hessians of lanes", 4 * sums * live * at_once * square, DEVICE),
            Item("inputs in float32", read, DEVICE),
            *self._activations(layer, largest),
        ]

    def _problems(self, group: Group) -> list[Item]:
        """What refinement wants to know of a group."""
        own = sum(self._own(member) for member in group.members)
        share = self.ranks.count if group.first.fused and group.first.columns != group.first.inputs else 1
        return [Item("wanted weights", 4 * own, NEAR), Item("Hessians", 4 * group.squared / share, NEAR)]

    def _while_initialized(self, group: Group) -> list[Item]:
        """Temporaries of some experts, or of all rows, at their most: factoring, or polish."""
        first, init = group.first, self.config.init
        own = -(-first.batch // self.ranks.count) if first.fused else 1
        count = min(own, together(self.device, group.rows, first.columns))
        square, weights = 4 * count * first.columns**2, 4 * count * group.rows * first.columns
        work = weights if first.fused else weights / self.ranks.count
        factored = min(square, 4 * gptq.FACTORED)
        factoring = (square + 3 * factored + 0.5 * work) if init.method == "gptq" else 0.0
        if self._cross(group):
            factoring = max(factoring, 3 * square + weights)
        groups = first.codebook.groups(first.columns) * (1 + first.codebook.offset)
        refitted = min(work, 4 * polish.PRODUCTS)
        systems = 2 * min(work / first.columns * groups**2, 4 * polish.SYSTEMS)
        polishing = max(3.5 * work, 2 * work + 3 * refitted + systems) if init.polish else 3 * work
        aims = weights * (1 + self._cross(group) + (first.codebook.rotation is not None))
        sums = 4 * group.first.batch * first.inputs**2 * self._cross(group)
        return [
            Item("moments", sums, NEAR),
            Item("aims and Hessians of an init", aims + square, DEVICE),
            Item("GPTQ and polish", max(factoring, polishing), DEVICE),
        ]

    def _while_refined(self, layer: Layer, stage: tuple[Matrix, ...]) -> dict[str, list[Item]]:
        """When logits are made, while a step is taken, and when the hard result is judged."""
        config, own = self.config.refine, [self._own(matrix) for matrix in stage]
        moved = (torch.float32 if config.logits == "float32" else torch.bfloat16).itemsize
        moved += gumbel.MOMENTUM.get(self.kind, gumbel.ELSEWHERE).itemsize
        logits = sum(size * _logits(matrix.codebook) for size, matrix in zip(own, stage, strict=True))
        window = sum(size for size, m in zip(own, stage, strict=True) if len(m.codebook.levels) > gumbel.FULL)
        state = [Item("logits and momentum", moved * logits, NEAR), Item("windows of levels", window, DEVICE)]
        state.append(Item("best codes", 1.1 * sum(own), DEVICE))
        whole, largest = sum(matrix.codes for matrix in stage), max(own)
        step = [Item("soft weights", self.width * whole + self._soft(stage, own), DEVICE)]
        step.append(Item("tape of the relaxation", self._tape(stage, own), DEVICE))
        output = config.objective != "hessian"
        if output:
            step.append(Item("activations", self._learned(layer, stage).peak, DEVICE))
            step.append(Item("sums of gradients", 4 * whole * _live(self.step_lanes), NEAR))
            step.append(Item("exchange of gradients", 8 * max(m.codes for m in stage) * (self.ranks.count > 1), DEVICE))
        else:
            step.append(Item("gradients", 4 * (sum(own) + 3 * largest), DEVICE))
        width = self.width if output else 4
        hard = [Item("hard weights", width * (whole + sum(own) * (self.ranks.count > 1)), DEVICE)]
        hard.append(Item("judged codes", 1.1 * sum(own), DEVICE))
        hard += self._activations(layer, max(self._judges(), default=1)) if output else []
        freed = max(
            min(size, together(self.device, m.rows, m.columns) * m.rows * m.columns)
            for size, m in zip(own, stage, strict=True)
        )
        start = [Item("free weights", 4 * largest, NEAR), Item("finding free weights", 12 * freed, DEVICE)]
        return {"start": [*state, *start], "step": [*state, *step], "check": [*state, *hard]}

    def _soft(self, stage: tuple[Matrix, ...], own: list[float]) -> float:
        """Bytes of soft weights in float32, which exist beside those of the activations' dtype."""
        books = [matrix.codebook for matrix in stage]
        return max(4.0 * size * (b.rotation is not None or b.offset) for size, b in zip(own, books, strict=True))

    def _tape(self, stage: tuple[Matrix, ...], own: list[float]) -> float:
        """Bytes that a CPU keeps for the way back."""
        if self.on_device:
            return 0.0
        kept = [(size, m) for size, m in zip(own, stage, strict=True) if size <= relaxation.KEPT]
        return sum(4.0 * size * (_logits(matrix.codebook) + 1) for size, matrix in kept)

    def _outside(self) -> dict[str, Moment]:
        """Points of the run before and behind the walk."""
        found, calib, settings = {}, self.config.calib, self.config.eval
        model = sum(p.numel() for p in self.skeleton.model.parameters()) * self.width
        if calib.source == "self":
            logits = 16 * min(SELF_BATCH, calib.windows) * self._vocabulary
            found["tokens"] = (self._base(), Item("whole model", model, DEVICE), Item("logits", logits, DEVICE))
        if streams := len(flexible(self.skeleton, self.config.plan.all_rules, self.config.plan.sensitivity.widths)):
            sizes = self.config.plan.sensitivity
            hidden = 4 * (streams + 2) * sizes.windows * sizes.length * self._hidden_size
            largest = max(layer.weights for layer in self.layers)
            found["plan"] = (
                self._base(), Item("hidden states of each unit", hidden, DEVICE), Item("layer", 8 * largest, DEVICE)
            )  # fmt: skip
        if self.config.export.format and settings.text:
            hidden = 3 * settings.windows * settings.length * self._hidden_size * self.width
            largest = max(layer.weights for layer in self.layers) * self.width
            logits = DEVICE_LOGIT_BYTES if self.on_device else LOGIT_BYTES
            found["evaluate"] = (
                self._base(), Item("hidden states", hidden, HOST), Item("layer", largest, DEVICE),
                Item("embeddings and heads", 4 * self._head_weights * self.width, DEVICE),
                Item("logits", logits, DEVICE),
            )  # fmt: skip
        return found

    # Disk, and all in tables

    def disk(self) -> dict[str, float]:
        """Bytes on disk: the run folder, the export, hidden states that lie in files (of all processes here)."""
        layers = sum(entry.codebook.nbytes(entry.shape) for entry in self.plan.targets())
        export = self.plan.summary()["bytes_after"] if self.config.export.format else 0
        files = self.working.peak(self.hardware, "file") * self.hardware.local
        return {"run": layers + 8 * self.config.calib.windows * self.length, EXPORT: export, "files": files}

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return sum(self.seconds()["run"].values())

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
        placed = working.placed(hardware)
        point = max(placed, key=lambda point: placed[point]["device" if self.on_device else "host"])
        where = PLACES[self.on_device]
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


def estimate_for(config: Config, device: str | None, processes: int) -> tuple[Estimate, Path]:
    """The estimate of a config on this machine, or on so many GPUs of a name, and the folder of its files."""
    keep_freed_memory()
    here, folder = pick_device(), scratch(config, run_folder(config))
    if device is not None:
        hardware = Hardware.named(device, folder, processes)
        if config.dtype == "auto":
            config = config.model_copy(update={"dtype": "bfloat16"})
        return estimated(config, opened(config, here), None, hardware), folder
    skeleton = opened(config, here)
    width = skeleton.model.get_input_embeddings().weight.shape[1]
    hardware = Hardware.here(here, folder, processes).measured(here, skeleton.dtype, width)
    return estimated(config, skeleton, None, hardware), folder


def estimated(config: Config, skeleton: Skeleton, plan: Plan | None, hardware: Hardware) -> Estimate:
    """The estimate of a config within its budgets; without a plan, of one that needs no weights."""
    return Estimate(config, skeleton, plan or outlined(config, skeleton), hardware.limited(config))


def outlined(config: Config, skeleton: Skeleton) -> Plan:
    """A plan from headers alone: what weights would tell is taken to be as usual.

    Raises `UserError` for a plan that cannot hold.
    """
    rules, settings = config.plan.all_rules, config.plan
    found = dict.fromkeys(candidates(skeleton, rules), UNKNOWN_KURTOSIS)
    planned, open_ones = planner(config, skeleton, found), flexible(skeleton, rules, settings.sensitivity.widths)
    target = settings.target_bpw or 4.0
    refused = None
    for width in sorted(settings.sensitivity.widths, key=lambda width: abs(width - target)):
        bits = {name: min(widths, key=lambda own: abs(own - width)) for name, widths in open_ones.items()}
        try:
            return planned(bits)
        except UserError as error:  # the format of the export may not hold this width
            refused = refused or error
    raise refused


def scratch(config: Config, run: Path) -> Path:
    """Where hidden states lie that fit nowhere else."""
    return Path(config.memory.disk_dir) if config.memory.disk_dir else run / "scratch"


def rooms(config: Config, skeleton: Skeleton, plan: Plan, folder: Path) -> Rooms:
    """What `Memory` may fill in this process, on this machine; files go to `folder`.

    Half of the budgets, if the model's layers do not run without weights.
    """
    hardware = Hardware.here(skeleton.device, folder).limited(config)
    try:
        return estimated(config, skeleton, plan, hardware).working.rooms(hardware)
    except UntracedError:
        return Rooms(math.inf if hardware.accelerator is None else hardware.accelerator / 2, hardware.share / 2)


def refuse_unfit(config: Config, skeleton: Skeleton, folder: Path) -> None:
    """Raise `UserError` if what must be in memory exceeds a budget, or what else is held the disk of `folder`.

    Says nothing of a plan that cannot hold: whoever makes the plan itself does.
    """
    with suppress(UntracedError):
        try:
            plan = outlined(config, skeleton)
        except UserError:
            return
        check_fit(estimated(config, skeleton, plan, Hardware.here(skeleton.device, folder)), folder)


def check_fit(estimate: Estimate, folder: Path) -> None:
    """Raise `UserError` if a run does not fit; names numbers, the largest items, and what to change."""
    working, hardware = estimate.working, estimate.hardware
    advice = _advice(estimate.config)
    if working.on_device and working.fixed_device > hardware.accelerator:
        raise UserError(
            f"a run needs {units.size(working.fixed_device)} of each accelerator, and may take "
            f"{units.size(hardware.accelerator)} (memory.device_gb): {_largest(working, DEVICE, NEAR)}; {advice}"
        )
    host = hardware.share
    if working.fixed_host > host:
        places = (HOST,) if working.on_device else (HOST, DEVICE)
        raise UserError(
            f"each of {hardware.local} processes needs {units.size(working.fixed_host)} of the host's memory, and may "
            f"take {units.size(host)} (memory.host_gb): {_largest(working, *places)}; {advice}"
        )
    files = estimate.disk()["files"]
    if files > hardware.disk:
        raise UserError(
            f"{units.size(files)} of hidden states and the like must lie in files, but {folder} has "
            f"{units.size(hardware.disk)} free; let memory.disk_dir name a larger disk, raise memory.host_gb, or lower "
            "calib.windows or calib.length"
        )


def _largest(working: Working, *places: str) -> str:
    """The largest items in these places, where they are most."""
    total = lambda held: sum(item.bytes for item in held if item.place in places)  # noqa: E731
    point, held = max(working.moments.items(), key=lambda pair: total(pair[1]))
    items = sorted((item for item in held if item.place in places), key=lambda item: -item.bytes)[:3]
    return f"in {point}, " + ", ".join(f"{item.name} {units.size(item.bytes)}" for item in items)


def _advice(config: Config) -> str:
    """Settings that take less memory, as far as they are not in use."""
    options = {
        f"calib.batch (now {config.calib.batch})": config.calib.batch > 1,
        f"calib.length ({config.calib.length})": config.calib.length > 128,
        f"refine.windows ({config.refine.windows})": config.refine.windows > LANES,
    }
    lower = ", ".join(name for name, possible in options.items() if possible)
    others = [f"lower {lower}"] if lower else []
    if config.refine.enabled and config.refine.logits == "float32":
        others.append("set refine.logits: bfloat16")
    if config.refine.enabled and config.refine.stage == "layer":
        others.append("set refine.stage: module")
    return "; ".join([*others, "or start more processes, each with memory of its own"])


def _logits(codebook: Codebook) -> int:
    """Of each weight."""
    return len(codebook.levels) if len(codebook.levels) <= gumbel.FULL else gumbel.WINDOW


def gptq_uneven(codebook: Codebook) -> bool:
    """Whether levels are found by comparing with each bound between them."""
    from gsq.kernels.columns import spacing

    return spacing(codebook.levels) is None


def _live(lanes: int) -> int:
    """Sums of lanes that exist at once in `gsq.ranks.tree_sum`: one at each branch, and one that is made."""
    return max(1, math.ceil(math.log2(max(lanes, 1))) + 1)


def _split(total: int, step: int) -> list[int]:
    return [min(step, total - start) for start in range(0, total, step)]


def _over(numbers: float, passes: float, at_once: float, speed: Speed) -> float:
    """Seconds of `passes` over so many float32 `numbers`, worked on `at_once`."""
    if not numbers:
        return 0.0
    nbytes, calls = PASS * numbers * passes, passes * math.ceil(numbers / max(at_once, 1))
    small = min(at_once, numbers) * PASS <= CACHED
    return speed.seconds(Work(bytes=0.0 if small else nbytes, small=nbytes if small else 0.0, calls=calls))
