"""Perplexity on text, and divergence from the base on the same text, at several context lengths.

Text becomes windows in one of two ways. `windows`: consecutive ones, whose first token is given and
whose others are predicted. `rolling`: every token of every document is predicted exactly once, with at most
`length` tokens before it, the first of a document behind the tokenizer's first special token; these are
the windows of lm-eval's rolling log-likelihood (its `wikitext` task). Perplexity per word is
`exp(total loss / words)`, words being what whitespace separates, and compares models of any tokenizers.

Without a KV-cache scheme models are walked layer by layer and need not fit into memory; with one, the
whole model reads the text in pieces, and attends to what the cache has kept of the pieces before.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from gsq.calib.tokens import documents, joined
from gsq.config import Positive, Section
from gsq.errors import UserError
from gsq.eval.quality import (
    CPU,
    FinalStates,
    Progress,
    Scores,
    by_position,
    eval_tokens,
    evaluate,
    final_states,
    score,
    summary,
)
from gsq.export.base import open_model
from gsq.model.resolve import load_tokenizer, resolve_model

if TYPE_CHECKING:
    from gsq.eval.subject import Local

# Short names of hub datasets: repository, configuration, split
DATASETS = {
    "wikitext": ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train"),
    "c4": ("allenai/c4", "en", "validation"),
}
WALK_TOKENS = 8192  # that go through a layer at once
SPACE = re.compile(r"\s+")


class Settings(Section):
    """What is read, and how it is cut."""

    text: str = Field("wikitext", description="file or glob of text or JSONL, or a hub dataset")
    words: Positive = Field(16000, description="read so many words of it, or all if it has fewer")
    contexts: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (1024,), description="context lengths in tokens", min_length=1
    )
    mode: Literal["windows", "rolling"] = Field(
        "windows", description="how text is cut: consecutive windows, or every token predicted once"
    )
    windows: Positive | None = Field(None, description="at most so many windows of each context")
    chunk: Positive = Field(128, description="tokens that enter a compressed KV cache at once")


@dataclass(frozen=True)
class Windows:
    """Token ids `tokens [W, L]`, which predictions count (bool, `[W, L - 1]`), and the words that these make."""

    tokens: Tensor
    counted: Tensor
    words: float

    @property
    def digest(self) -> str:
        """Hash of what is predicted from what."""
        digest = hashlib.sha256(str(tuple(self.tokens.shape)).encode())
        for tensor in (self.tokens, self.counted):
            digest.update(tensor.contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


@dataclass
class BaseWalks:
    """The base's hidden states on the windows that were walked last, for several models in turn."""

    key: tuple | None = None
    states: FinalStates | None = None

    def walk(self, model: Weights, folder: Path, windows: Windows, progress: Progress | None) -> FinalStates:
        """States of the model in `folder` on these windows, computed as `model`'s are."""
        key = (folder, windows.digest, model.device, model.dtype)
        if key != self.key:
            self.key, self.states = None, None  # frees the old ones before the walk
            self.states, self.key = model.walk(folder, windows, progress), key
        return self.states


