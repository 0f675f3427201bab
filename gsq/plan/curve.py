"""Predicted KL against bits per weight: of the best widths for every size, of widths that are all alike, of presets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from gsq.codebook import Codebook
from gsq.config import Rule
from gsq.plan.rules import Plan
from gsq.plan.sensitivity import Allocation

POINTS = 40
Point = tuple[float, float]  # bits per weight of what is solved for, KL in nats per token


@dataclass(frozen=True)
class Curve:
    """The solved plans in order of size, those of one width and presets by name, and the one that was chosen.

    The KL of a preset is approximate: it is that of its widths in the codebook that was measured.
    """

    solved: list[Point]
    others: dict[str, Point]
    presets: dict[str, Point]
    chosen: Point

    def to_dict(self) -> dict:
        """JSON description."""
        return asdict(self)


def curve_of(allocation: Allocation, chosen: Plan, presets: Mapping[str, Plan]) -> Curve:
    """The curve of what `allocation` measured, with the `chosen` plan, and of `presets` those whose widths it has."""
    widths = sorted(set.intersection(*(set(found.errors) for found in allocation.measured.values())))
    flat = {f"{bits} bits": _flat(allocation, bits) for bits in widths}
    sizes = [bpw for bpw, _ in flat.values()]
    solved = [_solved(allocation, bpw) for bpw in np.linspace(min(sizes), max(sizes), POINTS).tolist()]
    named = {name: point for name, plan in presets.items() if (point := _of_plan(allocation, plan))}
    return Curve(solved, flat, named, _of_plan(allocation, chosen))


def for_dense(preset: str, rules: list[Rule]) -> tuple[str, list[Rule]]:
    """A preset for a model without experts, and a name that tells.

    What it says of routed experts goes for the MLP, unless it speaks of that as well.
    """
    if any(role.family == "mlp" for rule in rules for role in rule.roles):
        return preset, rules
    roles = [rule.role and tuple(re.sub("^expert", "mlp", role) for role in rule.role) for rule in rules]
    changed = [rule.model_copy(update={"role": own}) for rule, own in zip(rules, roles, strict=True)]
    return f"{preset} (MLP for experts)", changed


def _flat(allocation: Allocation, bits: int) -> Point:
    size = sum(allocation.nbytes(unit, bits) for unit in allocation.measured)
    return 8 * size / allocation.weights, allocation.predicted({name: bits for u in allocation.measured for name in u})


def _solved(allocation: Allocation, bpw: float) -> Point:
    bits = allocation.solve(round(bpw * allocation.weights / 8))
    size = sum(allocation.nbytes(unit, bits[unit[0]]) for unit in allocation.measured)
    return 8 * size / allocation.weights, allocation.predicted(bits)


def _of_plan(allocation: Allocation, plan: Plan) -> Point | None:
    """A whole plan, of which the weights that were measured count; None if it has widths that were not."""
    entries = {name: plan.entries[name] for unit in allocation.measured for name in unit}
    if any(entry.codebook and _ternary(entry.codebook) for entry in entries.values()):
        return None
    bits = {name: entry.codebook and entry.codebook.bits for name, entry in entries.items()}
    for unit, found in allocation.measured.items():
        if any(bits[name] not in (None, *found.errors) for name in unit):
            return None
    size = sum(entry.bytes_after for entry in entries.values())
    return 8 * size / allocation.weights, allocation.predicted(bits)


def _ternary(codebook: Codebook) -> bool:
    """Whether it has fewer levels than its bits could tell apart, which makes larger errors than were measured."""
    return len(codebook.levels) < 1 << codebook.bits
