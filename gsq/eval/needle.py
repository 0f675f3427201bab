"""A needle in a haystack: a verification code, stated once somewhere in a long text, is to be said verbatim.

Prompt and room for the answer fill the context. The question is put so that models which only
complete text can answer it ("The verification code is"), which also keeps models from thinking aloud;
`form: chat` asks in a message instead. An answer counts if the code stands in it.

After G. Kamradt, "Needle in a haystack" (2023), and the retrieval tasks of RULER (arXiv 2404.06654).
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from pydantic import Field

from gsq.config import Positive, Section
from gsq.errors import UserError
from gsq.eval.filler import filled, read_text, require_fill, require_window, sentence_starts, turned
from gsq.eval.intervals import wilson
from gsq.eval.subject import Prompt, Subject
from gsq.report import FIGURE_STYLE

Depth = Annotated[int, Field(ge=0, le=100)]

DIGITS = 6
NEEDLE = "Remember this: the verification code is {code}."
QUESTION = "What is the verification code that was given in the text above?"
COMPLETION = "{text}\n\nQuestion: {question}\nAnswer: The verification code is"
CHAT = "{text}\n\n{question} Answer with the code alone."


class Settings(Section):
    """What to hide, where, and how often."""

    text: str = Field("wikitext", description="file, glob or hub dataset whose text is the haystack")
    contexts: tuple[Positive, ...] = Field(
        (1024, 4096), min_length=1, description="tokens of prompt and answer together"
    )
    depths: tuple[Depth, ...] = Field((10, 25, 50, 75, 90), min_length=1, description="percent of the text before it")
    trials: Positive = Field(3, description="codes, each in another part of the text, per context and depth")
    form: Literal["completion", "chat"] = "completion"
    max_tokens: Positive = Field(16, description="length of an answer")
    seed: int = 0


def parts(settings: Settings) -> dict[str, Callable[[Subject], dict]]:
    """One part per context and depth, `needle/1024/50`; raises `UserError` if the text cannot be read."""
    text = read_text(settings.text, "needle.text", max(settings.contexts))
    return {
        f"needle/{context}/{depth}": lambda subject, cell=(context, depth): search(subject, settings, text, *cell)
        for context in settings.contexts
        for depth in settings.depths
    }


def check(settings: Settings, subject: Subject) -> None:
    """Raise `UserError`, before any work, for what this subject cannot do."""
    require_window(settings.contexts, subject, "needle.contexts")
    if settings.form == "chat" and not subject.chats:
        raise UserError(f"needle.form: {subject.name} has no chat template; use form: completion")
    text = read_text(settings.text, "needle.text", max(settings.contexts))
    needle = NEEDLE.format(code="1" * DIGITS)
    require_fill(
        lambda filler: ask(insert(filler, needle, [], 50), settings.form),
        text,
        settings.contexts,
        settings.max_tokens,
        subject,
        "needle.contexts",
    )


def search(subject: Subject, settings: Settings, text: str, context: int, depth: int) -> dict:
    """All trials of one context and depth: the answers, how many held the code, and a 95 % interval of that share."""
    answers = []
    for trial in range(settings.trials):
        key = f"{settings.seed} {context} {depth} {trial}"
        code = str(random.Random(key).randrange(10 ** (DIGITS - 1), 10**DIGITS))
        prompt = haystack(subject, turned(text, key), code, context - settings.max_tokens, depth, settings.form)
        answer = subject.generate(prompt, settings.max_tokens)
        found = code in answer.text
        answers.append({"code": code, "text": answer.text, "found": found, "prompt_tokens": answer.prompt_tokens})
    hits = sum(answer["found"] for answer in answers)
    share = {
        "context": context,
        "depth": depth,
        "trials": settings.trials,
        "hits": hits,
        "accuracy": hits / settings.trials,
    }
    return share | {"interval": wilson(hits, settings.trials), "answers": answers}


def haystack(subject: Subject, text: str, code: str, tokens: int, depth: int, form: str) -> Prompt:
    """A prompt of `tokens` tokens with the needle at the border of sentences nearest to `depth` percent of the text."""
    needle = NEEDLE.format(code=code)
    borders = sentence_starts(text)
    return filled(lambda filler: ask(insert(filler, needle, borders, depth), form), text, tokens, subject)


def ask(content: str, form: str) -> Prompt:
    """The question behind `content`."""
    if form == "chat":
        return [{"role": "user", "content": CHAT.format(text=content, question=QUESTION)}]
    return COMPLETION.format(text=content, question=QUESTION)


def insert(text: str, needle: str, borders: list[int], depth: int) -> str:
    """The text with the needle at the one of the sorted `borders`, or of its ends, nearest to `depth` percent."""
    wanted = len(text) * depth / 100
    inside = [0, *borders[: bisect(borders, len(text) - 1)], len(text)]
    place = min(inside, key=lambda border: abs(border - wanted))
    before, after = text[:place], text[place:]
    gap = "" if not before or before[-1].isspace() else " "
    return f"{before}{gap}{needle} {after}"


def summary(results: dict[str, dict]) -> dict:
    """All cells together, and by context, from the results of parts by their names."""
    cells = list(results.values())
    contexts = sorted({cell["context"] for cell in cells})
    by_context = {str(context): _total([cell for cell in cells if cell["context"] == context]) for context in contexts}
    return _total(cells) | {"contexts": by_context}


def draw(results: dict[str, dict], path: Path, title: str | None = None) -> None:
    """Heat map of the share of codes found: contexts across, depths down; cells that were not run stay empty."""
    contexts, depths = (sorted({cell[key] for cell in results.values()}) for key in ("context", "depth"))
    grid = np.full((len(depths), len(contexts)), np.nan)
    for cell in results.values():
        grid[depths.index(cell["depth"]), contexts.index(cell["context"])] = cell["accuracy"]
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(2.2 + 0.8 * len(contexts), 1.3 + 0.4 * len(depths)), layout="constrained")
        axes = figure.subplots()
        shown = axes.imshow(np.ma.masked_invalid(grid), aspect="auto", cmap="cividis", vmin=0, vmax=1)
        axes.grid(False)
        axes.set_xticks(range(len(contexts)), [str(context) for context in contexts])
        axes.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths])
        axes.set_xlabel("context, tokens")
        axes.set_ylabel("depth")
        if title:
            axes.set_title(title)
        for cell in results.values():
            place = contexts.index(cell["context"]), depths.index(cell["depth"])
            ink = "black" if cell["accuracy"] > 0.5 else "white"  # the colours go from dark to light
            axes.text(*place, f"{cell['hits']}/{cell['trials']}", ha="center", va="center", color=ink)
        figure.colorbar(shown, ax=axes, label="codes found", pad=0.02).outline.set_visible(False)
        figure.savefig(path, dpi=150)


def _total(cells: list[dict]) -> dict:
    hits, trials = (sum(cell[key] for cell in cells) for key in ("hits", "trials"))
    return {"hits": hits, "trials": trials, "accuracy": hits / trials, "interval": wilson(hits, trials)}
