"""From a finished run to a checkpoint that a server loads, and back to dense tensors.

A format is one module listed in `FORMATS`. It must provide
`check(source, entries)`, which raises `UserError` for a plan that the format cannot hold;
`write(run, writer)`, which adds every tensor and `config.json`;
`recognizes(checkpoint)`, whether a folder is in this format; and
`decoded(checkpoint)`, the same folder seen as dense tensors.
Nothing here knows how bits are packed, and a format knows nothing of files.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from gsq.codebook import Codebook, QuantizedTensor
from gsq.errors import UserError
from gsq.model.checkpoint import Checkpoint, CheckpointWriter, sound
from gsq.model.targets import expert_part_names


@dataclass(frozen=True)
class Format:
    """Module that implements a format, what to call it in front of users, and how they use an export."""

    module: str
    description: str
    usage: str = "serve it: vllm serve {folder}"


FORMATS: dict[str, Format] = {
    "humming": Format("gsq.export.humming", "integers of 2 to 8 bits, for vLLM with Humming kernels"),
    "tq": Format("gsq.export.turboquant", "2 to 4 bits in a rotated basis, for vLLM and MLX with turboquant-plus-vllm"),
    "jangtq": Format(
        "gsq.export.jangtq",
        "routed experts of 2 to 4 bits, 8 bits elsewhere, for MLX with jang",
        usage="load it: jang_tools.load_jangtq.load_jangtq_model('{folder}')",
    ),
}


class PlanEntry(Protocol):
    """What an export needs to know of a planned tensor.

    `name` is the parameter of the module, `sources` are the checkpoint's tensors that it replaces:
    itself, perhaps under another name, or its experts one by one. Without a codebook it is kept.
    """

    name: str
    shape: tuple[int, ...]
    codebook: Codebook | None
    sources: list[str]


class Plan(Protocol):
    """The entries of a plan by name; tensors of the checkpoint that no entry names are kept."""

    entries: Mapping[str, PlanEntry]


class Run(Protocol):
    """A finished quantization."""

    source: Checkpoint
    plan: Plan

    def load(self, name: str) -> QuantizedTensor:
        """Codes and scales of a quantized entry, experts fused `[experts, out, in]`."""


@dataclass(frozen=True)
class PackedTensor:
    """A dense tensor `shape` as an export stores it: in the tensors `stored`, in the manner `label`.

    `decode(part)` gives it in `dtype`: all of it for None, or one index of its first dimension.
    """

    shape: tuple[int, ...]
    stored: tuple[str, ...]
    label: str
    decode: Callable[[int | None], Tensor]
    dtype: torch.dtype = torch.bfloat16


class DecodedCheckpoint(Checkpoint):
    """An export seen as a dense checkpoint: packed tensors are decoded when read.

    `packed` maps dense names to how they are stored; `stored` is the export itself; `markers` are
    files, and `settings` keys of `config.json`, that mean nothing to readers of dense checkpoints.
    """

    def __init__(
        self,
        stored: Checkpoint,
        packed: dict[str, PackedTensor],
        markers: tuple[str, ...] = (),
        settings: tuple[str, ...] = ("quantization_config",),
    ):
        hidden = {name for tensor in packed.values() for name in tensor.stored} - packed.keys()
        tensors = {name: info for name, info in stored.tensors.items() if name not in hidden}
        for name, tensor in packed.items():
            info = stored.tensors[tensor.stored[0]]
            tensors[name] = replace(info, dtype=tensor.dtype, shape=tensor.shape)
        config = {key: value for key, value in stored.config.items() if key not in settings}
        super().__init__(stored.folder, config, tensors)
        self.stored, self.packed, self.markers = stored, packed, markers

    def side_files(self) -> Iterator[Path]:
        """Files beside the weights that the dense model needs too."""
        return (path for path in self.stored.side_files() if path.name not in self.markers)

    def read(self, name: str, part: int | None = None) -> Tensor:
        """The dense tensor `name`, or index `part` of its first dimension."""
        if name not in self.packed:
            return self.stored.read(name, part)
        return self.packed[name].decode(part)


def format_module(format: str) -> ModuleType:
    """The module that implements a format; raises `UserError` for an unknown one."""
    if format not in FORMATS:
        raise UserError(f"unknown export format {format!r}; GSQ writes {', '.join(FORMATS)}")
    return importlib.import_module(FORMATS[format].module)


def check_plan(format: str, source: Checkpoint, entries: Mapping[str, PlanEntry]) -> None:
    """Raise `UserError` if `format` cannot hold this plan; cheap, so it can be asked before any work starts."""
    format_module(format).check(source, entries)


def export_run(run: Run, format: str, out: str | Path, shard_bytes: int = 2 << 30) -> Path:
    """Write the run's model in `format` to the new folder `out`; memory holds a shard and the largest tensor.

    Quantized tensors are packed one entry at a time; all others, also those that no model class
    loads, are copied bit for bit, and so are the side files.
    """
    module = format_module(format)
    module.check(run.source, run.plan.entries)
    writer = CheckpointWriter(out, shard_bytes, _bytes_after(run.source, run.plan.entries))
    module.write(run, writer)
    for path in run.source.side_files():
        writer.copy(path)
    return writer.finish()


def format_of(checkpoint: Checkpoint) -> str | None:
    """What a checkpoint is quantized in: one of `FORMATS`, or whatever its config says; None if it is dense."""
    for format in FORMATS:
        if format_module(format).recognizes(checkpoint):
            return format
    config = checkpoint.config.get("quantization_config") or checkpoint.config.get("quantization")
    if not config:
        return None
    return config.get("quant_method") or config.get("mode", "unknown") if isinstance(config, dict) else str(config)


def open_model(folder: str | Path) -> Checkpoint:
    """A checkpoint of dense tensors: the folder itself, or the decoded view of an export of ours."""
    checkpoint = Checkpoint.open(folder)
    format = format_of(checkpoint)
    if format in FORMATS:
        return format_module(format).decoded(checkpoint)
    if format:
        raise UserError(
            f"{folder} is quantized in the format {format!r}, which GSQ does not read; "
            f"it reads dense checkpoints and its own exports ({', '.join(FORMATS)})"
        )
    return checkpoint


def walk(source: Checkpoint, entries: Mapping[str, PlanEntry]) -> Iterator[tuple[str, PlanEntry | None]]:
    """Tensors of `source` in stored order: `(name, None)` if kept, `(first source, entry)` once per quantized entry."""
    quantized = {entry.sources[0]: entry for entry in entries.values() if entry.codebook}
    replaced = {name for entry in quantized.values() for name in entry.sources}
    for name in sorted(replaced - source.tensors.keys()):
        raise UserError(f"the run quantized {name}, which {source.folder} lacks; the source has changed since")
    for name in source.tensors:
        if name in quantized:
            yield name, quantized[name]
        elif name not in replaced:
            yield name, None


def require_codebook(entry: PlanEntry, format: str) -> None:
    """Raise `UserError` unless an entry has the rotated codebook of the format's name; say what could hold it."""
    codebook = entry.codebook
    kind = codebook.rotation.kind if codebook.rotation else None
    if kind != format:
        integers = all(level == int(level) for level in codebook.levels)
        home = kind or ("humming" if integers else None)
        advice = f", or export as {home}" if home else "; no format holds this one"
        raise UserError(
            f"{entry.name}: format {format} holds codebook {format} only; use it in the plan's rule{advice}"
        )


