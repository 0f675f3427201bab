"""mlx_lm's own quantizers beside ours, at equal size, on the same text.

    python bench/mlx_tools.py CONFIG --text test.txt --out runs/mlx --set calib.source=valid.txt --sizes 2,3,4,2:6

A size is the bits of the decoder's Linears, and of embedding and head, which mlx_lm quantizes like the rest;
all in affine codes, groups of 64. `rtn` is `mlx_lm.convert`. The tools that calibrate are given the tokens that
our runs have, by the places where they look for text, and keep their defaults otherwise. They work on a float32
copy, since MLX multiplies bfloat16 slowly on processors; what they wrote is rounded to bfloat16 by `mlx_lm.convert`.

What a tool wrote is kept, so the table can be completed later; remove its folder and log to run it again. MLX's
wheel for Linux brings a plain BLAS: with another in front of it (`LD_PRELOAD=libmkl_rt.so`) tools are much faster.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import mlx.nn
import quality
import typer
from mlx_lm.convert import convert
from plans import EVERYTHING, METHODS, Overrides, chosen, measure_rows, rule, settings, shared
from torch import Tensor

from gsq.calib.tokens import stored_tokens
from gsq.config import Config, load_config
from gsq.errors import UserError
from gsq.model.resolve import load_tokenizer, resolve_model

GROUP = 64
ROUNDING = "rtn"
TOOLS = {  # commands of mlx_lm, and their options; `dynamic_quant` divides its bits as it likes
    "gptq": "--bits {bits} --group-size {group} --fallback-bits {outside} --fallback-group-size {group} "
    "--num-samples {windows} --sequence-length {length}",
    "awq": "--bits {bits} --group-size {group} --embed-bits {outside} --embed-group-size {group} "
    "--num-samples {windows} --sequence-length {length}",
    "dwq": "--quantized-model {rounded} --data-path {data} --num-samples {training} --max-seq-length {one_more}",
    "dynamic_quant": "--low-bits {less} --low-group-size {group} --high-bits {more} --high-group-size {group} "
    "--target-bpw {per_weight}",
}


@dataclass(frozen=True)
class Size:
    """Bits of the decoder's Linears, and of embedding and head."""

    bits: int
    outside: int

    @classmethod
    def read(cls, text: str) -> Size:
        """`3`, or `3:6` if embedding and head differ."""
        bits, _, outside = text.partition(":")
        return cls(int(bits), int(outside or bits))

    def __str__(self) -> str:
        return f"{self.bits} bits" + (f" (embedding {self.outside})" if self.outside != self.bits else "")

    @property
    def rules(self) -> list[dict]:
        """Rules of our plan."""
        return [rule(self.outside, GROUP, role=["embedding", "head"]), rule(self.bits, GROUP, role=EVERYTHING)]


def main(
    config: Path,
    text: Annotated[Path, typer.Option(help="text to measure on")],
    out: Annotated[Path, typer.Option(help="folder for runs, checkpoints and results")],
    sizes: Annotated[str, typer.Option(help="comma-separated: BITS, or BITS:BITS_OF_EMBEDDING")] = "2,3,4",
    tools: Annotated[str, typer.Option(help=f"comma-separated, of: {ROUNDING}, {', '.join(TOOLS)}")] = ROUNDING,
    methods: Annotated[str, typer.Option(help="ours, comma-separated, of: GPTQ, and GSQ as the config says")] = "",
    overrides: Overrides = [],  # noqa: B006
    limit: Annotated[int, typer.Option(help="CPU seconds after which a tool is stopped")] = 1200,
    windows: int = 20,
    length: int = 1024,
) -> None:
    """Run what is missing, then write table.md and table.json, and of the tools tools.json."""
    out = out.resolve()
    loaded = load_config(config, overrides)
    source = resolve_model(loaded.model.name)
    sample = Sample(loaded, source, out)
    wanted = [Size.read(size) for size in sizes.split(",")]
    external, outcomes = [], {}
    for size in wanted:
        for tool in [ROUNDING, *(name for name in tools.split(",") if name != ROUNDING)]:
            name, folder = f"mlx_lm {tool} {size}", out / f"{tool}-{size.bits}-{size.outside}"
            outcomes[name] = made(tool, size, source, folder, sample, limit)
            external += [f"{name}={folder}"] if folder.exists() else []
            (out / "tools.json").write_text(json.dumps(outcomes, indent=1) + "\n")
    rows = {
        f"{method} {size}": [*chosen(METHODS, method), *settings({"rules": size.rules})]
        for size in wanted
        for method in filter(None, methods.split(","))
    }
    measure_rows(rows, config, text, out, [*overrides, *shared(out)], windows, length, external)
    print("\n".join(f"{name}: {outcome}" for name, outcome in outcomes.items()))


