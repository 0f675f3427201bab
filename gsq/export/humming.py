"""Humming checkpoints (`quant_method: "humming"`), as vLLM and the humming-kernels package read them.

A Linear `X` becomes `X.weight`, int32 words of densely packed codes `[out, in * bits / 32]`, and
`X.weight_scale`, bfloat16 `[out, in / group]`; experts are stored one by one. A code stands for the
integer `code - 2**(bits - 1)`. Which modules are quantized, and how, the reader learns from
`config.json` alone, so most of this file derives that description from the plan:

* `ignore`: substrings of module names. The regular expressions (`re:`) that later readers also
  take are silently ignored by vLLM up to 0.25, so none is written.
* `dynamic`: `-:REGEX` leaves modules unquantized, `+:REGEX` gives them other settings. All readers match these.
* A reader fuses modules (`FUSED`, and all experts of a layer) and asks for the fused one under its
  own name, so what it fuses must share one setting, and patterns must fit both names.
* A reader renames the root of the module tree, so no pattern may contain it.

Source: `HummingConfig` in vLLM (model_executor/layers/quantization/humming.py), `humming.schema` in humming-kernels.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gsq.codebook import Codebook, CodebookError, QuantizedTensor
from gsq.errors import UserError
from gsq.export.base import DecodedCheckpoint, PackedTensor, PlanEntry, Run, linear_names, linears, walk
from gsq.export.patterns import cover
from gsq.kernels.packing import WORD, pack_dense, unpack_dense
from gsq.model.checkpoint import Checkpoint, CheckpointWriter
from gsq.model.targets import EXPERT_PARTS

MIN_GROUP = 16  # kernels refuse smaller groups
EXPERT = re.compile(r"(.*\bexperts)\.\d+\.")
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
FUSED_BY_PART = {part: fused for fused, parts in FUSED.items() for part in parts}


@dataclass(frozen=True)
class Setting:
    """How a module is quantized."""

    bits: int
    group_size: int

    def fields(self) -> dict:
        """Its keys in `quantization_config`."""
        return {"b_dtype": f"uint{self.bits}", "weight_scale_group_size": self.group_size}

    def codebook(self) -> Codebook:
        """What the reader decodes with."""
        return Codebook.integer(self.bits, self.group_size)

    def __str__(self) -> str:
        return f"uint{self.bits} g{self.group_size}"


def check(source: Checkpoint, entries: Mapping[str, PlanEntry]) -> None:
    """Raise `UserError` naming the first tensor that the format cannot hold, and what could."""
    quantization_config(source, entries)


def write(run: Run, writer: CheckpointWriter) -> None:
    """Add all tensors and `config.json`."""
    for name, entry in walk(run.source, run.plan.entries):
        if entry is None:
            writer.add(name, run.source.read(name))
            continue
        for weight, quantized in linears(entry, run.load(entry.name)):
            writer.add(weight, pack_levels(quantized))
            writer.add(scale_name(weight), quantized.scales)
    config = quantization_config(run.source, run.plan.entries)
    writer.write_json("config.json", run.source.config | {"quantization_config": config})


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


def pack_levels(quantized: QuantizedTensor) -> Tensor:
    """int32 words `[out, in * bits / 32]` of a Linear; ternary {-1, 0, 1} takes the uint2 codes 1 to 3."""
    bits = integer_bits(quantized.codebook.levels)
    stored = torch.tensor([int(level) + (1 << (bits - 1)) for level in quantized.codebook.levels], dtype=torch.uint8)
    return pack_dense(stored.to(quantized.codes.device)[quantized.codes.int()], bits)


def integer_bits(levels: tuple[float, ...]) -> int | None:
    """Fewest bits (2 to 8) whose two's complement integers include all `levels`; None if there are none."""
    if any(level != int(level) for level in levels):
        return None
    return next((b for b in range(2, 9) if -(1 << (b - 1)) <= min(levels) and max(levels) < 1 << (b - 1)), None)


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
    modules, weights = _modules(source, entries)
    if not weights:
        raise UserError("the plan quantizes nothing, so there is nothing to export")
    names = _reader_names(modules)
    default = weights.most_common(1)[0][0]
    kept = _units(name for name, setting in modules.items() if setting is None)
    quantized = [name for name, setting in names.items() if setting]
    ignore, dynamic = [], {}
    for run, exact in cover(kept, quantized, {True, False}):
        if exact:
            dynamic["-:" + _regex([run])] = {}
        else:
            ignore.append(run)
    for setting in sorted(weights.keys() - {default}, key=str):
        wanted = _units(name for name, own in modules.items() if own == setting)
        others = [name for name in quantized if names[name] != setting]
        runs = [run for run, _ in cover(wanted, others, {True})]
        dynamic |= {"+:" + _regex(alike): setting.fields() for alike in _alike(runs)}
    config = {
        "quant_method": "humming",
        **default.fields(),
        "weight_scale_type": "group",
        "has_zero_point": False,
        "ignore": sorted(ignore),
        "dynamic": dynamic,
    }
    for name, setting in names.items():
        if read_setting(config, name) != setting:
            raise UserError(f"no pattern tells {name} ({setting or 'kept'}) from other modules; give them one codebook")
    return config


