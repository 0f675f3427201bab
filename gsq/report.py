"""One HTML page that tells a run: what came out, what each layer cost in error, time and bytes, and how it was set up.

Made from the run's folder alone (`metrics.jsonl`, `config.yaml`, `plan.json`), so it can be written while
the run is on; a section whose data is missing is left out. The page is one file that loads nothing: figures
are inline SVG that takes its text colour from the page, and so follows the reader's dark or light scheme.
"""

from __future__ import annotations

import io
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from gsq import units
from gsq.errors import UserError
from gsq.model.checkpoint import read_json
from gsq.tracking import METRICS, read_metrics

INK = "#010203"  # stands for the page's text colour until the SVG is embedded
WIDTH = 9.0  # inches of a figure; the page scales it
CURVE_POINTS = 150  # per loss curve

# colour and marker of each method, apart for every kind of colour vision and on black and white
METHODS = {
    "rtn": ("RTN", "#8a8f98", "s"),
    "gptq": ("GPTQ", "#d55e00", "^"),
    "polish": ("GPTQ + polish", "#2f86c9", "D"),
    "gsq": ("GSQ", "#009e73", "o"),
}
PHASES = {"hessian": "#2f86c9", "init": "#d55e00", "refine": "#009e73", "push": "#cc79a7", "teacher": "#c9a400"}
OTHER = "#8a8f98"

FIGURE_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gsq",  # the same data gives the same file
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.alpha": 0.15,
    "grid.color": INK,
    "legend.frameon": False,
    **{key: INK for key in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")},
}

CSS = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #5c6470; --line: #dfe2e7; --page: #fff; --box: #f5f6f8;
  --bar: #009e73 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --soft: #9aa3af; --line: #31363f; --page: #14171c;
  --box: #1d2128 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 62rem;
  margin: 2rem auto; padding: 0 1.25rem }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem }
p { margin: .25rem 0 .75rem; color: var(--soft) } svg { width: 100%; height: auto; color: var(--ink) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .3rem .75rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th { font-weight: 600; color: var(--soft) } th:first-child, td:first-child { text-align: left; padding-left: 0 }
.scroll { overflow-x: auto } .bar { display: inline-block; height: .6rem; background: var(--bar); border-radius: 2px }
td.wide { width: 30%; text-align: left }
pre { background: var(--box); padding: 1rem; border-radius: 6px; overflow-x: auto; font-size: 13px }
"""


@dataclass
class Run:
    """What a run's folder tells: events by kind, the tensors of the plan, and the config as text."""

    name: str
    events: dict[str, list[dict]] = field(default_factory=lambda: defaultdict(list))
    plan: list[dict] = field(default_factory=list)
    config: str = ""

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Whatever there is; raises `UserError` if that is nothing."""
        run = cls(folder.resolve().name)
        for event in read_metrics(folder):
            run.events[event["kind"]].append(event)
        if (folder / "plan.json").exists():
            run.plan = read_json(folder / "plan.json")["entries"]
        if (folder / "config.yaml").exists():
            run.config = (folder / "config.yaml").read_text(encoding="utf-8")
        if not run.events and not run.config:
            raise UserError(f"{folder} holds neither {METRICS} nor config.yaml; give the folder of a run")
        return run

    def last(self, kind: str) -> dict:
        """The latest event of a kind, or an empty one."""
        return (self.events.get(kind) or [{}])[-1]

    @property
    def model(self) -> str:
        """The quantized model's name: an id of the hub, or the last part of a path."""
        settings = yaml.safe_load(self.config) if self.config else None
        model = settings.get("model") if isinstance(settings, dict) else None
        name = str(model.get("name") or self.name) if isinstance(model, dict) else self.name
        return name if name.count("/") == 1 else Path(name).name


def write_report(run_folder: str | Path, out_html: str | Path) -> Path:
    """Write the page of a run to `out_html`; raises `UserError` if the folder is no run."""
    run = Run.read(Path(run_folder))
    with matplotlib.rc_context(FIGURE_STYLE):
        parts = [section for write in SECTIONS if (section := write(run))]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>GSQ report: {escape(run.model)}</title>\n<style>{CSS}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    out = Path(out_html)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    return partial.replace(out)


# Sections: each takes the run and gives HTML, or None if its data is missing.


def header(run: Run) -> str:
    """Model, date, versions, and how far the run got."""
    start, plan, done = run.last("start"), run.last("plan"), run.last("done")
    facts = []
    if start:
        facts.append(time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.events["start"][0]["time"])))
    if plan:
        facts.append(f"{plan['bits_per_weight']:.2f} bits per weight")
        facts.append(f"{units.size(plan['bytes_before'])} → {units.size(plan['bytes_after'])}")
    if done:
        layers = sum(event.get("seconds", {}).get("total") or 0 for event in run.events.get("layer", []))
        facts.append(f"took {units.duration(done.get('seconds') or layers)}")
    elif run.events.get("layer"):
        facts.append(f"{len(run.events['layer'])} of {run.last('layer').get('layers')} layers so far")
    memory = {name: max((event.get(key) or 0 for event in run.events.get("layer", [])), default=0)
              for name, key in (("RAM", "peak_rss_gb"), ("GPU memory", "device_gb"))}  # fmt: skip
    facts += [f"peak {name} {value:.1f} GB" for name, value in memory.items() if value]
    versions = " · ".join(f"{name} {number}" for name, number in start.get("versions", {}).items())
    lines = [f"<h1>{escape(run.model)}</h1>", f"<p>{escape(' · '.join(facts))}"]
    if versions:
        lines.append(f"<br>{escape(versions)}")
    return "\n".join(lines) + "</p>"


