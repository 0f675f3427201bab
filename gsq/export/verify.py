"""Reads an export back and compares it with its run and its source, bit for bit.

A check is worth what it does not share with what it checks: files are parsed from their bytes, and
codes are unpacked and decoded here in NumPy, by another rule than the writer's. So this module
must not use `gsq.kernels` or the codebook's decode; of `Checkpoint` it takes only the check that
every shard is whole and inside its folder.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from gsq.codebook import QuantizedTensor
from gsq.errors import UserError
from gsq.export import humming
from gsq.export.base import PlanEntry, Run, linears, walk
from gsq.model.checkpoint import INDEX, SINGLE, Checkpoint, read_json

SHOWN = 5  # differences named in an error
LENGTH = 8  # bytes in front of a shard's header that tell its length


@dataclass(frozen=True)
class RawTensor:
    """A tensor as it lies in a file: `dtype` as safetensors spells it, `data` uint8 `[bytes]`."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    def same_as(self, other: RawTensor) -> bool:
        """Whether type, shape and every byte agree."""
        return (self.dtype, self.shape) == (other.dtype, other.shape) and np.array_equal(self.data, other.data)


@dataclass
class Report:
    """What was compared; `differences` is empty in a report that `verify` returns."""

    format: str
    quantized_tensors: int = 0
    quantized_weights: int = 0
    quantized_bytes: int = 0
    kept_tensors: int = 0
    kept_bytes: int = 0
    differences: list[str] = field(default_factory=list)

    @property
    def bits_per_quantized_weight(self) -> float:
        """Bits on disk per quantized weight, scales included."""
        return 8 * self.quantized_bytes / max(self.quantized_weights, 1)

    def __str__(self) -> str:
        return (
            f"{self.format}: {self.quantized_tensors} quantized tensors ({self.quantized_weights} weights, "
            f"{self.quantized_bytes} bytes, {self.bits_per_quantized_weight:.3f} bits per weight) and "
            f"{self.kept_tensors} kept ({self.kept_bytes} bytes) agree bit for bit"
        )


