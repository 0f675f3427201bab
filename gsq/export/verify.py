"""Reads an export back and compares it with its run and its source, bit for bit.

A check is worth what it does not share with what it checks: files are parsed from their bytes, and
codes are unpacked and decoded here in NumPy, by another rule than the writer's. So this module
must not use `gsq.kernels` or the codebook's decode; of `Checkpoint` it takes only the check that
every shard is whole and inside its folder, of a format only its names for things.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from gsq.codebook import QuantizedTensor
from gsq.errors import UserError
from gsq.export import compressed_tensors, humming, jangtq, mlx_layout, turboquant
from gsq.export.base import PlanEntry, Run, format_module, linears, walk
from gsq.export.integers import Setting
from gsq.model.checkpoint import INDEX, SINGLE, Checkpoint, read_json

SHOWN = 5  # differences named in an error
SLICE = 1 << 20  # weights decoded at once
LENGTH = 8  # bytes in front of a shard's header that tell its length
FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
PIECE = 1 << 16  # groups of a kept tensor that are rounded at once


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
    comparison = COMPARE[format]
    report = Report(format)
    stored = _open_shards(folder, report.differences)
    source = _open_shards(run.source.folder, [])
    report.differences += comparison.config(checkpoint, run.source.config, stored)
    seen: set[str] = set()
    for name, entry in walk(run.source, run.plan.entries):
        if entry is None:
            for place, wanted in comparison.kept(name, source, run.source).items():
                seen.add(place)
                _compare_kept(place, stored, wanted, report)
        else:
            for weight, names, difference in comparison.quantized(entry, run.load(entry.name), stored, checkpoint):
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
        setting = humming.read_setting(config, module)
        yield module, names, _missing(names, stored) or _integers_differ(wanted, setting, *(stored[n] for n in names))


def _compare_compressed_tensors(
    entry: PlanEntry, quantized: QuantizedTensor, stored: Stored, checkpoint: Checkpoint
) -> Compared:
    """Packed Linears of an entry of the run."""
    config = compressed_tensors.read_config(checkpoint)
    for weight, wanted in linears(entry, quantized):
        module = weight.removesuffix(".weight")
        names = tuple(module + part for part in (".weight_packed", ".weight_scale", ".weight_shape"))
        setting = compressed_tensors.read_setting(config, module)
        difference = _missing(names, stored) or _integers_differ(wanted, setting, *(stored[n] for n in names[:2]))
        shape = RawTensor("I64", (2,), np.array(wanted.codes.shape, "<i8").view(np.uint8))
        if not difference and not stored[names[2]].same_as(shape):
            difference = f"weight_shape is not {list(wanted.codes.shape)}"
        yield module, names, difference


def _integers_differ(
    wanted: QuantizedTensor, setting: Setting | None, words: RawTensor, scales: RawTensor
) -> str | None:
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
    config = turboquant.read_config(checkpoint)
    for weight, wanted in turboquant.stored_parts(entry, quantized):
        names = (weight + ".tq_packed", weight + ".tq_norms")
        difference = _missing(names, stored) or _tq_difference(wanted, *(stored[n] for n in names), config, weight)
        yield weight, names, difference


def _tq_difference(
    wanted: QuantizedTensor, packed: RawTensor, norms: RawTensor, config: dict, weight: str
) -> str | None:
    bits, size = turboquant.bits_of(config, weight), config["group_size"]
    codes = wanted.codes.reshape(-1, wanted.codes.shape[-1])
    rows, groups = len(codes), codes.shape[1] // wanted.codebook.group_size
    if (bits, size) != (wanted.codebook.bits, wanted.codebook.group_size):
        return f"tq_config.json says {bits} bits in groups of {size}, the run has another codebook"
    if (packed.dtype, packed.shape) != ("U8", (rows * groups, size * bits // 8)):
        return f"codes are stored as {packed.dtype} {packed.shape}"
    if (norms.dtype, norms.shape) != ("F32", (rows, groups)):
        return f"norms are stored as {norms.dtype} {norms.shape}"
    width = config.get("orig_in_dims", {}).get(weight, codes.shape[1])
    if width != wanted.codebook.rotation.width:
        return f"tq_config.json says rows of {width}, the run has {wanted.codebook.rotation.width}"
    scales = norms.data.view("<f4").reshape(norms.shape).copy()
    if not np.array_equal(scales, wanted.scales.reshape(norms.shape).numpy()):
        return "norms differ"
    octets, step = packed.data.reshape(rows, -1), max(1, SLICE // codes.shape[1])
    for part in (slice(start, start + step) for start in range(0, rows, step)):
        found = _unpack(octets[part].reshape(-1, packed.shape[1]), bits)
        if not np.array_equal(found.reshape(-1, codes.shape[1]), codes[part].numpy()):
            return "codes differ"
        decoded = _rotate_back(np.array(wanted.codebook.levels)[found]) * scales[part].reshape(-1, 1)
        expected = QuantizedTensor(codes[part], torch.from_numpy(scales[part]), wanted.codebook).dequantize().numpy()
        # another order of operations than the writer's, in float64, so up to rounding
        error = np.abs(decoded.reshape(len(expected), -1)[:, :width] - expected)
        if not (error <= 1e-6 * np.abs(scales[part]).max()).all():
            return "decoded values differ"
    return None


def _rotate_back(units: np.ndarray) -> np.ndarray:
    """Groups `[n, d]` out of the rotated basis, by the whole matrix: signs, Hadamard, signs."""
    size = units.shape[1]
    generator = torch.Generator().manual_seed(42)
    before, after = (torch.randint(0, 2, (size,), generator=generator).numpy() * 2 - 1 for _ in range(2))
    return (units * after) @ _hadamard(size.bit_length() - 1) / np.sqrt(size) * before


def _compare_jangtq(entry: PlanEntry, quantized: QuantizedTensor, stored: Stored, checkpoint: Checkpoint) -> Compared:
    """Stacked experts of an entry of the run."""
    beside = checkpoint.folder / "jangtq_runtime.safetensors"
    runtime = _open_shard(beside) if beside.exists() else {}
    for module, wanted in jangtq.stored_parts(entry, quantized):
        names = (module + ".tq_packed", module + ".tq_norms", module + ".tq_bits")
        difference = _missing(names, stored) or _runtime_difference(wanted, runtime)
        yield module, names, difference or _jangtq_difference(wanted, *(stored[name] for name in names))


def _runtime_difference(wanted: QuantizedTensor, runtime: Stored) -> str | None:
    bits, columns = wanted.codebook.bits, wanted.codes.shape[-1]
    tables = {f"signs.{columns}.42": _jangtq_signs(columns), f"codebook.{columns}.{bits}": wanted.codebook.levels}
    for name, values in tables.items():
        table = RawTensor("F32", (len(values),), np.array(values, "<f4").view(np.uint8))
        if name not in runtime or not runtime[name].same_as(table):
            return f"jangtq_runtime.safetensors lacks {name}, or has another"
    return None


def _jangtq_signs(columns: int) -> np.ndarray:
    return np.random.default_rng(42).choice([-1.0, 1.0], size=columns)


def _jangtq_difference(wanted: QuantizedTensor, packed: RawTensor, norms: RawTensor, width: RawTensor) -> str | None:
    bits, lanes = wanted.codebook.bits, 32 // wanted.codebook.bits
    experts, rows, columns = wanted.codes.shape
    if (width.dtype, width.shape, width.data.tolist()) != ("U8", (1,), [bits]):
        return f"tq_bits is {width.data.tolist()}, the run has {bits} bits"
    if (packed.dtype, packed.shape) != ("U32", (experts, rows, columns // lanes)):
        return f"codes are stored as {packed.dtype} {packed.shape}"
    if (norms.dtype, norms.shape) != ("F16", (experts, rows)):
        return f"norms are stored as {norms.dtype} {norms.shape}"
    scales = norms.data.view("<f2").reshape(norms.shape)
    if not np.array_equal(scales, wanted.scales.reshape(norms.shape).numpy()):
        return "norms differ"
    words = packed.data.view("<u4").reshape(packed.shape)
    levels, signs = np.array(wanted.codebook.levels), _jangtq_signs(columns)
    tolerance = 1e-6 * np.abs(scales).max()  # another order of operations, in float64, so up to rounding
    for expert in range(experts):
        codes = (words[expert][..., None] >> np.arange(lanes, dtype=np.uint32) * bits) & ((1 << bits) - 1)
        codes = codes.reshape(rows, columns)
        if not np.array_equal(codes, wanted.codes[expert].numpy()):
            return f"codes of expert {expert} differ"
        decoded = _split_hadamard(levels[codes]) * signs * scales[expert][:, None].astype(np.float64)
        values = QuantizedTensor(wanted.codes[expert], wanted.scales[expert], wanted.codebook).dequantize().numpy()
        if not np.allclose(decoded, values, rtol=0, atol=tolerance):
            return f"decoded values of expert {expert} differ"
    return None


def _compare_mlx(entry: PlanEntry, quantized: QuantizedTensor, stored: Stored, checkpoint: Checkpoint) -> Compared:
    """Modules of an entry of the run."""
    setting = checkpoint.config["quantization"]
    for module, wanted in mlx_layout.stored_parts(mlx_layout.layout_of(checkpoint.config).places, entry, quantized):
        names = tuple(module + part for part in mlx_layout.PARTS)
        own = setting.get(module, setting)
        difference = _missing(names, stored) or _affine_difference(wanted, own, *(stored[name] for name in names))
        yield module, names, difference


def _affine_difference(
    wanted: QuantizedTensor, setting: dict, words: RawTensor, scales: RawTensor, biases: RawTensor
) -> str | None:
    bits, size = wanted.codebook.bits, wanted.codebook.group_size
    *rows, columns = wanted.codes.shape
    if (setting.get("bits"), setting.get("group_size"), setting.get("mode", "affine")) != (bits, size, "affine"):
        return f"config.json says {setting}, the run has {bits} bits in groups of {size}"
    if (words.dtype, words.shape) != ("U32", (*rows, columns * bits // 32)):
        return f"codes are stored as {words.dtype} {words.shape}"
    dtype = {torch.bfloat16: "BF16", torch.float16: "F16"}.get(wanted.codebook.scale_dtype)
    for part in (scales, biases):
        if (part.dtype, part.shape) != (dtype, (*rows, columns // size)):
            return f"scales or biases are stored as {part.dtype} {part.shape}"
    if not np.array_equal(scales.data, _octets(wanted.scales)):
        return "scales differ"
    if wanted.offsets is not None and not np.array_equal(biases.data, _octets(wanted.offsets)):
        return "biases differ"
    wanted = wanted.shaped(math.prod(rows))
    octets = words.data.reshape(len(wanted.codes), -1)
    factors, summands = (_numbers(part).astype(np.float32).reshape(len(octets), -1) for part in (scales, biases))
    step = max(1, SLICE // columns)
    for start in range(0, len(octets), step):
        part = slice(start, start + step)
        codes, expected = _unpack(octets[part], bits), wanted.rows(start, start + step)
        if not np.array_equal(codes, expected.codes.numpy()):
            return "codes differ"
        decoded = codes.astype(np.float32) * factors[part].repeat(size, axis=1) + summands[part].repeat(size, axis=1)
        if not np.array_equal(decoded, expected.dequantize().numpy()):  # zeros may have another sign
            return "decoded values differ"
    return None


def _octets(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy().ravel()


def _split_hadamard(rows: np.ndarray) -> np.ndarray:
    """Rows `[n, in]` transformed in blocks, the descending powers of two that add up to `in`; each as a product."""
    done, parts = 0, []
    for bit in reversed(range(rows.shape[1].bit_length())):
        if rows.shape[1] >> bit & 1:
            first, second = _hadamard(bit // 2), _hadamard(bit - bit // 2)  # the matrix is their Kronecker product
            block = rows[:, done : done + (1 << bit)].reshape(-1, len(first), len(second))
            parts.append((first @ block @ second).reshape(len(rows), -1) / np.sqrt(1 << bit))
            done += 1 << bit
    return np.concatenate(parts, axis=1)


def _hadamard(order: int) -> np.ndarray:
    """The matrix of `2^order` rows, in natural order."""
    matrix = np.ones((1, 1))
    for _ in range(order):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _missing(names: tuple[str, ...], stored: Stored) -> str | None:
    return next((f"{name} is missing" for name in names if name not in stored), None)


def _identical(name: str, source: Stored, checkpoint: Checkpoint) -> Stored:
    """Kept tensors that are copied bit for bit."""
    return {name: source[name]}


def _as_float16(name: str, source: Stored, checkpoint: Checkpoint) -> Stored:
    """Kept tensors that are rounded to float16."""
    return {name: _half(source[name])}


def _kept_by_jangtq(name: str, source: Stored, checkpoint: Checkpoint) -> Stored:
    """Kept tensors under MLX's names: dropped, rounded to float16, with channels last, or to affine 8 bits."""
    kind = jangtq.kind_of(name, source[name].shape)
    if kind == "dropped":
        return {}
    place, half = jangtq.stored_name(name), _half(source[name])
    if kind == "float16":
        return {place: half}
    values = half.data.view("<f2")
    if kind == "channels last":
        moved = np.moveaxis(values.reshape(half.shape), 1, -1)
        return {place: RawTensor("F16", moved.shape, np.ascontiguousarray(moved).reshape(-1).view(np.uint8))}
    rows, groups = half.shape[0], half.shape[1] // 64
    codes, scales, biases = _affine8(values.reshape(-1, 64))
    module = place.removesuffix(".weight")
    return {
        place: RawTensor("U32", (rows, groups * 16), codes.reshape(-1)),
        module + ".scales": RawTensor("F16", (rows, groups), scales.view(np.uint8)),
        module + ".biases": RawTensor("F16", (rows, groups), biases.view(np.uint8)),
    }


