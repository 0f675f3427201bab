"""Modules of a plan by their setting, under every name that a server asks for them by, and patterns to tell them apart.

vLLM fuses modules (`FUSED`, and all experts of a layer) and asks for the fused one under its own
name, so what it fuses must share one setting, and patterns must fit both names. It also renames
the root of the module tree, so no pattern may contain that.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

import torch

from gsq.errors import UserError
from gsq.export.base import PlanEntry, linear_names, walk
from gsq.model.checkpoint import Checkpoint
from gsq.model.targets import EXPERT_PARTS

EXPERT = re.compile(r"(.*\bexperts)\.\d+\.")
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
FUSED_BY_PART = {part: fused for fused, parts in FUSED.items() for part in parts}

S = TypeVar("S", bound=Hashable)


def planned_modules(
    source: Checkpoint, entries: Mapping[str, PlanEntry], setting: Callable[[PlanEntry], S]
) -> tuple[dict[str, S | None], Counter[S]]:
    """Setting of every module with a matrix, by its name in the checkpoint, None if kept; and weights per setting.

    Experts that have the setting of the first of their layer are left out: there are thousands of them.
    """
    modules: dict[str, S | None] = {}
    weights: Counter[S] = Counter()
    for name, entry in walk(source, entries):
        info = source.tensors[name]
        if entry is not None:
            own = setting(entry)
            names = [part.removesuffix(".weight") for parts in linear_names(entry) for part in parts]
            modules |= dict.fromkeys(names, own)
            weights[own] += torch.Size(entry.shape).numel()
        elif len(info.shape) >= 2:
            module, _, leaf = name.rpartition(".")
            modules[module if leaf == "weight" else name] = None
    for module in list(modules):
        first = EXPERT.sub(r"\1.0.", module)
        if first != module and first in modules and modules[first] == modules[module]:
            del modules[module]
    return modules, weights


def served_names(modules: Mapping[str, S | None]) -> dict[str, S | None]:
    """`modules` and the fused ones that vLLM makes of them; raises `UserError` if parts of one differ."""
    names = dict(modules)
    parts: dict[str, str] = {}
    for module, setting in modules.items():
        fused = fused_name(module)
        if fused is None or fused in modules:
            continue
        if names.setdefault(fused, setting) != setting:
            raise UserError(
                f"{module} ({setting or 'kept'}) and {parts[fused]} ({names[fused] or 'kept'}) differ, but vLLM reads "
                f"both as one module {fused}; give all parts of {fused} the same codebook, or keep all of them"
            )
        parts.setdefault(fused, module)
    return names


def fused_name(module: str) -> str | None:
    """The module of vLLM that swallows this one."""
    prefix, _, leaf = module.rpartition(".")
    expert = EXPERT.match(module)
    if expert or (leaf in EXPERT_PARTS and prefix.endswith("experts")):
        return expert[1] if expert else prefix
    return f"{prefix}.{FUSED_BY_PART[leaf]}" if leaf in FUSED_BY_PART else None


def units(modules: Iterable[str], fused: bool) -> set[str]:
    """Names to find patterns for: modules as stored and, with `fused`, as vLLM fuses them; experts as one, fused."""
    found = set()
    for module in modules:
        swallower = fused_name(module)
        if swallower and swallower.endswith("experts"):
            found.add(swallower)
        else:
            found |= {module, swallower} if fused and swallower else {module}
    return found


def regexes(runs: Iterable[str]) -> list[str]:
    """One for all runs that differ in their first index only: each matches, from its start, a name that holds a run."""
    groups = defaultdict(list)
    for run in runs:
        groups[re.sub(r"\.\d+(?=\.|$)", ".#", run, count=1)].append(run)
    return [_regex(alike) for alike in groups.values()]


def _regex(runs: list[str]) -> str:
    if len(runs) == 1:
        body = re.escape(runs[0])
    else:
        indices = sorted(int(re.search(r"\.(\d+)(?=\.|$)", run)[1]) for run in runs)
        before, after = re.split(r"\.\d+(?=\.|$)", runs[0], maxsplit=1)
        body = rf"{re.escape(before)}\.({'|'.join(map(str, indices))}){re.escape(after)}"
    return rf"(.*\.)?{body}(\.|$)"
