"""JANGTQ checkpoints (`weight_format: mxtq`), as the MLX loaders of jang read them: models of Qwen3.5-MoE's layout.

Names are those of MLX's module tree, see `PLACES`. All routed experts of a layer are stacked, gate
and up apart: `...mlp.switch_mlp.gate_proj` holds `tq_packed`, uint32 `[experts, out, words]` (codes
never straddle two words), `tq_norms`, float16 `[experts, out]`, and `tq_bits`, uint8 `[1]`. Other
matrices are in MLX's affine 8 bits, and what is small or tender in float16, see `KINDS`; MTP is
left out. `config.json` lists the affine modules, `jang_config.json` says how to serve the model,
and `jangtq_runtime.safetensors` has signs and levels for readers that do not compute them.

Source: `jang_tools.convert_qwen35_jangtq`, `load_jangtq`, `capabilities`, `build_jangtq_sidecar`.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from gsq.codebook import Codebook, QuantizedTensor
from gsq.errors import UserError
from gsq.export import mlx_layout
from gsq.export.base import (
    DecodedCheckpoint,
    PackedTensor,
    PlanEntry,
    Run,
    as_float16,
    float16_bytes,
    require_codebook,
    walk,
)
from gsq.kernels.affine import dequantize_affine, pack_affine, quantize_affine, unpack_affine
from gsq.kernels.packing import WORD, pack_words, unpack_words
from gsq.model.checkpoint import Checkpoint, CheckpointWriter
from gsq.model.targets import EXPERT_PARTS
from gsq.rotation import SEED

BITS, GROUP = 8, 64  # of affine tensors
WIDTHS = (2, 3, 4)  # of routed experts
CONFIG, RUNTIME = "jang_config.json", "jangtq_runtime.safetensors"
SETTINGS = ("quantization", "weight_format", "mxtq_seed", "mxtq_bits")  # what `config.json` gains
PACKED, NORMS, WIDTH = ".tq_packed", ".tq_norms", ".tq_bits"

PLACES = (*mlx_layout.QWEN3_5, ("model.visual.", "vision_tower."))
Kind = Literal["dropped", "experts", "channels last", "float16", "affine"]
KINDS: tuple[tuple[str, Kind], ...] = (  # the first pattern found in a source's name decides
    (r"(^|\.)mtp\.", "dropped"),
    (r"\.mlp\.experts\.", "experts"),
    (r"^model\.visual\.patch_embed\.proj\.weight$", "channels last"),
    (r"^model\.visual\.", "float16"),
    (r"norm\.weight$", "float16"),
    (r"\.(A_log|dt_bias)$|conv1d\.weight$", "float16"),
    (r"\.(mlp\.gate|shared_expert_gate)\.weight$", "float16"),
    (r"\.weight$", "affine"),
)
PARSERS = {"reasoning_parser": "qwen3", "tool_parser": "qwen3_coder", "think_in_template": True, "cache_type": "hybrid"}
FAMILIES = {  # type of the text model: the family that readers know it as, and how they serve that
    "qwen3_5_moe": {"family": "qwen3_5_moe", **PARSERS},
    "qwen3_5_moe_text": {"family": "qwen3_5_moe", **PARSERS},
}


def check(source: Checkpoint, entries: Mapping[str, PlanEntry]) -> None:
    """Raise `UserError` naming the first tensor that the format cannot hold, and what could."""
    for _, entry in walk(source, entries):
        if entry:
            _check_entry(entry)
    for name in _kept_names(source, entries):
        if kind_of(name, source.tensors[name].shape) == "experts":
            raise UserError(
                f"{name}: format jangtq packs all routed experts, and this one is kept; quantize it with codebook "
                "jangtq, or use codebook and format tq"
            )
        stored_name(name)
    _family(source.config)


def write(run: Run, writer: CheckpointWriter) -> None:
    """Add all tensors, `config.json`, and what lies beside it."""
    source, entries = run.source, run.plan.entries
    for name, entry in walk(source, entries):
        if entry is None:
            if kind_of(name, source.tensors[name].shape) != "dropped":
                writer.add_all(kept_as(name, source.read(name)))
            continue
        for module, quantized in stored_parts(entry, run.load(entry.name)):
            writer.add_all(pack(module, quantized))
    writer.describe({"format": "jangtq"})
    writer.write_json("config.json", config_with(source, entries))
    writer.write_json(CONFIG, jang_config(source, entries))
    writer.write_tensors(RUNTIME, runtime_tensors(entries))


def packed_bytes(entry: PlanEntry) -> int:
    """Bytes of experts: words that no code straddles, norms, and the width of each stack."""
    *rows, columns = entry.shape
    words = columns // (WORD // entry.codebook.bits) * torch.uint32.itemsize
    norm = entry.codebook.scale_dtype.itemsize
    return math.prod(rows) * (words + norm) + len(mlx_layout.stored_modules(PLACES, entry))


def kept_bytes(source: Checkpoint, name: str) -> int:
    """Bytes of a tensor that is no routed expert."""
    info = source.tensors[name]
    kind = kind_of(name, info.shape)
    if kind == "dropped":
        return 0
    if kind == "affine":
        return Codebook.affine(BITS, GROUP, torch.float16).nbytes(info.shape)
    return float16_bytes(source, name)


def recognizes(checkpoint: Checkpoint) -> bool:
    """Whether a folder is in this format."""
    return checkpoint.config.get("weight_format") == "mxtq"


def decoded(checkpoint: Checkpoint) -> DecodedCheckpoint:
    """The export as dense tensors under their Hugging Face names; raises `UserError` where parts are missing."""
    packed = {}
    for name in checkpoint.tensors:
        if name.endswith(PACKED):
            fused, tensor = _decoded_experts(checkpoint, name)
            packed[fused] = tensor
        elif name.endswith(".weight") and name.removesuffix(".weight") + ".scales" in checkpoint.tensors:
            packed[original_name(name)] = _decoded_affine(checkpoint, name)
        elif not name.endswith((".scales", ".biases", NORMS, WIDTH)):
            packed[original_name(name)] = _decoded_float16(checkpoint, name)
    return DecodedCheckpoint(checkpoint, packed, (CONFIG,), SETTINGS)


def stored_name(name: str) -> str:
    """Where MLX's module tree has a tensor of the source."""
    place = mlx_layout.stored_name(PLACES, name)
    if place is not None:
        return place
    places = ", ".join(before + "*" for before, _ in PLACES)
    raise UserError(
        f"format jangtq has no place for {name}: it takes models whose tensors are {places}; use codebook and format tq"
    )


