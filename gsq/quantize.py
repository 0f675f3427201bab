"""One decoder layer: observe, initialize, refine. What `gsq.train` does for every layer, in its own words.

A *group* is the targets that read one tensor (q, k, v): they share a Hessian and are initialized
together, after the groups before them. A *stage* is the targets refined together against the output
of the smallest module that holds them all.
"""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor, nn

from gsq.calib.hessian import Moments, answer_original
from gsq.calib.observe import ObserveLinears, shared_inputs
from gsq.calib.stream import Calls, Stream, layer_calls
from gsq.codebook import Codebook, QuantizedTensor
from gsq.errors import UserError
from gsq.init.gptq import damped, gptq
from gsq.init.polish import free_values, polish, quadratic, row_errors
from gsq.init.rtn import round_to_nearest
from gsq.model.skeleton import SeenEnough
from gsq.ranks import Ranks
from gsq.refine.loop import Quantized, Refined, Schedule, refine
from gsq.refine.objective import HessianObjective, Objective, OutputObjective, epochs, token_sizes, token_weights

Event = Callable[..., None]
METHODS = ("rtn", "gptq", "polish")
TOGETHER = {"cpu": 1 << 26}  # entries of the Hessians, and weights, of experts that are initialized at once; some
ELSEWHERE = 1 << 31  # copies of them live


@dataclass(frozen=True)
class Recipe:
    """Numbers that a layer is quantized with; see the configuration for what they mean."""

    method: str
    damping: float
    polish: int
    answer_original: bool
    expert_prior: float
    objectives: tuple[str, ...]  # refined one after the other
    stream_target: bool
    whole_layer: bool
    schedule: Schedule
    windows_per_step: int
    held_out: int
    seed: int

    @property
    def needs_original(self) -> bool:
        """Whether the original model's hidden states are walked beside the quantized ones."""
        return self.stream_target or self.answer_original


@dataclass
class Problem:
    """What a process's own rows of a target aim at, in the basis of its codebook.

    `wanted` `[batch, out, columns]` and `hessian` `[batch, columns, columns]`, damped and per token.
    """

    wanted: Tensor
    hessian: Tensor


