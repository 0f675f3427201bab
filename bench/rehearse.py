"""Rehearsal: random weights in the exact config and tensors of a published model, through the real pipeline.

    python bench/rehearse.py --out /tmp/rehearsal --layers 1
    python bench/rehearse.py --out /tmp/rehearsal --layers 2 --budget reference     # where there is a GPU
    python bench/rehearse.py --out /tmp/rehearsal --model Qwen3.6-27B --set refine.enabled=false

Writes `--layers` decoder layers (from four on both kinds occur) with embedding, head, vision tower and
multi-token prediction as they are published; `--vocab`, `--experts` and `--vision` make them smaller, which the
table then says. Then `gsq quantize` runs on it in a process of its own, watched by `bench/watch.py`, by the
published recipe with one of three budgets. Calibration tokens are random. Tells, in `rehearsal.md` and
`rehearsal.json`: seconds by phase, peak memory and what holds it, the device's memory, bytes written.
Time, memory and bytes are those of the published model; quality means nothing. Linux only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from synthetic import MODELS, Published, write_checkpoint

from gsq import units
from gsq.config import Config, load_config
from gsq.errors import UserError
from gsq.model.checkpoint import Checkpoint, read_json
from gsq.tracking import read_metrics

ROOT = Path(__file__).resolve().parent.parent
BUDGETS: dict[str, dict[str, int]] = {
    "small": {
        "calib.windows": 4, "calib.length": 64, "calib.validation": 1, "calib.batch": 4,
        "refine.steps": 2, "refine.windows": 2, "refine.checks": 1,
    },
    "recipe": {},  # as configs/ has it
    "reference": {  # 10 epochs over 4096 sequences, 64 at a time
        "calib.windows": 4096 + 16, "calib.length": 4096, "calib.validation": 16,
        "refine.steps": 640, "refine.windows": 64,
    },
}  # fmt: skip
PLACES = 12  # rows of the table of places
HELD = 10  # and of that of tensors


def main(
    out: Annotated[Path, typer.Option(help="folder for the model, the run and the tables")],
    model: Annotated[str, typer.Option(help=f"one of {', '.join(n for n in MODELS if MODELS[n].recipe)}")] = (
        "Qwen3.6-35B-A3B"
    ),
    layers: Annotated[int, typer.Option(help="decoder layers")] = 1,
    budget: Annotated[str, typer.Option(help=f"of calibration and refinement: {', '.join(BUDGETS)}")] = "small",
    vocab: Annotated[int | None, typer.Option(help="tokens, fewer than published; saves disk")] = None,
    experts: Annotated[int | None, typer.Option(help="routed experts, fewer than published")] = None,
    vision: Annotated[int | None, typer.Option(help="blocks of the vision tower, fewer than published")] = None,
    overrides: Annotated[list[str], typer.Option("--set", help="change a setting of the recipe")] = [],  # noqa: B006
) -> None:
    """Write the model if it is missing, quantize it, write and print the tables."""
    published, settings = chosen(model), BUDGETS.get(budget)
    if settings is None:
        raise typer.BadParameter(f"unknown budget {budget!r}; there are {', '.join(BUDGETS)}")
    shrunk = smaller(published, vocab=vocab, experts=experts, vision=vision)
    content = published.config(layers, **shrunk)
    source = checkpoint(published, content, out / f"{model}-{layers}")
    recipe = ROOT / "configs" / published.recipe
    tokens = out / "tokens.safetensors"
    given = [f"model.name={source}", f"calib.source={tokens}", *(f"{k}={v}" for k, v in settings.items()), *overrides]
    config = load_config(recipe, given)
    save_file({"tokens": random_tokens(config, content["text_config"]["vocab_size"])}, tokens)
    seconds, memory = watched(recipe, given, out)
    title = {"model": model, "layers": layers, "budget": budget, "set": overrides, "smaller": shrunk}
    found = title | {"seconds": seconds, "memory": memory} | outcome(out / "run", source, config)
    (out / "rehearsal.json").write_text(json.dumps(found, indent=1))
    (out / "rehearsal.md").write_text(text := report(found))
    print(text)


def chosen(name: str) -> Published:
    """A model that has a recipe."""
    if name not in MODELS or not MODELS[name].recipe:
        raise typer.BadParameter(
            f"unknown model {name!r}; there are {', '.join(n for n in MODELS if MODELS[n].recipe)}"
        )
    return MODELS[name]


def smaller(
    published: Published, vocab: int | None = None, experts: int | None = None, vision: int | None = None
) -> dict[str, int]:
    """Settings of `Published.config` that differ from those published."""
    found = {"vocab_size": vocab, "vision": vision}
    if experts is not None:
        chosen_ones = published.config()["text_config"].get("num_experts_per_tok")
        if chosen_ones is None:
            raise typer.BadParameter("the model has no experts; leave out --experts")
        found |= {"num_experts": experts, "num_experts_per_tok": min(chosen_ones, experts)}
    return {key: value for key, value in found.items() if value is not None}


def checkpoint(published: Published, config: dict, folder: Path) -> Path:
    """The model in `folder`, written if there is none; another one there is refused."""
    if not folder.exists():
        write_checkpoint(published, config, folder)
    if read_json(folder / "config.json") != config:
        raise UserError(f"{folder} holds another model; remove it, or choose another --out")
    return folder


def random_tokens(config: Config, vocab: int) -> torch.Tensor:
    """Token ids `[windows, length]` from the whole vocabulary, so that all experts have something to do."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab, (config.calib.windows, config.calib.length), generator=generator)