def verify(folder: str | Path, run: Run) -> Report:
    """Compare codes, scales, decoded values and kept tensors; raises `UserError` naming the first that differ."""
    folder = Path(folder)
    config = Checkpoint.open(folder).config
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method not in COMPARE:
        raise UserError(f"{folder} is in format {method!r}; verify knows {', '.join(COMPARE)}")
    report = Report(method)
    if {**config, "quantization_config": None} != {**run.source.config, "quantization_config": None}:
        report.differences.append("config.json differs from the source beyond quantization_config")
    stored = _open_shards(folder, report.differences)
    source = _open_shards(run.source.folder, [])
    seen: set[str] = set()
    for name, entry in walk(run.source, run.plan.entries):
        if entry is None:
            seen.add(name)
            _compare_kept(name, stored, source, report)
        else:
            for difference in COMPARE[method](entry, run.load(entry.name), stored, config, report, seen):
                report.differences.append(difference)
    report.differences += [f"{name} belongs to no tensor of the source" for name in sorted(stored.keys() - seen)]
    if report.differences:
        more = len(report.differences) - SHOWN
        listed = "; ".join(report.differences[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise UserError(f"{folder} does not match the run: {listed}. Export it again")
    return report


def _compare_kept(name: str, stored: dict[str, RawTensor], source: dict[str, RawTensor], report: Report) -> None:
    if name not in stored:
        report.differences.append(f"{name} is missing")
    elif not stored[name].same_as(source[name]):
        report.differences.append(f"{name} differs from the source")
    else:
        report.kept_tensors += 1
        report.kept_bytes += len(stored[name].data)


def _compare_humming(
    entry: PlanEntry,
    quantized: QuantizedTensor,
    stored: dict[str, RawTensor],
    config: dict,
    report: Report,
    seen: set[str],
) -> Iterator[str]:
    """Differences between an entry of the run and its packed Linears."""
    for weight, wanted in linears(entry, quantized):
        module = weight.removesuffix(".weight")
        names = (weight, module + ".weight_scale")
        seen.update(names)
        missing = [name for name in names if name not in stored]
        if missing:
            yield f"{missing[0]} is missing"
            continue
        difference = _humming_difference(wanted, *(stored[name] for name in names), config, module)
        if difference:
            yield f"{module}: {difference}"
            continue
        report.quantized_tensors += 1
        report.quantized_weights += wanted.codes.numel()
        report.quantized_bytes += sum(len(stored[name].data) for name in names)


def _humming_difference(
    wanted: QuantizedTensor, words: RawTensor, scales: RawTensor, config: dict, module: str
) -> str | None:
    setting = humming.read_setting(config["quantization_config"], module)
    if setting is None:
        return "config.json says it is not quantized"
    rows, columns = wanted.codes.shape
    groups = columns // wanted.codebook.group_size
    if setting.group_size != wanted.codebook.group_size:
        return f"config.json says group size {setting.group_size}, the run has {wanted.codebook.group_size}"
    if (words.dtype, words.shape) != ("I32", (rows, columns * setting.bits // 32)):
        return f"codes are stored as {words.dtype} {words.shape}"
    if (scales.dtype, scales.shape) != ("BF16", (rows, groups)):
        return f"scales are stored as {scales.dtype} {scales.shape}"
    levels = _unpack(words.data.reshape(rows, -1), setting.bits) - (1 << (setting.bits - 1))
    if not np.array_equal(levels, np.array(wanted.codebook.levels)[wanted.codes.numpy()]):
        return "codes differ"
    raw_scales = scales.data.view("<u2").reshape(rows, groups)
    if not np.array_equal(raw_scales, wanted.scales.contiguous().view(torch.int16).numpy().view(np.uint16)):
        return "scales differ"
    values = levels.astype(np.float32) * np.repeat(_bfloat16(raw_scales), setting.group_size, axis=1)
    if not np.array_equal(values.view(np.uint32), wanted.dequantize(torch.float32).numpy().view(np.uint32)):
        return "decoded values differ"
    return None


def _unpack(rows: np.ndarray, bits: int) -> np.ndarray:
    """Bytes `[out, bytes]` as one stream of bits per row, least significant first, to codes int64 `[out, in]`."""
    stream = np.unpackbits(rows, axis=1, bitorder="little")
    return stream.reshape(len(rows), -1, bits).astype(np.int64) @ (1 << np.arange(bits))


def _bfloat16(raw: np.ndarray) -> np.ndarray:
    """Bit patterns uint16 of bfloat16 numbers as float32."""
    return (raw.astype(np.uint32) << 16).view(np.float32)


def _open_shards(folder: Path, differences: list[str]) -> dict[str, RawTensor]:
    """All tensors of a checkpoint, mapped; what index and files disagree on is added to `differences`."""
    if not (folder / INDEX).exists():
        return _open_shard(folder / SINGLE)
    index = read_json(folder / INDEX)
    tensors: dict[str, RawTensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        found = _open_shard(folder / file)
        listed = {name for name, place in index["weight_map"].items() if place == file}
        differences += [f"{file} and {INDEX} disagree on {name}" for name in sorted(listed ^ found.keys())]
        tensors |= found
    size = sum(len(tensor.data) for tensor in tensors.values())
    if index.get("metadata", {}).get("total_size") != size:
        differences.append(f"{INDEX} does not say that the tensors have {size} bytes")
    return tensors


def _open_shard(path: Path) -> dict[str, RawTensor]:
    """A safetensors file: 8 bytes of header length, a JSON header with offsets, the tensors' bytes."""
    with open(path, "rb") as file:
        content = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    start = LENGTH + int(content[:LENGTH].view("<u8")[0])
    header = json.loads(content[LENGTH:start].tobytes())
    tensors = {}
    for name, fields in header.items():
        if name != "__metadata__":
            begin, end = (start + offset for offset in fields["data_offsets"])
            tensors[name] = RawTensor(fields["dtype"], tuple(fields["shape"]), content[begin:end])
    return tensors


# How the quantized tensors of each format are compared.
COMPARE: dict[str, Callable[..., Iterator[str]]] = {"humming": _compare_humming}
