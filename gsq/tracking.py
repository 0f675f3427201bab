"""What a run reports while it works: `metrics.jsonl` in its folder, Weights & Biases, and the console.

The training loop says `tracker.event(kind, **fields)` and knows no more than that. Every event is one
JSON line of the run's folder, from which the report is made; W&B and the console show the same events.
Kinds that W&B or the console do not know are only written. Nothing here computes anything about a model.

Events: `plan`, `curve`, `step`, `stage`, `target`, `coverage`, `layer`, `eval`, `done`; the tracker itself adds
`start` (versions) whenever a run starts or goes on. Events of a decoder layer carry its index as `layer`.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
import uuid
from collections.abc import Collection, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from gsq import units

METRICS = "metrics.jsonl"
WANDB_ID = "wandb.id"
PACKAGES = ("gsq", "torch", "transformers", "accelerate")

WandbMode = Literal["online", "offline", "off"]


class Sink(Protocol):
    """Somewhere that events go."""

    def write(self, kind: str, fields: dict) -> None:
        """Take one event; `fields` are plain JSON values."""

    def close(self, failed: bool) -> None:
        """The run is over, or was interrupted by an exception."""


class Tracker:
    """Context manager that takes the events of one run; with `enabled=False` (ranks other than 0) it does nothing.

    `keep_layers` are the finished layers of a resumed run: events of all others are dropped from the file, since
    these layers are done again. With None, everything that the file holds stays.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        enabled: bool = True,
        keep_layers: Collection[int] | None = None,
        wandb: WandbMode = "off",
        project: str = "gsq",
        name: str | None = None,
        config: dict | None = None,
        console: Console | None = None,
    ):
        self.run, self.enabled, self.keep_layers = Path(run), enabled, keep_layers
        self.wandb, self.project, self.name, self.config = wandb, project, name, config
        self.console = console or Console(stderr=True)
        self._sinks: list[Sink] = []

    def __enter__(self) -> Tracker:
        if self.enabled:
            self.run.mkdir(parents=True, exist_ok=True)
            past = _tidy(self.run / METRICS, self.keep_layers)
            self._sinks.append(_MetricsFile(self.run / METRICS))
            if self.wandb != "off":
                self._start_wandb(steps=sum(event["kind"] == "step" for event in past))
            display = _Live if self.console.is_terminal else _Log
            layers = max((event.get("layers", 0) for event in past), default=0)
            self._sinks.append(display(self.console, layers, len(self.keep_layers or ())))
            self.event("start", versions=_versions(), resumed=bool(past))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        while self._sinks:
            self._sinks.pop().close(failed=kind is not None)

    def event(self, kind: str, **fields) -> None:
        """Record one event now."""
        if self.enabled and not self._sinks:
            raise RuntimeError("events are taken inside `with Tracker(...)` only")
        fields = _plain(fields)
        for sink in self._sinks:
            sink.write(kind, fields)

    def _start_wandb(self, steps: int) -> None:
        """Start W&B, or warn and do without: a run is worth more than its plots, whatever W&B raises."""
        fallback = {
            "online": f"going on offline; to upload later: wandb login, then wandb sync {self.run / 'wandb'}/offline-*",
            "offline": f"going on without it; all metrics are in {self.run / METRICS}",
        }
        for mode in ("online", "offline") if self.wandb == "online" else ("offline",):
            try:
                self._sinks.append(_Wandb(self.run, mode, self.project, self.name, self.config, steps))
                return
            except Exception as error:
                warning = f"W&B did not start ({type(error).__name__}: {error}); {fallback[mode]}"
                self.console.print(warning, style="yellow", markup=False, highlight=False)


def read_metrics(run: str | Path) -> list[dict]:
    """Events of a run in order, each with `kind` and `time` (seconds since 1970); a line cut short is left out."""
    return _parse(Path(run) / METRICS)


def short_name(target: str, layer: int) -> str:
    """Name of a target within its layer: `model.layers.3.mlp.up_proj.weight` in layer 3 is `mlp.up_proj`."""
    inside = target.partition(f".{layer}.")[2] or target
    return inside.removesuffix(".weight")