def watched(recipe: Path, overrides: Iterable[str], out: Path) -> tuple[float, dict]:
    """Quantize under watch into `out / "run"`; seconds by the clock, and what `bench/watch.py` saw."""
    file = out / "memory.json"
    settings = [argument for override in overrides for argument in ("--set", override)]
    command = [sys.executable, str(ROOT / "bench" / "watch.py"), str(file), str(recipe)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))}
    start = os.times().elapsed
    done = subprocess.run([*command, "--out", str(out / "run"), *settings], env=environment)
    if done.returncode:
        raise UserError(f"gsq quantize ended with {done.returncode}; what it held at its peak is in {file}")
    return os.times().elapsed - start, json.loads(file.read_text())


def outcome(run: Path, source: Path, config: Config) -> dict:
    """What a finished run says of its layers, and bytes of all that was read and written."""
    content, layers = read_json(source / "config.json")["text_config"], []
    lines = map(json.loads, (run / "journal.jsonl").read_text().splitlines())
    cpu = {line["layer"]: line["cpu_seconds"] for line in lines if line["layer"] is not None}
    for event in read_metrics(run):
        if event["kind"] == "layer":
            kind = content["layer_types"][event["layer"]]
            kept = ("layer", "seconds", "peak_rss_gb", "device_gb")
            layers.append({key: event[key] for key in kept} | {"kind": kind, "cpu_seconds": cpu[event["layer"]]})
    width = {"float32": 4, "bfloat16": 2}[read_yaml_dtype(run)]
    sizes = {
        "checkpoint": Checkpoint.open(source).nbytes,
        "layers of the run": folder_bytes(run / "layers"),
        "export": folder_bytes(run / "export"),
        "one stream of hidden states": config.calib.windows * config.calib.length * content["hidden_size"] * width,
    }
    return {"by_layer": layers, "bytes": sizes, "tokens": [config.calib.windows, config.calib.length]}


def read_yaml_dtype(run: Path) -> str:
    """The dtype of a run's activations, which it remembers."""
    return load_config(run / "config.yaml").dtype


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder; none if it is missing."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def report(found: Mapping) -> str:
    """The tables as Markdown."""
    memory, peak = found["memory"], found["memory"]["peak"]
    shrunk = ", ".join(f"{key} {value}" for key, value in found["smaller"].items())
    windows, length = found["tokens"]
    fullest = max(memory["places"], key=lambda place: memory["places"][place]["anon"])
    sizes = ", ".join(f"{what} {units.size(nbytes)}" for what, nbytes in found["bytes"].items())
    heads = [
        f"{found['model']}, {found['layers']} layers" + (f", but not as published: {shrunk}" if shrunk else ""),
        f"budget {found['budget']}, {windows} x {length} tokens" + "".join(f", {text}" for text in found["set"]),
        f"{units.duration(found['seconds'])}; peak anonymous memory {units.size(memory['places'][fullest]['anon'])} in "
        f"`{fullest}` (resident: {units.size(memory['most_resident'])})",
        f"written: {units.size(memory['written'])}; {sizes}",
    ]
    tables = [layer_table(found["by_layer"]), place_table(memory["places"]), held_table(peak)]
    return "\n".join([*(f"- {head}" for head in heads), "", "\n\n".join(tables), ""])


def layer_table(layers: list[dict]) -> str:
    """Seconds of each layer by phase, and peaks up to its end."""
    phases = list(dict.fromkeys(phase for layer in layers for phase in layer["seconds"]))
    rows = [
        [
            layer["layer"], layer["kind"], *(f"{layer['seconds'].get(phase, 0):.1f}" for phase in phases),
            f"{layer['cpu_seconds']:.1f}", f"{layer['peak_rss_gb']:.2f}", f"{layer['device_gb']:.2f}",
        ]
        for layer in layers
    ]  # fmt: skip
    return table(["layer", "kind", *(f"{phase}, s" for phase in phases), "CPU s", "peak RAM, GB", "device, GB"], rows)


def place_table(places: Mapping[str, dict]) -> str:
    """Where the program was when it held most, in the order in which it came there."""
    most = sorted(places, key=lambda place: -places[place]["anon"])[:PLACES]
    rows = [
        [f"`{place}`", f"{seen['seconds']:.1f}", *(units.size(seen[key]) for key in ("anon", "resident", "device"))]
        for place, seen in places.items()
        if place in most
    ]
    return table(["place", "seconds", "peak anonymous", "peak resident", "peak device"], rows)


def held_table(peak: Mapping) -> str:
    """Tensors at the peak, the largest kinds, and what is no tensor that Python holds."""
    listed = peak["tensors"]
    rows = [[f"{kind['dtype']} {kind['shape']}", kind["count"], units.size(kind["bytes"])] for kind in listed[:HELD]]
    rest = sum(kind["bytes"] for kind in listed[HELD:])
    outside = peak["anon"] - sum(kind["bytes"] for kind in listed)
    rows += [["smaller ones listed", "", units.size(rest)], ["no tensor listed", "", units.size(outside)]]
    return table(["held at the peak", "count", "bytes"], rows)


def table(heads: list[str], rows: Iterable[list]) -> str:
    """Rows as a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    typer.run(main)
