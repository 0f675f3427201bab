"""A finished run in memory, for tests of what comes after it: every matching parameter rounded to nearest."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gsq.codebook import Codebook, QuantizedTensor
from gsq.model.checkpoint import Checkpoint
from gsq.model.targets import EXPERT_PARTS, expert_part_names


@dataclass(frozen=True)
class Entry:
    name: str
    shape: tuple[int, ...]
    codebook: Codebook | None
    sources: list[str]


@dataclass(frozen=True)
class Entries:
    entries: dict[str, Entry]


class MemoryRun:
    """`rules` maps patterns of parameter names (`re.search`) to codebooks; the first that matches holds.

    A codebook that depends on a tensor's width is given as a function of it.
    """

    def __init__(self, folder: Path, rules: dict[str, Codebook | Callable[[int], Codebook]], seed: int = 0):
        self.source = Checkpoint.open(folder)
        self.plan = Entries({entry.name: entry for entry in self._plan(rules)})
        generator = torch.Generator().manual_seed(seed)
        self.quantized = {e.name: self._quantize(e, generator) for e in self.plan.entries.values() if e.codebook}

    def load(self, name: str) -> QuantizedTensor:
        return self.quantized[name]

    def _plan(self, rules: dict[str, Codebook]) -> list[Entry]:
        entries: dict[str, Entry] = {}
        for name, info in self.source.tensors.items():
            parameter, sources, shape = _fused(name, self.source)
            codebook = next((rules[p] for p in rules if re.search(p, parameter) and len(info.shape) >= 2), None)
            codebook = codebook(shape[-1]) if callable(codebook) else codebook
            entries.setdefault(parameter, Entry(parameter, shape, codebook, sources))
        return list(entries.values())

    def _quantize(self, entry: Entry, generator: torch.Generator) -> QuantizedTensor:
        """Scales of random sign, as GPTQ with a sign search leaves them, and some of them zero."""
        parts = [self.source.read(name).float() for name in entry.sources]
        weight = (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(entry.shape)
        weight = entry.codebook.rotate(weight)
        groups = weight.unflatten(-1, (-1, entry.codebook.group_size))
        scales = groups.abs().amax(-1) / max(map(abs, entry.codebook.levels))
        signs = torch.randint(-1, 2, scales.shape, generator=generator)
        rare = torch.rand(scales.shape, generator=generator) < 0.05
        scales = torch.where(rare | (signs != 0), scales * signs, scales).to(entry.codebook.scale_dtype)
        return QuantizedTensor(entry.codebook.encode(weight, scales), scales, entry.codebook)


def _fused(name: str, source: Checkpoint) -> tuple[str, list[str], tuple[int, ...]]:
    """Parameter, sources and shape of the module's weight that a tensor is, or is a part of."""
    shape = source.tensors[name].shape
    part = re.fullmatch(r"(.*\.experts)\.\d+\.(\w+)\.weight", name)
    if not part:
        return name, [name], shape
    leaf = next(leaf for leaf, parts in EXPERT_PARTS.items() if part[2] in parts)
    parameter = f"{part[1]}.{leaf}"
    experts = sum(other.startswith(part[1]) and other.endswith(f"{part[2]}.weight") for other in source.tensors)
    names = [name for row in expert_part_names(parameter, experts) for name in row]
    return parameter, names, (experts, len(EXPERT_PARTS[leaf]) * shape[0], shape[1])
