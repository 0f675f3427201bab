"""Humming checkpoints (`quant_method: "humming"`), as vLLM and the humming-kernels package read them.

A Linear `X` becomes `X.weight`, int32 words of densely packed codes `[out, in * bits / 32]`, and
`X.weight_scale`, bfloat16 `[out, in / group]`; experts are stored one by one. A code stands for the
integer `code - 2**(bits - 1)`. Which modules are quantized, and how, the reader learns from
`config.json` alone, so most of this file derives that description from the plan:

* `ignore`: substrings of module names. The regular expressions (`re:`) that later readers also
  take are silently ignored by vLLM up to 0.25, so none is written.
* `dynamic`: `-:REGEX` leaves modules unquantized, `+:REGEX` gives them other settings. All readers match these.
* A reader asks for some modules under other names than the checkpoint's, see `gsq.export.modules`.

Source: `HummingConfig` in vLLM (model_executor/layers/quantization/humming.py), `humming.schema` in humming-kernels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from gsq.errors import UserError
from gsq.export.base import DecodedCheckpoint, PackedTensor, PlanEntry, Run, linears, walk
from gsq.export.integers import Setting, integer_bytes, integer_setting, pack_levels, packed_integers
from gsq.export.modules import planned_modules, regexes, served_names, units
from gsq.export.patterns import cover
from gsq.model.checkpoint import Checkpoint, CheckpointWriter

MIN_GROUP = 16  # kernels refuse smaller groups


def check(source: Checkpoint, entries: Mapping[str, PlanEntry]) -> None:
    """Raise `UserError` naming the first tensor that the format cannot hold, and what could."""
    quantization_config(source, entries)


def write(run: Run, writer: CheckpointWriter) -> None:
    """Add all tensors and `config.json`."""
    for name, entry in walk(run.source, run.plan.entries):
        if entry is None:
            writer.add(name, run.source.read(name))
            continue
        bits = _setting(entry).bits
        for weight, quantized in linears(entry, run.load(entry.name)):
            writer.add(weight, pack_levels(quantized, bits))
            writer.add(scale_name(weight), quantized.scales)
    config = quantization_config(run.source, run.plan.entries)
    writer.write_json("config.json", run.source.config | {"quantization_config": config})


def packed_bytes(entry: PlanEntry) -> int:
    """Bytes of a planned tensor that is packed."""
    return integer_bytes(entry, _setting(entry))


def kept_bytes(source: Checkpoint, name: str) -> int:
    """Bytes of a tensor that is copied."""
    return source.tensors[name].nbytes


def recognizes(checkpoint: Checkpoint) -> bool:
    """Whether a folder is in this format."""
    return (checkpoint.config.get("quantization_config") or {}).get("quant_method") == "humming"


def decoded(checkpoint: Checkpoint) -> DecodedCheckpoint:
    """The export as dense tensors; raises `UserError` where tensors and `config.json` disagree."""
    packed = {}
    for name, info in checkpoint.tensors.items():
        if info.dtype == torch.int32 and name.endswith(".weight"):
            packed[name] = _packed_tensor(checkpoint, name)
    return DecodedCheckpoint(checkpoint, packed)


def scale_name(weight: str) -> str:
    """Name of the scales that belong to the packed tensor `weight`."""
    return weight.removesuffix(".weight") + ".weight_scale"


def read_setting(config: dict, module: str) -> Setting | None:
    """How a reader of `quantization_config` takes the module of this name; None if it is not quantized."""
    if "lm_head" in module or any(_ignores(pattern, module) for pattern in config.get("ignore") or []):
        return None
    dynamic = config.get("dynamic") or {}
    if any(rule.startswith("-") and re.match(rule[2:], module) for rule in dynamic):
        return None
    override = next((dynamic[rule] for rule in dynamic if rule.startswith("+") and re.match(rule[2:], module)), {})
    fields = config | override
    kind = re.fullmatch(r"u?int([2-8])", str(fields.get("b_dtype")))
    known = kind and fields.get("weight_scale_type", "group") == "group" and fields.get("weight_scale_group_size")
    if not known or fields.get("has_zero_point") or fields.get("hadamard_block_size"):
        raise UserError(f"{module} is stored as {fields}; GSQ decodes Humming integers with group scales only")
    return Setting(int(kind[1]), fields["weight_scale_group_size"])


def quantization_config(source: Checkpoint, entries: Mapping[str, PlanEntry]) -> dict:
    """The `quantization_config` under which a reader takes exactly the planned modules as quantized."""
    modules, weights = planned_modules(source, entries, _setting)
    names = served_names(modules)
    default = weights.most_common(1)[0][0]
    kept = units((name for name, setting in modules.items() if setting is None), fused=True)
    quantized = [name for name, setting in names.items() if setting]
    ignore, dynamic = [], {}
    for run, exact in cover(kept, quantized, {True, False}):
        if exact:
            dynamic |= {"-:" + regex: {} for regex in regexes([run])}
        else:
            ignore.append(run)
    for setting in sorted(weights.keys() - {default}, key=str):
        wanted = units((name for name, own in modules.items() if own == setting), fused=True)
        others = [name for name in quantized if names[name] != setting]
        runs = (run for run, _ in cover(wanted, others, {True}))
        dynamic |= {"+:" + regex: _fields(setting) for regex in regexes(runs)}
    config = {
        "quant_method": "humming",
        **_fields(default),
        "weight_scale_type": "group",
        "has_zero_point": False,
        "ignore": sorted(ignore),
        "dynamic": dynamic,
    }
    for name, setting in names.items():
        if read_setting(config, name) != setting:
            raise UserError(f"no pattern tells {name} ({setting or 'kept'}) from other modules; give them one codebook")
    return config


def _fields(setting: Setting) -> dict:
    """Its keys in `quantization_config`."""
    return {"b_dtype": f"uint{setting.bits}", "weight_scale_group_size": setting.group_size}


def _setting(entry: PlanEntry) -> Setting:
    """What a planned codebook is called in this format; raises `UserError` if it cannot be expressed."""
    setting = integer_setting(entry, "humming")
    problem = None
    if setting.group_size < MIN_GROUP:
        problem = f"has groups of at least {MIN_GROUP}, not {setting.group_size}; use 32, 64 or 128"
    elif any(part in name for part in ("lm_head", "embed") for name in (entry.name, *entry.sources)):
        problem = "is never read for lm_head and embeddings; keep this tensor unquantized"
    if problem:
        raise UserError(f"{entry.name}: format humming {problem}")
    return setting


def _ignores(pattern: str, module: str) -> bool:
    return bool(re.match(pattern[3:], module)) if pattern.startswith("re:") else pattern in module


def _packed_tensor(checkpoint: Checkpoint, name: str) -> PackedTensor:
    setting = read_setting(checkpoint.config["quantization_config"], name.removesuffix(".weight"))
    if setting is None:
        raise UserError(f"{name} is packed, but {checkpoint.folder / 'config.json'} says it is not; export again")
    return packed_integers(checkpoint, setting, name, scale_name(name))
