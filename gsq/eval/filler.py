"""Prompts of a given number of tokens, filled with text.

How many tokens a text has is known only by counting the whole prompt: tokens join across borders, and
templates add their own. So the prompt is built with more or less of the text until the count is right.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import lru_cache

from gsq.calib.tokens import documents, text_mark
from gsq.errors import UserError
from gsq.eval.subject import Prompt, Server, Subject
from gsq.eval.text import DATASETS

CHARACTERS = 24  # of text per token of context that are read; words of technical prose have fewer
GUESS = 4.0  # characters per token, where none were counted yet
WORDS = (
    "people history way art world information map family government health system computer meat year thanks music "
    "person reading method data food theory law bird literature problem software control knowledge power ability love "
    "nature fact product idea investment area society story media oven community safety quality language variety video"
)
NEAR = 12  # characters around a length that nearly fits, among which one that fits is looked for
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=\S)|\n+\s*(?=\S)")  # what parts sentences


def read_text(source: str, setting: str, context: int) -> str:
    """Text of a file, glob or hub dataset, enough for `context` tokens; errors name the `setting`."""
    return _read_text(source, setting, context, text_mark(source, setting))


@lru_cache(maxsize=8)
def _read_text(source: str, setting: str, context: int, _mark: str) -> str:
    """Tests and their checks read the same; `_mark` changes with the files."""
    pieces: list[str] = []
    needed = context * CHARACTERS
    for document in documents(source, None, setting, DATASETS):
        pieces.append(document.strip())
        needed -= len(pieces[-1])
        if needed <= 0:
            break
    return "\n\n".join(pieces)[: context * CHARACTERS]


def random_words(context: int, seed: int) -> str:
    """Sentences of words drawn at random, enough for `context` tokens of any tokenizer: each word is one or more."""
    draw, words = random.Random(seed), WORDS.split()
    lines = [" ".join(draw.choices(words, k=12)).capitalize() + "." for _ in range(context // 12 + 1)]
    return "\n".join(lines)


def turned(text: str, seed: object) -> str:
    """The text from a sentence on that `seed` draws, and what was before it at the end: each sentence once."""
    starts = [0, *sentence_starts(text)]
    start = random.Random(str(seed)).choice(starts)
    return f"{text[start:].rstrip()}\n{text[:start].rstrip()}" if start else text


def sentence_starts(text: str) -> list[int]:
    """Where sentences begin, the first excepted."""
    return [match.end() for match in SENTENCE.finditer(text)]


def filled(build: Callable[[str], Prompt], text: str, tokens: int, subject: Subject) -> Prompt:
    """`build(beginning of text)` of exactly `tokens` tokens, or of the most below if no beginning gives that many.

    The count grows nearly in proportion to the text, so a few steps of the secant method find it; every
    third step halves the bracket, which bounds their number. Raises `UserError` if the text is too short,
    or what surrounds it too long.
    """

    def count(length: int) -> int:
        return subject.count(build(text[:length]))

    low, at_low = 0, count(0)
    high, at_high = len(text), None
    if at_low > tokens:
        raise UserError(f"the question alone has {at_low} tokens; use a context of more than {tokens}")
    step = 0
    while at_low < tokens and low < high:
        step += 1
        slope = GUESS if at_high is None else (high - low) / (at_high - at_low)
        ahead = (high - low) // 2 if step % 3 == 0 else round((tokens - at_low) * slope)
        middle = min(low + max(ahead, 1), high if at_high is None else high - 1)
        if middle <= low:
            break
        at_middle = count(middle)
        if at_middle <= tokens:
            low, at_low = middle, at_middle
        else:
            high, at_high = middle, at_middle
    if at_high is None and at_low < tokens:
        raise UserError(f"the text fills a context of {at_low} tokens, not of {tokens}; give a longer text")
    if at_low < tokens:  # a word that is cut may have more tokens than the whole one, so the count also falls
        around = (low + offset for reach in range(1, NEAR) for offset in (reach, -reach))
        low = next((length for length in around if 0 <= length <= len(text) and count(length) == tokens), low)
    return build(text[:low])


def require_window(contexts: tuple[int, ...], subject: Subject, setting: str) -> None:
    """Raise `UserError` if a context is longer than the model takes."""
    if subject.window is not None and max(contexts) > subject.window:
        raise UserError(
            f"{setting}: {subject.name} takes {subject.window} tokens, prompt and answer together, not {max(contexts)}"
        )


def require_fill(
    build: Callable[[str], Prompt], text: str, contexts: tuple[int, ...], answer: int, subject: Subject, setting: str
) -> None:
    """Raise `UserError` unless `build(beginning of text)` and an answer of so many tokens can fill every context.

    A server without a tokenizer counts by reading, which is work, and is not asked.
    """
    if isinstance(subject, Server) and subject.tokenizer is None:
        return
    bare = subject.count(build("")) + answer
    if bare > min(contexts):
        raise UserError(
            f"{setting}: question and answer alone take {bare} tokens of {subject.name}; "
            f"use contexts of more than {min(contexts)}"
        )
    most = subject.count(build(text)) + answer
    if most < max(contexts):
        raise UserError(
            f"{setting}: the text fills a context of {most} tokens of {subject.name}, not of {max(contexts)}; "
            "give a longer text, or shorter contexts"
        )