class _MetricsFile:
    """One JSON line per event, on disk as soon as it happens."""

    def __init__(self, path: Path):
        self.file = path.open("a", encoding="utf-8")

    def write(self, kind: str, fields: dict) -> None:
        self.file.write(json.dumps({"kind": kind, "time": round(time.time(), 3), **fields}, allow_nan=False) + "\n")
        self.file.flush()

    def close(self, failed: bool) -> None:
        self.file.close()


class _Wandb:
    """Steps over a global step, layers over their index, everything else in the summary.

    The W&B run's id is kept in the run's folder, so that a resumed run goes on in the same plots.
    """

    def __init__(self, run: Path, mode: str, project: str, name: str | None, config: dict | None, steps: int):
        import wandb  # slow, and not needed by most

        id_file = run / WANDB_ID
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8] + "\n")
        self.steps = steps
        self.session = wandb.init(
            project=project,
            name=name or run.name,
            config=config,
            dir=str(run),
            id=id_file.read_text().strip(),
            resume="allow" if mode == "online" else None,
            mode=mode,
            settings=wandb.Settings(silent=True, login_timeout=30, init_timeout=60),
        )
        self.session.define_metric("step/global", hidden=True)
        self.session.define_metric("step/*", step_metric="step/global")
        self.session.define_metric("layer/index", hidden=True)
        self.session.define_metric("layer/*", step_metric="layer/index")

    def write(self, kind: str, fields: dict) -> None:
        if kind == "step":
            self.session.log({"step/global": self.steps, **_numbers(fields, "step/")})
            self.steps += 1
        elif "layer" in fields:
            self.session.log({"layer/index": fields["layer"], **_layer_metrics(kind, fields)})
        else:
            label = f"{kind}/{fields['label']}/" if "label" in fields else f"{kind}/"
            self.session.summary.update(_numbers(fields, label))

    def close(self, failed: bool) -> None:
        self.session.finish(exit_code=int(failed))


def _layer_metrics(kind: str, fields: dict) -> dict[str, float]:
    """W&B names of what an event tells of a layer, such as `layer/target/mlp.up_proj/gptq`."""
    fields = dict(fields)
    layer = fields.pop("layer")
    if kind == "layer":
        fields.pop("layers", None)
        return _numbers(fields, "layer/")
    owner = fields.pop("stage", None) or short_name(fields.pop("target", ""), layer)
    if kind == "coverage":
        counts = fields["tokens"]
        return {f"layer/coverage/{owner}/{name}": value for name, value in
                (("fewest", min(counts)), ("most", max(counts)), ("unseen", counts.count(0)))}  # fmt: skip
    return _numbers(fields, f"layer/{kind}/{owner}/")


def _numbers(fields: dict, prefix: str) -> dict[str, float]:
    """The numbers among `fields`, nested ones included, under names that begin with `prefix`."""
    found = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            found |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            found[prefix + name] = value
    return found


class _Console:
    """What log and live display share: where the run stands, and a line of text for the events worth one."""

    def __init__(self, console: Console, layers: int, done: int):
        self.console = console
        self.layers, self.done = layers, done
        self.stages: list[dict] = []  # of the current layer
        self.seconds: list[float] = []  # of the layers done since this start
        self.coverage: list[int] = []  # tokens by expert of the current layer

    def line(self, kind: str, fields: dict) -> str | None:
        """Text for an event, or None."""
        formats = {"layer": self._layer_line, "eval": _eval_line, "done": _done_line}
        if kind == "plan":
            self.layers = fields.get("layers", 0)
        elif kind == "stage":
            self.stages.append(fields)
        elif kind == "coverage":
            self.coverage = fields["tokens"]
        elif kind == "layer":
            self.layers, self.done = fields.get("layers", self.layers), fields["layer"] + 1
            self.seconds.append(fields.get("seconds", {}).get("total", 0))
        text = formats[kind](fields) if kind in formats else None
        if kind == "layer":
            self.stages.clear()
            self.coverage = []
        return text

    @property
    def left(self) -> float | None:
        """Seconds until the last layer is done, judged by the recent ones."""
        recent = self.seconds[-5:]
        return sum(recent) / len(recent) * (self.layers - self.done) if recent and self.layers else None

    def _layer_line(self, fields: dict) -> str:
        parts = [f"layer {self.done}/{self.layers}"]
        for stage in self.stages:
            change = f"{units.number(stage.get('error_init'))} → {units.number(stage.get('error_final'))}"
            parts.append(f"{stage['stage']} {change}" + ("" if stage.get("accepted", True) else " (kept init)"))
        if 0 in self.coverage:
            parts.append(f"{self.coverage.count(0)} of {len(self.coverage)} experts saw no token")
        if fields.get("output_error") is not None:
            parts.append(f"output error {units.number(fields['output_error'])}")
        parts.append(units.duration(self.seconds[-1]))
        memory = {"RAM": fields.get("peak_rss_gb"), "GPU": fields.get("device_gb")}
        parts += [f"{name} {value:.1f} GB" for name, value in memory.items() if value]
        if self.done < self.layers:
            parts.append(f"{units.duration(self.left)} left")
        return " · ".join(parts)