def results(run: Run) -> str | None:
    """The final table: one row per evaluation, the latest of each label, under the base they share."""
    evaluations = {event.get("label", "quantized"): event for event in run.events.get("eval", [])}
    if not evaluations:
        return None
    plan = run.last("plan")
    rows = []
    for label, event in evaluations.items():
        base = (
            "original",
            units.number(event.get("base_perplexity")),
            "0",
            "100%",
            units.size(plan.get("bytes_before")),
        )
        if event.get("base_perplexity") is not None and base not in rows:
            rows.insert(0, base)
        top1 = "–" if event.get("top1") is None else f"{event['top1']:.1%}"
        size = units.size(event.get("bytes") or plan.get("bytes_after"))
        rows.append((label, units.number(event.get("perplexity")), units.number(event.get("kl")), top1, size))
    tokens = ", ".join(sorted({f"{event['tokens']:,}" for event in evaluations.values() if event.get("tokens")}))
    note = "KL divergence from the original in nats per token; top-1: tokens with the same likeliest successor."
    note += f" Measured on {tokens} predicted tokens." if tokens else ""
    return _section("Result", note, _table(("model", "perplexity", "KL", "top-1", "size"), rows))


def errors(run: Run) -> str | None:
    """Error of each layer by method."""
    measured = method_errors(run.events.get("target", []))
    if not measured:
        return None
    figure, (axes,) = _figure(3.2)
    for method, means in measured.items():
        label, colour, marker = METHODS[method]
        axes.plot(
            *zip(*means.items(), strict=True), color=colour, marker=marker, markersize=4, linewidth=1.4, label=label
        )
    _log_axis(axes)
    _layer_axis(axes)
    axes.set_ylabel("relative error")
    _legend(axes)
    note = (
        "tr(D H Dᵀ) / tr(W H Wᵀ): W the wanted weights (corrected toward the original's outputs, if the init aims at "
        "them), D what the quantized ones lack of them, H the Hessian of their inputs; mean of the targets."
    )
    return _section("Weight error by layer", note, _svg(figure, "errors"))


def method_errors(targets: Iterable[dict]) -> dict[str, dict[int, float]]:
    """Mean error of the targets of each layer, by method and layer, from events of the kind `target`.

    A target that did not go through a method counts there with its error before, so that all means are of the same;
    where no target went through it, there is none.
    """
    cells, measured = defaultdict(list), set()
    for event in targets:
        error = None
        for method in METHODS:
            if event.get(method) is not None:
                error = event[method]
                measured.add((method, event["layer"]))
            if error is not None:
                cells[method, event["layer"]].append(error)
    found: dict[str, dict[int, float]] = {}
    for method, layer in sorted(measured, key=lambda place: (list(METHODS).index(place[0]), place[1])):
        found.setdefault(method, {})[layer] = float(np.mean(cells[method, layer]))
    return found


