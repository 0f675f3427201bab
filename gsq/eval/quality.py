"""How far a quantized model is from its original: perplexity, KL divergence, and agreement of the likeliest token.

Both models are walked layer by layer, so memory holds one decoder layer, the hidden states of the
evaluation text, and a small piece of the logits. The hidden states behind the last layer are kept as
`FinalStates`: several quantized checkpoints are compared with one base that was walked once.

Nothing here knows formats or runs; anything that reads like a `Checkpoint` can be measured. Nothing
is printed: `progress(done, layers)` is called after every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gsq.errors import UserError
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


def evaluate(
    checkpoint: Checkpoint,
    base: Checkpoint | None,
    tokens: Tensor,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    batch: int = 8,
    max_layers: int | None = None,
    progress: Progress | None = None,
) -> dict:
    """Quality of `checkpoint` on windows `tokens [W, L]`, of which L - 1 tokens each are predicted; see `compare`.

    `batch` windows go through a layer at once. `progress` counts the layers of both models as one.
    """
    sources = [checkpoint] if base is None else [checkpoint, base]
    walked = []
    for number, source in enumerate(sources):
        report = _shifted(progress, number, len(sources))
        walked.append(final_states(source, tokens, device, dtype, batch, max_layers, report))
    return compare(*walked)


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


@torch.no_grad()
def compare(quantized: FinalStates, base: FinalStates | None = None) -> dict:
    """Perplexity of `quantized`, and its distance from `base` on the same windows if there is one.

    Keys: `perplexity`, `tokens` (predicted tokens), `windows`, `length`; with a base also `base_perplexity`,
    `kl`, `kl_median` and `kl_p99` (KL(base || quantized), nats per predicted token), and `top1` (share of tokens
    whose likeliest successor is the same).
    """
    if base is not None:
        _check_pair(quantized, base)
    labels = quantized.tokens[:, 1:].flatten()
    pieces = [
        _measure(log_q, log_p, labels[span].to(log_q.device)) for span, log_q, log_p in _log_probs(quantized, base)
    ]
    loss, base_loss, divergence, agrees = (torch.cat(column) for column in zip(*pieces, strict=True))
    windows, length = quantized.tokens.shape
    result = {
        "perplexity": loss.mean().exp().item(),
        "tokens": labels.numel(),
        "windows": windows,
        "length": length,
    }
    if base is not None:
        result |= {
            "base_perplexity": base_loss.mean().exp().item(),
            "kl": divergence.mean().item(),
            "kl_median": divergence.median().item(),
            "kl_p99": _percentile(divergence, 0.99),
            "top1": agrees.double().mean().item(),
        }
    return result


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


def _measure(log_q: Tensor, log_p: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per token, on the CPU: loss of q, loss of p, KL(p || q), same argmax; all `[T]`. p is q if there is no base."""
    log_p = log_q if log_p is None else log_p
    loss, base_loss = (-log.gather(1, labels[:, None])[:, 0].double() for log in (log_q, log_p))
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1, dtype=torch.float64)
    agrees = log_p.argmax(dim=-1) == log_q.argmax(dim=-1)
    return loss.cpu(), base_loss.cpu(), divergence.cpu(), agrees.cpu()


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