def _affine8(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes uint8 `[n, 64]`, scales and biases float16 `[n]` of groups float16 `[n, 64]`, as MLX defines them."""
    codes = np.empty(weights.shape, np.uint8)
    scales, biases = np.empty(len(weights), np.float16), np.empty(len(weights), np.float16)
    for start in range(0, len(weights), PIECE):
        part = slice(start, start + PIECE)
        w = weights[part].astype(np.float32)
        low, high = w.min(axis=1), w.max(axis=1)
        upwards = np.abs(low) > np.abs(high)  # codes count up from the lowest weight, or down from the highest
        bias = np.where(upwards, low, high)
        step = np.maximum((high - low) / np.float32(255), np.float32(1e-7))
        scale = np.where(upwards, step, -step)
        count = np.rint(bias / scale)
        scale = np.divide(bias, count, out=scale, where=count != 0)
        bias[count == 0] = 0
        codes[part] = np.rint((w - bias[:, None]) / scale[:, None]).clip(0, 255)
        scales[part], biases[part] = scale, bias
    return codes, scales, biases


def _kept_by_mlx(name: str, source: Stored, checkpoint: Checkpoint) -> Stored:
    """Kept tensors under MLX's names: dropped, stacked, divided, with one added, with channels last, or copied."""
    layout, tensor = mlx_layout.source_layout(checkpoint), source[name]
    place = layout.stored_name(name)
    if place is None:
        return {}
    if expert := mlx_layout.EXPERT.fullmatch(place):
        if expert["index"] != "0":
            return {}  # it is in the stack that the first one stands for
        names = mlx_layout.expert_names(name, source)
        stack = np.concatenate([source[each].data for each in names])
        stacked = RawTensor(tensor.dtype, (len(names), *tensor.shape), stack)
        return {f"{expert['mlp']}.switch_mlp.{expert['part']}.weight": stacked}
    if fused := mlx_layout.FUSED.fullmatch(place):
        modules = mlx_layout.stacks(fused["mlp"], fused["fused"])
        experts, rows, columns = tensor.shape
        shape, halves = (experts, rows // len(modules), columns), tensor.data.reshape(experts, len(modules), -1)
        parts = [RawTensor(tensor.dtype, shape, halves[:, index].ravel()) for index in range(len(modules))]
        return {module + ".weight": part for module, part in zip(modules, parts, strict=True)}
    if re.search(layout.raised, name):
        return {place: _plus_one(tensor)}
    if re.search(layout.channels_last, name):
        moved = np.moveaxis(tensor.data.reshape(*tensor.shape, -1), 1, -2)  # the last dimension: bytes of a number
        return {place: RawTensor(tensor.dtype, moved.shape[:-1], moved.ravel())}
    return {place: tensor}


def _plus_one(tensor: RawTensor) -> RawTensor:
    """Floating-point numbers with one added, rounded to their dtype."""
    sums = _numbers(tensor) + 1
    if tensor.dtype == "BF16":
        bits = sums.view("<u4")
        sums = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")  # to nearest, ties to even
    return RawTensor(tensor.dtype, tensor.shape, sums.view(np.uint8))


def _half(tensor: RawTensor) -> RawTensor:
    """Floating-point numbers rounded to float16."""
    if tensor.dtype not in ("BF16", *FLOATS):
        return tensor
    return RawTensor("F16", tensor.shape, _numbers(tensor).astype(np.float16).view(np.uint8))


def _numbers(tensor: RawTensor) -> np.ndarray:
    """Floating-point numbers in a row, those of bfloat16 as float32."""
    return _bfloat16(tensor.data.view("<u2")) if tensor.dtype == "BF16" else tensor.data.view(FLOATS[tensor.dtype])


def _config_as_source(checkpoint: Checkpoint, source: dict, stored: Stored) -> list[str]:
    """What `config.json` says otherwise than the source's, quantization aside."""
    alike = {**checkpoint.config, "quantization_config": None} == {**source, "quantization_config": None}
    return [] if alike else ["config.json differs from the source beyond quantization_config"]


def _config_of_jangtq(checkpoint: Checkpoint, source: dict, stored: Stored) -> list[str]:
    """What `config.json` and the other files beside the tensors say otherwise than source and tensors."""
    text = source.get("text_config") or source
    setting = {"group_size": 64, "bits": 8, "mode": "affine"}
    affine = [name.removesuffix(".scales") for name in stored if name.endswith(".scales")]
    widths = _stored_widths(stored)
    wanted = {key: value for key, value in source.items() if key != "quantization_config"}
    wanted |= {"quantization": setting | dict.fromkeys(affine, setting), "weight_format": "mxtq"}
    wanted |= {"mxtq_seed": 42, "mxtq_bits": widths}
    if wanted.get("eos_token_id") is None and "eos_token_id" in text:
        wanted["eos_token_id"] = text["eos_token_id"]
    differences = [] if checkpoint.config == wanted else ["config.json does not describe source and tensors"]
    jang = read_json(checkpoint.folder / "jang_config.json")
    roles = ("attention", "linear_attention", "shared_expert", "embed_tokens", "lm_head")
    if jang.get("mxtq_bits") != dict.fromkeys(roles, 8) | {"routed_expert": widths}:
        differences.append("jang_config.json does not describe the widths")
    if jang.get("mxtq_seed") != 42:
        differences.append("jang_config.json does not describe the rotation")
    return differences


def _config_of_mlx(checkpoint: Checkpoint, source: dict, stored: Stored) -> list[str]:
    """What `config.json` says otherwise than source and tensors; its settings are compared with each module."""
    config, text = checkpoint.config, mlx_layout.text_config(checkpoint.config)
    rope = text.get("rope_parameters") or {}
    older = {key: rope.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    older["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    older["num_experts"] = text.get("num_local_experts")
    changed = _changed(text, mlx_layout.text_config(source), older)
    if text is not config:
        changed += _changed(config, source)
    differences = [f"config.json says another {key} than the source" for key in changed]
    if text.get("tie_word_embeddings") == any("lm_head." in name for name in stored):
        differences.append("config.json and tensors disagree on a tied head")
    if config["quantization"] != config.get("quantization_config"):
        differences.append("quantization and quantization_config of config.json differ")
    settings = (key for key, value in config["quantization"].items() if isinstance(value, dict))
    differences += [f"config.json has a setting of {key}" for key in settings if key + ".scales" not in stored]
    return differences


def _changed(ours: dict, theirs: dict, more: dict | None = None) -> list[str]:
    """Keys that differ between the source's config and ours, which has `more`, quantization aside."""
    apart = {"quantization", "quantization_config", "vision_config", "text_config", "tie_word_embeddings"}
    wanted = (more or {}) | {key: value for key, value in theirs.items() if value is not None}
    return [key for key in sorted((ours.keys() | wanted.keys()) - apart) if ours.get(key) != wanted.get(key)]


def _stored_widths(stored: Stored) -> int | dict[str, int]:
    """Bits of all stacked experts, or, if they differ, the commonest of each projection."""
    found: dict[str, list[int]] = {}
    for name in stored:
        if name.endswith(".tq_bits"):
            found.setdefault(name.split(".")[-2], []).append(int(stored[name].data[0]))
    every = {bits for widths in found.values() for bits in widths}
    return every.pop() if len(every) == 1 else {part: max(sorted(w), key=w.count) for part, w in found.items()}


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


@dataclass(frozen=True)
class Comparison:
    """How the quantized tensors of a format are compared, what becomes of a kept one, what configs must say."""

    quantized: Callable[[PlanEntry, QuantizedTensor, Stored, Checkpoint], Compared]
    kept: Callable[[str, Stored, Checkpoint], Stored]
    config: Callable[[Checkpoint, dict, Stored], list[str]]


COMPARE = {
    "humming": Comparison(_compare_humming, _identical, _config_as_source),
    "compressed-tensors": Comparison(_compare_compressed_tensors, _identical, _config_as_source),
    "tq": Comparison(_compare_tq, _as_float16, _config_as_source),
    "jangtq": Comparison(_compare_jangtq, _kept_by_jangtq, _config_of_jangtq),
    "mlx": Comparison(_compare_mlx, _kept_by_mlx, _config_of_mlx),
}
