"""Reads an export back and compares it with its run and its source, bit for bit.

A check is worth what it does not share with what it checks: files are parsed from their bytes, and
codes are unpacked and decoded here in NumPy, by another rule than the writer's. So this module
must not use `gsq.kernels` or the codebook's decode; of `Checkpoint` it takes only the check that
every shard is whole and inside its folder.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from gsq.codebook import QuantizedTensor
from gsq.errors import UserError
from gsq.export import humming, turboquant
from gsq.export.base import PlanEntry, Run, format_module, linears, walk
from gsq.model.checkpoint import INDEX, SINGLE, Checkpoint, read_json

SHOWN = 5  # differences named in an error
LENGTH = 8  # bytes in front of a shard's header that tell its length
FLOATS = {"F32": "<f4", "F64": "<f8"}


@dataclass(frozen=True)
class RawTensor:
    """A tensor as it lies in a file: `dtype` as safetensors spells it, `data` uint8 `[bytes]`."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    def same_as(self, other: RawTensor) -> bool:
        """Whether type, shape and every byte agree."""
        return (self.dtype, self.shape) == (other.dtype, other.shape) and np.array_equal(self.data, other.data)


Stored = dict[str, RawTensor]
Compared = Iterator[tuple[str, tuple[str, ...], str | None]]  # weight, the tensors it is stored in, what differs


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
    checkpoint = Checkpoint.open(folder)
    format = next((name for name in COMPARE if format_module(name).recognizes(checkpoint)), None)
    if format is None:
        raise UserError(f"{folder} is in none of the formats that verify knows: {', '.join(COMPARE)}")
    compare, kept_as = COMPARE[format]
    report, config = Report(format), checkpoint.config
    if {**config, "quantization_config": None} != {**run.source.config, "quantization_config": None}:
        report.differences.append("config.json differs from the source beyond quantization_config")
    stored = _open_shards(folder, report.differences)
    source = _open_shards(run.source.folder, [])
    seen: set[str] = set()
    for name, entry in walk(run.source, run.plan.entries):
        if entry is None:
            seen.add(name)
            _compare_kept(name, stored, kept_as(source[name]), report)
        else:
            for weight, names, difference in compare(entry, run.load(entry.name), stored, checkpoint):
                seen.update(names)
                if difference:
                    report.differences.append(f"{weight}: {difference}")
                else:
                    report.quantized_tensors += 1
                    report.quantized_bytes += sum(len(stored[part].data) for part in names)
            report.quantized_weights += math.prod(entry.shape)
    report.differences += [f"{name} belongs to no tensor of the source" for name in sorted(stored.keys() - seen)]
    if report.differences:
        more = len(report.differences) - SHOWN
        listed = "; ".join(report.differences[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise UserError(f"{folder} does not match the run: {listed}. Export it again")
    return report


def _compare_kept(name: str, stored: dict[str, RawTensor], wanted: RawTensor, report: Report) -> None:
    if name not in stored:
        report.differences.append(f"{name} is missing")
    elif not stored[name].same_as(wanted):
        report.differences.append(f"{name} differs from the source")
    else:
        report.kept_tensors += 1
        report.kept_bytes += len(stored[name].data)


def _compare_humming(entry: PlanEntry, quantized: QuantizedTensor, stored: Stored, checkpoint: Checkpoint) -> Compared:
    """Packed Linears of an entry of the run."""
    config = checkpoint.config["quantization_config"]
    for weight, wanted in linears(entry, quantized):
        module = weight.removesuffix(".weight")
        names = (weight, module + ".weight_scale")
        difference = _missing(names, stored) or _humming_difference(wanted, *(stored[n] for n in names), config, module)
        yield module, names, difference


def _humming_difference(
    wanted: QuantizedTensor, words: RawTensor, scales: RawTensor, config: dict, module: str
) -> str | None:
    setting = humming.read_setting(config, module)
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
    if not np.array_equal(values.view(np.uint32), wanted.dequantize().numpy().view(np.uint32)):
        return "decoded values differ"
    return None


def _compare_tq(entry: PlanEntry, quantized: QuantizedTensor, stored: Stored, checkpoint: Checkpoint) -> Compared:
    """Packed weights of an entry of the run."""
    config = read_json(checkpoint.folder / "tq_config.json")
    for weight, wanted in turboquant.stored_parts(entry, quantized):
        names = (weight + ".tq_packed", weight + ".tq_norms")
        difference = _missing(names, stored) or _tq_difference(wanted, *(stored[n] for n in names), config, weight)
        yield weight, names, difference


def _tq_difference(
    wanted: QuantizedTensor, packed: RawTensor, norms: RawTensor, config: dict, weight: str
) -> str | None:
    sensitive = any(pattern in weight for pattern in config.get("sensitive_patterns", []))
    bits, size = config["sensitive_bits" if sensitive else "bits"], config["group_size"]
    codes = wanted.codes.reshape(-1, wanted.codes.shape[-1]).numpy()
    groups = codes.shape[1] // wanted.codebook.group_size
    if (bits, size) != (wanted.codebook.bits, wanted.codebook.group_size):
        return f"tq_config.json says {bits} bits in groups of {size}, the run has another codebook"
    if (packed.dtype, packed.shape) != ("U8", (codes.size // size, size * bits // 8)):
        return f"codes are stored as {packed.dtype} {packed.shape}"
    if (norms.dtype, norms.shape) != ("F32", (len(codes), groups)):
        return f"norms are stored as {norms.dtype} {norms.shape}"
    width = config.get("orig_in_dims", {}).get(weight, codes.shape[1])
    values = wanted.dequantize().reshape(len(codes), -1).numpy()
    if width != values.shape[1]:
        return f"tq_config.json says rows of {width}, the run has {values.shape[1]}"
    found = _unpack(packed.data.reshape(packed.shape), bits)
    if not np.array_equal(found.reshape(codes.shape), codes):
        return "codes differ"
    scales = norms.data.view("<f4").reshape(norms.shape)
    if not np.array_equal(scales, wanted.scales.reshape(norms.shape).numpy()):
        return "norms differ"
    decoded = _rotate_back(np.array(wanted.codebook.levels)[found]) * scales.reshape(-1, 1)
    # another order of operations than the writer's, in float64, so up to rounding
    if not np.allclose(decoded.reshape(len(codes), -1)[:, :width], values, rtol=0, atol=1e-6 * np.abs(scales).max()):
        return "decoded values differ"
    return None


def _rotate_back(units: np.ndarray) -> np.ndarray:
    """Groups `[n, d]` out of the rotated basis, by the whole matrix: signs, Hadamard, signs."""
    size = units.shape[1]
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    generator = torch.Generator().manual_seed(42)
    before, after = (torch.randint(0, 2, (size,), generator=generator).numpy() * 2 - 1 for _ in range(2))
    return (units * after) @ matrix / np.sqrt(size) * before


def _missing(names: tuple[str, ...], stored: Stored) -> str | None:
    return next((f"{name} is missing" for name in names if name not in stored), None)


def _identical(tensor: RawTensor) -> RawTensor:
    """Kept tensors that are copied bit for bit."""
    return tensor


def _as_float16(tensor: RawTensor) -> RawTensor:
    """Kept tensors that are rounded to float16."""
    if tensor.dtype not in ("BF16", *FLOATS):
        return tensor
    raw = tensor.data
    values = _bfloat16(raw.view("<u2")) if tensor.dtype == "BF16" else raw.view(FLOATS[tensor.dtype])
    return RawTensor("F16", tensor.shape, values.astype(np.float16).view(np.uint8))


def _unpack(rows: np.ndarray, bits: int) -> np.ndarray:
    """Bytes `[out, bytes]` as one stream of bits per row, least significant first, to codes int64 `[out, in]`."""
    stream = np.unpackbits(rows, axis=1, bitorder="little")
    return stream.reshape(len(rows), -1, bits).astype(np.int64) @ (1 << np.arange(bits))


def _bfloat16(raw: np.ndarray) -> np.ndarray:
    """Bit patterns uint16 of bfloat16 numbers as float32."""
    return (raw.astype(np.uint32) << 16).view(np.float32)


def _open_shards(folder: Path, differences: list[str]) -> Stored:
    """All tensors of a checkpoint, mapped; what index and files disagree on is added to `differences`."""
    if not (folder / INDEX).exists():
        return _open_shard(folder / SINGLE)
    index = read_json(folder / INDEX)
    tensors: Stored = {}
    for file in sorted(set(index["weight_map"].values())):
        found = _open_shard(folder / file)
        listed = {name for name, place in index["weight_map"].items() if place == file}
        differences += [f"{file} and {INDEX} disagree on {name}" for name in sorted(listed ^ found.keys())]
        tensors |= found
    size = sum(len(tensor.data) for tensor in tensors.values())
    if index.get("metadata", {}).get("total_size") != size:
        differences.append(f"{INDEX} does not say that the tensors have {size} bytes")
    return tensors


def _open_shard(path: Path) -> Stored:
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


# How the quantized tensors of each format are compared, and what becomes of kept ones.
COMPARE: dict[str, tuple[Callable[..., Compared], Callable[[RawTensor], RawTensor]]] = {
    "humming": (_compare_humming, _identical),
    "tq": (_compare_tq, _as_float16),
}
