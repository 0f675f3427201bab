"""How far a quantized model is from its original: perplexity, KL divergence, and agreement of the likeliest token.

Both models are walked layer by layer, so memory holds one decoder layer, the hidden states of the
evaluation text, and a small piece of the logits. The hidden states behind the last layer are kept as
`FinalStates`: several quantized checkpoints are compared with one base that was walked once.

What is measured stays per token (`Scores`), so that it can be summed up as a whole or by position.
Nothing here knows formats or runs; anything that reads like a `Checkpoint` can be measured. Nothing
is printed: `progress(done, layers)` is called after every layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gsq.errors import UserError
from gsq.eval.intervals import mean_interval
from gsq.model.checkpoint import Checkpoint
from gsq.model.skeleton import Skeleton

Progress = Callable[[int, int], None]

CPU = torch.device("cpu")
LOGIT_BYTES = 256 << 20  # budget of all [tokens, vocab] float32 buffers that live at once
DEVICE_LOGIT_BYTES = 2 << 30  # the same on an accelerator, which is idle if it gets few tokens at a time
TOKENS = 4096  # at once, at most: the model's forward may build a mask of its square
LOGIT_BUFFERS = 6  # logits and log-probabilities of two models, and the two temporaries of the divergence


@dataclass(frozen=True)
class FinalStates:
    """Hidden states `[W, L, H]` (CPU) behind the last layer for windows `tokens [W, L]`, and the model."""

    skeleton: Skeleton
    tokens: Tensor
    hidden: Tensor

    @property
    def vocabulary(self) -> int:
        """Size V of the model's vocabulary."""
        return self.skeleton.model.get_output_embeddings().out_features


@dataclass(frozen=True)
class Scores:
    """What was measured of every prediction, on the CPU, each `[W, L - 1]`.

    `counted` (bool) are the predictions that count; `loss` is in nats, float64. With a base also `base_loss`,
    `kl` (KL(base || model), float64) and `agrees` (bool: same likeliest token).
    """

    counted: Tensor
    loss: Tensor
    base_loss: Tensor | None = None
    kl: Tensor | None = None
    agrees: Tensor | None = None


def evaluate(
    checkpoint: Checkpoint,
    base: Checkpoint | None,
    tokens: Tensor,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    batch: int = 8,
    max_layers: int | None = None,
    progress: Progress | None = None,
    words: float | None = None,
) -> dict:
    """Quality of `checkpoint` on windows `tokens [W, L]`, of which L - 1 tokens each are predicted; see `summary`.

    `batch` windows go through a layer at once. `progress` counts the layers of both models as one.
    """
    sources = [checkpoint] if base is None else [checkpoint, base]
    walked = []
    for number, source in enumerate(sources):
        report = _shifted(progress, number, len(sources))
        walked.append(final_states(source, tokens, device, dtype, batch, max_layers, report))
    return summary(score(*walked), words)


@torch.no_grad()
def final_states(
    checkpoint: Checkpoint,
    tokens: Tensor,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    batch: int = 8,
    max_layers: int | None = None,
    progress: Progress | None = None,
) -> FinalStates:
    """Walk windows `tokens [W, L]` through the decoder layers of a checkpoint, `batch` windows at a time."""
    skeleton = Skeleton(checkpoint, device=device, dtype=dtype, max_layers=max_layers)
    _check_tokens(tokens, skeleton)
    parts: list[Tensor] = []  # hidden states [B, L, H] of each batch
    calls: dict[int, list[dict]] = {}  # arguments of the layers depend on the batch's shape alone
    for windows in tokens.split(batch):
        hidden, calls[len(windows)] = skeleton.embed(windows)
        parts.append(hidden.cpu())
    for index in range(skeleton.num_layers):
        layer = skeleton.load_layer(index)
        for number, hidden in enumerate(parts):
            parts[number] = skeleton.run_layer(layer, hidden, calls[len(hidden)][index]).cpu()
        del layer
        if progress:
            progress(index + 1, skeleton.num_layers)
    return FinalStates(skeleton, tokens, torch.cat(parts))


def compare(quantized: FinalStates, base: FinalStates | None = None) -> dict:
    """Perplexity of `quantized`, and its distance from `base` on the same windows if there is one; see `summary`."""
    return summary(score(quantized, base))


