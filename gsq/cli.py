"""The `gsq` command. Each command reads its arguments, calls one function and prints what it returns."""

from __future__ import annotations

import errno
import json
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from gsq import units
from gsq.errors import UserError

if TYPE_CHECKING:  # commands import what they need, so that `gsq --help` is quick
    from gsq.estimate.report import Estimate
    from gsq.plan.rules import Plan, PlanEntry
    from gsq.run import Run
    from gsq.serve.verify import KernelReport

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Quantize Hugging Face models to 2 to 4 bits by Gumbel-Softmax refinement.",
)
# Patterns and paths hold brackets, which are no markup; a file or pipe gets whole tensor names.
console = Console(markup=False, highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML recipe; see configs/")]
Overrides = Annotated[list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="change one setting")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="run folder")]
ModelFolder = Annotated[Path, typer.Argument(metavar="DIR", help="dense checkpoint, or an export of GSQ")]


class Scan(StrEnum):
    """What `gsq plan` can measure."""

    kurtosis = "kurtosis"


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

    with stopped_by_sigterm():
        run = train(load_config(config, overrides), out, resume, started=show_start, progress=show_measuring)
    if run:
        show_outcome(run)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006
    tensors: Annotated[bool, typer.Option("--tensors", help="also one line per tensor")] = False,
    scan: Annotated[Scan | None, typer.Option(help="measure this of all that can be quantized; a table of it")] = None,
    curve: Annotated[
        Path | None, typer.Option(help="draw predicted KL against bits per weight: .png, .svg or .pdf")
    ] = None,
) -> None:
    """Show what a recipe does to each tensor, with bits per weight and bytes.

    Reads weights only where rules or options ask for something measured, and only once.
    """
    from gsq import prepare
    from gsq.config import load_config
    from gsq.device import pick_device
    from gsq.report import write_curve

    settings = load_config(config, overrides)
    if curve and curve.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--curve {curve} must end in .png, .svg or .pdf")
    if curve and settings.plan.target_bpw is None and settings.plan.target_size is None:
        raise UserError("--curve draws what bits: sensitivity chooses from; give a rule these, and the plan a target")
    skeleton, found = prepare.prepare(settings, pick_device(), scan is not None, show_measuring)
    if scan:
        show_kurtosis(found, settings.plan.kurtosis.limits())
    show_plan(found, tensors)
    if curve:
        write_curve(prepare.curve(settings, skeleton, found).to_dict(), curve)
        console.print(f"curve: {curve}")


@app.command()
def estimate(
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006
    device: Annotated[str | None, typer.Option(help="a GPU such as h200; default: this machine")] = None,
    processes: Annotated[int, typer.Option(min=1, help="of the run, one per GPU")] = 1,
) -> None:
    """Memory, disk and time that a run will take, from the checkpoint's headers alone.

    Ends with an error if it does not fit, which says what to change.
    """
    from gsq.config import load_config
    from gsq.estimate.fit import check_fit, estimate_for

    found, folder = estimate_for(load_config(config, overrides), device, processes)
    show_estimate(found)
    check_fit(found, folder)


@app.command()
def convert(
    config: ConfigFile,
    out: Annotated[Path, typer.Option(help="folder to write; must not exist")],
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Round a model to a recipe's codebooks without calibration: a CPU and little memory are enough."""
    from gsq.config import load_config
    from gsq.convert import convert

    show_written(convert(load_config(config, overrides), out))


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option(help="folder to write; must not exist")],
    format: Annotated[str | None, typer.Option(help="on-disk format; default: the run's `export.format`")] = None,
) -> None:
    """Pack a finished run as a checkpoint that servers load."""
    from gsq.export.base import FORMATS, export_run
    from gsq.run import Run

    finished = Run.open(run).completed()
    chosen = format or finished.config.export.format
    if chosen is None:
        raise UserError(f"the config of {run} has no export.format; give one with --format: {', '.join(FORMATS)}")
    show_written(export_run(finished, chosen, out))


@app.command()
def dequantize(folder: ModelFolder, out: Annotated[Path, typer.Option(help="folder to write; must not exist")]) -> None:
    """Write the dense bfloat16 checkpoint that an export stands for."""
    from gsq.export.dequantize import dequantize

    show_written(dequantize(folder, out))


