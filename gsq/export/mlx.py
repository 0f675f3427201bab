"""MLX checkpoints in affine codes, as stock mlx_lm loads them.

A module `M` becomes `M.weight`, uint32 words `[..., out, in * bits / 32]`, with `M.scales` and
`M.biases`, `[..., out, in / group]`, for weights `scale * code + bias`. Symmetric integers are such
codes as well: the bias is the lowest level times the scale, exactly, since that level is a power of
two. What is kept has the dtype of the source. Names, and what becomes of norms, convolutions and
experts, see `gsq.export.mlx_layout`. In `config.json`, `quantization` has the commonest setting and
the modules with another one; a module without scales is not quantized.

Weights are decoded as in MLX's Metal kernels: `scale * code + bias` in float32, rounded once. So
they are, to the last bit, in products with many tokens of a bfloat16 model; those with one token do
not round them at all, and `mlx.core.dequantize` on a CPU rounds the product as well as the sum.

Source: `load_model`, `quantize_model` and `save_config` of `mlx_lm.utils`; `kernels/quantized.h` of MLX.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from gsq.codebook import Codebook, CodebookError, QuantizedTensor
from gsq.errors import UserError
from gsq.export.base import DecodedCheckpoint, PackedTensor, PlanEntry, Run, walk
from gsq.export.mlx_layout import (
    EXPERT,
    FUSED,
    PARTS,
    STACK,
    Layout,
    affine_module,
    channels_first,
    expert_names,
    is_tied,
    kept_tensor,
    layout_of,
    source_layout,
    stacked_beside,
    stacks,
    stored_modules,
    stored_parts,
    text_config,
)
from gsq.kernels.affine import BITS, GROUPS, pack_affine, unpack_affine
from gsq.model.checkpoint import Checkpoint, CheckpointWriter

SETTINGS = ("quantization", "quantization_config")  # keys of `config.json` that say the same


def check(source: Checkpoint, entries: Mapping[str, PlanEntry]) -> None:
    """Raise `UserError` naming the first tensor that the format cannot hold, and what could."""
    layout = source_layout(source)
    for name, entry in walk(source, entries):
        if layout.stored_name(name) is None and entry:
            raise UserError(f"{entry.name}: format mlx leaves this tensor out, as mlx_lm does not read it; keep it")
        if entry:
            _check_entry(entry)


def write(run: Run, writer: CheckpointWriter) -> None:
    """Add all tensors and `config.json`."""
    layout = source_layout(run.source)
    for name, entry in walk(run.source, run.plan.entries):
        if entry is None:
            writer.add_all(kept_as(layout, run.source, name))
            continue
        for module, quantized in stored_parts(layout.places, entry, run.load(entry.name)):
            writer.add_all(pack(module, quantized))
    writer.write_json("config.json", config_with(run.source, run.plan.entries))


def packed_bytes(entry: PlanEntry) -> int:
    """Bytes of a planned tensor that is packed, with biases, whether its codebook has them or not."""
    return replace(entry.codebook, offset=True).nbytes(entry.shape)


def kept_bytes(source: Checkpoint, name: str) -> int:
    """Bytes of a tensor that is not packed; one of experts that come one by one is its part of their stack."""
    return 0 if source_layout(source).stored_name(name) is None else source.tensors[name].nbytes


def recognizes(checkpoint: Checkpoint) -> bool:
    """Whether a folder is in this format, whoever wrote it."""
    setting = checkpoint.config.get("quantization")
    affine = isinstance(setting, dict) and setting.get("mode", "affine") == "affine"
    return affine and "weight_format" not in checkpoint.config


def decoded(checkpoint: Checkpoint) -> DecodedCheckpoint:
    """The export as dense tensors under their Hugging Face names; raises `UserError` where parts are missing."""
    layout = layout_of(checkpoint.config)
    packed: dict[str, PackedTensor] = {}
    for name in checkpoint.tensors:
        module, _, leaf = name.rpartition(".")
        if leaf in ("scales", "biases"):
            continue
        if leaf == "weight" and STACK.fullmatch(module):
            packed |= _decoded_experts(checkpoint, layout, module)
        elif checkpoint.tensors[name].dtype == torch.uint32:
            packed[layout.original_name(name)] = _decoded_module(checkpoint, module)
        else:
            packed[layout.original_name(name)] = _decoded_kept(checkpoint, layout, name)
    return DecodedCheckpoint(checkpoint, packed, settings=SETTINGS)


def kept_as(layout: Layout, source: Checkpoint, name: str) -> dict[str, Tensor]:
    """What is stored of a tensor that is not packed; the first of experts that come one by one brings all of them."""
    place = layout.stored_name(name)
    if place is None:
        return {}
    if expert := EXPERT.fullmatch(place):
        names = expert_names(name, source.tensors) if expert["index"] == "0" else []
        stack = f"{expert['mlp']}.switch_mlp.{expert['part']}.weight"
        return {stack: torch.stack([source.read(each) for each in names])} if names else {}
    tensor = source.read(name)
    if fused := FUSED.fullmatch(place):
        modules = stacks(fused["mlp"], fused["fused"])
        parts = tensor.chunk(len(modules), dim=1)
        return {module + ".weight": part for module, part in zip(modules, parts, strict=True)}
    if re.search(layout.raised, name):
        tensor = tensor + 1
    return {place: tensor.movedim(1, -1) if re.search(layout.channels_last, name) else tensor}


def pack(module: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
    """What is stored of a quantized module."""
    codebook, scales, biases = quantized.codebook, quantized.scales, quantized.offsets
    if biases is None:
        biases = scales * codebook.levels[0]
    if not (scales.isfinite().all() and biases.isfinite().all()):
        raise UserError(
            f"{module} has a scale or bias that {codebook.scale_dtype} cannot hold; use another scale dtype"
        )
    words = pack_affine(quantized.codes, codebook.bits)
    return {module + part: tensor for part, tensor in zip(PARTS, (words, scales, biases), strict=True)}


def config_with(source: Checkpoint, entries: Mapping[str, PlanEntry]) -> dict:
    """`config.json`: the source's, how modules are quantized, and what mlx_lm looks for in another place."""
    layout = source_layout(source)
    modules: dict[str, tuple[int, int]] = {}
    weights: Counter[tuple[int, int]] = Counter()
    for _, entry in walk(source, entries):
        if entry:
            setting = (entry.codebook.group_size, entry.codebook.bits)
            modules |= dict.fromkeys(stored_modules(layout.places, entry), setting)
            weights[setting] += torch.Size(entry.shape).numel()
    common = weights.most_common(1)[0][0]
    others = {module: _fields(setting) for module, setting in modules.items() if setting != common}
    quantization = _fields(common) | {"mode": "affine"} | others
    # like mlx_lm's own conversion, which leaves the vision tower out as well
    config = {key: value for key, value in source.config.items() if key not in ("vision_config", *SETTINGS)}
    text = text_config(config)
    text = text | _older_names(text) | {"tie_word_embeddings": is_tied(source)}
    config = config | {"text_config": text} if "text_config" in config else text
    return config | dict.fromkeys(SETTINGS, quantization)


