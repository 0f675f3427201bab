"""Quantize a model: the whole method, top to bottom.

    accelerate launch --num_processes 1 gsq/train.py configs/smollm2_cpu.yaml

Plan what becomes of each tensor; sample calibration tokens; walk the decoder layers. In each:
observe what its Linears read, initialize codes and scales (GPTQ and polish), refine them by
Gumbel-Softmax against the wanted output, keep the layer, and push the hidden states through it.
Then export, verify the export against the run, and measure it.
"""

from __future__ import annotations

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
from contextlib import closing
from dataclasses import fields

import torch
from torch import Tensor

from gsq.calib.grouped import even_groups
from gsq.calib.stream import Stream
from gsq.codebook import QuantizedTensor
from gsq.config import Config
from gsq.convert import without_calibration
from gsq.device import activation_dtype, keep_freed_memory, peak_memory, pick_device
from gsq.errors import UserError
from gsq.estimate.fit import micro_batch, refuse_unfit, rooms, scratch, with_batch
from gsq.eval.quality import eval_tokens, evaluate
from gsq.export.base import export_run, open_model
from gsq.export.verify import verify
from gsq.files import check_space
from gsq.memory import Batch, Memory
from gsq.model.checkpoint import sound
from gsq.model.resolve import load_tokenizer
from gsq.model.skeleton import Skeleton
from gsq.prepare import Progress, curve, exportable, opened, plan_of, run_folder, tokens_for
from gsq.quantize import LayerWork, Recipe, quantized_layer
from gsq.ranks import LANES, Ranks
from gsq.refine.loop import Schedule
from gsq.report import write_report
from gsq.run import EXPORT, Run
from gsq.tracking import Tracker


def train(
    config: Config,
    folder: Path | None = None,
    resume: bool = False,
    started: Callable[[Run, int], None] = lambda run, finished: None,
    progress: Progress = lambda done, layers: None,
) -> Run | None:
    """Quantize as `config` says, into run folder `folder` (default: the config's).

    Returns the finished run; None in a process other than the first, which alone writes and reports.
    `started` is told of the run and its number of finished layers when all that can be checked was checked;
    `progress(done, layers)` of what is measured before that, if the plan asks for it.
    """
    folder = folder or run_folder(config)
    keep_freed_memory()
    ranks, device = Ranks.join(config.processes.patience), pick_device()
    dtype = str(activation_dtype(device, config.dtype)).removeprefix("torch.")
    config = config.model_copy(update={"dtype": dtype})  # the run remembers what `auto` was
    skeleton = ranks.errand(lambda: opened(config, device)) or opened(config, device)  # the first fetches it for all
    check_shares(config, ranks)
    eval_windows(config, skeleton.checkpoint.folder)
    config = settled(config, skeleton, folder, resume, ranks)
    refuse_unfit(config, skeleton, scratch(config, folder))
    make = lambda: ranks.errand(lambda: begun(folder, config, skeleton, resume, progress)) or Run.open(folder)  # noqa: E731
    with even_groups(skeleton), closing(make()) as run:
        run.config = config
        [finished] = map(int, ranks.total(len(run.finished()) if ranks.first else 0))  # asked once: it reads all layers
        if ranks.first:
            check_space(folder, run.bytes_from(finished))
            started(run, finished)
        with tracker_for(run, finished, ranks.first) as tracker:
            if not finished and ranks.first:
                tracker.event("plan", layers=skeleton.num_layers, **run.plan.summary())
                if found := curve(config, skeleton, run.plan):
                    tracker.event("curve", **found.to_dict())
            if finished < skeleton.num_layers:
                walk(run, skeleton, finished, tracker.event, ranks)
            ranks.leave()
            if ranks.first:
                finish(run, tracker.event)
    return run if ranks.first else None


def settled(config: Config, skeleton: Skeleton, folder: Path, resume: bool, ranks: Ranks) -> Config:
    """A number for `calib.batch: auto`: that of the run to be continued, or what the first process finds to fit."""
    if config.calib.batch != "auto":
        return config

    def number() -> int:
        if resume and folder.exists():
            return Run.open(folder).config.calib.batch
        return micro_batch(config, skeleton, scratch(config, folder))

    [windows] = map(int, ranks.total(ranks.errand(number) or 0))
    return with_batch(config, windows)


