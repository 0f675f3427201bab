"""Results of several models side by side: tables for the console and for Markdown, and pictures.

Everything is made from the result files alone, so that it can be made again, or of other models together.
How each kind of test is shown is in `gsq.eval.views`. Of a file's parts only those count that are listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

from gsq import units
from gsq.eval.views import PLAIN, VIEWS, Models, Parts, Row, Table, aligned
from gsq.report import FIGURE_STYLE

# What would be markup in text that people or models wrote, and what shows as the same
LITERALS = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\\": "&#92;", "`": "&#96;", "*": "&#42;", "|": "\\|"}
)
UNDERSCORES = re.compile(r"(?<![^\W_])_|_(?![^\W_])")  # those that may begin or end emphasis


def markdown(results: Sequence[dict], pictures: Iterable[Path] = ()) -> str:
    """The content of result files as a Markdown document, with links to pictures beside it."""
    sections = [("", [headline(results)]), *((label, tables) for label, tables in all_tables(results))]
    lines = ["# Results", ""]
    for label, tables in sections:
        lines += [f"## {inline(label)}", ""] if label else []
        for table in tables:
            lines += [f"### {inline(table.title)}", ""] if table.title else []
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
    body = [[inline(row[key]) for key in head] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in ([inline(key) for key in head], rule, *body))


def inline(text: str) -> str:
    """Any text as one line of Markdown that shows it as it is, also in a table's cell or between HTML tags."""
    literal = UNDERSCORES.sub("&#95;", " ".join(text.split()).translate(LITERALS))
    return literal.replace("![", "!&#91;").replace("](", "]&#40;")


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
            row |= {prefix + key: value for key, value in VIEWS.get(test, PLAIN).headline(parts).items()}
        rows.append(row)
    return Table("", aligned(rows))


def all_tables(results: Sequence[dict]) -> list[tuple[str, list[Table]]]:
    """The tables of each test, by its label."""
    return [(label, VIEWS.get(test, PLAIN).tables(models)) for (label, test), models in by_test(results).items()]


def write_pictures(results: Sequence[dict], folder: Path) -> list[Path]:
    """Draw what can be drawn into `folder`; returns the files."""
    with matplotlib.rc_context(FIGURE_STYLE):
        drawn = [
            VIEWS.get(test, PLAIN).pictures(label, models, folder) for (label, test), models in by_test(results).items()
        ]
    return [path for paths in drawn for path in paths]


def write_tables(results: Sequence[dict], folder: Path) -> Path:
    """`results.md` with all tables, and the pictures, in `folder`; returns the former."""
    path = folder / "results.md"
    path.write_text(markdown(results, write_pictures(results, folder)), encoding="utf-8")
    return path


def grouped(content: dict) -> dict[str, tuple[str, Parts]]:
    """Parts of one model by the label of their test, with the test's kind; numbers in names are in their order."""
    groups: dict[str, tuple[str, Parts]] = {}
    kinds = {kind: place for place, kind in enumerate(VIEWS)}
    place = {name: (kinds.get(part["test"], len(kinds)), _natural(name)) for name, part in _listed(content).items()}
    for name, part in sorted(_listed(content).items(), key=lambda item: place[item[0]]):
        _, parts = groups.setdefault(name.partition("/")[0], (part["test"], {}))
        parts[name] = part["result"]
    return groups


def by_test(results: Sequence[dict]) -> dict[tuple[str, str], Models]:
    """Parts of all models by the label of their test and its kind."""
    tests: dict[tuple[str, str], Models] = {}
    for content in results:
        for label, (test, parts) in grouped(content).items():
            tests.setdefault((label, test), {})[content["model"]["label"]] = parts
    return tests


def environments(results: Sequence[dict]) -> str:
    """What the results were computed with, in one line per environment."""
    used = [
        content["environments"][number]
        for content in results
        for number in sorted({part["environment"] for part in _listed(content).values()})
    ]
    seen = []
    for environment in used:
        versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
        line = f"Measured on {environment['device']} in {environment['dtype']}, with {versions}."
        seen += [line] if line not in seen else []
    return "\n\n".join(seen)


def _listed(content: dict) -> dict[str, dict]:
    """The parts that the last suite asked for, and those of tests that it did not have."""
    return {name: part for name, part in content["parts"].items() if part.get("listed", True)}


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key in which numbers are in their order."""
    return [(1, int(piece), "") if piece.isdecimal() else (0, 0, piece) for piece in re.split(r"(\d+)", name)]


def _numeric(cell: str) -> bool:
    return bool(re.match(r"[-\d–]", cell))
