"""From a finished run to a checkpoint that a server loads, and back to dense tensors.

A format is one module listed in `FORMATS`. It must provide
`check(source, entries)`, which raises `UserError` for a plan that the format cannot hold;
`write(run, writer)`, which adds every tensor and `config.json`;
`packed_bytes(entry)` and `kept_bytes(source, name)`, the bytes that `write` stores of a planned tensor
that it packs, and of any other;
`recognizes(checkpoint)`, whether a folder is in this format; and
`decoded(checkpoint)`, the same folder seen as dense tensors.
Nothing here knows how bits are packed, and a format knows nothing of files.
"""

from __future__ import annotations

import importlib
from collections import Counter
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
    """Module that implements a format, what to call it in front of users, and how they use an export.

    `fuses`: its servers make one module of several (`gsq.export.modules.fused_name`), which share a width.
    """

    module: str
    description: str
    usage: str = "serve it: gsq serve {folder}"
    fuses: bool = True


FORMATS: dict[str, Format] = {
    "humming": Format("gsq.export.humming", "integers of 2 to 8 bits, for vLLM with Humming kernels"),
    "tq": Format("gsq.export.turboquant", "2 to 4 bits in a rotated basis, for vLLM and MLX with turboquant-plus-vllm"),
    "jangtq": Format(
        "gsq.export.jangtq",
        "routed experts of 2 to 4 bits, 8 bits elsewhere, for MLX with jang",
        usage="load it: jang_tools.load_jangtq.load_jangtq_model('{folder}')",
        fuses=False,
    ),
    "compressed-tensors": Format("gsq.export.compressed_tensors", "integers of 2 to 8 bits, for transformers and vLLM"),
    "compressed-tensors-wide": Format(
        "gsq.export.compressed_tensors_wide",
        "the same in containers of 4 and 8 bits, for readers that take no others: vLLM on CPUs, and before 0.25",
    ),
    "mlx": Format(
        "gsq.export.mlx",
        "affine codes of 2 to 8 bits, for MLX with mlx_lm",
        usage="use it: mlx_lm.chat --model {folder}, or gsq serve {folder}",
        fuses=False,
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

    `decode(part)` gives it in `dtype`: all of it for None, or one index of its first dimension. With a
    `codebook`, the first two of `stored` are its codes, row by row in dense streams of bits, and its scales.
    """

    shape: tuple[int, ...]
    stored: tuple[str, ...]
    label: str
    decode: Callable[[int | None], Tensor]
    dtype: torch.dtype = torch.bfloat16
    codebook: Codebook | None = None


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
    """Raise `UserError` if `format` cannot hold this plan, and say which formats can.

    Cheap, so it can be asked before any work starts.
    """
    if not any(entry.codebook for entry in entries.values()):
        raise UserError("the plan quantizes nothing, so there is nothing to export")
    problem = _problem(format, source, entries)
    if problem:
        fitting = [other for other in FORMATS if other != format and not _problem(other, source, entries)]
        advice = f"formats that hold this plan: {', '.join(fitting)}" if fitting else "no format holds this plan"
        raise UserError(f"{problem}; {advice}")


def _problem(format: str, source: Checkpoint, entries: Mapping[str, PlanEntry]) -> str | None:
    """Why a format cannot hold a plan."""
    module = format_module(format)
    try:
        module.check(source, entries)
    except UserError as error:
        return str(error)
    return None


def export_run(run: Run, format: str, out: str | Path, shard_bytes: int = 2 << 30) -> Path:
    """Write the run's model in `format` to the new folder `out`; memory holds a shard and the largest tensor.

    Quantized tensors are packed one entry at a time; all others, also those that no model class
    loads, are copied bit for bit, and so are the side files.
    """
    check_plan(format, run.source, run.plan.entries)
    writer = CheckpointWriter(out, shard_bytes, stored_bytes(format, run.source, run.plan.entries).total())
    format_module(format).write(run, writer)
    for path in run.source.side_files():
        writer.copy(path)
    return writer.finish()


def stored_bytes(format: str, source: Checkpoint, entries: Mapping[str, PlanEntry]) -> Counter[str]:
    """Bytes of the tensors that an export in `format`, which must hold this plan, has for each entry.

    Tensors that no entry names count under their own names; files beside the shards are not counted.
    """
    module = format_module(format)
    owners = {tensor: entry.name for entry in entries.values() for tensor in entry.sources}
    sizes: Counter[str] = Counter()
    for name, entry in walk(source, entries):
        stored = module.kept_bytes(source, name) if entry is None else module.packed_bytes(entry)
        sizes[owners.get(name, name)] += stored
    return sizes


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
    """Raise `UserError` unless an entry has the rotated codebook of the format's name."""
    if entry.codebook.rotation is None or entry.codebook.rotation.kind != format:
        raise UserError(f"{entry.name}: format {format} holds codebook {format} only; use it in the plan's rule")


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


def float16_bytes(source: Checkpoint, name: str) -> int:
    """Bytes of a tensor as `as_float16` leaves it."""
    info = source.tensors[name]
    return info.numel * torch.float16.itemsize if info.dtype.is_floating_point else info.nbytes


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
    out = quantized.codes.shape[-2] // len(names[0])
    parts = quantized.map(lambda tensor: tensor.reshape(-1, out, tensor.shape[-1]))  # [experts * parts, out, in]
    for index, name in enumerate(name for row in names for name in row):
        yield name, parts.map(lambda tensor, index=index: tensor[index])
