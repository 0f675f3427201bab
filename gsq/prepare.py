"""What is known before work starts: the checkpoint's headers, its architecture, and what becomes of each tensor.

Weights are read only if a rule of the plan asks for something measured, and that is remembered beside
the run folder that the config names, so that one command finds what another measured.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from gsq.calib.tokens import calibration_tokens, text_mark
from gsq.codebook import Codebook
from gsq.config import Config
from gsq.device import activation_dtype
from gsq.errors import UserError
from gsq.export.base import FORMATS, check_plan, format_of, stored_bytes
from gsq.export.modules import fused_name
from gsq.files import explained
from gsq.memory import WINDOWS
from gsq.model.checkpoint import Checkpoint, fingerprint
from gsq.model.resolve import resolve_model
from gsq.model.skeleton import Skeleton
from gsq.plan.curve import Curve, curve_of, for_dense
from gsq.plan.kurtosis import measured
from gsq.plan.presets import PRESETS
from gsq.plan.roles import Role
from gsq.plan.rules import Plan, candidates, flexible, make_plan
from gsq.plan.sensitivity import Allocation, Unit, measure, remember, remembered

Progress = Callable[[int, int], None]
Planner = Callable[[Mapping[str, int]], Plan]


def prepare(
    config: Config, device: torch.device, scan: bool = False, progress: Progress = lambda done, layers: None
) -> tuple[Skeleton, Plan]:
    """Everything that can be checked before work starts: the checkpoint's headers, its architecture, the plan."""
    skeleton = opened(config, device)
    return skeleton, plan_of(config, skeleton, scan, progress)


def opened(config: Config, device: torch.device) -> Skeleton:
    """The model of a config, of which only the checkpoint's headers are read; refused if it is quantized already."""
    source = Checkpoint.open(resolve_model(config.model.name))
    if method := format_of(source):
        raise UserError(f"{source.folder} is quantized already ({method}); give the original checkpoint")
    return Skeleton(source, device, activation_dtype(device, config.dtype), config.model.max_layers)


def plan_of(
    config: Config, skeleton: Skeleton, scan: bool = False, progress: Progress = lambda done, layers: None
) -> Plan:
    """The plan of a config, which its export can hold.

    Reads weights only if a rule needs something measured, or if `scan` asks for the kurtosis of all that
    can be quantized. `progress(done, layers)` is told of the layers whose sensitivity is measured.
    """
    planned = planner(config, skeleton, kurtosis(config, skeleton, scan))
    allocation = measured_allocation(config, skeleton, planned, progress)
    return planned(solved(config, allocation, planned) if allocation else {})


def exportable(config: Config, source: Checkpoint, plan: Plan) -> Plan:
    """A plan with the bytes that the config's export stores, if there is to be one.

    Raises `UserError` if its format cannot hold the plan.
    """
    format = config.export.format
    if format is None:
        return plan
    check_plan(format, source, plan.entries)
    return plan.priced(stored_bytes(format, source, plan.entries))


def curve(config: Config, skeleton: Skeleton, plan: Plan) -> Curve | None:
    """Where `plan` stands among all sizes and the presets that fit the model, as far as sensitivities are remembered.

    None if they are not, or no bits were solved for. Presets have the sizes of their own codebooks.
    """
    found, limits = kurtosis(config, skeleton), config.plan.kurtosis.limits()
    allocation = measured_allocation(config, skeleton, planner(config, skeleton, found))
    if allocation is None:
        return None
    dense = all(Role.read(entry.role).family != "expert" for entry in plan.entries.values())
    presets = {}
    for name in PRESETS:
        rules = config.plan.model_copy(update={"preset": name, "rules": []}).all_rules
        label, rules = for_dense(name, rules) if dense else (name, rules)
        with suppress(UserError):  # it is for other models
            if found.keys() >= candidates(skeleton, rules).keys():
                presets[label] = make_plan(skeleton, rules, found, limits)
    return curve_of(allocation, plan, presets)


def planner(config: Config, skeleton: Skeleton, found: Mapping[str, float]) -> Planner:
    """The plan of a config as a function of what is still open, the bits to be solved for.

    It raises `UserError` for a plan that the config's export cannot hold.
    """
    rules, limits, source = config.plan.all_rules, config.plan.kurtosis.limits(), skeleton.checkpoint
    return lambda bits: exportable(config, source, make_plan(skeleton, rules, found, limits, bits))


def kurtosis(config: Config, skeleton: Skeleton, everything: bool = False) -> dict[str, float]:
    """Kurtosis by parameter of what the rules ask it of, or of `everything` that can be quantized."""
    rules = config.plan.all_rules
    wanted = candidates(skeleton, None if everything else rules)
    if not wanted:
        return {}
    least = {name: min(widths) for name, widths in flexible(skeleton, rules, config.plan.sensitivity.widths).items()}
    make_plan(skeleton, rules, dict.fromkeys(wanted, 0.0), solved=least)  # what cannot hold is found before a long read
    return measured(skeleton.checkpoint, wanted, beside(config, "kurtosis"))