class Sample:
    """The tokens of our runs where mlx_lm's tools look for text: `home` and `data`, folders in `out`."""

    def __init__(self, config: Config, source: Path, out: Path):
        calib = config.calib
        self.home, self.data = out / "home", out / "data"
        self.windows, self.length, self.training = calib.windows, calib.length, calib.windows - calib.validation
        tokens = stored_tokens(quality.sample_once(config, source, out / "tokens.safetensors"), *self.shape)
        self._write(tokens, load_tokenizer(source))

    @property
    def shape(self) -> tuple[int, int]:
        """Windows, and tokens of each."""
        return self.windows, self.length

    def _write(self, tokens: Tensor, tokenizer) -> None:
        """`calibration_v5.txt`, which tools download if it is missing, and a data set of one text per window."""
        whole = self.home / ".cache" / "mlx-lm" / "calibration_v5.txt"
        whole.parent.mkdir(parents=True, exist_ok=True)
        whole.write_text(tokenizer.decode(tokens.flatten()), encoding="utf-8")
        self.data.mkdir(exist_ok=True)
        lines = [json.dumps({"text": tokenizer.decode(window)}) for window in tokens]
        (self.data / "train.jsonl").write_text("\n".join(lines) + "\n")


def made(tool: str, size: Size, source: Path, folder: Path, sample: Sample, limit: int) -> str:
    """Make `folder`, unless it or the log of a failure is there; say what came of it."""
    log = folder.with_suffix(".log")
    if tool == ROUNDING and not folder.exists():
        rounded(size, source, folder)
    elif not (folder.exists() or log.exists()):
        calibrated(tool, size, source, folder, sample, limit, log)
    lines = log.read_text().replace("\r", "\n").strip().splitlines() if log.exists() else []
    return "; ".join(["done", *lines[-1:]] if folder.exists() else ["failed", *lines[-2:]])


def rounded(size: Size, source: Path, folder: Path) -> None:
    """What `mlx_lm.convert` makes of the model."""

    def widths(path: str, module: mlx.nn.Module) -> dict:
        outside = isinstance(module, mlx.nn.Embedding) or path.endswith("lm_head")
        return {"bits": size.outside if outside else size.bits, "group_size": GROUP}

    convert(str(source), folder, quantize=True, q_bits=size.bits, q_group_size=GROUP, quant_predicate=widths)


def calibrated(tool: str, size: Size, source: Path, folder: Path, sample: Sample, limit: int, log: Path) -> None:
    """What another tool makes of a float32 copy, in bfloat16; what the tool says goes to `log`."""
    dense, wide = folder.with_name("dense-float32"), folder.with_name(f"{folder.name}-float32")
    if not dense.exists():
        convert(str(source), dense, dtype="float32")
    facts = {
        "bits": size.bits, "outside": size.outside, "group": GROUP, "less": size.bits - 1, "more": size.bits + 1,
        "per_weight": size.bits + 32 / GROUP, "windows": sample.windows, "length": sample.length, "data": sample.data,
        "training": sample.training, "one_more": sample.length + 1,
        "rounded": folder.with_name(f"{ROUNDING}-{size.bits}-{size.outside}"),
    }  # fmt: skip
    options = chosen(TOOLS, tool).format(**facts).split()
    command = [sys.executable, "-m", "mlx_lm", tool, "--model", str(dense), "--mlx-path", str(wide), *options]
    shutil.rmtree(wide, ignore_errors=True)
    if run(command, folder.parent, os.environ | {"HOME": str(sample.home)}, limit, log):
        convert(str(wide), folder, dtype="bfloat16")
        shutil.rmtree(wide)


def run(command: list[str], folder: Path, environment: dict[str, str], limit: int, log: Path) -> bool:
    """Run a command in a folder for `limit` CPU seconds at most; whether it came to a good end, as `log` says too."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(log, "w") as output:
        status = subprocess.run(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT,
            preexec_fn=partial(resource.setrlimit, resource.RLIMIT_CPU, (limit, limit + 1)),
        ).returncode  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        end = "stopped" if status == -signal.SIGXCPU else f"exit status {status}"
        output.write(f"\n{end}; {seconds:.0f} CPU seconds\n")
    return status == 0


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(f"error: {error}")
