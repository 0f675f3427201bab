"""Bits where they matter: how much each tensor's error raises the KL of the model, and the best widths for a size.

For small errors the divergence of a quantized model is about the sum over its tensors of `a * t^2`,
where `t^2` is a tensor's relative error and `a` depends on the tensor, not on how it is quantized
(the linearity theorem: Malinovskii et al., https://arxiv.org/abs/2411.17525). We take
`t^2 = tr(D H D^T) / tr(W H W^T)` of GPTQ at every width, and find `a` by quantizing what shares a
width, a *unit*, at the narrowest one, alone, and looking at the model's output. One walk over the
decoder layers does it: the hidden states behind every unit so far travel beside the original's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gsq.calib.hessian import Moments
from gsq.calib.observe import ObserveLinears, shared_inputs
from gsq.calib.stream import Stream
from gsq.codebook import Codebook
from gsq.errors import UserError
from gsq.eval.quality import divergences
from gsq.files import write_whole
from gsq.init.gptq import damped, gptq, inverse_factor
from gsq.init.polish import relative_error
from gsq.memory import Batch
from gsq.model.skeleton import Skeleton

CELLS = 50_000  # sizes that `solve` tells apart
Unit = tuple[str, ...]  # parameters that share a width
Widths = Mapping[int, Codebook]  # codebooks by their bits, alike but for levels


class BudgetError(ValueError):
    """The narrowest widths take `least` bytes, more than the budget."""

    def __init__(self, least: int, budget: int):
        super().__init__(f"needs at least {least} bytes, more than the {budget} allowed")
        self.least = least


@dataclass(frozen=True)
class Sensitivity:
    """What was measured of a unit: the KL (nats per token) when it alone has `errors`' narrowest width.

    `errors` is the relative error of GPTQ by width, averaged over its tensors.
    """

    kl: float
    errors: dict[int, float]

    def predicted(self, bits: int | None) -> float:
        """KL when it has so many bits; None: it is kept."""
        narrowest = self.errors[min(self.errors)]
        return 0.0 if bits is None or not narrowest else self.kl * self.errors[bits] / narrowest


@torch.no_grad()
def measure(
    skeleton: Skeleton,
    tokens: Tensor,
    units: Mapping[Unit, Mapping[str, Widths]],
    damping: float,
    expert_prior: float,
    batch: int,
    progress: Callable[[int, int], None] = lambda done, layers: None,
) -> dict[Unit, Sensitivity]:
    """Sensitivity of each unit, whose tensors come with their codebooks by width, on windows `tokens` `[W, L]`.

    Units lie in one decoder layer each. Raises `UserError` for weights that no token reached.
    """
    base = Stream(skeleton, tokens, Batch(batch))
    behind: dict[Unit, Stream] = {}
    errors: dict[Unit, dict[int, float]] = {}
    for index in range(skeleton.num_layers):
        layer, prefix = skeleton.load_layer(index), skeleton.layer_names[index] + "."
        for stream in behind.values():
            stream.advance(layer, index)
        mine = {unit: widths for unit, widths in units.items() if unit[0].startswith(prefix)}
        hessians = _hessians(layer, index, base, [n.removeprefix(prefix) for unit in mine for n in unit], expert_prior)
        for unit, widths in mine.items():
            probe, of_tensors = {}, []
            for name, codebooks in widths.items():
                short = name.removeprefix(prefix)
                hessian = damped(hessians[short], damping)
                try:
                    probe[short], of_tensor = _try_widths(layer.get_parameter(short), hessian, codebooks)
                except torch.linalg.LinAlgError as error:
                    raise UserError(f"{name}: {error}") from None
                of_tensors.append(of_tensor)
            errors[unit] = {bits: sum(of[bits] for of in of_tensors) / len(of_tensors) for bits in of_tensors[0]}
            with _swapped(layer, probe):
                behind[unit] = base.copy()
                behind[unit].advance(layer, index)
        hessians = probe = hessian = None  # of hundreds of experts they take gigabytes, and the next layer's follow
        base.advance(layer, index)
        progress(index + 1, skeleton.num_layers)
    found = divergences(skeleton, [stream.hidden for stream in behind.values()], base.hidden)
    return {unit: Sensitivity(kl, errors[unit]) for unit, kl in zip(behind, found, strict=True)}


def solve(options: Sequence[Mapping[int | None, tuple[int, float]]], budget: int) -> list[int | None]:
    """A width for each unit, whose `options` are bytes and KL by width, with the least KL in `budget` bytes.

    A dynamic program over sizes; exact if the sizes' greatest common divisor divides the budget into
    fewer than `CELLS`, else sizes are rounded up to one of so many. Raises `BudgetError` if nothing fits.
    """
    least = [min(size for size, _ in option.values()) for option in options]
    spare = budget - sum(least)
    if spare < 0:
        raise BudgetError(sum(least), budget)
    extras = [[size - low for size, _ in option.values()] for option, low in zip(options, least, strict=True)]
    if spare >= sum(map(max, extras)):  # all fits, also what rounding up would push out
        return [min(option, key=lambda bits: option[bits][1]) for option in options]
    divisor = math.gcd(*(extra for option in extras for extra in option)) or 1
    cell = divisor * max(1, math.ceil(spare / divisor / CELLS))
    best = np.zeros(spare // cell + 1)  # least KL with at most so many cells
    choices = []
    for option, extra in zip(options, extras, strict=True):
        trials = np.full((len(extra), len(best)), np.inf)
        for trial, size, (_, kl) in zip(trials, extra, option.values(), strict=True):
            cells = -(-size // cell)
            if cells < len(best):
                trial[cells:] = best[: len(best) - cells] + kl
        choices.append(trials.argmin(0).astype(np.uint8))
        best = trials.min(0)
    place, widths = len(best) - 1, []
    for option, extra, choice in zip(options[::-1], extras[::-1], choices[::-1], strict=True):
        widths.append(list(option)[choice[place]])
        place -= -(-extra[choice[place]] // cell)
    return widths[::-1]


@dataclass(frozen=True)
class Allocation:
    """What was measured of units, and bytes of their parameters by width: all that a size needs to be solved for.

    `weights` is the number of all weights in them.
    """

    measured: Mapping[Unit, Sensitivity]
    sizes: Mapping[str, Mapping[int, int]]
    weights: int

    def nbytes(self, unit: Unit, bits: int) -> int:
        """Bytes of a unit at a width, scales included."""
        return sum(self.sizes[name][bits] for name in unit)

    def solve(self, budget: int) -> dict[str, int]:
        """Bits by parameter with the least predicted KL in so many bytes; raises `BudgetError` if no widths fit."""
        options = [
            {bits: (self.nbytes(unit, bits), found.predicted(bits)) for bits in sorted(found.errors)}
            for unit, found in self.measured.items()
        ]
        chosen = zip(self.measured, solve(options, budget), strict=True)
        return {name: bits for unit, bits in chosen for name in unit}

    def predicted(self, bits: Mapping[str, int | None]) -> float:
        """KL of the model with these bits by parameter (None: kept); of parts of a unit the fewest count."""
        total = 0.0
        for unit, found in self.measured.items():
            own = [bits[name] for name in unit if bits[name] is not None]
            total += found.predicted(min(own, default=None))
        return total


def remembered(cache: Path, mark: dict) -> dict[Unit, Sensitivity] | None:
    """What a file holds that was measured under the circumstances `mark`; None if they differ, or it is broken."""
    try:
        content = json.loads(cache.read_text())
        if content["mark"] != mark:
            return None
        return {
            tuple(fields["unit"]): Sensitivity(fields["kl"], {int(b): t for b, t in fields["errors"].items()})
            for fields in content["sensitivity"]
        }
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def remember(cache: Path, mark: dict, found: Mapping[Unit, Sensitivity]) -> None:
    """Write what `remembered` reads."""
    fields = [{"unit": list(unit), **vars(sensitivity)} for unit, sensitivity in found.items()]
    text = json.dumps({"mark": mark, "sensitivity": fields}, indent=1)
    write_whole(cache, lambda partial: partial.write_text(text), len(text))


def _hessians(layer: nn.Module, index: int, stream: Stream, names: list[str], prior: float) -> dict[str, Tensor]:
    """Hessians per token `[batch, in, in]` of what each Linear or expert reads; readers of one tensor share theirs."""
    if not names:
        return {}
    sample = slice(0, stream.batch.windows)
    groups = shared_inputs(layer, names, lambda: stream.run(layer, index, sample))
    first = {group[0]: layer.get_parameter(group[0]) for group in groups}
    device = stream.skeleton.device
    moments = {name: Moments(len(w) if w.ndim == 3 else 1, w.shape[-1], device) for name, w in first.items()}
    with ObserveLinears(first, lambda name, expert, x: moments[name].add(expert, x)):
        for part in stream.parts():
            stream.run(layer, index, part)
    for name, found in moments.items():
        if not found.tokens.any():
            raise UserError(f"no token reached {name} of layer {index}; keep it, or give it a fixed width")
    shrunk = {group[0]: moments.pop(group[0]).shrunk(prior) for group in groups}
    return {name: shrunk[group[0]] for group in groups for name in group}


def _try_widths(weight: Tensor, hessian: Tensor, widths: Widths) -> tuple[Tensor, dict[int, float]]:
    """A tensor at its narrowest width, dequantized, and its relative error at every width; all have one basis."""
    narrowest = widths[min(widths)]
    batched = weight.float() if weight.ndim == 3 else weight.float()[None]
    wanted, moments = narrowest.rotate(batched), narrowest.rotate_moments(hessian)
    upper = inverse_factor(moments)
    errors, probe = {}, None
    for bits, codebook in sorted(widths.items()):
        found = gptq(wanted, moments, codebook, upper)
        errors[bits] = relative_error(wanted, found, moments)
        if probe is None:
            probe = found.dequantize().view(weight.shape)
    return probe, errors


@contextmanager
def _swapped(layer: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The layer with other weights for a while."""
    before = {name: layer.get_parameter(name).data.clone() for name in weights}
    try:
        for name, weight in weights.items():
            layer.get_parameter(name).data.copy_(weight)
        yield
    finally:
        for name, weight in before.items():
            layer.get_parameter(name).data.copy_(weight)
