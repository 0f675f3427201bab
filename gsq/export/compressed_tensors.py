"""compressed-tensors checkpoints (`format: pack-quantized`), as transformers and vLLM read them.

A Linear `X` becomes `X.weight_packed`, int32 words of densely packed codes `[out, in * bits / 32]`,
`X.weight_scale`, bfloat16 `[out, in / group]`, and `X.weight_shape`, int64 `[2]`; experts are stored
one by one. A code stands for the integer `code - 2**(bits - 1)`. `config.json` says which modules
are quantized, and how, by regular expressions that are matched from the start of a module's name:

* what matches `ignore` is not quantized, whatever else it matches;
* `config_groups` hold the settings. Readers disagree on which of two matching targets wins (the
  first one, or the first in alphabetical order), so no module may match those of two groups. The class
  `Linear` is no target, because some versions of vLLM ask for it before they ask for the parts of what they fuse;
* transformers reads all routed experts by the first group whose targets mention `experts`, so those that hold
  experts do, and the widest comes first: a narrower expert then has too few words, which is noticed.

Source: `compressed_tensors.compressors.pack_quantized`, `compressed_tensors.utils.match`; `CompressedTensorsConfig` in
vLLM (model_executor/layers/quantization/compressed_tensors).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

import torch

from gsq.errors import UserError
from gsq.export.base import DecodedCheckpoint, PackedTensor, PlanEntry, Run, linear_names, linears, walk
from gsq.export.integers import Setting, integer_bytes, integer_setting, pack_levels, packed_integers
from gsq.export.modules import planned_modules, regexes, served_names, units
from gsq.export.patterns import cover
from gsq.model.checkpoint import Checkpoint, CheckpointWriter

FORMAT = "compressed-tensors"
WIDTHS = tuple(range(2, 9))  # bits that a stored code may have
PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
SHAPE_BYTES = 2 * torch.int64.itemsize


def check(source: Checkpoint, entries: Mapping[str, PlanEntry], widths: tuple[int, ...] = WIDTHS) -> None:
    """Raise `UserError` naming the first tensor that the format cannot hold, and what could."""
    quantization_config(source, entries, widths)


def write(run: Run, writer: CheckpointWriter, widths: tuple[int, ...] = WIDTHS) -> None:
    """Add all tensors and `config.json`; a code is stored in the narrowest of `widths` that holds it."""
    for name, entry in walk(run.source, run.plan.entries):
        if entry is None:
            writer.add(name, run.source.read(name))
            continue
        bits = _setting(entry, widths).bits
        for weight, quantized in linears(entry, run.load(entry.name)):
            module = weight.removesuffix(".weight")
            writer.add(module + PACKED, pack_levels(quantized, bits))
            writer.add(module + SCALE, quantized.scales)
            writer.add(module + SHAPE, torch.tensor(quantized.codes.shape))
    config = quantization_config(run.source, run.plan.entries, widths)
    writer.write_json("config.json", run.source.config | {"quantization_config": config})


def packed_bytes(entry: PlanEntry, widths: tuple[int, ...] = WIDTHS) -> int:
    """Bytes of a planned tensor that is packed."""
    return integer_bytes(entry, _setting(entry, widths)) + SHAPE_BYTES * sum(map(len, linear_names(entry)))


def kept_bytes(source: Checkpoint, name: str) -> int:
    """Bytes of a tensor that is copied."""
    return source.tensors[name].nbytes


def recognizes(checkpoint: Checkpoint) -> bool:
    """Whether a folder is in this format."""
    return (checkpoint.config.get("quantization_config") or {}).get("quant_method") == FORMAT


def decoded(checkpoint: Checkpoint) -> DecodedCheckpoint:
    """The export as dense tensors; raises `UserError` where tensors and `config.json` disagree."""
    config = read_config(checkpoint)
    modules = [name.removesuffix(PACKED) for name in checkpoint.tensors if name.endswith(PACKED)]
    packed = {f"{module}.weight": _packed_tensor(checkpoint, config, module) for module in modules}
    return DecodedCheckpoint(checkpoint, packed)


def read_config(checkpoint: Checkpoint) -> dict:
    """The `quantization_config` of a folder; raises `UserError` for what this reader would misread."""
    config, path = checkpoint.config["quantization_config"], checkpoint.folder / "config.json"
    if config.get("format") != "pack-quantized":
        raise UserError(f"{path} has format {config.get('format')!r}; GSQ reads its own pack-quantized exports only")
    for group in (config.get("config_groups") or {}).values():
        weights = group.get("weights") or {} if isinstance(group, dict) else {}
        if weights.get("num_bits") not in WIDTHS or weights != _weights(_setting_of(weights)):
            raise UserError(f"{path} has the group {group}; GSQ reads its own symmetric integers only")
    return config


def read_setting(config: dict, module: str) -> Setting | None:
    """How a reader of `quantization_config` takes the module of this name; None if it is not quantized."""
    if any(_matches(target, module) for target in config.get("ignore") or []):
        return None
    groups = [group for group in config["config_groups"].values() if any(_matches(t, module) for t in group["targets"])]
    found = {_setting_of(group["weights"]) for group in groups}
    if len(found) > 1:
        raise UserError(f"{module} matches targets of several config_groups, and readers differ in which one they take")
    return found.pop() if found else None


def quantization_config(source: Checkpoint, entries: Mapping[str, PlanEntry], widths: tuple[int, ...]) -> dict:
    """The `quantization_config` under which readers take exactly the planned modules as quantized."""
    modules, weights = planned_modules(source, entries, partial(_setting, widths=widths))
    names = served_names(modules)
    quantized = [name for name, setting in names.items() if setting]
    kept = units((name for name, setting in modules.items() if setting is None), fused=True)
    groups = {}
    for index, setting in enumerate(sorted(weights, key=lambda setting: -setting.bits)):
        wanted = units((name for name, own in modules.items() if own == setting), fused=False)
        others = [name for name in quantized if names[name] != setting]
        experts = {name for name in wanted if name.endswith(".experts")}
        runs = cover(experts, others, {True}, within="experts") + cover(wanted - experts, others, {True})
        groups[f"group_{index}"] = {"targets": _patterns(runs), "weights": _weights(setting)}
    config = {
        "quant_method": FORMAT, "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": groups, "ignore": _patterns(cover(kept, quantized, {True})),
    }  # fmt: skip
    for name, setting in names.items():
        found = read_setting(config, name)
        if found != setting and (found or name in modules):  # a fused module that matches nothing is read as its parts
            raise UserError(f"no pattern tells {name} ({setting or 'kept'}) from other modules; give them one codebook")
    return config


def _patterns(runs: list[tuple[str, bool]]) -> list[str]:
    """Entries of `targets` or `ignore` that match the modules whose names hold one of the runs."""
    return ["re:" + regex for regex in regexes(run for run, _ in runs)]


def _setting(entry: PlanEntry, widths: tuple[int, ...]) -> Setting:
    exact = integer_setting(entry, FORMAT)
    if any("embed" in name for name in entry.sources):
        raise UserError(f"{entry.name}: transformers loads no packed embeddings; keep this tensor unquantized")
    return Setting(min(width for width in widths if width >= exact.bits), exact.group_size)


def _weights(setting: Setting) -> dict:
    return {
        "num_bits": setting.bits, "type": "int", "symmetric": True, "dynamic": False,
        "strategy": "group", "group_size": setting.group_size,
    }  # fmt: skip


def _setting_of(weights: dict) -> Setting:
    return Setting(weights.get("num_bits"), weights.get("group_size"))


def _matches(target: str, module: str) -> bool:
    return bool(re.match(target[3:], module)) if target.startswith("re:") else target == module


def _packed_tensor(checkpoint: Checkpoint, config: dict, module: str) -> PackedTensor:
    setting = read_setting(config, module)
    if setting is None:
        raise UserError(f"{module} is packed, but {checkpoint.folder / 'config.json'} says it is not; export again")
    return packed_integers(checkpoint, setting, module + PACKED, module + SCALE, module + SHAPE)