@app.command()
def verify(
    folder: ModelFolder,
    run: Annotated[Path, typer.Option(help="run it was exported from")],
    kernels: Annotated[bool, typer.Option("--kernels", help="also compute with the packed kernels")] = False,
) -> None:
    """Read an export back with an independent decoder and compare it with its run, bit for bit.

    With --kernels also multiply with its packed weights, on the run's calibration tokens, and compare what comes out.
    """
    from gsq.export.verify import verify
    from gsq.run import Run

    finished = Run.open(run).completed()
    console.print(str(verify(folder, finished)))
    if kernels:
        from gsq.device import activation_dtype, pick_device
        from gsq.serve.verify import verify_kernels

        device = pick_device()
        show_kernels(verify_kernels(folder, finished, device, activation_dtype(device, finished.config.dtype)))


@app.command("eval")
def evaluate(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME=]DIR", help="dense checkpoints, exports, .gguf files")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="text file")] = None,
    base: Annotated[str | None, typer.Option(help="original model, to measure divergence from")] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="of the text, without a suite; default: 20")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="tokens per window, likewise; default: 1024")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="also write the result here")] = None,
    suite: Annotated[str | None, typer.Option(help="quick, card, full or a YAML file: many tests, many models")] = None,
    tests: Annotated[str, typer.Option(help="comma-separated: only these of the suite")] = "",
    kv: Annotated[str | None, typer.Option(help="scheme of the KV cache, such as turbo4v2")] = None,
    url: Annotated[str | None, typer.Option(help="server of the model, which generates in its place")] = None,
    served_as: Annotated[str | None, typer.Option(help="what that server calls it")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of a suite's results; done parts are not repeated")] = None,
) -> None:
    """Perplexity of a model on a text; with --base also KL divergence (nats) and top-1 agreement.

    With --suite, or a suite's YAML file in place of DIR, everything that the suite lists, of all models side by side.
    """
    from gsq.device import activation_dtype, pick_device
    from gsq.eval.tables import headline, write_tables
    from gsq.eval.views import cache_rows, flat_row

    device = pick_device()
    models = models or []
    if suite is None and len(models) == 1 and models[0].endswith((".yaml", ".yml")):
        suite, models = models[0], []
    if suite is None:
        from gsq.eval.text import measure_file

        if len(models) != 1 or text is None:
            raise UserError("give one model and --text FILE, or a suite: gsq eval DIR... --suite quick|card|full|FILE")
        if url or served_as or tests or out:
            raise UserError("--url, --served-as, --tests and --out are of suites; add --suite quick|card|full|FILE")
        if json_out and not json_out.absolute().parent.is_dir():
            raise UserError(f"--json {json_out}: there is no folder {json_out.parent}")
        dtype = activation_dtype(device)
        result = measure_file(models[0], base, text, windows or 20, length or 1024, device, dtype, kv)
        show_table([flat_row(result)])
        if sizes := cache_rows(result):
            show_table(sizes)
        if json_out:
            json_out.write_text(json.dumps(result, indent=2) + "\n")
        return
    if windows or length or json_out:
        raise UserError("--windows, --length and --json are for one text; a suite has settings, and --out")
    from gsq.eval.definition import compose, named
    from gsq.eval.suite import run_suite

    chosen = compose(
        suite, named(models, url, served_as), base, kv, text and str(text), tests.split(",") if tests else []
    )
    folder = out or Path("evals", chosen.name)
    results = run_suite(chosen, folder, device, activation_dtype(device), show_part)
    show_table(headline(results).rows)
    console.print(f"all tables: {write_tables(results, folder)}")


@app.command()
def inspect(folder: ModelFolder) -> None:
    """What a checkpoint holds: kinds of tensors, bits per weight, bytes."""
    from gsq.export.inspect import inspect

    show_table(
        {
            "kind": row["kind"],
            "stored as": row["stored as"],
            "tensors": str(row["tensors"]),
            "weights": units.count(row["weights"]),
            "bits per weight": f"{row['bits per weight']:.3f}",
            "size": units.size(row["bytes"]),
        }
        for row in inspect(folder)
    )


@app.command()
def report(
    run: RunFolder, out: Annotated[Path | None, typer.Option(help="HTML file; default: report.html in the run")] = None
) -> None:
    """Write one self-contained HTML page about a run."""
    from gsq.report import write_report

    console.print(f"wrote {write_report(run, out or run / 'report.html')}")


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(metavar="RUN_OR_EXPORT", help="an export, or the run that holds it")],
    run: Annotated[Path | None, typer.Option(help="run that the export is of, if it does not lie in it")] = None,
    base: Annotated[str | None, typer.Option(help="the original's id on the hub, if its run does not know")] = None,
    evaluations: Annotated[list[Path], typer.Option("--eval", metavar="FILE", help="result of gsq eval; or more")] = [],  # noqa: B006
    name: Annotated[str | None, typer.Option(help="the export's own id on the hub, for commands in the card")] = None,
    out: Annotated[Path | None, typer.Option(help="file to write; default: README.md in the export")] = None,
    force: Annotated[bool, typer.Option(help="replace a README that is none of these cards")] = False,
) -> None:
    """Write the model card of an export: what is stored, what was measured, how to use it, how it was made."""
    from gsq.export.card import write_card

    written = write_card(folder, run, base, evaluations, name, out, force)
    console.print(f"wrote {written.path}")
    for gap in written.missing:
        console.print(f"left out: {gap}")