def measured_allocation(
    config: Config, skeleton: Skeleton, planned: Planner, progress: Progress | None = None
) -> Allocation | None:
    """Sensitivity of all parameters whose bits are to be solved for; None if there are none.

    What servers fuse is one unit, and only widths that the export's format holds are considered. What is not
    remembered is measured, which `progress` is told of; without `progress` it is not, and the answer is None.
    """
    source, settings = skeleton.checkpoint, config.plan.sensitivity
    names = flexible(skeleton, config.plan.all_rules, settings.widths)
    if not names:
        return None
    units = units_of(names, config.export.format)
    plans = _by_width(settings.widths, names, units, planned)
    names = {name: {bits: codebooks[bits] for bits in plans} for name, codebooks in names.items()}
    sizes = {name: {bits: plan.entries[name].bytes_after for bits, plan in plans.items()} for name in names}
    weights = sum(skeleton.model.get_parameter(name).numel() for name in names)
    codebooks = {unit: {name: names[name] for name in unit} for unit in units}
    described = {name: {bits: codebook.to_dict() for bits, codebook in own.items()} for name, own in names.items()}
    text = json.dumps([list(units), described], sort_keys=True)
    mark = {
        "fingerprint": fingerprint(source), "units": hashlib.sha256(text.encode()).hexdigest(), "seed": config.seed,
        "text": text_mark(config.calib.source), "windows": settings.windows, "length": settings.length,
        "damping": config.init.damping, "expert_prior": config.init.expert_prior, "dtype": str(skeleton.dtype),
        "layers": skeleton.num_layers,
    }  # fmt: skip
    cache = beside(config, "sensitivity")
    found = remembered(cache, mark)
    if found is None and progress is None:
        return None
    if found is None:
        _budget(config, Allocation({}, sizes, weights), planned)  # one that cannot be met is found before the work
        with explained(cache, 0):
            cache.parent.mkdir(parents=True, exist_ok=True)
        calib = config.calib.model_copy(update={"windows": settings.windows, "length": settings.length})
        tokens = tokens_for(config.model_copy(update={"calib": calib}), source.folder, skeleton.device)
        prior = config.init.expert_prior
        # a skeleton of its own, since it keeps embedding and head; bfloat16 would add about 1e-4 to every KL
        own = Skeleton(source, skeleton.device, torch.float32, config.model.max_layers)
        found = measure(own, tokens, codebooks, config.init.damping, prior, WINDOWS, progress)
        remember(cache, mark, found)
    return Allocation(found, sizes, weights)


def solved(config: Config, allocation: Allocation, planned: Planner) -> dict[str, int]:
    """Bits by parameter that meet the config's target with the least predicted KL."""
    return allocation.solve(_budget(config, allocation, planned))


def _budget(config: Config, allocation: Allocation, planned: Planner) -> int:
    """Bytes that the target leaves for what is solved for; raises `UserError` if the narrowest widths take more."""
    narrowest = {name: min(own) for name, own in allocation.sizes.items()}
    summary = planned(narrowest).summary()
    least = sum(allocation.sizes[name][bits] for name, bits in narrowest.items())
    if config.plan.target_bpw is not None:
        unit, target, lowest = "bits per quantized weight", config.plan.target_bpw, summary["bits_per_quantized_weight"]
        spare = (target - lowest) * summary["quantized_weights"] / 8
    else:
        unit, target, lowest = "GB", config.plan.target_size, summary["bytes_after"] / 1e9
        spare = target * 1e9 - summary["bytes_after"]
    if spare < 0:
        raise UserError(
            f"the plan needs at least {math.ceil(1000 * lowest) / 1000:g} {unit}, and its target is {target:g}; raise "
            "the target, allow narrower widths in plan.sensitivity.widths, or let rules take less"
        )
    return least + int(spare)


def _by_width(
    widths: Iterable[int], names: Mapping[str, Mapping[int, Codebook]], units: list[Unit], planned: Planner
) -> dict[int, Plan]:
    """The plans that give all `names` one of `widths`: one that their codebooks have and the export's format holds.

    Raises the format's `UserError` if there are none, or if it cannot hold them beside each other.
    """
    common = [bits for bits in widths if all(bits in own for own in names.values())]
    plans, refused = {}, UserError("the codebooks of rules with bits: sensitivity have no width in common")
    for bits in common:
        try:
            plans[bits] = planned(dict.fromkeys(names, bits))
        except UserError as error:
            refused = error
    if not plans:
        raise refused
    mixed = {name: bits for unit, bits in zip(units, cycle(plans), strict=False) for name in unit}
    try:
        planned(mixed)
    except UserError as error:
        raise UserError(f"{error}; give plan.sensitivity.widths fewer widths to mix") from None
    return plans


def units_of(names: Iterable[str], format: str | None) -> list[Unit]:
    """Parameters that share a width: those that a server of the format fuses."""
    units: dict[str, list[str]] = {}
    for name in names:
        fused = fused_name(name.removesuffix(".weight")) if format is None or FORMATS[format].fuses else None
        units.setdefault(fused or name, []).append(name)
    return [tuple(unit) for unit in units.values()]


def tokens_for(config: Config, folder: Path, device: torch.device) -> Tensor:
    """Calibration tokens `[windows, length]` that `config` asks for, of the model in `folder`."""
    calib = config.calib
    dtype = activation_dtype(device, config.dtype)
    return calibration_tokens(calib.source, folder, calib.windows, calib.length, config.seed, device, dtype)


def run_folder(config: Config) -> Path:
    """The run folder that a config names."""
    return Path(config.run or "runs/gsq")


def beside(config: Config, kind: str) -> Path:
    """The file beside the run folder that remembers what was measured."""
    folder = run_folder(config)
    return folder.with_name(f"{folder.name}.{kind}.json")