@torch.no_grad()
def score(quantized: FinalStates, base: FinalStates | None = None, counted: Tensor | None = None) -> Scores:
    """Every prediction of `quantized`, beside those of `base` on the same windows if there is one.

    `counted` (bool, `[W, L - 1]`) are the predictions that count; default: all.
    """
    if base is not None:
        _check_pair(quantized, base)
    labels = quantized.tokens[:, 1:]
    pieces = [
        measure(log_q, log_p, labels.flatten()[span].to(log_q.device))
        for span, log_q, log_p in _log_probs(quantized, base)
    ]
    columns = [torch.cat(column).view(labels.shape) for column in zip(*pieces, strict=True)]
    return Scores(torch.ones_like(labels, dtype=torch.bool) if counted is None else counted, *columns)


def summary(scores: Scores, words: float | None = None) -> dict:
    """All counted predictions as one.

    Keys: `perplexity`, `tokens` (predicted tokens), `windows`, `length`; with `words`, the number of words that
    these tokens make, `word_perplexity` (exp of the total loss per word); with a base also `base_perplexity`,
    `kl`, `kl_median` and `kl_p99` (nats per predicted token), and `top1` (share of tokens whose likeliest
    successor is the same). `*_low` and `*_high` are ends of 95 % intervals, if there is more than one window.
    """
    tokens, (windows, length) = int(scores.counted.sum()), scores.loss.shape
    result = _perplexity("perplexity", scores.loss, scores.counted)
    result |= {"tokens": tokens, "windows": windows, "length": length + 1}
    if words:
        result |= {"words": round(words), **_perplexity("word_perplexity", scores.loss, scores.counted, tokens / words)}
    if scores.kl is not None:
        divergence = scores.kl[scores.counted]
        result |= _perplexity("base_perplexity", scores.base_loss, scores.counted)
        result |= {"kl": _mean(scores.kl, scores.counted), **_ends("kl", _interval(scores.kl, scores.counted), 0)}
        result |= {"kl_median": divergence.median().item(), "kl_p99": _percentile(divergence, 0.99)}
        agrees = scores.agrees.double()
        result |= {"top1": _mean(agrees, scores.counted), **_ends("top1", _interval(agrees, scores.counted), 0, 1)}
    return result


def by_position(scores: Scores) -> list[dict]:
    """Means over predictions with 1, 2-3, 4-7, 8-15, ... tokens before them in the window, as far as there are any.

    Keys: `from` and `to` (tokens before), `tokens` (predictions), `loss`; with a base also `base_loss`, `kl`, `top1`.
    """
    columns = {"loss": scores.loss, "base_loss": scores.base_loss, "kl": scores.kl, "top1": scores.agrees}
    length = scores.loss.shape[1]  # prediction number n has n + 1 tokens before it
    rows = []
    for first in (1 << power for power in range(length.bit_length())):
        part = slice(first - 1, 2 * first - 1)
        counted = scores.counted[:, part]
        if counted.any():
            means = {name: _mean(v[:, part].double(), counted) for name, v in columns.items() if v is not None}
            rows.append({"from": first, "to": min(2 * first - 1, length), "tokens": int(counted.sum()), **means})
    return rows


@torch.no_grad()
def divergences(skeleton: Skeleton, hidden: list[Tensor], base: Tensor) -> list[float]:
    """KL(base || other), nats per token, of each of `hidden`: states `[W, L, H]` behind the last layer."""
    flat, sums = base.flatten(0, 1), [0.0] * len(hidden)
    step = _tokens_at_once(skeleton)
    for start in range(0, len(flat), step):
        log_p = _log_softmax(skeleton, flat[start : start + step])
        p = log_p.exp()
        for number, other in enumerate(hidden):
            log_q = _log_softmax(skeleton, other.flatten(0, 1)[start : start + step])
            sums[number] += float((p * (log_p - log_q)).sum(dtype=torch.float64))
    return [total / len(flat) for total in sums]


