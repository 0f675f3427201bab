"""Estimates of runs on a machine, and runs that it cannot hold.

`rooms` is what budgets leave for tensors that are handed out; `refuse_unfit` ends a run whose other items are too
much. Neither needs a plan that was measured: `outlined` makes one from headers.
"""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

from gsq import units
from gsq.config import Config
from gsq.device import keep_freed_memory, pick_device
from gsq.errors import UserError
from gsq.estimate.places import DEVICE, HOST, NEAR, Working
from gsq.estimate.report import Estimate
from gsq.hardware import Hardware
from gsq.memory import WINDOWS, Rooms
from gsq.model.skeleton import Skeleton
from gsq.plan.rules import Plan, candidates, flexible
from gsq.prepare import opened, planner, run_folder
from gsq.ranks import LANES
from gsq.trace import UntracedError

UNKNOWN_KURTOSIS = 3.0  # a Gaussian's, where a plan asks for what only weights tell
BUSY = 1 << 16  # tokens at once that keep any accelerator busy
UNKNOWN_BITS = 4.0  # of a weight, where they are solved for and a size on disk is the target


def estimate_for(config: Config, device: str | None, processes: int) -> tuple[Estimate, Path]:
    """The estimate of a config on this machine, or on so many GPUs of a name, and the folder of its files."""
    keep_freed_memory()
    here, folder = pick_device(), scratch(config, run_folder(config))
    if device is not None:
        hardware = Hardware.named(device, folder, processes)
        if config.dtype == "auto":
            config = config.model_copy(update={"dtype": "bfloat16"})
        return estimated(config, opened(config, here), None, hardware), folder
    skeleton = opened(config, here)
    width = skeleton.model.get_input_embeddings().weight.shape[1]
    hardware = Hardware.here(here, folder, processes).measured(here, skeleton.dtype, width)
    return estimated(config, skeleton, None, hardware), folder


def estimated(config: Config, skeleton: Skeleton, plan: Plan | None, hardware: Hardware) -> Estimate:
    """The estimate of a config within its budgets; without a plan, of one that needs no weights."""
    plan, hardware = plan or outlined(config, skeleton), hardware.limited(config)
    if config.calib.batch != "auto":
        return Estimate(config, skeleton, plan, hardware)
    for windows in _batches(config, hardware):
        found = Estimate(with_batch(config, windows), skeleton, plan, hardware)
        if found.working.fixed_device <= (hardware.accelerator or 0.0):
            break
    return found