@app.command()
def serve(
    folder: ModelFolder,
    more: Annotated[list[str] | None, typer.Argument(metavar="[-- ...]", help="arguments of the server's own")] = None,
    host: Annotated[str, typer.Option(help="address to listen at; 0.0.0.0 for all of this machine")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    python: Annotated[str | None, typer.Option(help="interpreter of the environment that has the server")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only print the command")] = False,
) -> None:
    """Start the server that reads a checkpoint on this machine, or say what to install and type."""
    from gsq.serve.launch import serving, start

    command = serving(folder, host, port, more or [], python=python)
    console.print(shlex.join(command))
    if not dry_run:
        start(command)


def show_start(run: Run, finished: int) -> None:
    """What a run is about to do, behind its `finished` layers."""
    show_plan(run.plan)
    if finished:
        console.print(f"continuing {run.folder} behind {finished} finished layers")


def show_outcome(run: Run) -> None:
    """What a run has left behind, and what to do with it. Its tracker has told the measurements."""
    from gsq.export.base import FORMATS
    from gsq.train import export_folder

    console.print(f"report: {run.folder / 'report.html'}")
    if run.config.export.format is None:
        console.print(f"pack it: gsq export {run.folder} --format FORMAT --out DIR")
        return
    folder = export_folder(run.folder, run.config)
    show_written(folder)
    console.print(FORMATS[run.config.export.format].usage.format(folder=folder))


def show_written(folder: Path) -> None:
    """A checkpoint that was written, and its size."""
    from gsq.export.inspect import inspect

    total = inspect(folder)[-1]
    console.print(f"wrote {folder} · {units.size(total['bytes'])} · {total['bits per weight']:.2f} bits per weight")


def show_estimate(found: Estimate) -> None:
    """Seconds by phase, what memory holds when it holds most, bytes on disk."""
    show_table(found.phase_rows())
    show_table(found.memory_rows())
    sizes = " · ".join(f"{name} {units.size(nbytes)}" for name, nbytes in found.disk().items())
    console.print(f"disk: {sizes}")
    console.print(
        f"{found.hardware.name}, {found.hardware.processes} processes: about {units.duration(found.total)} in all"
    )


def show_kernels(report: KernelReport) -> None:
    """Worst products by layer, and the whole model's."""
    show_table(
        {
            "layer": "head" if layer.layer is None else str(layer.layer),
            "products": str(len(layer.errors)),
            "worst error": f"{layer.errors[layer.worst]:.1e}",
            "rounding explains": f"{layer.limits[layer.worst]:.1e}",
            "of": layer.worst,
            "drift": f"{layer.drift:.1e}",
        }
        for layer in report.layers
        if layer.errors
    )
    console.print(str(report))


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Let a scheduler's SIGTERM end the program in good order, with a hint and exit code 0.

    It may come at any moment: whatever is finished is on disk already, and files appear whole or not at all.
    """

    stopping = False

    def stop(*_: object) -> NoReturn:
        nonlocal stopping
        stopping = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers send it more than once
        raise SystemExit

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException:  # libraries may turn what the signal raised inside them into errors of their own
        if not stopping:
            raise
        sys.stderr.write("stopped by SIGTERM; finished layers are kept: the same command with --resume goes on\n")
        sys.exit(0)
    finally:
        signal.signal(signal.SIGTERM, before)


def show_measuring(done: int, layers: int) -> None:
    """How far the measuring of sensitivities is; on stderr, which is for people."""
    sys.stderr.write(f"\rmeasuring sensitivity: layer {done} of {layers}" + ("\n" if done == layers else ""))
    sys.stderr.flush()


def show_part(label: str, part: str, done: int, layers: int) -> None:
    """Which part of a suite is running, and on a terminal how far it is; on stderr, which is for people."""
    terminal = sys.stderr.isatty()
    if terminal:
        sys.stderr.write(f"\r\033[K{label}: {part}" + (f", layer {done} of {layers}" if layers else ""))
    elif not done:
        sys.stderr.write(f"{label}: {part}\n")
    sys.stderr.flush()


def show_kurtosis(found: Plan, limits: Mapping[int, float]) -> None:
    """Kurtosis by family of roles, and how many tensors a rule `bits: kurtosis` would give so many bits."""
    from gsq.plan.roles import Role

    families: dict[str, list[float]] = {}
    for entry in found.entries.values():
        if entry.kurtosis is not None:
            families.setdefault(Role.read(entry.role).family, []).append(entry.kurtosis)
    show_table(_family_row(family, values, limits) for family, values in families.items())


def show_plan(found: Plan, tensors: bool = False) -> None:
    """A plan, tensor by tensor if asked for, by role and rule, and its totals."""
    if tensors:
        show_table(map(_tensor_row, found.entries.values()))
    show_table(_kind_rows(found))
    total = found.summary()
    console.print(
        f"{total['targets']} tensors quantized at {total['bits_per_quantized_weight']:.2f} bits per weight · "
        f"whole model {total['bits_per_weight']:.2f} bits · "
        f"{units.size(total['bytes_before'])} → {units.size(total['bytes_after'])}"
    )


def show_table(rows: Iterable[dict[str, str]]) -> None:
    """Rows with the same keys, which are the head."""
    rows = list(rows)
    table = Table(*rows[0], box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def _family_row(family: str, kurtosis: list[float], limits: Mapping[int, float]) -> dict[str, str]:
    from gsq.config import WIDTHS
    from gsq.plan.kurtosis import bits_for

    bits = Counter(bits_for(value, limits, limits) for value in kurtosis)
    common = set.intersection(*map(set, WIDTHS.values()))
    heads = {width: f"{width} bits" if width in common else f"{width} bits or keep" for width in limits}
    counts = {f"{heads[width]} (< {limit:g})": bits[width] for width, limit in limits.items()} | {"keep": bits[None]}
    return {
        "family": family,
        "tensors": str(len(kurtosis)),
        "mean kurtosis": f"{sum(kurtosis) / len(kurtosis):.2f}",
        "max": f"{max(kurtosis):.2f}",
        **{head: str(count) for head, count in counts.items()},
    }


def _tensor_row(entry: PlanEntry) -> dict[str, str]:
    shape = {"tensor": entry.name, "shape": str(list(entry.shape))}
    return shape | {"role": entry.role, **_storage(entry), "rule": entry.reason}


def _kind_rows(found: Plan) -> Iterable[dict[str, str]]:
    """One row for entries of the same family of roles, rule and storage."""
    from gsq.plan.roles import ROLES, Role, together

    kinds: dict[tuple, list[PlanEntry]] = {}
    for entry in found.entries.values():
        kinds.setdefault((Role.read(entry.role).family, entry.rule, *_storage(entry).items()), []).append(entry)
    for _, entries in sorted(kinds.items(), key=lambda kind: [*ROLES, kind[0][0]].index(kind[0][0])):
        (role,) = together(Role.read(entry.role) for entry in entries)
        yield {
            "role": str(role),
            **_storage(entries[0]),
            "tensors": str(len(entries)),
            "weights": units.count(sum(entry.numel for entry in entries)),
            "before": units.size(sum(entry.bytes_before for entry in entries)),
            "after": units.size(sum(entry.bytes_after for entry in entries)),
            "rule": _reason(entries),
        }


def _reason(entries: list[PlanEntry]) -> str:
    """Their rule, and the range of what it saw."""
    values = [entry.kurtosis for entry in entries if entry.kurtosis is not None]
    if len(values) < 2:
        return entries[0].reason
    return f"{entries[0].rule} (kurtosis {min(values):.2f} to {max(values):.2f})"


def _storage(entry: PlanEntry) -> dict[str, str]:
    book = entry.codebook
    bits, group = ("keep", "") if book is None else (str(book.bits), str(book.group_size))
    return {"bits": bits, "group": group}


def main(arguments: list[str] | None = None) -> None:
    """Run the command; a mistake of the user's, or of the disk, ends with one message and exit code 2."""
    try:
        app(arguments, standalone_mode=True)
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        from gsq.files import REMEDY

        _fail(f"{error}; {REMEDY}" if error.errno == errno.ENOSPC else str(error))


def _fail(message: str) -> NoReturn:
    stderr = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    stderr.print("error: ", style="bold red", end="")
    stderr.print(message)
    sys.exit(2)


def quantize_program() -> None:
    """`gsq/train.py CONFIG ...`: the quantize command without its name."""
    main(["quantize", *sys.argv[1:]])
