"""One decoder layer: observe, initialize, refine. What `gsq.train` does for every layer, in its own words.

A *group* is the targets that read one tensor (q, k, v): they share a Hessian and are initialized
together, after the groups before them. A *stage* is the targets refined together against the output
of the smallest module that holds them all.
"""

from __future__ import annotations

import copy
import time
import zlib
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import accumulate, takewhile

import torch
from torch import Tensor, nn

from gsq.calib.hessian import Moments, answer_original
from gsq.calib.observe import ObserveLinears, shared_inputs
from gsq.calib.stream import Calls, Stream
from gsq.codebook import Codebook, QuantizedTensor
from gsq.errors import UserError
from gsq.init.gptq import damped, gptq
from gsq.init.polish import free_values, polish, relative_error, row_errors
from gsq.init.rtn import round_to_nearest
from gsq.model.skeleton import SeenEnough
from gsq.ranks import Ranks
from gsq.refine.loop import Quantized, Refined, Schedule, refine
from gsq.refine.objective import HessianObjective, Objective, OutputObjective, epochs, token_weights

Event = Callable[..., None]


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
        self.current = copy.deepcopy(original)
        self.timer = Timer()
        self.quantized: Quantized = {}
        self.hessians: dict[str, Tensor] = {}  # these two in the codebook's basis
        self.wanted: dict[str, Tensor] = {}
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
                    calls, reached = self._record(module_path)
            for group in groups:
                if set(group) <= set(targets):
                    self._initialize(group)
            if self.recipe.objectives:
                wanted = self._wanted_output(module_path, calls, behind, reached)
                weights = token_weights(reached if behind is None else behind, self.ranks)
                with self.timer("refine"):
                    self._refine(targets, module_path, calls, wanted, weights)
            for name in targets:
                self.event("target", layer=self.index, target=name, **self.errors[name])
        return self.quantized, behind

    def _groups(self) -> list[list[str]]:
        """Targets that share inputs, codebook and stage, in the order in which the layer reads them."""
        sample = slice(0, min(self.stream.batch, len(self.stream.tokens)))
        run = lambda: self.stream.run(self.original, self.index, sample)  # noqa: E731
        groups = []
        for group in shared_inputs(self.original, self.codebooks, run):
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

    def _record(self, module_path: str) -> tuple[Calls, Tensor]:
        """Calls of a module, outputs included, before its targets are quantized; and the layer's output."""
        module = self.current.get_submodule(module_path)
        calls = Calls(self.stream.tokens.shape[1])
        size = 0
        handle = module.register_forward_hook(calls.hook(lambda: size), with_kwargs=True)
        outputs = []
        try:
            for part in self.stream.parts():
                size = part.stop - part.start
                output = self.stream.run(self.current, self.index, part)
                if module_path:  # the layer's own calls hold it already
                    outputs.append(output)
        finally:
            handle.remove()
        calls.finish()
        return calls, torch.cat(outputs) if module_path else calls.outputs

    def _initialize(self, group: list[str]) -> None:
        """Quantize one group by the recipe's method, and put the result into the current layer."""
        with self.timer("hessian"):
            moments = self._observe(group)
            hessian = damped(moments.shrunk(self.recipe.expert_prior), self.recipe.damping)
        with self.timer("init"):
            codebook = self.codebooks[group[0]]
            given = [self.original.get_parameter(name).float() for name in group]
            rows = [w.shape[-2] for w in given]
            joined = torch.cat([w if w.ndim == 3 else w[None] for w in given], dim=1)  # [batch, out, in]
            try:
                aim = joined if moments.cross is None else answer_original(joined, moments, hessian)
                aim, hessian = codebook.rotate(aim), codebook.rotate_moments(hessian)
                found, errors = self._quantize(aim, hessian, codebook, given[0].ndim == 3)
            except torch.linalg.LinAlgError:
                raise UserError(
                    f"layer {self.index}, {group[0]}: the Hessian is not positive definite; raise init.damping"
                ) from None
            ends = list(accumulate(rows))
            for name, w, start, end in zip(group, given, [0, *ends], ends, strict=False):
                self.wanted[name], self.hessians[name] = aim[:, start:end], hessian
                self._set(name, found.rows(start, end).shaped(*w.shape[:-1]))
                self.errors[name] = errors | {"gsq": None}
        if len(moments.tokens) > 1:
            self.event("coverage", layer=self.index, target=group[0], tokens=moments.tokens.tolist())

    def _quantize(
        self, aim: Tensor, hessian: Tensor, codebook: Codebook, experts: bool
    ) -> tuple[QuantizedTensor, dict]:
        """RTN or GPTQ, then polish, all in the codebook's basis; with the relative error after each.

        Each process does its own experts, or rows.
        """
        dim, ranks = 0 if experts else 1, self.ranks
        length = aim.shape[dim]
        span = ranks.span(length)
        aim, hessian = (aim[span], hessian[span]) if experts else (aim[:, span], hessian)
        [size] = ranks.total(float(((aim.float() @ hessian) * aim.float()).sum()))
        relative = lambda q: ranks.total(float(row_errors(aim, q, hessian).sum()))[0] / max(size, 1e-30)  # noqa: E731
        importance = hessian.diagonal(dim1=-2, dim2=-1)[:, None]
        found = round_to_nearest(aim, codebook, importance)
        errors = {"rtn": relative(found), "gptq": None, "polish": None}
        if self.recipe.method == "gptq":
            found = gptq(aim, hessian, codebook)
            errors["gptq"] = relative(found)
        if self.recipe.polish:
            found = polish(aim, found, hessian, self.recipe.polish)
            errors["polish"] = relative(found)
        join = lambda own: ranks.joined(own.transpose(0, dim), length).transpose(0, dim)  # noqa: E731
        return found.map(join), errors

    @torch.no_grad()
    def _observe(self, group: list[str]) -> Moments:
        """Second moments of what a group reads, over the windows that are not held out."""
        first = self.current.get_parameter(group[0])
        fused = first.ndim == 3
        cross = self.recipe.answer_original and not fused  # experts see other tokens in the original model

        def observe(moments: Moments, lane: range) -> None:
            for part in self.stream.parts([lane]):
                answers: dict[str, Tensor] = {}
                if cross:
                    self._watch(self.original, self.originals, group[0], part, lambda e, x, a=answers: a.update(x=x))
                add = lambda e, x, a=answers: moments.add(e, x, a.get("x"))  # noqa: E731
                self._watch(self.current, self.stream, group[0], part, add)

        share, batch = self.stream.share, first.shape[0] if fused else 1
        training = share.below(share.total - self.recipe.held_out)
        moments = Moments.over(training, observe, self.ranks, batch, first.shape[-1], self.stream.hidden.device, cross)
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

    def _wanted_output(self, module_path: str, calls: Calls, behind: Tensor | None, reached: Tensor) -> Tensor:
        """What the stage's module must put out, `[windows, length, H]`.

        Its own output with original weights; for the stream target, plus what the layer's output
        lacks from the original stream, which the last module of a layer adds to.
        """
        if not self.recipe.stream_target:
            return calls.outputs
        if module_path == "":
            return behind
        last = self._is_last(module_path)
        return calls.outputs + (behind - reached).view_as(calls.outputs) if last else calls.outputs

    def _is_last(self, module_path: str) -> bool:
        children = [name.split(".")[0] for name in self.codebooks]
        return children[-1] == module_path.split(".")[0]

    def _refine(self, targets: list[str], module_path: str, calls: Calls, wanted: Tensor, weights: Tensor) -> None:
        """Refine one stage by each objective in turn."""
        schedule, init = self.recipe.schedule, {name: self.quantized[name] for name in targets}
        inside = {name: name.removeprefix(module_path + ".") if module_path else name for name in targets}
        for number, objective_name in enumerate(self.recipe.objectives):
            objective = self._objective(objective_name, inside, module_path, calls, wanted, weights)
            start = time.perf_counter()
            if number and self._error(objective, inside, init) < self._error(objective, inside, self.quantized):
                for name in targets:
                    self._set(name, init[name])
            refined = refine(
                {inside[name]: self._own(self.quantized[name]) for name in targets},
                {inside[name]: self._free_values(name) for name in targets},
                objective,
                schedule,
                self.recipe.seed,
                {inside[name]: zlib.crc32(f"{self.index}.{name}".encode()) for name in targets},
                lambda step, loss, at, o=objective_name: self.event(
                    "step", layer=self.index, stage=module_path or "layer", objective=o, step=step,
                    steps=schedule.steps, loss=loss, lr=at.lr, tau=at.tau, kappa=at.kappa,
                ),
                {inside[name]: self._first(name) for name in targets},
                wanted.dtype if objective_name == "output" else torch.float32,
            )  # fmt: skip
            self._take(refined, inside, module_path, objective_name, time.perf_counter() - start)

    def _objective(
        self, name: str, inside: dict[str, str], module_path: str, calls: Calls, wanted: Tensor, weights: Tensor
    ) -> Objective:
        if name == "hessian":
            own = {full: self._own_problem(full) for full in inside}
            return HessianObjective(
                {short: own[full][0] for full, short in inside.items()},
                {short: own[full][1] for full, short in inside.items()},
                {short: self.codebooks[full] for full, short in inside.items()},
                self.ranks,
            )
        module = self.current.get_submodule(module_path)
        recipe = self.recipe
        order = epochs(recipe.seed * 1009 + self.index)
        return OutputObjective(
            module, calls, wanted, weights, recipe.held_out, recipe.windows_per_step, self.stream.batch, order,
            self.ranks, self.stream.share,
        )  # fmt: skip

    def _take(self, refined: Refined, inside: dict[str, str], module_path: str, objective: str, seconds: float) -> None:
        for full, short in inside.items():
            whole = self.quantized[full].codes.shape[0]
            self._set(full, refined.targets[short].map(lambda own, n=whole: self.ranks.joined(own, n)))
            self.errors[full]["gsq"] = relative_error(self.wanted[full], self._batched(full), self.hessians[full])
        self.event(
            "stage", layer=self.index, stage=module_path or "layer", objective=objective, error_init=refined.error_init,
            error_final=refined.error_final, accepted=refined.error_final < refined.error_init,
            best_step=refined.best_step, steps=self.recipe.schedule.steps, seconds=seconds,
        )  # fmt: skip

    def _error(self, objective: Objective, inside: dict[str, str], quantized: Quantized) -> float:
        return objective.error({short: self._own(quantized[full]).dequantize() for full, short in inside.items()})

    def _own(self, quantized: QuantizedTensor) -> QuantizedTensor:
        """This process's rows, or experts, of a target."""
        span = self.ranks.span(quantized.codes.shape[0])
        return quantized.map(lambda t: t[span])

    def _first(self, name: str) -> int:
        """Number of this process's first weight in a target."""
        codes = self.quantized[name].codes
        return self.ranks.span(len(codes)).start * codes[0].numel()

    def _own_problem(self, name: str) -> tuple[Tensor, Tensor]:
        """The wanted values `[batch, out, columns]` of this process's rows or experts, and their Hessians."""
        wanted, hessian = self.wanted[name], self.hessians[name]
        span = self.ranks.span(self.quantized[name].codes.shape[0])
        experts = self.quantized[name].codes.ndim == 3
        return (wanted[span], hessian[span]) if experts else (wanted[:, span], hessian)

    def _free_values(self, name: str) -> Tensor:
        """Where each own weight of a target would like to be, in its codebook's basis: the start of its logits."""
        (wanted, hessian), own = self._own_problem(name), self._own(self.quantized[name])
        free = free_values(wanted, own.shaped(*wanted.shape[:-1]), hessian)
        return free.view(own.codes.shape)

    def _batched(self, name: str) -> QuantizedTensor:
        """A target as it is now, as a batch `[batch, out, columns]`."""
        return self.quantized[name].shaped(*self.wanted[name].shape[:-1])

    def _set(self, name: str, quantized: QuantizedTensor) -> None:
        self.quantized[name] = quantized
        parameter = self.current.get_parameter(name)
        parameter.data.copy_(quantized.dequantize())


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
        original.get_parameter(name).data.copy_(q.dequantize())
    return original
