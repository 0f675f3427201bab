"""Conversion without calibration: every weight is rounded where it stands, tensor by tensor.

Needs no activations, no GPU and little memory, so models far larger than memory convert at the
speed of the disk. For rotated codebooks it gives what the formats' own tools give.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from gsq.codebook import Codebook, QuantizedTensor
from gsq.config import Config
from gsq.errors import UserError
from gsq.export.base import PlanEntry, export_run, walk
from gsq.init.rtn import match_norms, round_to_nearest
from gsq.model.checkpoint import Checkpoint
from gsq.plan.rules import Plan
from gsq.prepare import prepare

T = TypeVar("T")
PIECE = 1 << 22  # weights that a thread rounds at a time
AHEAD = 16  # pieces that may wait to be packed
SHARD = 1 << 27  # bytes of a shard: small, since memory holds one, besides the codes of the largest tensor


class Rounded:
    """Looks to an export like a finished run, but rounds its tensors while they are asked for, in stored order.

    The threads of `pool` work a little ahead, piece by piece: rows do not depend on each other.
    """

    def __init__(self, source: Checkpoint, plan: Plan, pool: Executor):
        self.source, self.plan = source, plan
        entries = [entry for _, entry in walk(source, plan.entries) if entry]
        self._entries = iter(entries)
        self._pieces = ahead(pool, self._round, (piece for entry in entries for piece in self._divide(entry)))

    def load(self, name: str) -> QuantizedTensor:
        """Codes and scales of a planned tensor, experts fused."""
        entry = next(self._entries)
        if entry.name != name:
            raise ValueError(f"{name} was asked for before {entry.name}, which is stored in front of it")
        rows = math.prod(entry.shape[:-1])
        whole, place = None, 0
        while place < rows:
            piece = next(self._pieces)
            whole = whole or piece.map(lambda tensor: tensor.new_empty(rows, tensor.shape[-1]))
            for part, target in zip(_tensors(piece), _tensors(whole), strict=True):
                target[place : place + len(part)] = part
            place += len(piece.codes)
        return whole.shaped(*entry.shape[:-1])

    def _divide(self, entry: PlanEntry) -> Iterator[tuple[PlanEntry, str, slice]]:
        """Pieces of an entry, in order: tensors that make it up, and parts of their first dimension."""
        for name in entry.sources:
            length, *rest = self.source.tensors[name].shape
            step = max(1, PIECE // math.prod(rest))
            yield from ((entry, name, slice(start, start + step)) for start in range(0, length, step))

    def _round(self, entry: PlanEntry, name: str, part: slice) -> QuantizedTensor:
        weights = self.source.read_sound(name, part)
        return without_calibration(weights.flatten(0, -2), entry.codebook)


def _tensors(quantized: QuantizedTensor) -> list[Tensor]:
    return [t for t in (quantized.codes, quantized.scales, quantized.offsets) if t is not None]


def without_calibration(weight: Tensor, codebook: Codebook) -> QuantizedTensor:
    """Round a weight `[out, in]` knowing nothing else: norms where the codebook rotates, else searched scales."""
    return match_norms(weight, codebook) if codebook.rotation else round_to_nearest(weight, codebook)


def convert(config: Config, out: str | Path) -> Path:
    """Write the model of `config`, rounded by its plan, to the new folder `out` in its export format."""
    if config.export.format is None:
        raise UserError("export.format is null, so there is nothing to write; set it")
    skeleton, plan = prepare(config, torch.device("cpu"))
    with threads() as pool:
        return export_run(Rounded(skeleton.checkpoint, plan, pool), config.export.format, out, SHARD)


@contextmanager
def threads() -> Iterator[Executor]:
    """As many threads as torch uses. Each of them, and the caller meanwhile, has torch's operations to itself."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count) as pool:
            yield pool
    finally:
        torch.set_num_threads(count)


def ahead(pool: Executor, work: Callable[..., T], items: Iterable[tuple]) -> Iterator[T]:
    """`work(*item)` for every item, in order; `pool` does the first `AHEAD` of those not asked for yet."""
    submitted = (pool.submit(work, *item) for item in items)
    waiting = deque(islice(submitted, AHEAD))

    def results() -> Iterator[T]:
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(islice(submitted, 1))
            yield result

    return results()