def _setting(entry: PlanEntry) -> Setting:
    """What a planned codebook is called in this format; raises `UserError` if it cannot be expressed."""
    codebook, in_features = entry.codebook, entry.shape[-1]
    bits = integer_bits(codebook.levels)
    problem = None
    if codebook.rotation:
        problem = f"holds no rotated weights; export as {codebook.rotation.kind}, or use an integer codebook"
    elif bits is None:
        problem = f"holds integer levels between -128 and 127, not {codebook.levels}; use an integer codebook"
    elif codebook.scale_dtype != torch.bfloat16:
        problem = f"stores bfloat16 scales, not {codebook.scale_dtype}; set the scale dtype to bfloat16"
    elif codebook.group_size < MIN_GROUP:
        problem = f"has groups of at least {MIN_GROUP}, not {codebook.group_size}; use 32, 64 or 128"
    elif in_features % WORD:
        problem = f"packs rows of a multiple of {WORD}, and this one has {in_features}; keep this tensor unquantized"
    elif any("lm_head" in name for name in (entry.name, *entry.sources)):
        problem = "is never read for lm_head; keep this tensor unquantized"
    if problem:
        raise UserError(f"{entry.name}: format humming {problem}")
    try:
        codebook.groups(in_features)
    except CodebookError as error:
        raise UserError(f"{entry.name}: {error}") from None
    return Setting(bits, codebook.group_size)


def _modules(
    source: Checkpoint, entries: Mapping[str, PlanEntry]
) -> tuple[dict[str, Setting | None], Counter[Setting]]:
    """Setting of every module with a matrix, by its name in the checkpoint, and weights per setting."""
    modules: dict[str, Setting | None] = {}
    weights: Counter[Setting] = Counter()
    for name, entry in walk(source, entries):
        info = source.tensors[name]
        if entry is not None:
            setting = _setting(entry)
            names = [part.removesuffix(".weight") for parts in linear_names(entry) for part in parts]
            modules |= dict.fromkeys(names, setting)
            weights[setting] += torch.Size(entry.shape).numel()
        elif len(info.shape) >= 2:
            module, _, leaf = name.rpartition(".")
            modules[module if leaf == "weight" else name] = None
    return modules, weights


def _reader_names(modules: dict[str, Setting | None]) -> dict[str, Setting | None]:
    """`modules` and the fused ones that a reader makes of them; raises `UserError` if parts of one differ."""
    names = dict(modules)
    parts: dict[str, str] = {}
    for module, setting in modules.items():
        fused = _fused_name(module)
        if fused is None or fused in modules:
            continue
        if names.setdefault(fused, setting) != setting:
            raise UserError(
                f"{module} ({setting or 'kept'}) and {parts[fused]} ({names[fused] or 'kept'}) differ, but vLLM reads "
                f"both as one module {fused}; give all parts of {fused} the same codebook, or keep all of them"
            )
        parts.setdefault(fused, module)
    return names


def _fused_name(module: str) -> str | None:
    """The module of a reader that swallows this one."""
    prefix, _, leaf = module.rpartition(".")
    expert = EXPERT.match(module)
    if expert or (leaf in EXPERT_PARTS and prefix.endswith("experts")):
        return expert[1] if expert else prefix
    return f"{prefix}.{FUSED_BY_PART[leaf]}" if leaf in FUSED_BY_PART else None


def _units(modules: Iterable[str]) -> set[str]:
    """Names to find patterns for: modules as stored and as fused; of experts only the fused one, which holds them."""
    units = set()
    for module in modules:
        fused = _fused_name(module)
        units |= {fused} if fused and fused.endswith("experts") else {module, fused or module}
    return units


def _alike(runs: list[str]) -> list[list[str]]:
    """Runs grouped by what is left when their first index is taken out."""
    groups = defaultdict(list)
    for run in runs:
        groups[re.sub(r"\.\d+(?=\.|$)", ".#", run, count=1)].append(run)
    return list(groups.values())


def _regex(runs: list[str]) -> str:
    """Matches, from the start of a module name, those that contain one of the `runs`, alike but for one index."""
    if len(runs) == 1:
        body = re.escape(runs[0])
    else:
        indices = sorted(int(re.search(r"\.(\d+)(?=\.|$)", run)[1]) for run in runs)
        before, after = re.split(r"\.\d+(?=\.|$)", runs[0], maxsplit=1)
        body = rf"{re.escape(before)}\.({'|'.join(map(str, indices))}){re.escape(after)}"
    return rf"(.*\.)?{body}(\.|$)"


def _ignores(pattern: str, module: str) -> bool:
    return bool(re.match(pattern[3:], module)) if pattern.startswith("re:") else pattern in module


def _packed_tensor(checkpoint: Checkpoint, name: str) -> PackedTensor:
    setting = read_setting(checkpoint.config["quantization_config"], name.removesuffix(".weight"))
    if setting is None:
        raise UserError(f"{name} is packed, but {checkpoint.folder / 'config.json'} says it is not; export again")
    rows, words = checkpoint.tensors[name].shape
    shape = (rows, words * WORD // setting.bits)
    scales = checkpoint.tensors.get(scale_name(name))
    if scales is None or scales.shape != (rows, shape[1] // setting.group_size):
        raise UserError(f"{name} needs scales for {setting}, but has {scales and scales.shape}; export again")
    return PackedTensor(shape, (name, scale_name(name)), str(setting), partial(_decode, checkpoint, name, setting))


def _decode(checkpoint: Checkpoint, name: str, setting: Setting, part: int | None) -> Tensor:
    """bfloat16 weights `[out, in]`, or row `part`.

    Integer level times bfloat16 scale has at most 16 significant bits, so the float32 product is
    exact, and rounding it to bfloat16 is the only rounding there is; for 2 bits, whose levels are
    powers of two or zero, there is none.
    """
    codes = unpack_dense(checkpoint.read(name, part), setting.bits)
    return setting.codebook().decode(codes, checkpoint.read(scale_name(name), part)).to(torch.bfloat16)
