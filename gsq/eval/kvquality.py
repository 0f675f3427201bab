"""What a KV cache of few bits costs: perplexity, and divergence from the same model with a 16-bit cache.

A text goes through the model in pieces, once for every cache, side by side, so that memory holds the logits
of one piece. Tokens attend to what the caches have stored of all tokens up to themselves, as in serving.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import Cache

from gsq.eval.kvcache import KVCache, Scheme
from gsq.eval.quality import Scores, measure, summary

CHUNK = 128  # tokens that enter the caches at once
PLAIN = Scheme.parse("16")


def kv_divergence(
    model: nn.Module,
    tokens: Tensor,
    scheme: Scheme,
    chunk: int = CHUNK,
    counted: Tensor | None = None,
    words: float | None = None,
) -> dict:
    """Quality and size of `scheme` on windows `tokens [W, L]`, as JSON.

    `summary`'s keys, where the base is the same model with a 16-bit cache, and `cache_sizes`'. Predictions that
    count and their words are as `score` and `summary` take them.
    """
    scores, [cache] = kv_scores(model, tokens, [lambda: scheme.cache(model)], chunk, counted)
    return summary(scores[0], words) | cache_sizes(cache, [tokens.shape[1]])


@torch.no_grad()
def kv_scores(
    model: nn.Module,
    tokens: Tensor,
    caches: list[Callable[[], Cache]],
    chunk: int = CHUNK,
    counted: Tensor | None = None,
) -> tuple[list[Scores], list[Cache]]:
    """Every prediction of windows `tokens [W, L]` with each of `caches`, beside that with a 16-bit cache.

    `chunk` tokens of a window enter the caches at once. `counted` (bool, `[W, L - 1]`) are the predictions that
    count; default: all. Also returns the caches as the last window left them, with L tokens each.
    """
    makers = [lambda: PLAIN.cache(model), *caches]
    rows: list[list[tuple[Tensor, ...]]] = [[] for _ in caches]  # of each cache, a piece's measures, each [n]
    for window in tokens:
        filled = [make() for make in makers]
        for start in range(0, len(window), chunk):
            piece, labels = window[start : start + chunk], window[start + 1 : start + 1 + chunk].to(model.device)
            log_p, *others = (_log_probs(model, piece, cache)[: len(labels)] for cache in filled)
            for row, log_q in zip(rows, others, strict=True):
                row.append(measure(log_q, log_p, labels))
    shape = (len(tokens), tokens.shape[1] - 1)
    counted = torch.ones(shape, dtype=torch.bool) if counted is None else counted
    scores = [Scores(counted, *(torch.cat(column).view(shape) for column in zip(*row, strict=True))) for row in rows]
    return scores, filled[1:]


def cache_sizes(cache: KVCache, lengths: list[int]) -> dict:
    """`kv_sizes`: by number of tokens, `bytes` of keys and values, `plain_bytes` in 16 bits, `bits_per_value`.

    And `kv_state_bytes`, of recurrent states, which do not grow.
    """
    sizes = {length: cache.size(length) for length in lengths}
    rows = {
        str(length): {"bytes": size.nbytes, "plain_bytes": size.plain_nbytes, "bits_per_value": size.bits_per_value}
        for length, size in sizes.items()
    }
    return {"kv_sizes": rows, "kv_state_bytes": cache.size().states}


def _log_probs(model: nn.Module, piece: Tensor, cache: Cache) -> Tensor:
    """Log-probabilities `[n, V]`, float32, behind each of `piece` `[n]`, whose keys and values `cache` keeps."""
    logits = model(piece[None].to(model.device), past_key_values=cache, use_cache=True).logits
    return logits[0].float().log_softmax(dim=-1)