def _fields(setting: tuple[int, int]) -> dict:
    return dict(zip(("group_size", "bits"), setting, strict=True))


def _older_names(text: dict) -> dict:
    """What is named otherwise since transformers 5, as mlx_lm asks for it: it would take a default instead."""
    rope = text.get("rope_parameters") or {}
    older = {key: rope.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    older["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    older["num_experts"] = text.get("num_local_experts")
    return {key: value for key, value in older.items() if value is not None and text.get(key) is None}


def _check_entry(entry: PlanEntry) -> None:
    codebook, lowest = entry.codebook, entry.codebook.levels[0]
    steps = codebook.levels == tuple(lowest + step for step in range(len(codebook.levels)))
    whole = lowest == 0 if codebook.offset else -lowest in (1 << power for power in range(8))
    problem = None
    if codebook.rotation:
        problem = "holds no rotated weights; use codebook affine or integer"
    elif not (steps and whole):
        problem = "holds integers only, with or without offsets; use codebook affine or integer"
    elif codebook.bits not in BITS:
        problem = f"has {_listed(BITS)} bits, not {codebook.bits}; use one of these"
    elif codebook.group_size not in GROUPS:
        problem = f"has groups of {_listed(GROUPS)}, not {codebook.group_size}; use one of these"
    elif codebook.scale_dtype == torch.float32:
        problem = "makes mlx_lm compute in float32 if scales are; set the scale dtype to bfloat16"
    if problem:
        raise UserError(f"{entry.name}: format mlx {problem}")
    try:
        codebook.groups(entry.shape[-1])
    except CodebookError as error:
        raise UserError(f"{entry.name}: {error}") from None


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}"


def _decoded_module(checkpoint: Checkpoint, module: str) -> PackedTensor:
    """The weights `[..., out, in]` of a module, packed or not."""
    if checkpoint.tensors[module + ".weight"].dtype != torch.uint32:
        return kept_tensor(checkpoint, module + ".weight")
    codebook, shape, stored = affine_module(checkpoint, module)
    label = f"affine{codebook.bits} g{codebook.group_size}"
    return PackedTensor(shape, stored, label, partial(_decode, checkpoint, stored, codebook))


def _decode(checkpoint: Checkpoint, stored: tuple[str, ...], codebook: Codebook, part: int | None) -> Tensor:
    words, scales, biases = (checkpoint.read(name, part) for name in stored)
    return QuantizedTensor(unpack_affine(words, codebook.bits), scales, codebook, biases).dequantize(torch.bfloat16)


def _decoded_experts(checkpoint: Checkpoint, layout: Layout, module: str) -> dict[str, PackedTensor]:
    """The experts that a stack is a part of, by name, as models of this type are published."""
    fused, modules = stacked_beside(module)
    missing = [name for name in modules if name + ".weight" not in checkpoint.tensors]
    if missing:
        raise UserError(f"{module} belongs to experts of which {missing[0]} is missing; export again")
    if layout.fused:
        return {layout.original_name(fused): _joined([_decoded_module(checkpoint, name) for name in modules])}
    stack = _decoded_module(checkpoint, module)
    prefix, leaf = layout.original_name(fused).rpartition(".")[0], module.rpartition(".")[2]
    return {
        f"{prefix}.{index}.{leaf}.weight": replace(stack, shape=stack.shape[1:], decode=partial(_expert, stack, index))
        for index in range(stack.shape[0])
    }


def _joined(stacks: list[PackedTensor]) -> PackedTensor:
    """Stacks one below the other, `[experts, out, in]`."""
    experts, rows, columns = stacks[0].shape
    return replace(
        stacks[0],
        shape=(experts, rows * len(stacks), columns),
        stored=tuple(name for stack in stacks for name in stack.stored),
        decode=lambda part: torch.cat([stack.decode(part) for stack in stacks], dim=-2),
    )


def _expert(stack: PackedTensor, index: int, part: int | None) -> Tensor:
    expert = stack.decode(index)
    return expert if part is None else expert[part]


def _decoded_kept(checkpoint: Checkpoint, layout: Layout, name: str) -> PackedTensor:
    """A tensor that was not packed, as the source had it.

    A norm to which one was added was rounded then, and MLX computes with that. Taking it off is exact (below
    256 in bfloat16), so whoever adds it again in float32 has MLX's number.
    """
    tensor, original = kept_tensor(checkpoint, name), layout.original_name(name)
    if re.search(layout.raised, original):
        return replace(tensor, decode=lambda part: tensor.decode(part) - 1)
    return channels_first(tensor) if re.search(layout.channels_last, original) else tensor