@dataclass(frozen=True)
class Weights:
    """A model in `folder` whose layers are read one by one, and the base that it is compared with.

    `local` opens the whole model with a KV-cache scheme, if it has one; models that share `bases` walk a base once.
    """

    folder: Path
    base: Path | None = None
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    local: Local | None = None
    bases: BaseWalks = field(default_factory=BaseWalks)
    progress: Progress | None = None

    def walk(self, folder: Path, windows: Windows, progress: Progress | None) -> FinalStates:
        """Hidden states behind the last layer of the model in `folder`."""
        batch = max(1, WALK_TOKENS // windows.tokens.shape[1])
        return final_states(open_model(folder), windows.tokens, self.device, self.dtype, batch=batch, progress=progress)


@dataclass
class Part:
    """The measurement at one context length, of `texts`; `cut` are the windows that they make, by model folder."""

    settings: Settings
    context: int
    texts: list[str]
    cut: dict[Path, Windows] = field(default_factory=dict)

    def windows(self, folder: Path) -> Windows:
        """The windows for the tokenizer in `folder`; raises `UserError` if the text does not make any."""
        if folder not in self.cut:
            self.cut[folder] = windows_of(self.settings, self.context, self.texts, load_tokenizer(folder))
        return self.cut[folder]

    def __call__(self, model: Weights) -> dict:
        """`context`, `summary` of all predictions, and `positions` as `by_position` has them.

        With a KV-cache scheme the base is the model itself with a 16-bit cache, and sizes of the cache are added.
        """
        windows = self.windows(model.folder)
        if model.local is not None:
            return self._cached(model.local, windows)
        walked = model.walk(model.folder, windows, model.progress)
        base = model.base and model.bases.walk(model, model.base, windows, model.progress)
        return self._summed(score(walked, base, windows.counted), windows)

    def _cached(self, local: Local, windows: Windows) -> dict:
        from gsq.eval.kvquality import cache_sizes, kv_scores

        chunk, caches = self.settings.chunk, [lambda: local.scheme.cache(local.model)]
        [scores], [cache] = kv_scores(local.model, windows.tokens, caches, chunk, windows.counted)
        return self._summed(scores, windows) | cache_sizes(cache, [windows.tokens.shape[1]])

    def _summed(self, scores: Scores, windows: Windows) -> dict:
        return {"context": self.context, **summary(scores, windows.words), "positions": by_position(scores)}


def parts(settings: Settings) -> dict[str, Part]:
    """One part per context length; raises `UserError` if the text cannot be read."""
    texts = list(_first_words(documents(settings.text, None, "text", DATASETS), settings.words))
    if not texts:
        raise UserError(f"text {settings.text!r} holds no words; give a file with text")
    return {f"perplexity/{context}": Part(settings, context, texts) for context in settings.contexts}


def measure_file(
    model: str,
    base: str | None,
    file: Path,
    windows: int,
    length: int,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    kv: str | None = None,
) -> dict:
    """`summary` of a model on the first `windows` windows of `length` tokens of a text file, as `windows` cuts them.

    With a KV-cache scheme `kv` the base is the model itself with a 16-bit cache, and sizes of the cache are added.
    """
    if kv and base:
        raise UserError("--kv measures divergence from the same model with a 16-bit cache; leave out --base")
    folder = resolve_model(model)
    tokenizer = load_tokenizer(folder)
    tokens = eval_tokens(file, tokenizer, windows, length)
    words = predicted_words(tokenizer, tokens)
    if kv is None:
        reference = open_model(resolve_model(base)) if base else None
        return evaluate(open_model(folder), reference, tokens, device, dtype, words=words)
    from gsq.eval.kvcache import Scheme
    from gsq.eval.kvquality import kv_divergence
    from gsq.eval.subject import Local

    scheme = Scheme.parse(kv)
    return kv_divergence(Local.open(folder, device, dtype).model, tokens, scheme, words=words)


def windows_of(settings: Settings, context: int, texts: list[str], tokenizer) -> Windows:
    """Documents as windows for a context of so many tokens."""
    cut = _rolling if settings.mode == "rolling" else _consecutive
    found = cut(texts, tokenizer, context, settings.windows)
    if found is None:
        raise UserError(
            f"text {settings.text!r} does not fill a window of {context} tokens; "
            "give more text (and `words`), shorter `contexts`, or mode: rolling"
        )
    return found


def rolling_windows(ids: list[int], prefix: int, length: int) -> tuple[Tensor, Tensor]:
    """Windows `[W, length + 1]` in which every one of `ids` is predicted once, and which predictions those are.

    The last window reaches back as far as the others do, and predicts only what they did not. A document that is
    shorter than a window is padded behind its end with the `prefix`, which nothing that is counted can see.
    """
    sequence = torch.tensor([prefix, *ids] + [prefix] * max(0, length - len(ids)))
    starts = list(range(0, max(len(ids) - length, 0) + 1, length))
    counted = torch.ones(len(starts), length, dtype=torch.bool)
    counted[-1, len(ids) :] = False
    rest = len(ids) - starts[-1] - length
    if rest > 0:
        starts.append(len(ids) - length)
        counted = torch.cat([counted, torch.arange(length)[None] >= length - rest])
    return torch.stack([sequence[start : start + length + 1] for start in starts]), counted


def count_words(text: str) -> int:
    """Pieces between whitespace, an empty one at either end included, as lm-eval counts them."""
    return len(SPACE.split(text))


def predicted_words(tokenizer, tokens: Tensor) -> float:
    """Words that the predicted tokens of consecutive windows `tokens [W, L]` make.

    All words of the windows, less the share of their tokens that is given, not predicted.
    """
    text = tokenizer.decode(tokens.flatten().tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(text.split()) * (tokens.shape[1] - 1) / tokens.shape[1]


def _first_words(texts: Iterable[str], words: int) -> Iterator[str]:
    for text in texts:
        ends = [found.end() for found in re.finditer(r"\S+", text)]
        if len(ends) >= words:
            yield text[: ends[words - 1]]
            return
        if ends:
            yield text
        words -= len(ends)


def _consecutive(texts: Iterable[str], tokenizer, length: int, most: int | None) -> Windows | None:
    ids = [token for document in joined(texts, tokenizer) for token in document]
    count = min(len(ids) // length, most or len(ids))
    if not count:
        return None
    tokens = torch.tensor(ids[: count * length]).view(count, length)
    return Windows(tokens, torch.ones(count, length - 1, dtype=torch.bool), predicted_words(tokenizer, tokens))


def _rolling(texts: Iterable[str], tokenizer, length: int, most: int | None) -> Windows:
    """Documents one by one; with `most`, whole documents while their windows are no more than that."""
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if prefix is None:
        raise UserError("mode: rolling needs a tokenizer with a special token to begin with; use mode: windows")
    rows, words = [], 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        windows = rolling_windows(ids, prefix, length)
        if most and rows and sum(len(row) for row, _ in rows) + len(windows[0]) > most:
            break
        rows.append(windows)
        words += count_words(text)
    tokens, counted = map(torch.cat, zip(*rows, strict=True))
    used = int(counted.any(dim=0).nonzero().max()) + 1  # less than `length` if all documents are shorter
    return Windows(tokens[:, : used + 1], counted[:, :used], words)
