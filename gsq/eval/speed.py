"""How fast a model reads and writes, and the memory it takes, by length of context.

Reading is timed to the first new token, writing from there to the last. The first runs of each context
warm up and do not count. Every prompt begins with words that were never used before, so that servers
which keep what they have read (prefix caches) read it again. What is given are medians and quartiles, and the
runs themselves.
"""

from __future__ import annotations

import platform
import statistics
import threading
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager

import psutil
import torch
from pydantic import Field

from gsq.config import Positive, Section
from gsq.eval.filler import filled, random_words, read_text, require_fill, require_window
from gsq.eval.subject import Answer, Prompt, Subject

INTERVAL = 0.005  # seconds between looks at the memory of this process


class Settings(Section):
    """Contexts to time, and how often."""

    contexts: tuple[Positive, ...] = Field(
        (512, 2048), min_length=1, description="tokens of prompt and answer together"
    )
    new_tokens: int = Field(64, ge=2, description="tokens to generate, of each context")
    repeats: Positive = 5
    warmup: int = Field(1, ge=0, description="runs before those that count")
    text: str | None = Field(None, description="file, glob or hub dataset to prompt with; words at random without it")
    seed: int = 0


def parts(settings: Settings) -> dict[str, Callable[[Subject], dict]]:
    """One part per context, `speed/512`; raises `UserError` if the text cannot be read."""
    text = _text(settings)
    return {
        f"speed/{context}": lambda subject, context=context: measure(subject, settings, text, context)
        for context in settings.contexts
    }


def check(settings: Settings, subject: Subject) -> None:
    """Raise `UserError`, before any work, for what this subject cannot do."""
    require_window(settings.contexts, subject, "speed.contexts")
    require_fill(new_beginning(), _text(settings), settings.contexts, settings.new_tokens, subject, "speed.contexts")


def measure(subject: Subject, settings: Settings, text: str, context: int) -> dict:
    """Tokens per second of one context, read and written, seconds to the first token, and peak memory."""
    runs = settings.warmup + settings.repeats
    prompts = [new_prompt(subject, text, context - settings.new_tokens) for _ in range(runs)]
    with PeakMemory(subject.device) as memory:
        answers = [subject.generate(prompt, settings.new_tokens, ignore_end=True) for prompt in prompts]
    timed = answers[settings.warmup :]
    return {
        "context": context,
        "device": device_name(subject.device),
        "prompt_tokens": [answer.prompt_tokens for answer in timed],
        "new_tokens": [answer.new_tokens for answer in timed],
        "prompt": spread([answer.prompt_tokens / answer.seconds_to_first for answer in timed]),
        "generation": spread([rate for answer in timed if (rate := writing_rate(answer)) is not None]),
        "seconds_to_first": spread([answer.seconds_to_first for answer in timed]),
        "memory_bytes": memory.peak,
        "memory_before_bytes": memory.before,
    }


def new_prompt(subject: Subject, text: str, tokens: int) -> Prompt:
    """A prompt of so many tokens that begins as none before it."""
    return filled(new_beginning(), text, tokens, subject)


def new_beginning() -> Callable[[str], Prompt]:
    """Puts words before a text that were never there before."""
    own = uuid.uuid4().hex
    return lambda text: f"{own}\n{text}"


def writing_rate(answer: Answer) -> float | None:
    """Tokens per second behind the first; None if there are none."""
    seconds = answer.seconds - answer.seconds_to_first
    return (answer.new_tokens - 1) / seconds if answer.new_tokens > 1 and seconds > 0 else None


def spread(values: list[float]) -> dict | None:
    """Median, quartiles (linear between the values) and the values; None if there are none."""
    if not values:
        return None
    low, median, high = statistics.quantiles(values, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "q25": low, "q75": high, "values": values}


def summary(results: dict[str, dict]) -> dict:
    """The medians by context, from the results of parts by their names."""

    def median(cell: dict, key: str) -> float | None:
        return cell[key] and cell[key]["median"]

    return {
        str(cell["context"]): {
            "prompt": median(cell, "prompt"),
            "generation": median(cell, "generation"),
            "memory_bytes": cell["memory_bytes"],
        }
        for cell in sorted(results.values(), key=lambda cell: cell["context"])
    }


def _text(settings: Settings) -> str:
    longest = max(settings.contexts)
    return read_text(settings.text, "speed.text", longest) if settings.text else random_words(longest, settings.seed)


def device_name(device: torch.device | None) -> str | None:
    """What computes, in words."""
    if device is None:
        return None
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads, {platform.machine()}"


class PeakMemory(AbstractContextManager):
    """Bytes in use when it is entered, `before`, and at most inside, `peak`.

    On a GPU what torch has allocated there; on a CPU the resident memory of this process, weights
    included, looked at every 5 ms; None where the device cannot be seen.
    """

    def __init__(self, device: torch.device | None):
        self.device, self.before, self.peak = device, None, None
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        elif self.device is not None:
            self.before = self.peak = psutil.Process().memory_info().rss
            self._watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device is not None and self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        elif self.device is not None:
            self._done.set()
            self._watcher.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._done.wait(INTERVAL):
            self.peak = max(self.peak, process.memory_info().rss)
