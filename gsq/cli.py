"""The `gsq` command. Each command reads its arguments, calls one function and prints what it returns."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from gsq.errors import UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Quantize Hugging Face models to 2 to 4 bits by Gumbel-Softmax refinement.",
)
console = Console()

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML recipe; see configs/")]
Overrides = Annotated[list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="change one setting")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="run folder")]
ModelFolder = Annotated[Path, typer.Argument(metavar="DIR", help="dense checkpoint, or an export of GSQ")]


@app.command()
def quantize(
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006 (typer copies it)
    out: Annotated[Path | None, typer.Option(help="run folder; default: the config's `run`")] = None,
    resume: Annotated[bool, typer.Option(help="continue the run where it stopped")] = False,
) -> None:
    """Quantize a model, export it, verify the export and measure it. The same program as `gsq/train.py`."""
    from gsq.config import load_config
    from gsq.train import train

    run = train(load_config(config, overrides), out, resume)
    console.print(f"finished {run.folder}")


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006
    tensors: Annotated[bool, typer.Option(help="one line per tensor")] = False,
) -> None:
    """Show what a recipe does to each tensor, with bits per weight and bytes. Reads no weights."""
    from gsq.config import load_config
    from gsq.device import pick_device
    from gsq.train import prepare

    _, found = prepare(load_config(config, overrides), pick_device())
    console.print(plan_table(found, tensors))
    summary = found.summary()
    console.print(
        f"{summary['targets']} tensors quantized at {summary['bits_per_quantized_weight']:.3f} bits per weight; "
        f"whole model {summary['bits_per_weight']:.3f} bits per weight, "
        f"{_size(summary['bytes_before'])} -> {_size(summary['bytes_after'])}"
    )


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option(help="folder to write; must not exist")],
    format: Annotated[str, typer.Option(help="on-disk format")] = "humming",
) -> None:
    """Pack a finished run as a checkpoint that servers load."""
    from gsq.export.base import export_run
    from gsq.run import Run

    folder = export_run(Run.open(run), format, out)
    console.print(f"wrote {folder}")


@app.command()
def dequantize(folder: ModelFolder, out: Annotated[Path, typer.Option(help="folder to write; must not exist")]) -> None:
    """Write the dense bfloat16 checkpoint that an export stands for."""
    from gsq.export.base import dequantize as decode

    console.print(f"wrote {decode(folder, out)}")


@app.command()
def verify(folder: ModelFolder, run: Annotated[Path, typer.Option(help="run it was exported from")]) -> None:
    """Read an export back with an independent decoder and compare it with its run, bit for bit."""
    from gsq.export.verify import verify as check
    from gsq.run import Run

    console.print(str(check(folder, Run.open(run))))


@app.command("eval")
def evaluate(
    folder: ModelFolder,
    text: Annotated[Path, typer.Option(help="text file")],
    base: Annotated[str | None, typer.Option(help="original model, to measure divergence from")] = None,
    windows: Annotated[int, typer.Option(min=1)] = 20,
    length: Annotated[int, typer.Option(min=2, help="tokens per window")] = 1024,
    json_out: Annotated[Path | None, typer.Option("--json", help="also write the result here")] = None,
) -> None:
    """Perplexity of a model on a text; with --base also KL divergence (nats) and top-1 agreement."""
    from transformers import AutoTokenizer

    from gsq.device import activation_dtype, pick_device
    from gsq.eval.quality import eval_tokens
    from gsq.eval.quality import evaluate as measure
    from gsq.export.base import open_model
    from gsq.model.resolve import resolve_model

    path = resolve_model(str(folder))
    tokens = eval_tokens(text, AutoTokenizer.from_pretrained(path), windows, length)
    device = pick_device()
    reference = open_model(resolve_model(base)) if base else None
    result = measure(open_model(path), reference, tokens, device, activation_dtype(device))
    table = Table(*result)
    table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in result.values()))
    console.print(table)
    if json_out:
        json_out.write_text(json.dumps(result, indent=2) + "\n")


@app.command()
def inspect(folder: ModelFolder) -> None:
    """What a checkpoint holds: kinds of tensors, bits per weight, bytes."""
    from gsq.export.inspect import inspect as rows_of
    from gsq.export.inspect import total

    rows = rows_of(folder)
    table = Table("kind", "stored as", "tensors", "weights", "bits per weight", "size")
    for row in [*rows, total(rows)]:
        weights = f"{row.weights / 1e6:.2f} M"
        bits = f"{row.bits_per_weight:.3f}"
        table.add_row(row.kind, row.stored_as, str(row.tensors), weights, bits, _size(row.nbytes))
    console.print(table)


@app.command()
def report(
    run: RunFolder, out: Annotated[Path | None, typer.Option(help="HTML file; default: in the run")] = None
) -> None:
    """Write one self-contained HTML page about a run."""
    from gsq.report import write_report

    console.print(f"wrote {write_report(run, out or run / 'report.html')}")


def plan_table(found, tensors: bool) -> Table:
    """The plan by role and rule, or tensor by tensor."""
    if tensors:
        table = Table("tensor", "shape", "bits", "group", "rule")
        for e in found.entries.values():
            book = e.codebook
            table.add_row(e.name, str(list(e.shape)), *_bits(book), e.rule)
        return table
    table = Table("role", "rule", "bits", "group", "tensors", "weights", "before", "after")
    kinds: dict[tuple, list] = {}
    for e in found.entries.values():
        kinds.setdefault((e.role, e.rule, *_bits(e.codebook)), []).append(e)
    for (role, rule, bits, group), entries in kinds.items():
        weights, before = sum(e.numel for e in entries), sum(e.bytes_before for e in entries)
        after = sum(e.bytes_after for e in entries)
        table.add_row(role, rule, bits, group, str(len(entries)), f"{weights / 1e6:.2f} M", _size(before), _size(after))
    return table


def _bits(codebook) -> tuple[str, str]:
    return ("keep", "") if codebook is None else (str(codebook.bits), str(codebook.group_size))


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def main(arguments: list[str] | None = None) -> None:
    """Run the command; a mistake of the user's ends with one message and exit code 2."""
    try:
        app(arguments, standalone_mode=True)
    except UserError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(2)


def quantize_program() -> None:
    """`gsq/train.py CONFIG ...`: the quantize command without its name."""
    main(["quantize", *sys.argv[1:]])