def _batches(config: Config, hardware: Hardware) -> list[int]:
    """Windows of the micro-batches that are worth a try, largest first: no lane has more, and none are busier."""
    if hardware.accelerator is None:
        return [WINDOWS]
    most = min(-(-config.calib.windows // LANES), max(1, BUSY // config.calib.length))
    return [1 << power for power in reversed(range(most.bit_length()))]


def micro_batch(config: Config, skeleton: Skeleton, folder: Path) -> int:
    """Windows at once where `calib.batch` is `auto`: the most with which a run fits this machine."""
    hardware = Hardware.here(skeleton.device, folder)
    if hardware.accelerator is None:
        return WINDOWS
    try:
        return estimated(config, skeleton, None, hardware).config.calib.batch
    except (UntracedError, UserError):  # of a plan that cannot hold; whoever makes the plan says so
        return WINDOWS


def with_batch(config: Config, windows: int) -> Config:
    """`config` with so many windows at once."""
    return config.model_copy(update={"calib": config.calib.model_copy(update={"batch": windows})})


def outlined(config: Config, skeleton: Skeleton) -> Plan:
    """A plan from headers alone: what weights would tell is taken to be as usual.

    Raises `UserError` for a plan that cannot hold.
    """
    rules, settings = config.plan.all_rules, config.plan
    found = dict.fromkeys(candidates(skeleton, rules), UNKNOWN_KURTOSIS)
    planned, open_ones = planner(config, skeleton, found), flexible(skeleton, rules, settings.sensitivity.widths)
    target = settings.target_bpw or UNKNOWN_BITS
    refused = None
    for width in sorted(settings.sensitivity.widths, key=lambda width: abs(width - target)):
        bits = {name: min(widths, key=lambda own: abs(own - width)) for name, widths in open_ones.items()}
        try:
            return planned(bits)
        except UserError as error:  # the format of the export may not hold this width
            refused = refused or error
    raise refused


def scratch(config: Config, run: Path) -> Path:
    """Where hidden states lie that fit nowhere else."""
    return Path(config.memory.disk_dir) if config.memory.disk_dir else run / "scratch"


def rooms(config: Config, skeleton: Skeleton, plan: Plan, folder: Path) -> Rooms:
    """What `Memory` may fill in this process, on this machine; files go to `folder`.

    Half of the budgets, if the model's layers do not run without weights.
    """
    hardware = Hardware.here(skeleton.device, folder).limited(config)
    try:
        return estimated(config, skeleton, plan, hardware).working.rooms(hardware)
    except UntracedError:
        return Rooms(math.inf if hardware.accelerator is None else hardware.accelerator / 2, hardware.share / 2)


def refuse_unfit(config: Config, skeleton: Skeleton, folder: Path) -> None:
    """Raise `UserError` if what must be in memory exceeds a budget, or what else is held the disk of `folder`.

    Says nothing of a plan that cannot hold: whoever makes the plan itself does.
    """
    with suppress(UntracedError):
        try:
            plan = outlined(config, skeleton)
        except UserError:
            return
        check_fit(estimated(config, skeleton, plan, Hardware.here(skeleton.device, folder)), folder)


def check_fit(estimate: Estimate, folder: Path) -> None:
    """Raise `UserError` if a run does not fit; names numbers, the largest items, and what to change."""
    working, hardware = estimate.working, estimate.hardware
    advice = _advice(estimate.config)
    if working.on_device and working.fixed_device > hardware.accelerator:
        raise UserError(
            f"a run needs {units.size(working.fixed_device)} of each accelerator, and may take "
            f"{units.size(hardware.accelerator)} (memory.device_gb): {_largest(working, DEVICE, NEAR)}; {advice}"
        )
    host = hardware.share
    if working.fixed_host > host:
        places = (HOST,) if working.on_device else (HOST, DEVICE)
        raise UserError(
            f"each of {hardware.local} processes needs {units.size(working.fixed_host)} of the host's memory, and may "
            f"take {units.size(host)} (memory.host_gb): {_largest(working, *places)}; {advice}"
        )
    files = estimate.disk()["files"]
    if files > hardware.disk:
        raise UserError(
            f"{units.size(files)} of hidden states and the like must lie in files, but {folder} has "
            f"{units.size(hardware.disk)} free; let memory.disk_dir name a larger disk, raise memory.host_gb, or lower "
            "calib.windows or calib.length"
        )


def _largest(working: Working, *places: str) -> str:
    """The largest items in these places, where they are most."""
    point, items = working.largest(*places)
    return f"in {point}, " + ", ".join(f"{item.name} {units.size(item.bytes)}" for item in items[:3])


def _advice(config: Config) -> str:
    """Settings that take less memory, as far as they are not in use."""
    options = {
        f"calib.batch (now {config.calib.batch})": config.calib.batch > 1,
        f"calib.length ({config.calib.length})": config.calib.length > 128,
        f"refine.windows ({config.refine.windows})": config.refine.windows > LANES,
    }
    lower = ", ".join(name for name, possible in options.items() if possible)
    others = [f"lower {lower}"] if lower else []
    if config.refine.enabled and config.refine.logits == "float32":
        others.append("set refine.logits: bfloat16")
    if config.refine.enabled and config.refine.stage == "layer":
        others.append("set refine.stage: module")
    return "; ".join([*others, "or start more processes, each with memory of its own"])
