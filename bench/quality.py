"""One model, one text, several methods, one table: what each step of GSQ is worth.

    python bench/quality.py configs/smollm2_cpu.yaml --text test.txt --out runs/bench --set calib.source=valid.txt

Every row is a whole run: quantized, exported, read back from the export, and compared with the
original model on the same windows. `--external NAME=DIR` adds dense checkpoints of other tools.
Runs are kept under `--out` and resumed, so the table can be completed later.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from gsq.config import Config, load_config
from gsq.convert import convert
from gsq.device import activation_dtype, pick_device
from gsq.errors import UserError
from gsq.eval.quality import FinalStates, compare, eval_tokens, final_states
from gsq.export.base import DecodedCheckpoint, PackedTensor, open_model
from gsq.files import save_tensors
from gsq.model.checkpoint import Checkpoint
from gsq.model.resolve import load_tokenizer, resolve_model
from gsq.prepare import tokens_for
from gsq.run import Run
from gsq.train import train

PLAIN = ["init.polish=0", "init.answer_original=false", "refine.enabled=false"]
ROWS: dict[str, list[str] | None] = {
    "calibration-free": None,  # as `gsq convert` writes it
    "RTN": [*PLAIN, "init.method=rtn"],
    "GPTQ": PLAIN,
    "GPTQ + polish": PLAIN[1:],
    "corrected GPTQ + polish": ["refine.enabled=false"],
    "GSQ hessian": ["refine.objective=hessian"],
    "GSQ output": ["refine.objective=output"],
    "GSQ both": ["refine.objective=both"],
    "GSQ": [],  # as the config says
}


def main(
    config: Path,
    text: Annotated[Path, typer.Option(help="text to measure on")],
    out: Annotated[Path, typer.Option(help="folder for runs and results")],
    rows: Annotated[str, typer.Option(help="comma-separated names; default: all but the first and last")] = "",
    external: Annotated[list[str], typer.Option(help="NAME=DIR of a dense checkpoint")] = [],  # noqa: B006
    overrides: Annotated[list[str], typer.Option("--set")] = [],  # noqa: B006
    extra: Annotated[list[str], typer.Option(help="NAME:key=value;... a row of your own")] = [],  # noqa: B006
    windows: int = 20,
    length: int = 1024,
) -> None:
    """Run what is missing, then write table.md and table.json."""
    names = [] if rows == "none" else rows.split(",") if rows else list(ROWS)[1:-1]
    if unknown := set(names) - set(ROWS):
        raise UserError(f"no row {', '.join(unknown)}; rows: {', '.join(ROWS)}")
    chosen = {name: ROWS[name] for name in names}
    for row in extra:
        name, _, settings = row.partition(":")
        chosen[name] = settings.split(";")
    base_config = load_config(config, overrides)
    source = resolve_model(base_config.model.name)
    tokens = eval_tokens(text, load_tokenizer(source), windows, length)
    base = measure_states(open_model(source), tokens)
    calibration = sample_once(base_config, source, out / "tokens.safetensors")
    results = [{"method": "original", **compare(base, base), "bytes": stored_bytes(source)}]
    for name, settings in chosen.items():
        folder = out / "".join(c if c.isalnum() else "-" for c in name.lower())
        if settings is None:
            seconds = convert_timed(load_config(config, overrides), folder / "export")
        else:
            seconds = quantize(config, [*overrides, *settings, f"calib.source={calibration}"], folder)
        exported = (folder / "export").exists()
        found = quality(folder / "export", tokens, base) if exported else run_quality(folder, tokens, base)
        results.append({"method": name, **found, **seconds})
        save(results, out)
    for name, _, folder in (item.partition("=") for item in external):
        results.append({"method": name, **quality(Path(folder), tokens, base)})
        save(results, out)


def sample_once(config: Config, source: Path, file: Path) -> Path:
    """The calibration tokens of all rows, made by the first."""
    if not file.exists():
        tokens = tokens_for(config, source, pick_device())
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors({"tokens": tokens.contiguous()}, file)
    return file


def quantize(config: Path, settings: list[str], folder: Path) -> dict:
    """Run or resume; seconds in all, of all processors, and per layer and phase, as the run journalled them."""
    train(load_config(config, settings), folder, resume=folder.exists())
    lines = map(json.loads, (folder / "journal.jsonl").read_text().splitlines())
    journal = [line for line in lines if "seconds" in line]  # of layers; embedding and head have none
    seconds = [line["seconds"] for line in journal]
    return {
        "bits": Run.open(folder).plan.summary()["bits_per_quantized_weight"],
        "seconds": sum(line["total"] for line in seconds),
        "cpu_seconds": sum(line["cpu_seconds"] for line in journal),
        "seconds_per_layer": {p: sum(line.get(p, 0) for line in seconds) / len(seconds) for p in seconds[-1]},
    }


def convert_timed(config: Config, out: Path) -> dict:
    """Convert without calibration, anew each time, since there is nothing to resume."""
    shutil.rmtree(out, ignore_errors=True)
    start, cpu_start = time.perf_counter(), time.process_time()
    convert(config, out)
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}


def measure_states(model: Checkpoint, tokens: torch.Tensor) -> FinalStates:
    """Hidden states behind the last layer of a checkpoint."""
    device = pick_device()
    return final_states(model, tokens, device, activation_dtype(device))


def quality(folder: Path, tokens: torch.Tensor, base: FinalStates) -> dict:
    """KL, perplexity and size of a checkpoint."""
    result = compare(measure_states(open_model(folder), tokens), base)
    return result | {"bytes": stored_bytes(folder)}


def run_quality(folder: Path, tokens: torch.Tensor, base: FinalStates) -> dict:
    """The same of a run whose codebook no format holds, as it would be at exact width."""
    run = Run.open(folder).completed()
    packed = {}
    for entry in run.plan.targets():
        [name] = entry.sources
        packed[name] = PackedTensor(entry.shape, (name,), "", lambda part, name=entry.name: run.load(name).dequantize())
    result = compare(measure_states(DecodedCheckpoint(run.source, packed), tokens), base)
    return result | {"bytes": run.plan.summary()["bytes_after"]}


def stored_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's tensors."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def shown(seconds: float | None) -> str:
    """Seconds of a cell; a dash where there are none."""
    return "–" if seconds is None else format(seconds, ".0f" if seconds >= 10 else ".1f")


def save(results: list[dict], out: Path) -> None:
    """Write and show the table so far."""
    head = "| method | bits | KL | perplexity | top-1 | seconds | CPU seconds | MB |\n" + "|---" * 8 + "|\n"
    lines = [
        f"| {r['method']} | {format(r['bits'], '.3f') if 'bits' in r else '–'} | {r['kl']:.4f} | "
        f"{r['perplexity']:.2f} | {r['top1']:.1%} | "
        f"{shown(r.get('seconds'))} | {shown(r.get('cpu_seconds'))} | {r['bytes'] / 1e6:.1f} |"
        for r in results
    ]
    note = (
        f"\nbase perplexity {results[0]['base_perplexity']:.2f}; {results[0]['windows']} windows of "
        f"{results[0]['length']} tokens; torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}; {time.strftime('%Y-%m-%d')}\n"
    )
    table = head + "\n".join(lines) + "\n" + note
    (out / "table.md").write_text(table)
    (out / "table.json").write_text(json.dumps(results, indent=1) + "\n")
    Console().print(table, highlight=False)


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(f"error: {error}")
