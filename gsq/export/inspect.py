"""What a folder holds: tensors grouped by kind, with bits per weight and bytes, computed from what is stored.

It knows dense checkpoints and exports; it returns data and prints nothing.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

from gsq.export.base import DecodedCheckpoint, open_model
from gsq.model.checkpoint import Checkpoint

TOTAL = ("total", "")


def inspect(folder: str | Path) -> list[dict]:
    """Rows of a table in stored order, the last one a total; experts count as one tensor each.

    `tensors` are those alike but for the indices in their names, which `kind` shows as `*`.
    """
    model = open_model(folder)
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for name, (stored_as, nbytes) in storage(model).items():
        kind = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        facts = (1, model.tensors[name].numel, nbytes)
        for key in ((kind, stored_as), TOTAL):
            sums[key] = [before + more for before, more in zip(sums[key], facts, strict=True)]
    sums[TOTAL] = sums.pop(TOTAL)
    return [_row(*key, *counts) for key, counts in sums.items()]


def storage(model: Checkpoint) -> dict[str, tuple[str, int]]:
    """How each tensor of an opened model is stored, in a word or two, and the bytes that takes, in stored order."""
    packed = model.packed if isinstance(model, DecodedCheckpoint) else {}
    sharers = Counter(part for tensor in packed.values() for part in tensor.stored)
    return {name: _storage(model, name, sharers) for name in model.tensors}


def _row(kind: str, stored_as: str, tensors: int, weights: int, nbytes: int) -> dict:
    bits = 8 * nbytes / weights if weights else 0.0
    return {
        "kind": kind, "stored as": stored_as, "tensors": tensors, "weights": weights,
        "bits per weight": bits, "bytes": nbytes,
    }  # fmt: skip


def _storage(model: Checkpoint, name: str, sharers: Counter[str]) -> tuple[str, int]:
    """How a tensor is stored and the bytes that takes; `sharers` counts the tensors, all alike, that share a part."""
    if isinstance(model, DecodedCheckpoint) and name in model.packed:
        packed = model.packed[name]
        return packed.label, sum(model.stored.tensors[part].nbytes // sharers[part] for part in packed.stored)
    info = model.tensors[name]
    return str(info.dtype).removeprefix("torch."), info.nbytes