def refinement(run: Run) -> str | None:
    """Held-out error of each stage before and after refinement."""
    stages = _by_stage(event for event in run.events.get("stage", []) if event.get("error_init") is not None)
    if not stages:
        return None
    figure, panels = _figure(2.6, len(stages))
    for axes, (name, events) in zip(panels, stages.items(), strict=True):
        for event in events:
            before, after = event["error_init"], event.get("error_final") or event["error_init"]
            axes.plot([event["layer"]] * 2, [before, after], color=OTHER, linewidth=1, zorder=1)
        layers = [event["layer"] for event in events]
        before = [event["error_init"] for event in events]
        axes.scatter(layers, before, s=16, facecolors="none", edgecolors=METHODS["gptq"][1], label="before")
        kept = [event for event in events if event.get("accepted") and event.get("error_final")]
        after = [event["error_final"] for event in kept]
        axes.scatter([event["layer"] for event in kept], after, s=16, color=METHODS["gsq"][1], label="after")
        axes.set_title(name)
        _log_axis(axes)
        _layer_axis(axes)
        if axes is panels[0]:
            axes.set_ylabel("relative error")
            _legend(axes)
    accepted = [event for events in stages.values() for event in events if event.get("accepted")]
    gains = [1 - event["error_final"] / event["error_init"] for event in accepted if event.get("error_final")]
    total = sum(map(len, stages.values()))
    note = "Error of the stage's output on tokens kept out of calibration (`hessian`: of the quadratic objective). "
    note += f"Refinement was accepted in {len(accepted)} of {total} stages"
    note += f", and lowered the error there by {np.median(gains):.0%} (median)." if gains else "."
    note += " A ring alone: the init was kept." if len(accepted) < total else ""
    return _section("Held-out error before and after refinement", note, _svg(figure, "refinement"))


def losses(run: Run) -> str | None:
    """Loss curves, a thin line per layer, a panel per stage."""
    stages = _by_stage(event for event in run.events.get("step", []) if event.get("loss"))
    if not stages:
        return None
    figure, panels = _figure(2.6, len(stages))
    last = max(event["layer"] for events in stages.values() for event in events)
    colours = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0.2, 0.85, 256)))  # seen on dark and light
    for axes, (name, events) in zip(panels, stages.items(), strict=True):
        curves = defaultdict(list)
        for event in events:
            curves[event["layer"]].append((event["step"], event["loss"]))
        for layer, curve in curves.items():
            steps, values = zip(*_thinned(curve), strict=True)
            axes.plot(steps, values, color=colours(layer / max(last, 1)), linewidth=0.8)
        axes.set_title(name)
        _log_axis(axes)
        axes.set_xlabel("step")
    panels[0].set_ylabel("loss")
    if last:
        scale = matplotlib.cm.ScalarMappable(Normalize(0, last), colours)
        bar = figure.colorbar(scale, ax=panels, label="layer", pad=0.01, aspect=30)
        bar.ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        bar.outline.set_visible(False)
    note = "Training loss of the relaxed weights, smoothed over neighbouring steps; one line per layer."
    return _section("Loss curves", note, _svg(figure, "losses"))


def plan_curve(run: Run) -> str | None:
    """What other sizes would have cost, if the plan was solved for its size."""
    curve = run.last("curve")
    if not curve:
        return None
    note = (
        "KL of the model as predicted from each tensor alone, for the best widths at every size; "
        "what refinement takes off is not in it. Presets have their own sizes, but their KL is that of their widths "
        "in this plan's codebook."
    )
    return _section("The plan among others", note, _svg(_curve_figure(curve), "curve"))


def write_curve(curve: dict, path: Path) -> None:
    """A `gsq.plan.curve.Curve`, as a dict, drawn to a file; its suffix decides how."""
    with matplotlib.rc_context(FIGURE_STYLE):
        _curve_figure(curve).savefig(path, dpi=150)