@dataclass
class Timer:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str):
        """Count the time of a block."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


class LayerWork:
    """The state of one layer at work: the original module, the one that becomes quantized, and what was found."""

    def __init__(
        self, index: int, original: nn.Module, stream: Stream, originals: Stream | None,
        codebooks: dict[str, Codebook], recipe: Recipe, event: Event, ranks: Ranks,
    ):  # fmt: skip
        """`codebooks` by the targets' names inside the layer; `event(kind, **fields)` takes what was measured.

        The streams hold this process's windows.
        """
        self.index, self.original, self.stream, self.originals = index, original, stream, originals
        self.codebooks, self.recipe, self.event, self.ranks = codebooks, recipe, event, ranks
        self.device, self.memory = stream.skeleton.device, stream.memory
        self.current = self.memory.copied(original)
        self.timer = Timer()
        self.quantized: Quantized = {}
        self.problems: dict[str, Problem] = {}
        self.errors: dict[str, dict] = {}

    def run(self) -> tuple[Quantized, Tensor | None]:
        """Quantize every target; returns them by name inside the layer, and the original stream behind the layer."""
        with self.timer("teacher"):
            behind = self.originals.outputs(self.original, self.index) if self.recipe.needs_original else None
        groups = self._groups()
        for targets in self._stages(groups):
            module_path = common_module(targets)
            if self.recipe.objectives:
                with self.timer("teacher"):
                    calls, wanted, sizes = self._teacher(module_path, behind)
            for group in groups:
                if set(group) <= set(targets):
                    self._initialize(group)
            if self.recipe.objectives:
                with self.timer("refine"):
                    self._refine(targets, module_path, calls, wanted, token_weights(sizes, self.ranks))
                del calls, wanted
            self.problems.clear()
            for name in targets:
                self.event("target", layer=self.index, target=name, **self.errors[name])
        return self.quantized, behind

    def _groups(self) -> list[list[str]]:
        """Targets that share inputs, codebook and stage, in the order in which the layer reads them."""
        stream = self.stream
        run = lambda: stream.run(self.original, self.index, slice(0, stream.batch.windows))  # noqa: E731
        groups = []
        for group in stream.batch.fitted(lambda: shared_inputs(self.original, self.codebooks, run)):
            alike: dict[tuple, list[str]] = {}
            for name in group:
                alike.setdefault((self.codebooks[name], self._stage_of(name)), []).append(name)
            groups += alike.values()
        return groups

    def _stage_of(self, name: str) -> str:
        """The layer (""), or the direct child of it that holds a target."""
        return "" if self.recipe.whole_layer else name.split(".")[0]

    def _stages(self, groups: list[list[str]]) -> list[list[str]]:
        """All targets of the layer, or those of each of its direct children; none of a layer that is kept."""
        stages: dict[str, list[str]] = {}
        for name in (name for group in groups for name in group):
            stages.setdefault(self._stage_of(name), []).append(name)
        return list(stages.values())

    def _teacher(self, module_path: str, behind: Tensor | None) -> tuple[Calls, Tensor, Tensor]:
        """Calls of a stage's module, what it must put out `[windows, length, H]`, and token sizes behind the layer.

        That is its own output before its targets are quantized; for the stream target, plus what the layer's
        output lacks from the original stream, which the last module of a layer adds to.
        """
        if module_path:
            return self._recorded(module_path, behind)
        calls = layer_calls(self.stream, self.index)
        wanted = behind if self.recipe.stream_target else self.stream.outputs(self.current, self.index)
        return calls, wanted, self._sizes(wanted if behind is None else behind)

    def _recorded(self, module_path: str, behind: Tensor | None) -> tuple[Calls, Tensor, Tensor]:
        """The same for a module inside the layer, whose calls must be kept."""
        aimed = self.recipe.stream_target and self._is_last(module_path)

        def record() -> tuple[Calls, Tensor, list[Tensor]]:
            calls = Calls(self.stream.tokens.shape[1], len(self.stream.tokens), self.memory)
            sizes, windows = [], 0
            hook = calls.hook(lambda: windows)
            handle = self.current.get_submodule(module_path).register_forward_hook(hook, with_kwargs=True)
            try:
                for part in self.stream.parts():
                    windows = part.stop - part.start
                    reached = self.stream.run(self.current, self.index, part)
                    goal = reached if behind is None else behind[part].to(self.device)
                    sizes.append(token_sizes(goal))
                    if aimed:
                        output = calls.outputs[part]
                        output.copy_(output.to(self.device) + (goal - reached).view_as(output))
            finally:
                handle.remove()
            return calls, calls.outputs, torch.cat(sizes)

        return self.stream.batch.fitted(record)

    def _sizes(self, hidden: Tensor) -> Tensor:
        return torch.cat([token_sizes(hidden[part].to(self.device)) for part in self.stream.parts()])

    def _initialize(self, group: list[str]) -> None:
        """Quantize one group by the recipe's method, and put the result into the current layer."""
        with self.timer("hessian"):
            moments = self._observe(group)
            hessians = moments.shrunk(self.recipe.expert_prior)  # [batch, in, in]
        with self.timer("init"):
            given = [self.original.get_parameter(name) for name in group]
            ends = torch.tensor([w.shape[-2] for w in given]).cumsum(0).tolist()
            rows = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
            try:
                found, errors = self._initialized(group, rows, given, moments, hessians)
            except torch.linalg.LinAlgError:
                raise UserError(
                    f"layer {self.index}, {group[0]}: the Hessian is not positive definite; raise init.damping"
                ) from None
            for name, w, own in zip(group, given, rows, strict=True):
                self._set(name, found.rows(own.start, own.stop).shaped(*w.shape[:-1]))
                self.errors[name] = errors | {"gsq": None}
        if len(moments.tokens) > 1:
            self.event("coverage", layer=self.index, target=group[0], tokens=moments.tokens.tolist())

    def _initialized(
        self, group: list[str], rows: list[slice], given: list[Tensor], moments: Moments, hessians: Tensor
    ) -> tuple[QuantizedTensor, dict]:
        """A group as one batch `[batch, out, columns]`, of which each has its `rows`; and its relative errors.

        Each process does its own experts, some at a time, or its own rows. What refinement wants to know of them
        is kept.
        """
        codebook, experts = self.codebooks[group[0]], given[0].ndim == 3
        own = self.ranks.span(len(hessians)) if experts else slice(0, 1)
        problems = self._room(group, rows, own, hessians, codebook.columns(hessians.shape[-1]), experts)
        parts, sums = [], Counter()
        for some in self._experts(own, rows[-1].stop, hessians.shape[-1]):
            joined = torch.cat([(w[some] if experts else w[None]).float() for w in given], dim=1)
            hessian = damped(hessians[some], self.recipe.damping)
            aim = joined if moments.cross is None else answer_original(joined, moments, hessian)
            aim, hessian = codebook.rotate(aim), codebook.rotate_moments(hessian)
            place = slice(some.start - own.start, some.stop - own.start)
            for problem, part in zip(problems, rows, strict=True):
                problem.hessian[place] = hessian
                problem.wanted[place] = aim[:, part] if experts else aim[:, part][:, self._span(part)]
            found = self._quantize(aim if experts else aim[:, self.ranks.span(aim.shape[1])], hessian, codebook, sums)
            parts.append(found)
        self.problems |= zip(group, problems, strict=True)
        dim, length = (0, len(hessians)) if experts else (1, rows[-1].stop)
        join = lambda t: self.ranks.joined(t.transpose(0, dim), length).transpose(0, dim)  # noqa: E731
        return QuantizedTensor.stacked(parts, dim=0).map(join), self._relative(sums)

    def _room(
        self, group: list[str], rows: list[slice], own: slice, hessians: Tensor, columns: int, experts: bool
    ) -> list[Problem]:
        """Where the problems of a group will be; all share a Hessian, which takes the place of the given one."""
        count, kept = own.stop - own.start, hessians[own]
        if columns != hessians.shape[-1]:
            kept = self.memory.empty((count, columns, columns), torch.float32, near=True)
        sizes = [part.stop - part.start for part in rows]
        sizes = sizes if experts else [span.stop - span.start for span in map(self.ranks.span, sizes)]
        return [Problem(self.memory.empty((count, n, columns), torch.float32, near=True), kept) for n in sizes]

    def _experts(self, own: slice, rows: int, columns: int) -> Iterator[slice]:
        """Some of the process's own experts, of so many rows and columns, at a time."""
        step = experts_at_once(self.device, rows, columns)
        return (slice(start, min(start + step, own.stop)) for start in range(own.start, own.stop, step))

    def _span(self, rows: slice) -> slice:
        """This process's share of the rows of one target."""
        return self.ranks.span(rows.stop - rows.start)

    def _quantize(self, aim: Tensor, hessian: Tensor, codebook: Codebook, sums: Counter) -> QuantizedTensor:
        """RTN or GPTQ, then polish, all in the codebook's basis; adds up the squared error after each, and of zero."""
        sums["zero"] += float(quadratic(aim, hessian).sum())
        error = lambda q: float(row_errors(aim, q, hessian).sum())  # noqa: E731
        importance = hessian.diagonal(dim1=-2, dim2=-1)[:, None]
        found = round_to_nearest(aim, codebook, importance)
        sums["rtn"] += error(found)
        if self.recipe.method == "gptq":
            found = gptq(aim, hessian, codebook)
            sums["gptq"] += error(found)
        if self.recipe.polish:
            found = polish(aim, found, hessian, self.recipe.polish)
            sums["polish"] += error(found)
        return found

    def _relative(self, sums: Counter) -> dict[str, float | None]:
        """Errors of all processes by method, relative to that of zero; None for what the recipe leaves out."""
        size, *errors = self.ranks.total(*(sums[kind] for kind in ("zero", *METHODS)))
        relative = dict(zip(METHODS, errors, strict=True))
        return {kind: error / max(size, 1e-30) if kind in sums else None for kind, error in relative.items()}

    @torch.no_grad()
    def _observe(self, group: list[str]) -> Moments:
        """Second moments of what a group reads, over the windows that are not held out."""
        first = self.current.get_parameter(group[0])
        fused = first.ndim == 3
        cross = self.recipe.answer_original and not fused  # experts see other tokens in the original model

        def observe(moments: Moments, lane: range) -> None:
            moments.forget()  # what a try that ran out of memory had counted
            for part in self.stream.parts([lane]):
                answers: dict[str, Tensor] = {}
                if cross:
                    self._watch(self.original, self.originals, group[0], part, lambda e, x, a=answers: a.update(x=x))
                add = lambda e, x, a=answers: moments.add(e, x, a.get("x"))  # noqa: E731
                self._watch(self.current, self.stream, group[0], part, add)

        share, batch = self.stream.share, first.shape[0] if fused else 1
        training = share.below(share.total - self.recipe.held_out)
        fitted = lambda moments, lane: self.stream.batch.fitted(lambda: observe(moments, lane))  # noqa: E731
        moments = Moments.over(training, fitted, self.ranks, batch, first.shape[-1], self.memory, cross)
        if not moments.tokens.any():
            raise UserError(
                f"layer {self.index} never multiplies with {group[0]} as a Linear does (transposed or unused weights "
                "cannot be quantized); add a rule with keep: true for it"
            )
        return moments

    def _watch(
        self, layer: nn.Module, stream: Stream, name: str, part: slice, see: Callable[[int, Tensor], None]
    ) -> None:
        """Run a layer and show what `name` reads; a Linear reads once, so the rest of the layer is not run."""
        weight = layer.get_parameter(name)

        def seen(_: str, expert: int, x: Tensor) -> None:
            see(expert, x)
            if weight.ndim == 2:
                raise SeenEnough

        with suppress(SeenEnough), ObserveLinears({name: weight}, seen):
            stream.run(layer, self.index, part)

    def _is_last(self, module_path: str) -> bool:
        children = [name.split(".")[0] for name in self.codebooks]
        return children[-1] == module_path.split(".")[0]

    def _refine(self, targets: list[str], module_path: str, calls: Calls, wanted: Tensor, weights: Tensor) -> None:
        """Refine one stage by each objective in turn."""
        schedule, init = self.recipe.schedule, {name: self.quantized[name] for name in targets}
        inside = {name: name.removeprefix(module_path + ".") if module_path else name for name in targets}
        outside = {short: name for name, short in inside.items()}
        for number, objective_name in enumerate(self.recipe.objectives):
            objective = self._objective(objective_name, inside, module_path, calls, wanted, weights)
            dtype = wanted.dtype if objective_name == "output" else torch.float32
            start = time.perf_counter()
            error = lambda q, o=objective, dtype=dtype: self._error(o, inside, q, dtype)  # noqa: E731
            if number and error(init) < error(self.quantized):
                for name in targets:
                    self._set(name, init[name])
            refined = refine(
                {inside[name]: self._own(self.quantized[name]) for name in targets},
                lambda short: self._free_values(outside[short]),
                objective,
                schedule,
                self.recipe.seed,
                {inside[name]: zlib.crc32(f"{self.index}.{name}".encode()) for name in targets},
                lambda step, loss, at, o=objective_name: self.event(
                    "step", layer=self.index, stage=module_path or "layer", objective=o, step=step,
                    steps=schedule.steps, loss=loss, lr=at.lr, tau=at.tau, kappa=at.kappa,
                ),
                {inside[name]: self._first(name) for name in targets},
                dtype,
                self.memory,
            )  # fmt: skip
            self._take(refined, inside, module_path, objective_name, time.perf_counter() - start)

    def _objective(
        self, name: str, inside: dict[str, str], module_path: str, calls: Calls, wanted: Tensor, weights: Tensor
    ) -> Objective:
        if name == "hessian":
            return HessianObjective(
                {short: self.problems[full].wanted for full, short in inside.items()},
                {short: self.problems[full].hessian for full, short in inside.items()},
                {short: self.codebooks[full] for full, short in inside.items()},
                self.ranks,
            )
        module = self.current.get_submodule(module_path)
        recipe = self.recipe
        order = epochs(recipe.seed * 1009 + self.index)
        return OutputObjective(
            module, calls, wanted, weights, recipe.held_out, recipe.windows_per_step, self.stream.batch, order,
            self.ranks, self.stream.share, self.memory,
        )  # fmt: skip

    def _take(self, refined: Refined, inside: dict[str, str], module_path: str, objective: str, seconds: float) -> None:
        for full, short in inside.items():
            whole = self.quantized[full].codes.shape[0]
            self._set(full, refined.targets[short].map(lambda own, n=whole: self.ranks.joined(own, n)))
            self.errors[full]["gsq"] = self._relative_error(full)
        self.event(
            "stage", layer=self.index, stage=module_path or "layer", objective=objective, error_init=refined.error_init,
            error_final=refined.error_final, accepted=refined.error_final < refined.error_init,
            best_step=refined.best_step, steps=self.recipe.schedule.steps, seconds=seconds,
        )  # fmt: skip

    def _error(self, objective: Objective, inside: dict[str, str], quantized: Quantized, dtype: torch.dtype) -> float:
        return objective.error({short: self._own(quantized[full]).dequantize(dtype) for full, short in inside.items()})

    def _own(self, quantized: QuantizedTensor) -> QuantizedTensor:
        """This process's rows, or experts, of a target."""
        span = self.ranks.span(quantized.codes.shape[0])
        return quantized.map(lambda t: t[span])

    def _first(self, name: str) -> int:
        """Number of this process's first weight in a target."""
        codes = self.quantized[name].codes
        return self.ranks.span(len(codes)).start * codes[0].numel()

    def _free_values(self, name: str) -> Tensor:
        """Where each own weight of a target would like to be, in its codebook's basis: the start of its logits."""
        wanted = self.problems[name].wanted
        free = self.memory.empty(wanted.shape, torch.float32, near=True)
        for some, quantized, problem in self._pieces(name):
            free[some] = free_values(problem.wanted, quantized, problem.hessian)
        return free.view(self._own(self.quantized[name]).codes.shape)

    def _relative_error(self, name: str) -> float:
        """`tr(D H D^T) / tr(W H W^T)` of a target as it is now."""
        error = size = 0.0
        for _, quantized, problem in self._pieces(name):
            error += float(row_errors(problem.wanted, quantized, problem.hessian).sum())
            size += float(quadratic(problem.wanted, problem.hessian).sum())
        error, size = self.ranks.total(error, size)
        return error / max(size, 1e-30)

    def _pieces(self, name: str) -> Iterator[tuple[slice, QuantizedTensor, Problem]]:
        """Some of a target's own matrices at a time, as they are now, and what they aim at."""
        problem = self.problems[name]
        batched = self._own(self.quantized[name]).shaped(*problem.wanted.shape[:-1])
        for some in self._experts(slice(0, len(problem.wanted)), *problem.wanted.shape[1:]):
            yield some, batched.map(lambda t, s=some: t[s]), Problem(problem.wanted[some], problem.hessian[some])

    def _set(self, name: str, quantized: QuantizedTensor) -> None:
        self.quantized[name] = quantized
        parameter = self.current.get_parameter(name)
        parameter.data.copy_(quantized.dequantize(parameter.dtype))


def experts_at_once(device: torch.device, rows: int, columns: int) -> int:
    """Experts that are initialized at once."""
    return max(1, TOGETHER.get(device.type, ELSEWHERE) // (columns * max(rows, columns)))


def common_module(targets: list[str]) -> str:
    """Path of the smallest module that holds all `targets`; "" is the layer itself.

    A single Linear stands inside its parent, whose output depends on more than that product.
    """
    paths = [name.split(".")[:-1] for name in targets]
    path = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]
    if len(targets) == 1 and targets[0].endswith(".weight"):
        path = path[:-1]
    return ".".join(path)


def quantized_layer(original: nn.Module, quantized: Quantized) -> nn.Module:
    """The layer as it will be served: `original`, which is changed, with decoded weights."""
    for name, q in quantized.items():
        parameter = original.get_parameter(name)
        parameter.data.copy_(q.dequantize(parameter.dtype))
    return original
