"""What a model writes: the same short prompts behind text of several lengths, kept verbatim.

Low bits show first in long answers that lose the thread or go in circles, which perplexity hardly sees.
Beside each answer stands the share of its n-grams that are distinct, which falls when it repeats itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from gsq.config import Positive, Section
from gsq.eval.filler import filled, read_text, require_fill, require_window
from gsq.eval.subject import Prompt, Subject

PROMPTS = {
    "explain": "Explain in simple words why the sky is blue.",
    "reason": "A train leaves at 9:40 and arrives at 12:05. How long does the journey take? Show the steps.",
    "code": "Write a Python function that returns the second largest number of a list, and explain it.",
    "story": "Tell a short story about a lighthouse keeper who finds a letter in a bottle.",
    "list": "Name five foods that are rich in protein, and say for each how it is usually prepared.",
}
NGRAMS = (1, 2, 3, 4)
ASK = "{text}\n\n{prompt}"
COMPLETION = "{text}\n\nQuestion: {prompt}\nAnswer:"  # for models without a chat template


class Settings(Section):
    """What to ask behind how much text."""

    contexts: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0, 2048), min_length=1, description="tokens of prompt and answer together; 0: the prompt alone"
    )
    text: str = Field("wikitext", description="file, glob or hub dataset that fills the contexts")
    prompts: tuple[str, ...] = Field(
        tuple(PROMPTS), min_length=1, description="of those built in, or words of your own"
    )
    max_tokens: Positive = 200


def parts(settings: Settings) -> dict[str, Callable[[Subject], dict]]:
    """One part per context and prompt, `samples/2048/explain`; raises `UserError` if the text cannot be read."""
    text = _text(settings)
    return {
        f"samples/{context}/{prompt}": lambda subject, own=(context, prompt): sample(subject, settings, text, *own)
        for context in settings.contexts
        for prompt in settings.prompts
    }


def check(settings: Settings, subject: Subject) -> None:
    """Raise `UserError`, before any work, for what this subject cannot do."""
    require_window((*settings.contexts, settings.max_tokens), subject, "samples.contexts")
    contexts = tuple(filter(None, settings.contexts))
    text = _text(settings)
    for prompt in settings.prompts if contexts else ():
        build = question(subject, prompt)
        require_fill(build, text, contexts, settings.max_tokens, subject, "samples.contexts")


def sample(subject: Subject, settings: Settings, text: str, context: int, prompt: str) -> dict:
    """The greedy answer to one prompt behind `context` tokens of text, the answer's room included."""
    build = question(subject, prompt)
    whole = filled(build, text, context - settings.max_tokens, subject) if context else build("")
    answer = subject.generate(whole, settings.max_tokens)
    return {
        "context": context,
        "prompt": PROMPTS.get(prompt, prompt),
        "text": answer.text,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": answer.new_tokens,
        "distinct": distinct(answer.text),
    }


def question(subject: Subject, prompt: str) -> Callable[[str], Prompt]:
    """What makes a prompt, built in or not, of the text before it, in the way that the subject takes."""
    asked = PROMPTS.get(prompt, prompt)
    if subject.chats:
        return lambda text: [{"role": "user", "content": ASK.format(text=text, prompt=asked).strip()}]
    return lambda text: COMPLETION.format(text=text, prompt=asked).strip()


def distinct(text: str) -> dict[str, float | None]:
    """Share of distinct n-grams of words, by n; None for texts of fewer words.

    Li et al., "A diversity-promoting objective function" (arXiv 1510.03055), there called distinct-n.
    """
    words = text.split()
    shares: dict[str, float | None] = {}
    for n in NGRAMS:
        ngrams = list(zip(*(words[offset:] for offset in range(n)), strict=False))
        shares[str(n)] = len(set(ngrams)) / len(ngrams) if ngrams else None
    return shares


def summary(results: dict[str, dict]) -> dict:
    """Mean share of distinct n-grams by context, from the results of parts by their names."""
    means: dict[str, dict[str, float | None]] = {}
    for context in sorted({cell["context"] for cell in results.values()}):
        cells = [cell["distinct"] for cell in results.values() if cell["context"] == context]
        means[str(context)] = {str(n): _mean([cell[str(n)] for cell in cells]) for n in NGRAMS}
    return means


def _text(settings: Settings) -> str:
    """What fills the contexts, if there are any."""
    longest = max(settings.contexts)
    return read_text(settings.text, "samples.text", longest) if longest else ""


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