def check_shares(config: Config, ranks: Ranks) -> None:
    """Raise `UserError` if there are more processes than can have windows of their own."""
    most = max(count for count in range(1, LANES + 1) if config.calib.windows > LANES * (count - 1) // count)
    if ranks.count > most:
        raise UserError(
            f"{ranks.count} processes cannot share the {config.calib.windows} windows of calib.windows, which run in "
            f"{LANES} lanes; start at most {most}"
        )


def begun(folder: Path, config: Config, skeleton: Skeleton, resume: bool, progress: Progress) -> Run:
    """The run in `folder`, to be continued, or a new one."""
    if resume and folder.exists():
        run = Run.resume(folder, config, skeleton.checkpoint)
        run.plan = exportable(config, run.source, run.plan)  # the format may be another one
        return run
    return start(folder, config, skeleton, progress)


def start(folder: Path, config: Config, skeleton: Skeleton, progress: Progress) -> Run:
    """A new run, with its plan and calibration tokens, once nothing is in its way."""
    Run.refuse_existing(folder)
    if config.export.format and (target := export_folder(folder, config)).exists():
        raise UserError(f"export folder {target} exists already; set export.out to another, or remove it")
    source, plan = skeleton.checkpoint, plan_of(config, skeleton, progress=progress)
    return Run.create(folder, config, plan, source, tokens_for(config, source.folder, skeleton.device))


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


def tracker_for(run: Run, finished: int, enabled: bool) -> Tracker:
    """Where a run reports to; what is already measured stays for the `finished` layers only."""
    config = run.config
    return Tracker(
        run.folder, enabled=enabled, keep_layers=range(finished), wandb=config.tracking.wandb,
        project=config.tracking.project, name=config.tracking.name, config=config.model_dump(mode="json"),
    )  # fmt: skip


def walk(run: Run, skeleton: Skeleton, finished: int, event: Callable[..., None], ranks: Ranks) -> None:
    """Quantize the layers behind the `finished` ones, in order; each process walks with its own windows."""
    config, plan = run.config, run.plan
    recipe = make_recipe(config)
    files = scratch(config, run.folder)
    memory = Memory(skeleton.device, rooms(config, skeleton, plan, files), files)
    tokens, batch = run.tokens(), Batch(config.calib.batch)
    share = ranks.share(len(tokens))
    originals = Stream(skeleton, tokens, batch, share, memory) if recipe.needs_original else None
    ranks.errand(lambda: run.outside_finished() or run.save_layer(None, round_outside(run, skeleton.device)))
    for entry in run.plan.targets():
        if entry.layer is None and entry.role == "embedding":  # a walk does not reach the head
            skeleton.replace(entry.name, run.load(entry.name).dequantize())
    stream = Stream(skeleton, tokens, batch, share, memory)
    layers = skeleton.layers()
    for index in range(skeleton.num_layers):
        start, cpu_start = time.perf_counter(), time.process_time()
        layer = memory.copied(next(layers))
        prefix = skeleton.layer_names[index] + "."
        if index < finished:  # walk on with what is already quantized
            quantized = {name.removeprefix(prefix): q for name, q in run.load_layer(index).items()}
            behind = originals.outputs(layer, index) if originals else None
            seconds = {}
        else:
            codebooks = {entry.name.removeprefix(prefix): entry.codebook for entry in plan.targets(index)}
            work = LayerWork(index, layer, stream, originals, codebooks, recipe, event, ranks)
            quantized, behind = work.run()
            seconds = work.timer.seconds
            del work  # with all that it knows of the layer
        before = time.perf_counter()
        stream.advance(quantized_layer(layer, quantized), index)
        if originals:
            originals.hidden = behind
        if index >= finished:
            seconds |= {"push": time.perf_counter() - before, "total": time.perf_counter() - start}
            cpu_seconds = time.process_time() - cpu_start  # of all threads; other programs leave it as it is
            named = {prefix + name: q for name, q in quantized.items()}
            output_error = _distance(stream, originals, ranks)
            host, on_device = peak_memory(skeleton.device)
            if ranks.first:
                run.save_layer(index, named, seconds=seconds, cpu_seconds=cpu_seconds)
            event(
                "layer", layer=index, layers=skeleton.num_layers, seconds=seconds, peak_rss_gb=host,
                device_gb=on_device, output_error=output_error,
            )  # fmt: skip
            del named
        del layer, quantized, behind  # before the next one comes


def round_outside(run: Run, device: torch.device) -> dict[str, QuantizedTensor]:
    """Embedding and head, if the plan quantizes them, rounded to nearest."""
    rounded = {}
    for entry in run.plan.targets():
        if entry.layer is None:
            source = entry.sources[0]
            weights = (sound(source, part).to(device) for part in run.source.parts(source))
            parts = (without_calibration(part, entry.codebook) for part in weights)
            rounded[entry.name] = QuantizedTensor.stacked(list(parts))
    return rounded


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


def _distance(stream: Stream, originals: Stream | None, ranks: Ranks) -> float | None:
    """Relative squared distance of the quantized hidden states from the original ones, averaged over tokens."""
    if originals is None:
        return None
    distance = 0.0
    for part in stream.parts():
        original, reached = (s.hidden[part].to(s.skeleton.device).float() for s in (originals, stream))
        difference = (reached - original).square().sum(-1)
        distance += float((difference / original.square().sum(-1).clamp_min(1e-30)).sum(dtype=torch.float64))
    distance, tokens = ranks.total(distance, stream.tokens.numel())
    return distance / tokens


if __name__ == "__main__":
    from gsq.cli import quantize_program

    quantize_program()
