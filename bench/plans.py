"""Plans of equal size beside each other, and how well sensitivities foretell what a plan costs.

    python bench/plans.py compare CONFIG --text test.txt --out runs/plans --set calib.source=valid.txt
    python bench/plans.py random CONFIG --text test.txt --out runs/plans --set calib.source=valid.txt

`compare` quantizes the model of a config by every plan of `PLANS`, with GPTQ and as the config says.
`random` draws the width of every tensor, and sets the divergence that `gsq.plan.sensitivity` predicts
for such a plan beside that of the model quantized so, with GPTQ, as the sensitivities were measured.

What the config itself plans does not matter. Runs are made, measured and resumed by `bench/quality.py`;
what is measured of the model once, of kurtosis and sensitivity, lies in `--out`, for both commands.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import quality
import typer

from gsq.config import load_config
from gsq.device import pick_device
from gsq.errors import UserError
from gsq.plan.sensitivity import Allocation
from gsq.prepare import measured_allocation, opened, planner

T = TypeVar("T")
EVERYTHING = ("attention", "mlp")  # roles of all that is quantized
ENDS = ("first 1", "last 1")  # layers


def rule(bits: int | str, group_size: int = 64, **conditions: Sequence[str] | str) -> dict:
    """A rule of `plan.rules` that gives affine codes to what fits the conditions."""
    return {**conditions, "codebook": "affine", "bits": bits, "group_size": group_size}


# Settings of section `plan` by name, with the bits per quantized weight in brackets that they come to, about, for
# SmolLM2-135M: for it widths of layers and limits of kurtosis were chosen so that plans are of equal size.
PLANS: dict[str, dict] = {
    "uniform 2 bits g32 (3.0)": {"rules": [rule(2, 32, role=EVERYTHING)]},
    "by role (3.0)": {"rules": [rule(6, layers=ENDS), rule(2, role="mlp"), rule(3, role="attention")]},
    "sensitivity (3.0)": {"target_bpw": 3.0, "rules": [rule("sensitivity", role=EVERYTHING)]},
    "uniform 3 bits g64 (3.5)": {"rules": [rule(3, role=EVERYTHING)]},
    "by role (3.6)": {
        "rules": [
            rule(8, layers=ENDS),
            rule(2, role="mlp gate up"),
            rule(3, role="mlp down"),
            rule(4, role="attention"),
        ]
    },
    "kurtosis (3.6)": {
        "rules": [rule("kurtosis", role=EVERYTHING)],
        "kurtosis": {"three_bits": 6, "four_bits": 30, "five_bits": 40},
    },
    "sensitivity (3.6)": {"target_bpw": 3.6, "rules": [rule("sensitivity", role=EVERYTHING)]},
}
METHODS: dict[str, list[str]] = {"GPTQ": quality.PLAIN, "GSQ": []}  # settings besides the plan's
NOTHING = {"preset": None, "target_bpw": None, "target_size": None}  # of what a config may plan itself

Overrides = Annotated[list[str], typer.Option("--set", help="change a setting of the config")]
app = typer.Typer(add_completion=False)


@app.command()
def compare(
    config: Path,
    text: Annotated[Path, typer.Option(help="text to measure on")],
    out: Annotated[Path, typer.Option(help="folder for runs and results")],
    plans: Annotated[str, typer.Option(help=f"comma-separated, of: {', '.join(PLANS)}")] = ",".join(PLANS),
    methods: Annotated[str, typer.Option(help="comma-separated, of: GPTQ, and GSQ as the config says")] = "GPTQ,GSQ",
    overrides: Overrides = [],  # noqa: B006
    windows: int = 20,
    length: int = 1024,
) -> None:
    """Quantize by every plan, with every method; write table.md and table.json."""
    rows = {
        f"{method} {plan}": [*chosen(METHODS, method), *settings(chosen(PLANS, plan))]
        for method in methods.split(",")
        for plan in plans.split(",")
    }
    measure_rows(rows, config, text, out, [*overrides, *shared(out)], windows, length)


@app.command()
def random(
    config: Path,
    text: Annotated[Path, typer.Option(help="text to measure on")],
    out: Annotated[Path, typer.Option(help="folder for runs, in `random`, and results")],
    count: Annotated[int, typer.Option(help="plans to draw")] = 10,
    means: Annotated[str, typer.Option(help="comma-separated mean bits of the plans, in turn")] = "2.5,3,3.5,4,5",
    seed: Annotated[int, typer.Option(help="of the draw")] = 0,
    overrides: Overrides = [],  # noqa: B006
    windows: int = 4,
    length: int = 512,
) -> None:
    """Predict and measure the divergence of random plans; write random.md and random.json."""
    overrides = [*overrides, *shared(out)]
    allocation = allocation_of(config, overrides, out)
    generator = np.random.default_rng(seed)
    drawn = {
        f"random {number}": draw(allocation, float(mean), generator)
        for number, mean in zip(range(1, count + 1), cycle(means.split(",")), strict=False)
    }
    rows = {name: [*quality.PLAIN, *settings({"rules": rules_of(bits)})] for name, bits in drawn.items()}
    overrides.append(f"calib.source={out / 'tokens.safetensors'}")
    measured = measure_rows(rows, config, text, out / "random", overrides, windows, length)
    save(
        [
            {"plan": name, "bits": measured[name]["bits"], "predicted": allocation.predicted(bits)}
            | {key: measured[name][key] for key in ("kl", "perplexity")}
            for name, bits in drawn.items()
        ],
        out,
    )


def chosen(table: Mapping[str, T], name: str) -> T:
    """The entry of a table; raises `UserError` if there is none."""
    if name not in table:
        raise UserError(f"there is no {name!r}; choose from {', '.join(table)}")
    return table[name]


def shared(out: Path) -> list[str]:
    """Settings of all runs: a format that holds every width, and where measurements are remembered."""
    return ["export.format=mlx", f"run={out / 'measured'}"]


def settings(plan: dict) -> list[str]:
    """A plan as `section.key=value`, where JSON is YAML too; it takes the place of the config's own."""
    return [f"plan.{key}={json.dumps(value)}" for key, value in (NOTHING | plan).items()]


