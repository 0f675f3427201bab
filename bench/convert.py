"""What conversion without calibration costs: a synthetic checkpoint through `gsq convert`, measured from outside.

    python bench/convert.py --folder /tmp/convert --gigabytes 10 --format tq --bits 2,3,4
    python bench/convert.py --folder /tmp/convert --gigabytes 72 --format jangtq --bits 2 --hollow

The model has layers of Qwen3-8B (format tq) or of Qwen3.6-35B-A3B (format jangtq), as many as fit,
with random weights or, if it is `--hollow`, zeros that take no room on a disk. It is written once;
every width of `--bits` is then a process of its own, which finds nothing of the source in the page
cache, and whose output is removed. Peak memory is given twice: all resident pages, and those that
no file backs (`anon`), which the system cannot drop.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from synthetic import MODELS, layout, write_checkpoint, write_hollow

from gsq.model.checkpoint import Checkpoint

SOURCES = {"tq": "Qwen3-8B", "jangtq": "Qwen3.6-35B-A3B"}
TARGETS = {"tq": r"layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight$", "jangtq": r"mlp\.experts\."}


def main(
    folder: Annotated[Path, typer.Option(help="where the source is kept and outputs are written")],
    gigabytes: Annotated[float, typer.Option(help="size of the source, about")] = 10,
    format: Annotated[str, typer.Option(help="tq or jangtq")] = "tq",
    bits: Annotated[str, typer.Option(help="comma-separated widths")] = "2,3,4",
    group_size: Annotated[int, typer.Option(help="of format tq")] = 128,
    hollow: Annotated[bool, typer.Option(help="the source has zeros for weights, and takes no room")] = False,
) -> None:
    """Make the source if it is missing, convert it once for each width, print a table."""
    source = folder / f"{format}-{'hollow' if hollow else 'source'}-{gigabytes:g}gb"
    if not source.exists():
        few, more = (model_bytes(SOURCES[format], layers) for layers in (4, 8))
        layers = round(4 + (gigabytes * 1e9 - few) / ((more - few) / 4))
        write = write_hollow if hollow else write_checkpoint
        write(MODELS[SOURCES[format]], MODELS[SOURCES[format]].config(layers), source)
    size = Checkpoint.open(source).nbytes
    print(f"source: {size / 1e9:.2f} GB; {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}\n")
    print("| bits | seconds | MB of bf16 a second | CPU seconds | peak MB | peak MB, anon | output GB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for width in map(int, bits.split(",")):
        out = folder / f"{format}{width}"
        shutil.rmtree(out, ignore_errors=True)
        forget(source)
        rule = {"match": TARGETS[format], "codebook": format, "bits": width}
        if format == "tq":
            rule["group_size"] = group_size
        seconds, cpu_seconds, peak, anon = measured(conversion(source, rule, out))
        print(
            f"| {width} | {seconds:.1f} | {size / 1e6 / seconds:.0f} | {cpu_seconds:.1f} | {peak / 1e6:.0f} | "
            f"{anon / 1e6:.0f} | {Checkpoint.open(out).nbytes / 1e9:.2f} |",
            flush=True,
        )
        shutil.rmtree(out)


def model_bytes(name: str, layers: int) -> int:
    """Bytes of a model's checkpoint in bfloat16, if it has so many layers."""
    return 2 * sum(map(math.prod, layout(MODELS[name], MODELS[name].config(layers)).values()))


def conversion(source: Path, rule: dict, out: Path) -> list[str]:
    """The command line that converts `source` to the folder `out` by one rule."""
    config = {"model": {"name": str(source)}, "plan": {"rules": [rule]}, "export": {"format": rule["codebook"]}}
    recipe = out.with_suffix(".yaml")
    recipe.write_text(json.dumps(config))  # which is YAML
    return [str(Path(sys.executable).with_name("gsq")), "convert", str(recipe), "--out", str(out)]


def forget(source: Path) -> None:
    """Drop a checkpoint from the page cache."""
    for path in source.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(command: list[str]) -> tuple[float, float, int, int]:
    """Run a command; seconds, CPU seconds, and peaks of resident and of anonymous memory in bytes."""
    start, peak, anon = time.perf_counter(), 0, 0
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
        memory = resident(child.pid)
        peak, anon = max(peak, memory.get("VmHWM", 0)), max(anon, memory.get("RssAnon", 0))
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return seconds, usage.ru_utime + usage.ru_stime, peak, anon


def resident(pid: int) -> dict[str, int]:
    """What the system says of a process's memory, in bytes. (`ru_maxrss` of a child counts its parent's, too.)"""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[-1] == "kB"}


if __name__ == "__main__":
    typer.run(main)
