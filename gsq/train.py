"""Quantize a model: the whole method, top to bottom.

    accelerate launch --num_processes 1 gsq/train.py configs/smollm2_cpu.yaml

Plan what becomes of each tensor; sample calibration tokens; walk the decoder layers. In each:
observe what its Linears read, initialize codes and scales (GPTQ and polish), refine them by
Gumbel-Softmax against the wanted output, keep the layer, and push the hidden states through it.
Then export, verify the export against the run, and measure it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Launched by path, Python puts this folder first on sys.path, and `import kernels` (an optional
# library of transformers) would find ours. Nothing else may be imported before this.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)
    if not any((Path(entry or ".") / "gsq" / "__init__.py").exists() for entry in sys.path):
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from gsq.calib.stream import Stream
from gsq.calib.tokens import calibration_tokens
from gsq.config import Config
from gsq.device import activation_dtype, keep_freed_memory, peak_memory, pick_device
from gsq.errors import UserError
from gsq.eval.quality import eval_tokens, evaluate
from gsq.export.base import check_plan, export_run, format_of, open_model
from gsq.export.verify import verify
from gsq.files import check_space
from gsq.model.checkpoint import Checkpoint
from gsq.model.resolve import load_tokenizer, resolve_model
from gsq.model.skeleton import Skeleton
from gsq.plan.kurtosis import measured
from gsq.plan.rules import Plan, candidates, make_plan
from gsq.quantize import LayerWork, Recipe, quantized_layer
from gsq.refine.loop import Schedule
from gsq.report import write_report
from gsq.run import EXPORT, Run
from gsq.tracking import Tracker


def train(
    config: Config,
    folder: Path | None = None,
    resume: bool = False,
    started: Callable[[Run, int], None] = lambda run, finished: None,
) -> Run:
    """Quantize as `config` says, into run folder `folder` (default: the config's); returns the finished run.

    `started` is told of the run and its number of finished layers when all that can be checked was checked.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a run is one process as yet; start it with `accelerate launch --num_processes 1`")
    folder = folder or run_folder(config)
    keep_freed_memory()
    device = pick_device()
    dtype = str(activation_dtype(device, config.dtype)).removeprefix("torch.")
    config = config.model_copy(update={"dtype": dtype})  # the run remembers what `auto` was
    skeleton, plan = prepare(config, device)
    eval_windows(config, skeleton.checkpoint.folder)
    if resume and folder.exists():
        run = Run.resume(folder, config, skeleton.checkpoint)
    else:
        run = start(folder, config, skeleton, plan)
    finished = len(run.finished())  # asked once: it reads every finished layer
    check_space(folder, run.bytes_from(finished))
    started(run, finished)
    with tracker_for(run, finished) as tracker:
        if not finished:
            tracker.event("plan", layers=skeleton.num_layers, **plan.summary())
        if finished < skeleton.num_layers:
            walk(run, skeleton, finished, tracker.event)
        finish(run, tracker.event)
    return run


def start(folder: Path, config: Config, skeleton: Skeleton, plan: Plan) -> Run:
    """A new run, with its calibration tokens, once nothing is in its way."""
    Run.refuse_existing(folder)
    if config.export.format and (target := export_folder(folder, config)).exists():
        raise UserError(f"export folder {target} exists already; set export.out to another, or remove it")
    source = skeleton.checkpoint
    return Run.create(folder, config, plan, source, tokens_for(config, source.folder, skeleton.device))


def tokens_for(config: Config, folder: Path, device: torch.device) -> Tensor:
    """Calibration tokens `[windows, length]` that `config` asks for, of the model in `folder`."""
    calib = config.calib
    dtype = activation_dtype(device, config.dtype)
    return calibration_tokens(calib.source, folder, calib.windows, calib.length, config.seed, device, dtype)


def finish(run: Run, event: Callable[..., None]) -> None:
    """Export, verify and measure a run whose layers are done, as far as its configuration asks."""
    config = run.config
    if config.export.format:
        folder = export_folder(run.folder, config)
        if not folder.exists():
            export_run(run, config.export.format, folder)
        checked = verify(folder, run)
        tokens = eval_windows(config, folder)
        if tokens is not None:
            device = pick_device()
            dtype = activation_dtype(device, config.dtype)
            event("eval", label="GSQ", **evaluate(open_model(folder), run.source, tokens, device, dtype))
        event("done", bytes=checked.quantized_bytes + checked.kept_bytes)
    write_report(run.folder, run.folder / "report.html")


def eval_windows(config: Config, folder: Path) -> Tensor | None:
    """Windows of the text to measure on, with the tokenizer in `folder`; None if there is nothing to measure."""
    if not (config.export.format and config.eval.text):
        return None
    return eval_tokens(config.eval.text, load_tokenizer(folder), config.eval.windows, config.eval.length)


def export_folder(folder: Path, config: Config) -> Path:
    """Where a run in `folder` writes its checkpoint."""
    return Path(config.export.out) if config.export.out else folder / EXPORT


def tracker_for(run: Run, finished: int) -> Tracker:
    """Where a run reports to; what is already measured stays for the `finished` layers only."""
    config = run.config
    return Tracker(
        run.folder, keep_layers=range(finished), wandb=config.tracking.wandb, project=config.tracking.project,
        name=config.tracking.name, config=config.model_dump(mode="json"),
    )  # fmt: skip


def run_folder(config: Config) -> Path:
    """The run folder that a config names."""
    return Path(config.run or "runs/gsq")


def prepare(config: Config, device: torch.device, scan: bool = False) -> tuple[Skeleton, Plan]:
    """Everything that can be checked before work starts: the checkpoint's headers, its architecture, the plan.

    Reads weights only if a rule needs their kurtosis, or if `scan` asks for that of all that can be quantized.
    """
    source = Checkpoint.open(resolve_model(config.model.name))
    if method := format_of(source):
        raise UserError(f"{source.folder} is quantized already ({method}); give the original checkpoint")
    skeleton = Skeleton(source, device, activation_dtype(device, config.dtype), config.model.max_layers)
    plan = make_plan(skeleton, config.plan.rules, kurtosis(config, skeleton, scan), config.plan.kurtosis.limits())
    if config.export.format:
        check_plan(config.export.format, source, plan.entries)
    return skeleton, plan


def kurtosis(config: Config, skeleton: Skeleton, everything: bool = False) -> dict[str, float]:
    """Kurtosis by parameter of what the rules ask it of, or of `everything` that can be quantized.

    Remembered beside the run folder that the config names, so that one command finds what another measured.
    """
    rules, folder = config.plan.rules, run_folder(config)
    wanted = candidates(skeleton, None if everything else rules)
    if not wanted:
        return {}
    make_plan(skeleton, rules, dict.fromkeys(wanted, 0.0))  # a rule that cannot hold is found before a long read
    return measured(skeleton.checkpoint, wanted, folder.with_name(folder.name + ".kurtosis.json"))


def walk(run: Run, skeleton: Skeleton, finished: int, event: Callable[..., None]) -> None:
    """Quantize the layers behind the `finished` ones, in order."""
    config, plan = run.config, run.plan
    recipe = make_recipe(config)
    stream = Stream(skeleton, run.tokens(), config.calib.batch)
    originals = stream.copy() if recipe.needs_original else None
    for index in range(skeleton.num_layers):
        start, cpu_start = time.perf_counter(), time.process_time()
        layer = skeleton.load_layer(index)
        prefix = skeleton.layer_names[index] + "."
        if index < finished:  # walk on with what is already quantized
            quantized = {name.removeprefix(prefix): q for name, q in run.load_layer(index).items()}
            behind = originals.outputs(layer, index) if originals else None
            seconds = {}
        else:
            codebooks = {entry.name.removeprefix(prefix): entry.codebook for entry in plan.targets(index)}
            work = LayerWork(index, layer, stream, originals, codebooks, recipe, event)
            quantized, behind = work.run()
            seconds = work.timer.seconds
        before = time.perf_counter()
        stream.advance(quantized_layer(layer, quantized), index)
        if originals:
            originals.hidden = behind
        if index >= finished:
            seconds |= {"push": time.perf_counter() - before, "total": time.perf_counter() - start}
            cpu_seconds = time.process_time() - cpu_start  # of all threads; other programs leave it as it is
            named = {prefix + name: q for name, q in quantized.items()}
            run.save_layer(index, named, seconds=seconds, cpu_seconds=cpu_seconds)
            host, on_device = peak_memory(skeleton.device)
            event(
                "layer", layer=index, layers=skeleton.num_layers, seconds=seconds, peak_rss_gb=host,
                device_gb=on_device, output_error=_distance(stream, originals),
            )  # fmt: skip


def make_recipe(config: Config) -> Recipe:
    """The numbers of `config` that a layer needs."""
    init, refine = config.init, config.refine
    objectives = {"output": ("output",), "hessian": ("hessian",), "both": ("hessian", "output")}[refine.objective]
    schedule = Schedule(**refine.model_dump(include={field.name for field in fields(Schedule)}))
    return Recipe(
        method=init.method, damping=init.damping, polish=init.polish,
        answer_original=init.answer_original, expert_prior=init.expert_prior,
        objectives=objectives if refine.enabled else (), stream_target=refine.enabled and refine.target == "stream",
        whole_layer=refine.stage == "layer", schedule=schedule, windows_per_step=refine.windows,
        held_out=config.calib.validation, seed=config.seed,
    )  # fmt: skip


def _distance(stream: Stream, originals: Stream | None) -> float | None:
    """Relative squared distance of the quantized hidden states from the original ones, averaged over tokens."""
    if originals is None:
        return None
    parts = []
    for part in stream.parts():
        original = originals.hidden[part].float()
        difference = (stream.hidden[part].float() - original).square().sum(-1)
        parts.append(difference / original.square().sum(-1).clamp_min(1e-30))
    return float(torch.cat(parts).mean())


if __name__ == "__main__":
    from gsq.cli import quantize_program

    quantize_program()