def measure_rows(
    rows: Mapping[str, list[str]],
    config: Path,
    text: Path,
    out: Path,
    overrides: list[str],
    windows: int,
    length: int,
    external: Sequence[str] = (),
) -> dict[str, dict]:
    """What `bench/quality.py` finds, by name, of the runs with these settings and of `external` checkpoints."""
    extra = [f"{name}:{';'.join(own)}" for name, own in rows.items()]
    quality.main(config, text, out, "none", list(external), overrides, extra, windows, length)
    return {found["method"]: found for found in json.loads((out / "table.json").read_text())}


def allocation_of(config: Path, overrides: list[str], out: Path) -> Allocation:
    """Sensitivities of all that is quantized, remembered or measured, on the tokens that runs are calibrated on."""
    flexible = settings(PLANS["sensitivity (3.6)"])  # whichever target: measurements do not depend on it
    loaded = load_config(config, [*overrides, *flexible])
    skeleton = opened(loaded, pick_device())
    calibration = quality.sample_once(loaded, skeleton.checkpoint.folder, out / "tokens.safetensors")
    loaded = load_config(config, [*overrides, *flexible, f"calib.source={calibration}"])
    return measured_allocation(loaded, skeleton, planner(loaded, skeleton, {}), progress)


def progress(done: int, layers: int) -> None:
    """Say how far the measurement is."""
    print(f"sensitivity: layer {done} of {layers}", flush=True)


def draw(allocation: Allocation, mean: float, generator: np.random.Generator) -> dict[str, int]:
    """Bits by parameter, drawn for every unit by itself from the widths that all have, with this `mean` to expect."""
    widths = sorted(set.intersection(*(set(found.errors) for found in allocation.measured.values())))
    drawn = generator.choice(widths, size=len(allocation.measured), p=tilted(widths, mean)).tolist()
    return {name: bits for unit, bits in zip(allocation.measured, drawn, strict=True) for name in unit}


def tilted(widths: Sequence[int], mean: float) -> np.ndarray:
    """Probabilities `[len(widths)]` with this mean, `p ~ exp(tilt * width)`: of all such, those nearest to equal ones.

    Raises `UserError` if the mean is not between the narrowest and the widest.
    """
    values = np.array(widths, dtype=np.float64)
    if not values.min() < mean < values.max():
        raise UserError(f"mean bits of {mean:g} are not between {values.min():g} and {values.max():g}; change --means")
    low, high = -64.0, 64.0  # tilts; the mean grows with them
    for _ in range(64):
        tilt = (low + high) / 2
        weights = np.exp(tilt * values - (tilt * values).max())
        probabilities = weights / weights.sum()
        low, high = (tilt, high) if probabilities @ values < mean else (low, tilt)
    return probabilities


def rules_of(bits: Mapping[str, int]) -> list[dict]:
    """Rules that give parameters these bits: one for each width."""
    names: dict[int, list[str]] = {}
    for name, width in bits.items():
        names.setdefault(width, []).append(re.escape(name))
    return [rule(width, match=f"^({'|'.join(own)})$") for width, own in sorted(names.items())]


def correlations(predicted: Iterable[float], measured: Iterable[float]) -> tuple[float, float]:
    """Spearman's rank correlation, and Pearson's of the logarithms, of two series without ties."""
    logs = np.log([list(predicted), list(measured)])
    ranks = logs.argsort(axis=1).argsort(axis=1)
    return float(np.corrcoef(ranks)[0, 1]), float(np.corrcoef(logs)[0, 1])


def save(results: list[dict], out: Path) -> None:
    """Write and show what was predicted and found."""
    spearman, pearson = correlations(*([r[key] for r in results] for key in ("predicted", "kl")))
    lines = [
        "| plan | bits per weight | predicted KL | measured KL | measured / predicted | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['plan']} | {r['bits']:.3f} | {r['predicted']:.4f} | {r['kl']:.4f} | {r['kl'] / r['predicted']:.2f} | "
        f"{r['perplexity']:.2f} |"
        for r in sorted(results, key=lambda r: r["bits"])
    ]
    table = "\n".join([*lines, "", f"Spearman {spearman:.3f}, Pearson of logarithms {pearson:.3f}", ""])
    (out / "random.md").write_text(table)
    (out / "random.json").write_text(
        json.dumps({"spearman": spearman, "pearson_log": pearson, "plans": results}, indent=1) + "\n"
    )
    print(table)


if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        sys.exit(f"error: {error}")