class _Log(_Console):
    """One line per layer, for files and pipes."""

    def write(self, kind: str, fields: dict) -> None:
        text = self.line(kind, fields)
        if text:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self, failed: bool) -> None:
        pass


class _Live(_Console):
    """Two bars, layers and the steps of the current stage, below the lines of the layers that are done."""

    def __init__(self, console: Console, layers: int, done: int):
        super().__init__(console, layers, done)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self.layer_bar = self.progress.add_task("layers", total=layers or None, completed=done, note="")
        self.step_bar = self.progress.add_task("", total=None, note="", visible=False)
        self.progress.start()

    def write(self, kind: str, fields: dict) -> None:
        text = self.line(kind, fields)
        if text:
            self.progress.console.print(text, markup=False, highlight=False)
        if kind == "step":
            self._show_step(fields)
        elif kind in ("plan", "layer"):
            note = "" if self.left is None else f"{units.duration(self.left)} left"
            self.progress.update(self.layer_bar, total=self.layers or None, completed=self.done, note=note)
            self.progress.update(self.step_bar, visible=False)

    def _show_step(self, fields: dict) -> None:
        description = f"layer {fields['layer'] + 1} {fields['stage']}"
        self.progress.update(self.layer_bar, completed=fields["layer"])
        self.progress.update(
            self.step_bar,
            visible=True,
            description=description,
            total=fields.get("steps"),
            completed=fields["step"] + 1,
            note=f"loss {units.number(fields.get('loss'))}",
        )

    def close(self, failed: bool) -> None:
        self.progress.stop()


def _eval_line(fields: dict) -> str:
    text = f"{fields.get('label', 'eval')}: perplexity {units.number(fields.get('perplexity'))}"
    if fields.get("base_perplexity") is not None:
        text += f" (base {units.number(fields['base_perplexity'])})"
    if fields.get("kl") is not None:
        text += f" · KL {units.number(fields['kl'])}"
    return text + (f" · top-1 {fields['top1']:.1%}" if fields.get("top1") is not None else "")


def _done_line(fields: dict) -> str:
    took = f" in {units.duration(fields['seconds'])}" if fields.get("seconds") is not None else ""
    return f"done{took}" + (f" · {units.size(fields['bytes'])}" if fields.get("bytes") else "")


def _plain(value):
    """As JSON values: tensors and numpy numbers become Python's, NaN and infinity become None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return [_plain(item) for item in value] if isinstance(value, Iterable) else str(value)


def _parse(path: Path) -> list[dict]:
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue  # a power cut leaves half a line
        if isinstance(event, dict) and "kind" in event:
            events.append(event)
    return events


def _tidy(path: Path, keep_layers: Collection[int] | None) -> list[dict]:
    """Drop events that will come again, and half lines; returns the others. The file is replaced, never half written.

    With no layer finished the run begins anew, and nothing stays. `done` always comes again; an `eval` measured the
    whole model, so it goes as soon as one layer goes.
    """
    events = _parse(path)
    kept = events
    if keep_layers is not None:
        kept = (
            [event for event in events if "layer" not in event or event["layer"] in keep_layers] if keep_layers else []
        )
        stale = ("done", "eval") if len(kept) < len(events) else ("done",)
        kept = [event for event in kept if event["kind"] not in stale]
    if path.exists():
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(event) + "\n" for event in kept)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    return kept


def _versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