def _curve_figure(curve: dict) -> Figure:
    figure, [axes] = _figure(3.4)
    axes.plot(*zip(*curve["solved"], strict=True), color="#009e73", label="best widths")
    _named_points(axes, curve["others"], marker="^", color="#d55e00", label="one width")
    presets = curve.get("presets") or {}  # runs from before they were told apart have them among the others
    _named_points(
        axes, presets, marker="D", markerfacecolor="none", color="#2f86c9", label="presets, KL as if in this codebook"
    )
    axes.plot(*curve["chosen"], marker="o", color="#009e73", linestyle="", label="this plan")
    axes.set_xlabel("bits per weight, as stored")
    axes.set_ylabel("predicted KL, nats per token")
    _log_axis(axes)
    _legend(axes)
    return figure


def _named_points(axes: Axes, points: dict[str, tuple[float, float]], label: str, **style: str) -> None:
    """Markers with a name beside each, and one entry of the legend for all."""
    if points:
        axes.plot(*zip(*points.values(), strict=True), linestyle="", label=label, **style)
    for name, point in points.items():
        axes.annotate(name, point, xytext=(5, 3), textcoords="offset points")


def sizes(run: Run) -> str | None:
    """Weights, bits and bytes by role and format."""
    if not run.plan:
        return None
    groups = defaultdict(lambda: [0, 0, 0, 0])  # tensors, weights, bytes before, bytes after
    for entry in run.plan:
        total = groups[entry.get("role") or "other", _format(entry)]
        for place, value in enumerate((1, math.prod(entry["shape"]), entry["bytes_before"], entry["bytes_after"])):
            total[place] += value
    most = max(total[3] for total in groups.values()) or 1
    rows = []
    for (role, kind), (tensors, weights, before, after) in sorted(groups.items(), key=lambda item: -item[1][3]):
        bar = f'<span class="bar" style="width: {100 * after / most:.1f}%"></span>'
        bits = f"{8 * after / weights:.2f}" if weights and after else "–"  # nothing is stored of a tied head
        rows.append(
            (role, kind, f"{tensors:,}", units.count(weights), bits, units.size(before), units.size(after), bar)
        )
    titles = ("role", "format", "tensors", "weights", "bits each", "before", "after", "")
    note = "After: as the export stores it, scales with the weights they belong to."
    return _section("Bits and bytes", note, _table(titles, rows, bars=True))