def eval_tokens(text_file: str | Path, tokenizer, windows: int, length: int) -> Tensor:
    """The first `windows` consecutive windows `[windows, length]` of a text file's tokens, without special tokens."""
    try:
        text = Path(text_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {text_file} as UTF-8 text ({error}); give a plain text file") from None
    if windows < 1 or length < 2:
        raise UserError(f"{windows} windows of {length} tokens predict nothing; use at least 1 window of 2 tokens")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < windows * length:
        raise UserError(
            f"{text_file} has {len(ids)} tokens, enough for {len(ids) // length} windows of {length}, not {windows}; "
            "ask for fewer or shorter windows, or give a longer text"
        )
    return torch.tensor(ids[: windows * length], dtype=torch.long).view(windows, length)


def _log_probs(quantized: FinalStates, base: FinalStates | None) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Spans of the predictions in reading order with the log-probabilities `[span, V]` of both models."""
    inputs = [None if states is None else states.hidden[:, :-1].flatten(0, 1) for states in (quantized, base)]
    step = min(_tokens_at_once(quantized.skeleton), quantized.tokens.shape[1] - 1)
    for start in range(0, len(inputs[0]), step):
        span = slice(start, start + step)
        log_q = _log_softmax(quantized.skeleton, inputs[0][span])
        log_p = None if base is None else _log_softmax(base.skeleton, inputs[1][span])
        yield span, log_q, log_p


def _tokens_at_once(skeleton: Skeleton) -> int:
    """Tokens whose logits fit the budget of the skeleton's device."""
    budget = LOGIT_BYTES if skeleton.device.type == "cpu" else DEVICE_LOGIT_BYTES
    vocabulary = skeleton.model.get_output_embeddings().out_features
    return max(1, min(TOKENS, budget // (LOGIT_BUFFERS * 4 * vocabulary)))


def _log_softmax(skeleton: Skeleton, hidden: Tensor) -> Tensor:
    """Log-probabilities `[T, V]` in float32 behind hidden states `[T, H]`."""
    return skeleton.head(hidden[None])[0].float().log_softmax(dim=-1)


def measure(log_q: Tensor, log_p: Tensor | None, labels: Tensor) -> tuple[Tensor, ...]:
    """Per token, on the CPU: loss of q; if there is a p also loss of p, KL(p || q), same argmax. All `[T]`."""
    loss = -log_q.gather(1, labels[:, None])[:, 0].double()
    if log_p is None:
        return (loss.cpu(),)
    base_loss = -log_p.gather(1, labels[:, None])[:, 0].double()
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1, dtype=torch.float64)
    agrees = log_p.argmax(dim=-1) == log_q.argmax(dim=-1)
    return loss.cpu(), base_loss.cpu(), divergence.cpu(), agrees.cpu()


def _mean(values: Tensor, counted: Tensor) -> float:
    """Mean of the counted of `values`, both `[W, T]`."""
    return values[counted].mean().item()


def _interval(values: Tensor, counted: Tensor) -> tuple[float, float] | None:
    """Ends of the interval of `_mean`, windows as blocks."""
    counts = counted.sum(dim=1)
    used = counts > 0
    return mean_interval(values.where(counted, 0).sum(dim=1)[used], counts[used])


def _ends(
    name: str, interval: tuple[float, float] | None, least: float = -math.inf, most: float = math.inf
) -> dict[str, float]:
    """The interval's ends as results name them, as far as the value can reach."""
    return {} if interval is None else {f"{name}_low": max(interval[0], least), f"{name}_high": min(interval[1], most)}


def _perplexity(name: str, loss: Tensor, counted: Tensor, tokens: float = 1.0) -> dict[str, float]:
    """exp of the mean loss of so many tokens, and of the ends of its interval."""
    interval = _interval(loss, counted)
    ends = interval and (_exp(interval[0] * tokens), _exp(interval[1] * tokens))
    return {name: _exp(_mean(loss, counted) * tokens), **_ends(name, ends)}


def _exp(value: float) -> float:
    """exp, infinite where a float cannot hold it (a damaged model)."""
    return math.inf if value >= 709 else math.exp(value)


def _percentile(values: Tensor, share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed (torch.quantile stops at 16 M values)."""
    rank = max(1, -int(-share * len(values) // 1))
    return values.kthvalue(rank).values.item()


def _check_tokens(tokens: Tensor, skeleton: Skeleton) -> None:
    if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise UserError(f"evaluation needs tokens [windows, length >= 2], got {list(tokens.shape)}")
    known = skeleton.model.get_input_embeddings().num_embeddings
    if int(tokens.max()) >= known:
        raise UserError(
            f"the text has token {int(tokens.max())}, but {skeleton.checkpoint.folder} knows only {known}; "
            "use the tokenizer that belongs to the model"
        )


def _check_pair(quantized: FinalStates, base: FinalStates) -> None:
    if not torch.equal(quantized.tokens, base.tokens):
        raise ValueError("both models must have walked the same tokens")
    if quantized.vocabulary != base.vocabulary:
        raise UserError(
            f"{quantized.skeleton.checkpoint.folder} has a vocabulary of {quantized.vocabulary}, its base of "
            f"{base.vocabulary}; give the model that it was quantized from"
        )


def _shifted(progress: Progress | None, walked: int, walks: int) -> Progress | None:
    """`progress` for one of several walks of equal length."""
    return progress and (lambda done, layers: progress(walked * layers + done, walks * layers))
