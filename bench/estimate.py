"""What `gsq estimate` says of runs, beside what they took: seconds by phase, peak memory.

    python bench/estimate.py configs/smollm2_cpu.yaml configs/tiny_moe_cpu.yaml --out /tmp/estimate \
        --layers 3 --set calib.source=TEXT

Every config is quantized in a process of its own with one thread, whose clock is the processor's: other programs on
the machine do not count. `--layers` walks only the first layers, of which the table tells; memory and seconds of a
layer do not depend on how many there are. Writes estimate.md and estimate.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer

from gsq import units
from gsq.config import load_config
from gsq.errors import UserError
from gsq.estimate.fit import estimate_for
from gsq.estimate.report import Estimate
from gsq.estimate.seconds import PHASES
from gsq.tracking import read_metrics

ROOT = Path(__file__).resolve().parent.parent
RUN = "import time; time.perf_counter = time.process_time; from gsq.cli import main; import sys; main(sys.argv[1:])"


def main(
    configs: Annotated[list[Path], typer.Argument(help="recipes")],
    out: Annotated[Path, typer.Option(help="folder for runs and tables")],
    layers: Annotated[int, typer.Option(help="layers to walk")] = 3,
    overrides: Annotated[list[str], typer.Option("--set", help="change a setting of all of them")] = [],  # noqa: B006
) -> None:
    """Estimate, run, compare."""
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    settings = [*overrides, f"model.max_layers={layers}", "export.format=null"]
    rows = [row for config in configs for row in compared(config, settings, out / config.stem)]
    (out / "estimate.json").write_text(json.dumps(rows, indent=1))
    (out / "estimate.md").write_text(text := table(rows))
    print(text)


def compared(config: Path, settings: list[str], run: Path) -> Iterable[dict]:
    """Rows of one config: what, estimated, measured."""
    found, _ = estimate_for(load_config(config, [*settings, f"run={run}"]), None, 1)
    arguments = [part for setting in settings for part in ("--set", setting)]
    subprocess.run([sys.executable, "-c", RUN, "quantize", str(config), "--out", str(run), *arguments], check=True)
    seconds, peak = outcome(run)
    estimated = found.seconds()["layer"]
    for phase in PHASES:
        yield {"config": config.stem, "what": phase, "estimated": estimated[phase], "measured": seconds[phase]}
    totals = (sum(estimated.values()), sum(seconds.values()))
    yield {"config": config.stem, "what": "a layer", "estimated": totals[0], "measured": totals[1]}
    yield {"config": config.stem, "what": "peak memory", "estimated": peak_of(found), "measured": peak}


def peak_of(found: Estimate) -> float:
    """Bytes of the host at the worst point."""
    return found.working.peak(found.hardware, "host")


def outcome(run: Path) -> tuple[dict[str, float], float]:
    """Seconds by phase of a layer on average, and peak resident bytes, of a finished run."""
    events = [event for event in read_metrics(run) if event["kind"] == "layer"]
    if not events:
        raise UserError(f"{run} has no finished layer")
    sums = dict.fromkeys(PHASES, 0.0)
    for event in events:
        named = event["seconds"]
        rest = named["total"] - sum(seconds for phase, seconds in named.items() if phase != "total")
        for phase, seconds in {**named, "load": rest}.items():
            if phase in sums:
                sums[phase] += seconds / len(events)
    return sums, max(event["peak_rss_gb"] for event in events) * 1e9


def table(rows: list[dict]) -> str:
    """As Markdown."""
    lines = ["| config | what | estimated | measured | ratio |", "|---|---|---|---|---|"]
    for row in rows:
        show = units.size if row["what"] == "peak memory" else units.duration
        ratio = row["estimated"] / row["measured"] if row["measured"] else float("nan")
        values = f"{show(row['estimated'])} | {show(row['measured'])} | {ratio:.2f}"
        lines.append(f"| {row['config']} | {row['what']} | {values} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(f"error: {error}")
