"""How results of each kind of test are shown: columns of the headline table, tables, pictures.

`VIEWS` has them by kind; what joins them to a document is in `gsq.eval.tables`. They get the results of parts by name,
and know nothing of files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from gsq import units
from gsq.errors import UserError
from gsq.eval.intervals import wilson

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
    """How results of a kind of test are shown; pictures go to files in a folder that begin with the test's label."""

    headline: Callable[[Parts], Row]
    tables: Callable[[Models], list[Table]]
    pictures: Callable[[str, Models, Path], list[Path]] = lambda label, models, folder: []


def aligned(rows: Sequence[Row]) -> list[Row]:
    """Rows with all keys of all rows, in order of appearance; a dash where one has nothing."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key, "–") for key in keys} for row in rows]


def flat_row(result: dict) -> Row:
    """One result as a row: its numbers, with their intervals if they have some."""
    numbers = {name: value for name, value in result.items() if isinstance(value, int | float)}
    ends = {f"{name}_{end}" for name in numbers for end in ("low", "high")}
    return {name: _measured(result, name) for name in numbers if name not in ends}


def _perplexity_headline(parts: Parts) -> Row:
    """At the longest context."""
    result = list(parts.values())[-1]
    row = {f"perplexity, {result['context']}": units.number(result["perplexity"])}
    row |= {"per word": units.number(result.get("word_perplexity"))}
    if "kl" in result:
        of = " of the cache" if _has_cache(result) else ""
        row |= {f"KL{of}": units.number(result["kl"]), f"top-1{of}": f"{result['top1']:.1%}"}
    return row


def _has_cache(result: dict) -> bool:
    """Whether a KV-cache scheme was measured, the base being the same model with a 16-bit cache."""
    return "kv_sizes" in result


def _perplexity_tables(models: Models) -> list[Table]:
    found = {name: {result["context"]: result for result in parts.values()} for name, parts in models.items()}
    contexts = sorted({context for of in found.values() for context in of})
    tables = [
        Table(
            title,
            [
                {"model": name, **{str(c): _measured(of[c], key) if c in of else "–" for c in contexts}}
                for name, of in found.items()
            ],
            "By context length in tokens; 95 % intervals in brackets.",
        )
        for title, key in (("Perplexity per token", "perplexity"), ("Perplexity per word", "word_perplexity"))
    ]
    compared = [
        ({"model": name, "context": str(result["context"])}, result)
        for name, parts in models.items()
        for result in parts.values()
        if "kl" in result
    ]
    weights = [row | _divergence(result) for row, result in compared if not _has_cache(result)]
    caches = [row | _divergence(result) for row, result in compared if _has_cache(result)]
    sizes = [row | size for row, result in compared for size in cache_rows(result)]
    tables += [Table("Divergence from the base, nats per token", weights)] if weights else []
    tables += [Table("Divergence from the same model with a 16-bit KV cache, nats per token", caches)] if caches else []
    return tables + ([Table("KV cache", sizes)] if sizes else [])


def cache_rows(result: dict) -> list[Row]:
    """What the KV cache takes, by tokens that it holds; nothing if there was no scheme."""
    return [
        {
            "tokens": tokens,
            "bits per value": f"{size['bits_per_value']:.2f}",
            "bytes": units.size(size["bytes"]),
            "in 16 bits": units.size(size["plain_bytes"]),
        }
        for tokens, size in result.get("kv_sizes", {}).items()
    ]


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
        paths.append(_save(figure, axes, folder / f"{file_name(label)}-by-context.png"))
    longest = {name: list(parts.values())[-1]["positions"] for name, parts in models.items()}
    of_cache = {name for name, parts in models.items() if any(map(_has_cache, parts.values()))}
    for key, title in (("loss", "loss, nats"), ("kl", "KL from the base, nats")):
        curves = {name: [row for row in rows if key in row] for name, rows in longest.items()}
        if key == "kl":
            curves = {name + " (from a 16-bit cache)" * (name in of_cache): rows for name, rows in curves.items()}
        if any(curves.values()):
            figure, [axes] = _figure(1)
            for style, (name, rows) in zip(_styles(), curves.items(), strict=False):
                axes.plot([row["from"] for row in rows], [row[key] for row in rows], label=name, **style)
            _log2_axis(axes, "tokens before the predicted one")
            axes.set_ylabel(title)
            paths.append(_save(figure, axes, folder / f"{file_name(label)}-{key}-by-position.png"))
    return paths


def _needle_headline(parts: Parts) -> Row:
    hits, trials = (sum(cell[key] for cell in parts.values()) for key in ("hits", "trials"))
    return {"needle": _share(hits / trials, wilson(hits, trials))}


def _needle_tables(models: Models) -> list[Table]:
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
        paths.append(folder / f"{file_name(label)}-{file_name(name)}.png")
        draw(parts, paths[-1], name)
    return paths


def _speed_headline(parts: Parts) -> Row:
    """At the longest context."""
    cell = list(parts.values())[-1]
    return {
        f"reads, tokens/s, {cell['context']}": units.number(_median(cell["prompt"])),
        "writes, tokens/s": units.number(_median(cell["generation"])),
    }


def _speed_tables(models: Models) -> list[Table]:
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
    return [_save(figure, panels[0], folder / f"{file_name(label)}-by-context.png")]


def _samples_headline(parts: Parts) -> Row:
    """Mean share of distinct 4-grams, which falls when answers go in circles."""
    shares = [share for cell in parts.values() if (share := cell["distinct"]["4"]) is not None]
    return {"distinct 4-grams": f"{sum(shares) / len(shares):.1%}"} if shares else {}


def _samples_tables(models: Models) -> list[Table]:
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


def _accuracy_tables(models: Models) -> list[Table]:
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


def _styles() -> Iterator[dict]:
    """Line styles of the models, in their order."""
    for line, (colour, marker) in cycle(product(("-", "--", ":"), zip(COLOURS, MARKERS, strict=True))):
        yield {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.4, "linestyle": line}


def _log2_axis(axes: Axes, label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)


def _save(figure: Figure, axes: Axes, path: Path) -> Path:
    axes.legend(loc="best", ncols=1 + len(axes.get_lines()) // 12).set_in_layout(False)
    figure.savefig(path, dpi=150)
    return path


def _plain_tables(models: Models) -> list[Table]:
    """All numbers, of kinds of tests that are not known here."""
    rows = [
        {"model": name, "part": part, **flat_row(of)} for name, parts in models.items() for part, of in parts.items()
    ]
    return [Table("", aligned(rows))]


def file_name(label: str) -> str:
    """A label as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", label).strip("-.")


def file_names(kind: str, labels: Iterable[str]) -> dict[str, str]:
    """A label's part of file names, by label; raises `UserError` if it is empty, or two have the same."""
    names = {label: file_name(label) for label in labels}
    owners: dict[str, str] = {}
    for label, name in names.items():
        other = owners.setdefault(name.casefold(), label)  # some disks do not tell capitals from small letters
        if other != label:
            raise UserError(f"{kind}: {other!r} and {label!r} make the same file names; name them differently")
        if not name:
            raise UserError(f"{kind}: {label!r} has no letter or digit for a file's name; name it differently")
    return names


PLAIN = View(lambda parts: {}, _plain_tables)
VIEWS: dict[str, View] = {
    "perplexity": View(_perplexity_headline, _perplexity_tables, _perplexity_pictures),
    "needle": View(_needle_headline, _needle_tables, _needle_pictures),
    "speed": View(_speed_headline, _speed_tables, _speed_pictures),
    "samples": View(_samples_headline, _samples_tables),
    "accuracy": View(_accuracy_headline, _accuracy_tables),
}