def coverage(run: Run) -> str | None:
    """How many calibration tokens each expert saw: layers down, experts across, the most used first."""
    counts: dict[int, list[int]] = {}
    for event in run.events.get("coverage", []):
        counts.setdefault(event["layer"], event["tokens"])  # the targets of a layer share their routing
    if not counts:
        return None
    layers = sorted(counts)
    grid = np.full((len(layers), max(map(len, counts.values()))), np.nan)
    for row, layer in enumerate(layers):
        grid[row, : len(counts[layer])] = sorted(counts[layer], reverse=True)
    seen = np.ma.masked_less(np.ma.masked_invalid(grid), 1)
    figure, (axes,) = _figure(min(5.0, 1.2 + 0.14 * len(layers)))
    colours = matplotlib.colormaps["cividis"].with_extremes(bad="#c0392b")
    top = max(float(seen.max()), 2) if seen.count() else 2
    shown = axes.imshow(
        seen, aspect="auto", cmap=colours, norm=LogNorm(1, top), interpolation="nearest",
        extent=(0.5, grid.shape[1] + 0.5, len(layers) - 0.5, -0.5),
    )  # fmt: skip
    axes.grid(False)
    ticks = range(0, len(layers), -(-len(layers) // 8))
    axes.set_yticks(ticks, [str(layers[tick]) for tick in ticks])
    axes.set_xlabel("experts, the most used first")
    axes.set_ylabel("layer")
    figure.colorbar(shown, ax=axes, label="tokens", pad=0.01, aspect=30).outline.set_visible(False)
    unseen, total = sum(tokens.count(0) for tokens in counts.values()), sum(map(len, counts.values()))
    note = f"Calibration tokens routed to each expert; red: none at all ({unseen:,} of {total:,})."
    return _section("Expert coverage", note, _svg(figure, "coverage"))


def seconds(run: Run) -> str | None:
    """Where the time of each layer went."""
    spent = {event["layer"]: event["seconds"] for event in run.events.get("layer", []) if event.get("seconds")}
    if not spent:
        return None
    layers = sorted(spent)
    figure, (axes,) = _figure(2.6)
    bottom = np.zeros(len(layers))
    for phase, colour in PHASES.items():
        height = np.array([spent[layer].get(phase) or 0 for layer in layers])
        if height.any():
            axes.bar(layers, height, bottom=bottom, color=colour, width=0.8, label=phase)
            bottom += height
    rest = np.array([spent[layer].get("total") or 0 for layer in layers]) - bottom
    if (rest > 0.01 * bottom.max()).any():
        axes.bar(layers, rest.clip(0), bottom=bottom, color=OTHER, width=0.8, label="other")
    _layer_axis(axes)
    axes.set_ylabel("seconds")
    _legend(axes)
    total = sum(spent[layer].get("total") or 0 for layer in layers)
    return _section(
        "Time by layer",
        f"{units.duration(total)} for {len(layers)} layer{'s' * (len(layers) > 1)}.",
        _svg(figure, "seconds"),
    )


def config(run: Run) -> str | None:
    """The config as it was run."""
    return _section("Config", "", f"<pre>{escape(run.config)}</pre>") if run.config else None


SECTIONS: tuple[Callable[[Run], str | None], ...] = (
    header, results, errors, refinement, losses, plan_curve, sizes, coverage, seconds, config,
)  # fmt: skip


# HTML


def _section(title: str, note: str, body: str) -> str:
    return f"<section><h2>{title}</h2>\n" + (f"<p>{escape(note)}</p>\n" if note else "") + f"{body}</section>"


def _table(titles: Iterable[str], rows: Iterable[tuple], bars: bool = False) -> str:
    """Cells are escaped, except the last of a row if it is a bar, which is HTML already."""
    lines = ["<tr>" + "".join(f"<th>{escape(title)}</th>" for title in titles) + "</tr>"]
    for row in rows:
        cells = row[:-1] if bars else row
        line = "".join(f"<td>{escape(str(cell))}</td>" for cell in cells)
        lines.append(f"<tr>{line}" + (f'<td class="wide">{row[-1]}</td>' if bars else "") + "</tr>")
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _format(entry: dict) -> str:
    """What a tensor of the plan is stored as: `4 levels, groups of 64`, or its dtype."""
    codebook = entry.get("codebook")
    if not codebook:
        return str(entry.get("dtype") or "kept").removeprefix("torch.")
    return f"{len(codebook['levels'])} levels, groups of {codebook['group_size']}"


# Figures


def _figure(height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of the page's width with panels of this height in inches, up to three in a row."""
    columns = min(panels, 3)
    rows = -(-panels // columns)
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[panels:]:
        axes.remove()
    return figure, grid[:panels]


def _layer_axis(axes: Axes) -> None:
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _log_axis(axes: Axes) -> None:
    """Logarithmic y axis with plain numbers; called when the data is drawn, for the ticks depend on its range."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high / low > 200 else (1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes) -> None:
    """Above the axes on the right; a panel's title is on the left."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=6, borderaxespad=0.2, handlelength=1.5)


def _by_stage(events: Iterable[dict]) -> dict[str, list[dict]]:
    """Events by the name of their stage, and by objective where a stage had several; in order of appearance."""
    stages = defaultdict(lambda: defaultdict(list))
    for event in events:
        stages[event["stage"]][event.get("objective")].append(event)
    return {
        f"{stage}, {objective}" if len(parts) > 1 else stage: part
        for stage, parts in stages.items()
        for objective, part in parts.items()
    }


def _thinned(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A curve of at most `CURVE_POINTS` points, each the mean of its neighbours."""
    cuts = np.linspace(0, len(curve), min(len(curve), CURVE_POINTS) + 1).astype(int)
    return [tuple(np.mean(curve[start:end], axis=0)) for start, end in pairwise(cuts)]


def _svg(figure: Figure, name: str) -> str:
    """The figure as an element of the page: no header, no namespace, ids of its own, text in the page's colour."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    return svg.replace(INK, "currentColor").replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
