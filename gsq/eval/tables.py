"""Results of several models side by side: tables for the console and for Markdown, and pictures.

Everything is made from the result files alone, so that it can be made again, or of other models together.
A kind of test has its columns of the headline table, its own tables and its pictures in `VIEWS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from gsq import units
from gsq.eval.intervals import wilson
from gsq.report import FIGURE_STYLE

Row = dict[str, str]
Parts = dict[str, dict]  # results of one test of one model by the parts' names
Models = dict[str, Parts]  # by the models' labels

COLOURS = ("#009e73", "#d55e00", "#2f86c9", "#cc79a7", "#c9a400", "#8a8f98", "#56b4e9", "#000000")
MARKERS = "o^DsvPX*"
SAMPLE_LENGTH = 600  # characters of an answer that a table shows


@dataclass(frozen=True)
class Table:
    """Rows that have the same keys, which are the head."""

    title: str
    rows: list[Row]
    note: str = ""


@dataclass(frozen=True)
class View:
    """How results of a kind of test are shown; pictures are written to `folder / f"{label}-*.png"`."""

    headline: Callable[[Parts], Row]
    tables: Callable[[str, Models], list[Table]]
    pictures: Callable[[str, Models, Path], list[Path]] = lambda label, models, folder: []


def markdown(results: Sequence[dict], pictures: Iterable[Path] = ()) -> str:
    """The content of result files as a Markdown document, with links to pictures beside it."""
    sections = [("", [headline(results)]), *((label, tables) for label, tables in all_tables(results))]
    lines = ["# Results", ""]
    for label, tables in sections:
        lines += [f"## {label}", ""] if label else []
        for table in tables:
            lines += [f"### {table.title}", ""] if table.title else []
            lines += [markdown_table(table.rows), ""]
            lines += [table.note, ""] if table.note else []
    for picture in pictures:
        lines += [f"![{picture.stem}]({picture.name})", ""]
    return "\n".join([*lines, environments(results), ""])


def markdown_table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table; the first column is left-aligned, numbers of the others right-aligned."""
    if not rows:
        return ""
    head = list(rows[0])
    rule = ["---"] + ["---:" if all(map(_numeric, (row[key] for row in rows))) else "---" for key in head[1:]]
    body = [[_cell(row[key]) for key in head] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in ([_cell(key) for key in head], rule, *body))


def headline(results: Sequence[dict]) -> Table:
    """One row per model, with what is most looked for of each test."""
    rows = []
    for content in results:
        model = content["model"]
        row = {"model": model["label"]}
        row["size"] = units.size(model.get("bytes"))
        row["bits"] = f"{model['bits_per_weight']:.2f}" if "bits_per_weight" in model else "–"
        for label, (test, parts) in grouped(content).items():
            prefix = "" if label == test else f"{label}: "
            row |= {prefix + key: value for key, value in VIEWS[test].headline(parts).items()}
        rows.append(row)
    return Table("", aligned(rows))


def flat_row(result: dict) -> Row:
    """One result as a row: its numbers, with their intervals if they have some."""
    numbers = {name: value for name, value in result.items() if isinstance(value, int | float)}
    ends = {f"{name}_{end}" for name in numbers for end in ("low", "high")}
    return {name: _measured(result, name) for name in numbers if name not in ends}


def all_tables(results: Sequence[dict]) -> list[tuple[str, list[Table]]]:
    """The tables of each test, by its label."""
    return [(label, VIEWS[test].tables(label, models)) for label, (test, models) in by_test(results).items()]


def write_pictures(results: Sequence[dict], folder: Path) -> list[Path]:
    """Draw what can be drawn into `folder`; returns the files."""
    with matplotlib.rc_context(FIGURE_STYLE):
        drawn = [VIEWS[test].pictures(label, models, folder) for label, (test, models) in by_test(results).items()]
    return [path for paths in drawn for path in paths]


def write_tables(results: Sequence[dict], folder: Path) -> Path:
    """`results.md` with all tables, and the pictures, in `folder`; returns the former."""
    path = folder / "results.md"
    path.write_text(markdown(results, write_pictures(results, folder)), encoding="utf-8")
    return path