def as_float16(name: str, tensor: Tensor, format: str) -> Tensor:
    """A tensor as formats store what they do not pack; raises `UserError` if float16 cannot hold it."""
    if not tensor.is_floating_point():
        return tensor
    extremes = torch.stack(sound(name, tensor).aminmax()) if tensor.numel() else torch.zeros(2)
    if not extremes.half().isfinite().all():
        raise UserError(
            f"{name} holds {float(extremes.abs().max()):g}, and format {format} stores it in float16, which ends at "
            "65504; quantize this tensor, or export to another format"
        )
    return tensor.half()


def _bytes_after(source: Checkpoint, entries: Mapping[str, PlanEntry]) -> int:
    """Bytes of all tensors when codes and scales are stored at exact width."""
    total = 0
    for name, entry in walk(source, entries):
        if entry is None:
            total += source.tensors[name].nbytes
        else:
            total += entry.codebook.nbytes(entry.shape)
    return total


def linear_names(entry: PlanEntry) -> list[list[str]]:
    """For each expert of an entry (a Linear counts as one), the 2-D tensors that its rows `[out, in]` divide into."""
    if len(entry.shape) == 2:
        return [entry.sources]
    experts = entry.shape[0]
    if len(entry.sources) == 1:
        return expert_part_names(entry.sources[0], experts)
    parts = len(entry.sources) // experts
    return [entry.sources[expert * parts : (expert + 1) * parts] for expert in range(experts)]


def linears(entry: PlanEntry, quantized: QuantizedTensor) -> Iterator[tuple[str, QuantizedTensor]]:
    """The 2-D tensors of an entry by name: codes `[out, in]`, scales `[out, groups]`."""
    names = linear_names(entry)
    codes = quantized.codes.reshape(len(names), *quantized.codes.shape[-2:])
    scales = quantized.scales.reshape(len(names), *quantized.scales.shape[-2:])
    for expert, parts in enumerate(names):
        divided = zip(parts, codes[expert].chunk(len(parts)), scales[expert].chunk(len(parts)), strict=True)
        for name, part_codes, part_scales in divided:
            yield name, QuantizedTensor(part_codes, part_scales, quantized.codebook)