def original_name(name: str) -> str:
    """Inverse of `stored_name`; a name that it never gives is left as it is."""
    return mlx_layout.original_name(PLACES, name)


def kind_of(name: str, shape: tuple[int, ...]) -> Kind:
    """What becomes of a tensor of the source."""
    kind = next((kind for pattern, kind in KINDS if re.search(pattern, name)), "float16")
    if kind == "affine" and (len(shape) != 2 or shape[-1] % GROUP):
        return "float16"
    return "float16" if kind == "channels last" and len(shape) != 5 else kind


def kept_as(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What is stored of a tensor that is neither packed nor dropped."""
    kind, place = kind_of(name, tuple(tensor.shape)), stored_name(name)
    half = as_float16(name, tensor, "jangtq")
    if kind != "affine":
        return {place: half.movedim(1, -1) if kind == "channels last" else half}
    codes, scales, biases = quantize_affine(half, BITS, GROUP)
    module = place.removesuffix(".weight")
    return {place: pack_affine(codes, BITS), module + ".scales": scales, module + ".biases": biases}


def stored_parts(entry: PlanEntry, quantized: QuantizedTensor) -> Iterator[tuple[str, QuantizedTensor]]:
    """The modules that fused experts are stored as, `[experts, out, in]` each, by name."""
    return mlx_layout.stored_parts(PLACES, entry, quantized)


def pack(module: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
    """What is stored of a module's experts."""
    bits, norms = quantized.codebook.bits, quantized.scales.squeeze(-1)
    if not norms.isfinite().all():
        raise UserError(f"{module} has a row whose norm float16 cannot hold; export to another format")
    return {
        module + PACKED: pack_words(quantized.codes, bits),
        module + NORMS: norms,
        module + WIDTH: torch.tensor([bits], dtype=torch.uint8),
    }


def config_with(source: Checkpoint, entries: Mapping[str, PlanEntry]) -> dict:
    """`config.json`: the source's, the affine modules, and how routed experts are stored."""
    setting = {"group_size": GROUP, "bits": BITS, "mode": "affine"}
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    text = config.get("text_config") or config
    if config.get("eos_token_id") is None and "eos_token_id" in text:  # readers look only here
        config["eos_token_id"] = text["eos_token_id"]
    return config | {
        "quantization": setting | {module: setting for module in _affine_modules(source, entries)},
        "weight_format": "mxtq",
        "mxtq_seed": SEED,
        "mxtq_bits": routed_bits(entries),
    }


def jang_config(source: Checkpoint, entries: Mapping[str, PlanEntry]) -> dict:
    """`jang_config.json`: widths by role, and what readers must know to serve the model."""
    text = source.config.get("text_config") or source.config
    routed = routed_bits(entries)
    vision = any(name.startswith("model.visual.") for name in source.tensors)
    roles = ("attention", "linear_attention", "shared_expert", "embed_tokens", "lm_head")
    layers = text.get("mtp_num_hidden_layers") or 0
    return {
        "version": 2,
        "weight_format": "mxtq",
        "profile": "JANGTQ_K" if isinstance(routed, dict) else f"JANGTQ{routed}",
        "source_model": {"name": source.folder.name, "architecture": text.get("model_type")},
        "has_vision": vision,
        "mxtq_seed": SEED,
        "mxtq_bits": dict.fromkeys(roles, BITS) | {"routed_expert": routed},
        "quantization": {
            "method": "affine+mxtq",
            "group_size": GROUP,
            "bits_default": BITS,
            "affine_override_count": len(_affine_modules(source, entries)),
            "routed_expert_bits": routed,
            "mxtq_tensor_group_count": sum(
                len(mlx_layout.stored_modules(PLACES, e)) for e in entries.values() if e.codebook
            ),
        },
        **(_without_mtp(layers) if layers else {}),
        "capabilities": _capabilities(source.config, vision),
    }


def routed_bits(entries: Mapping[str, PlanEntry]) -> int | dict[str, int]:
    """Width of all routed experts, or, if they differ, the commonest of each projection."""
    widths: dict[str, Counter[int]] = defaultdict(Counter)
    for entry in entries.values():
        if entry.codebook:
            for module in mlx_layout.stored_modules(PLACES, entry):
                widths[module.rpartition(".")[2]][entry.codebook.bits] += 1
    parts = [part for parts in EXPERT_PARTS.values() for part in parts if part in widths]
    common = {part: min(widths[part], key=lambda bits: (-widths[part][bits], bits)) for part in parts}
    return common if len(set().union(*widths.values())) > 1 else common[parts[0]]


def runtime_tensors(entries: Mapping[str, PlanEntry]) -> dict[str, Tensor]:
    """Signs by width of rows, levels by width of rows and of codes, float32."""
    tensors = {}
    for codebook in {entry.codebook for entry in entries.values() if entry.codebook}:
        width = codebook.rotation.width
        tensors[f"signs.{width}.{SEED}"], _ = codebook.rotation.signs
        tensors[f"codebook.{width}.{codebook.bits}"] = codebook.level_table()
    return dict(sorted(tensors.items()))


def _check_entry(entry: PlanEntry) -> None:
    if kind_of(entry.sources[0], entry.shape) != "experts":
        raise UserError(
            f"{entry.name}: format jangtq packs routed experts only, and stores other tensors in {BITS} or 16 bits; "
            "keep this tensor, or use codebook and format tq"
        )
    require_codebook(entry, "jangtq")
    stored_name(entry.sources[0])
    width, bits = entry.shape[-1], entry.codebook.bits
    if width % (WORD // bits):
        fitting = " or ".join(str(other) for other in WIDTHS if width % (WORD // other) == 0)
        advice = f"use {fitting} bits, or " if fitting else ""
        raise UserError(
            f"{entry.name}: format jangtq packs {WORD // bits} codes of {bits} bits in a word, which does not divide "
            f"in_features {width}; {advice}use codebook and format tq"
        )


def _kept_names(source: Checkpoint, entries: Mapping[str, PlanEntry]) -> list[str]:
    """Tensors of the source that are stored and not packed."""
    kept = (name for name, entry in walk(source, entries) if entry is None)
    return [name for name in kept if kind_of(name, source.tensors[name].shape) != "dropped"]


def _affine_modules(source: Checkpoint, entries: Mapping[str, PlanEntry]) -> list[str]:
    kept = _kept_names(source, entries)
    affine = (name for name in kept if kind_of(name, source.tensors[name].shape) == "affine")
    return sorted(stored_name(name).removesuffix(".weight") for name in affine)


def _family(config: dict) -> dict:
    text = config.get("text_config") or config
    types = [text.get("model_type"), config.get("model_type")]
    found = next((FAMILIES[type] for type in types if type in FAMILIES), None)
    if found is None:
        raise UserError(
            f"format jangtq is read for {', '.join(FAMILIES)}, not for {types[0]}; use codebook and format tq"
        )
    return found


def _capabilities(config: dict, vision: bool) -> dict:
    senses = {"text": True, "vision": vision, "audio": False, "video": False}
    return _family(config) | {
        "supports_tools": True,
        "supports_thinking": True,
        "modality": "vision" if vision else "text",
        "modalities": senses,
        **{f"has_{sense}": senses[sense] for sense in ("vision", "audio", "video")},
    }


def _without_mtp(layers: int) -> dict:
    """What says that `layers` of multi-token prediction, which `config.json` names, are not stored."""
    stored = {"bundle_has_mtp": False, "mtp_layers": layers}
    return {
        "runtime": stored | {"mtp_mode": "metadata_only_missing_weights"},
        "mtp": {"kept": False, "enabled": False, "num_layers": layers, "tensor_count": 0},
        **stored,
    }


def _decoded_experts(checkpoint: Checkpoint, name: str) -> tuple[str, PackedTensor]:
    """The fused experts, by name, that the tensor `name` is a part of."""
    fused, modules = mlx_layout.stacked_beside(name.removesuffix(PACKED))
    missing = [m + end for m in modules for end in (PACKED, NORMS, WIDTH) if m + end not in checkpoint.tensors]
    if missing:
        raise UserError(f"{name} belongs to experts of which {missing[0]} is missing; export again")
    books = [_stored_codebook(checkpoint, module) for module in modules]
    experts, rows, _ = checkpoint.tensors[name].shape
    shape = (experts, rows * len(modules), books[0].rotation.width)
    stored = tuple(module + end for module in modules for end in (PACKED, NORMS, WIDTH))
    decode = partial(_decode_experts, checkpoint, list(zip(modules, books, strict=True)))
    return original_name(fused), PackedTensor(shape, stored, f"jangtq{books[0].bits}", decode)


def _stored_codebook(checkpoint: Checkpoint, module: str) -> Codebook:
    packed, norms = checkpoint.tensors[module + PACKED].shape, checkpoint.tensors[module + NORMS].shape
    bits = int(checkpoint.read(module + WIDTH)[0])
    if bits not in WIDTHS or len(packed) != 3 or packed[:2] != norms:
        raise UserError(f"{module} has codes {packed} of {bits} bits and norms {norms}; export again")
    return Codebook.jangtq(bits, packed[-1] * (WORD // bits))


def _decode_experts(checkpoint: Checkpoint, modules: list[tuple[str, Codebook]], part: int | None) -> Tensor:
    """bfloat16 weights `[experts, out, in]`, or expert `part`."""
    weights = []
    for module, codebook in modules:
        codes = unpack_words(checkpoint.read(module + PACKED, part), codebook.bits)
        norms = checkpoint.read(module + NORMS, part)[..., None]
        weights.append(QuantizedTensor(codes, norms, codebook).dequantize(torch.bfloat16))
    return torch.cat(weights, dim=-2)


def _decoded_affine(checkpoint: Checkpoint, name: str) -> PackedTensor:
    codebook, shape, stored = mlx_layout.affine_module(checkpoint, name.removesuffix(".weight"))
    decode = partial(_decode_affine, checkpoint, stored, codebook.bits)
    return PackedTensor(shape, stored, f"affine{codebook.bits} g{codebook.group_size}", decode, torch.float16)


def _decode_affine(checkpoint: Checkpoint, stored: tuple[str, ...], bits: int, part: int | None) -> Tensor:
    words, scales, biases = (checkpoint.read(name, part) for name in stored)
    return dequantize_affine(unpack_affine(words, bits), scales, biases)


def _decoded_float16(checkpoint: Checkpoint, name: str) -> PackedTensor:
    tensor = mlx_layout.kept_tensor(checkpoint, name)
    last = kind_of(original_name(name), tensor.shape) == "channels last"
    return mlx_layout.channels_first(tensor) if last else tensor
