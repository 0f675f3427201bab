"""compressed-tensors checkpoints whose codes lie in 4 or 8 bits, for readers that take no other widths.

Codes of 2 and 3 bits, and ternary ones, are stored in 4 bits, those of 5 to 7 in 8: the same values
in more bytes. Such an export is read, decoded and verified like any other of `compressed-tensors`.
"""

from __future__ import annotations

from collections.abc import Mapping

from gsq.export import compressed_tensors
from gsq.export.base import PlanEntry, Run
from gsq.export.compressed_tensors import decoded, kept_bytes, recognizes
from gsq.model.checkpoint import Checkpoint, CheckpointWriter

__all__ = ["check", "decoded", "kept_bytes", "packed_bytes", "recognizes", "write"]

WIDTHS = (4, 8)


def check(source: Checkpoint, entries: Mapping[str, PlanEntry]) -> None:
    """Raise `UserError` naming the first tensor that the format cannot hold, and what could."""
    compressed_tensors.check(source, entries, WIDTHS)


def write(run: Run, writer: CheckpointWriter) -> None:
    """Add all tensors and `config.json`."""
    compressed_tensors.write(run, writer, WIDTHS)


def packed_bytes(entry: PlanEntry) -> int:
    """Bytes of a planned tensor that is packed."""
    return compressed_tensors.packed_bytes(entry, WIDTHS)