def grouped(content: dict) -> dict[str, tuple[str, Parts]]:
    """Parts of one model by the label of their test, with the test's kind; numbers in names are in their order."""
    groups: dict[str, tuple[str, Parts]] = {}
    kinds = list(VIEWS)
    stored = content["parts"].items()
    for name, part in sorted(stored, key=lambda item: (kinds.index(item[1]["test"]), _natural(item[0]))):
        _, parts = groups.setdefault(name.partition("/")[0], (part["test"], {}))
        parts[name] = part["result"]
    return groups


def by_test(results: Sequence[dict]) -> dict[str, tuple[str, Models]]:
    """Parts of all models by the label of their test, with the test's kind."""
    tests: dict[str, tuple[str, Models]] = {}
    for content in results:
        for label, (test, parts) in grouped(content).items():
            tests.setdefault(label, (test, {}))[1][content["model"]["label"]] = parts
    return tests


def aligned(rows: Sequence[Row]) -> list[Row]:
    """Rows with all keys of all rows, in order of appearance; a dash where one has nothing."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key, "–") for key in keys} for row in rows]


def environments(results: Sequence[dict]) -> str:
    """What the results were computed with, in one line per environment."""
    seen = []
    for environment in (environment for content in results for environment in content["environments"]):
        versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
        line = f"Measured on {environment['device']} in {environment['dtype']}, with {versions}."
        seen += [line] if line not in seen else []
    return "\n\n".join(seen)


def _perplexity_headline(parts: Parts) -> Row:
    """At the longest context."""
    result = list(parts.values())[-1]
    row = {f"perplexity, {result['context']}": units.number(result["perplexity"])}
    row |= {"per word": units.number(result.get("word_perplexity"))}
    if "kl" in result:
        row |= {"KL": units.number(result["kl"]), "top-1": f"{result['top1']:.1%}"}
    return row


def _perplexity_tables(label: str, models: Models) -> list[Table]:
    contexts = list(dict.fromkeys(result["context"] for parts in models.values() for result in parts.values()))
    found = {name: {result["context"]: result for result in parts.values()} for name, parts in models.items()}
    tables = [
        Table(
            title,
            aligned(
                [
                    {"model": name, **{str(c): _measured(of[c], key) for c in contexts if c in of}}
                    for name, of in found.items()
                ]
            ),
            "By context length in tokens; 95 % intervals in brackets.",
        )
        for title, key in (("Perplexity per token", "perplexity"), ("Perplexity per word", "word_perplexity"))
    ]
    divergences = [
        {"model": name, "context": str(result["context"]), **_divergence(result)}
        for name, parts in models.items()
        for result in parts.values()
        if "kl" in result
    ]
    caches = [
        {"model": name, "context": str(result["context"]), "tokens": tokens, **_cache(size)}
        for name, parts in models.items()
        for result in parts.values()
        for tokens, size in result.get("kv_sizes", {}).items()
    ]
    note = "With a KV-cache scheme, from the same model with a 16-bit cache." if caches else ""
    tables += [Table("Divergence from the base, nats per token", divergences, note)] if divergences else []
    return tables + ([Table("KV cache", caches)] if caches else [])


def _cache(size: dict) -> Row:
    return {
        "bits per value": f"{size['bits_per_value']:.2f}",
        "bytes": units.size(size["bytes"]),
        "in 16 bits": units.size(size["plain_bytes"]),
    }


def _divergence(result: dict) -> Row:
    return {
        "mean KL": _measured(result, "kl"),
        "median": units.number(result["kl_median"]),
        "99th percentile": units.number(result["kl_p99"]),
        "top-1 agreement": f"{result['top1']:.2%}",
    }


def _perplexity_pictures(label: str, models: Models, folder: Path) -> list[Path]:
    paths = []
    if any(len(parts) > 1 for parts in models.values()):
        figure, [axes] = _figure(1)
        for style, (name, parts) in zip(_styles(), models.items(), strict=False):
            points = [(r["context"], r["perplexity"], *_error(r, "perplexity")) for r in parts.values()]
            x, y, low, high = zip(*points, strict=True)
            axes.errorbar(x, y, yerr=(low, high), label=name, capsize=2, **style)
        _log2_axis(axes, "context, tokens")
        axes.set_ylabel("perplexity per token")
        paths.append(_save(figure, axes, folder / f"{label}-by-context.png"))
    longest = {name: list(parts.values())[-1]["positions"] for name, parts in models.items()}
    for key, title in (("loss", "loss, nats"), ("kl", "KL from the base, nats")):
        curves = {name: [row for row in rows if key in row] for name, rows in longest.items()}
        if any(curves.values()):
            figure, [axes] = _figure(1)
            for style, (name, rows) in zip(_styles(), curves.items(), strict=False):
                axes.plot([row["from"] for row in rows], [row[key] for row in rows], label=name, **style)
            _log2_axis(axes, "tokens before the predicted one")
            axes.set_ylabel(title)
            paths.append(_save(figure, axes, folder / f"{label}-{key}-by-position.png"))
    return paths


def _needle_headline(parts: Parts) -> Row:
    hits, trials = (sum(cell[key] for cell in parts.values()) for key in ("hits", "trials"))
    return {"needle": _share(hits / trials, wilson(hits, trials))}


def _needle_tables(label: str, models: Models) -> list[Table]:
    rows = []
    for name, parts in models.items():
        contexts = list(dict.fromkeys(cell["context"] for cell in parts.values()))
        depths = sorted({cell["depth"] for cell in parts.values()})
        cells = {(cell["context"], cell["depth"]): f"{cell['hits']}/{cell['trials']}" for cell in parts.values()}
        rows += [
            {"model": name, "context": str(context), **{f"{d} %": cells.get((context, d), "–") for d in depths}}
            for context in contexts
        ]
    return [Table("Codes found", aligned(rows), "By depth of the needle, in percent of the text before it.")]


def _needle_pictures(label: str, models: Models, folder: Path) -> list[Path]:
    from gsq.eval.needle import draw

    paths = []
    for name, parts in models.items():
        paths.append(folder / f"{label}-{file_name(name)}.png")
        draw(parts, paths[-1], name)
    return paths


def _speed_headline(parts: Parts) -> Row:
    """At the longest context."""
    cell = list(parts.values())[-1]
    return {
        f"reads, tokens/s, {cell['context']}": units.number(_median(cell["prompt"])),
        "writes, tokens/s": units.number(_median(cell["generation"])),
    }


def _speed_tables(label: str, models: Models) -> list[Table]:
    rows = [
        {
            "model": name,
            "context": str(cell["context"]),
            "reads, tokens/s": _spread(cell["prompt"]),
            "writes, tokens/s": _spread(cell["generation"]),
            "first token, s": _spread(cell["seconds_to_first"]),
            "peak memory": units.size(cell["memory_bytes"]),
            "device": cell["device"] or "server's",
        }
        for name, parts in models.items()
        for cell in parts.values()
    ]
    return [Table("Speed", rows, "Medians, with quartiles in brackets.")]


def _speed_pictures(label: str, models: Models, folder: Path) -> list[Path]:
    if all(len(parts) < 2 for parts in models.values()):
        return []
    figure, panels = _figure(2)
    for axes, key, title in zip(panels, ("prompt", "generation"), ("reading", "writing"), strict=True):
        for style, (name, parts) in zip(_styles(), models.items(), strict=False):
            points = [(cell["context"], cell[key]["median"]) for cell in parts.values() if cell[key]]
            axes.plot(*zip(*points, strict=True), label=name, **style)
        axes.set_ylabel(f"{title}, tokens per second")
        axes.set_ylim(bottom=0)
        _log2_axis(axes, "context, tokens")
    return [_save(figure, panels[0], folder / f"{label}-by-context.png")]


def _samples_headline(parts: Parts) -> Row:
    """Mean share of distinct 4-grams, which falls when answers go in circles."""
    shares = [share for cell in parts.values() if (share := cell["distinct"]["4"]) is not None]
    return {"distinct 4-grams": f"{sum(shares) / len(shares):.1%}"} if shares else {}


def _samples_tables(label: str, models: Models) -> list[Table]:
    tables: dict[tuple[int, str], list[Row]] = {}
    for name, parts in models.items():
        for cell in parts.values():
            share, text = cell["distinct"]["4"], cell["text"]
            row = {
                "model": name,
                "distinct 4-grams": "–" if share is None else f"{share:.0%}",
                "answer": text if len(text) <= SAMPLE_LENGTH else text[:SAMPLE_LENGTH] + " …",
            }
            tables.setdefault((cell["context"], cell["prompt"]), []).append(row)
    return [
        Table(prompt + (f" (behind {context} tokens)" if context else ""), rows)
        for (context, prompt), rows in tables.items()
    ]


def _accuracy_headline(parts: Parts) -> Row:
    return {cell["task"]: _share(cell["accuracy"], cell["interval"]) for cell in parts.values() if cell["metric"]}


def _accuracy_tables(label: str, models: Models) -> list[Table]:
    rows = [
        {
            "task": cell["task"],
            "model": name,
            "accuracy": _share(cell["accuracy"], cell["interval"]),
            "metric": cell["metric"],
            "documents": str(cell["documents"]),
            "examples": "–" if cell["fewshot"] is None else str(cell["fewshot"]),
            "version": str(cell["version"]),
            "lm-eval": cell["lm_eval"],
        }
        for name, parts in models.items()
        for cell in parts.values()
        if cell["metric"]
    ]
    rows.sort(key=lambda row: row["task"])
    return [Table("Accuracy", rows, "95 % intervals (Wilson) in brackets.")] if rows else []


def _median(spread: dict | None) -> float | None:
    return spread and spread["median"]


def _spread(spread: dict | None) -> str:
    """A median and its quartiles."""
    if spread is None:
        return "–"
    return f"{units.number(spread['median'])} [{units.number(spread['q25'])}, {units.number(spread['q75'])}]"


def _share(share: float, interval: Sequence[float]) -> str:
    return f"{share:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]"


def _measured(result: dict, key: str) -> str:
    """A value, and its interval if it has one."""
    if key not in result:
        return "–"
    value = units.number(result[key]) if isinstance(result[key], float) else str(result[key])
    low, high = (result.get(f"{key}_{end}") for end in ("low", "high"))
    return value if low is None else f"{value} [{units.number(low)}, {units.number(high)}]"


def _error(result: dict, key: str) -> tuple[float, float]:
    """How far the interval reaches below and above the value."""
    value = result[key]
    return value - result.get(f"{key}_low", value), result.get(f"{key}_high", value) - value


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.8 * panels + 1, 3.2), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False).flat)


def _styles() -> Iterable[dict]:
    """Line styles of the models, in their order."""
    return [
        {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.4, "linestyle": line}
        for line in ("-", "--", ":")
        for colour, marker in zip(COLOURS, MARKERS, strict=True)
    ]


def _log2_axis(axes: Axes, label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)


def _save(figure: Figure, axes: Axes, path: Path) -> Path:
    axes.legend(loc="best")
    figure.savefig(path, dpi=150)
    return path


def file_name(label: str) -> str:
    """A label as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", label).strip("-.")


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key in which numbers are in their order."""
    return [(1, int(piece), "") if piece.isdigit() else (0, 0, piece) for piece in re.split(r"(\d+)", name)]


def _numeric(cell: str) -> bool:
    return bool(re.match(r"[-\d–]", cell))


def _cell(text: str) -> str:
    """Text that keeps to its cell."""
    return " ".join(text.split()).replace("|", "\\|")


VIEWS: dict[str, View] = {
    "perplexity": View(_perplexity_headline, _perplexity_tables, _perplexity_pictures),
    "needle": View(_needle_headline, _needle_tables, _needle_pictures),
    "speed": View(_speed_headline, _speed_tables, _speed_pictures),
    "samples": View(_samples_headline, _samples_tables),
    "accuracy": View(_accuracy_headline, _accuracy_tables),
}
