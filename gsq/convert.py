"""Conversion without calibration: every weight is rounded where it stands, tensor by tensor.

Needs no activations, no GPU and little memory, so models far larger than memory convert at the
speed of the disk. For rotated codebooks it gives what the formats' own tools give.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gsq.codebook import Codebook, QuantizedTensor
from gsq.config import Config
from gsq.errors import UserError
from gsq.export.base import PlanEntry, export_run
from gsq.init.rtn import match_norms, round_to_nearest
from gsq.model.checkpoint import Checkpoint
from gsq.plan.rules import Plan
from gsq.train import prepare

SHARD = 1 << 29  # bytes of a shard: small, since memory holds one, besides the codes of the largest tensor


class Rounded:
    """Looks to an export like a finished run, but quantizes each tensor only when it is asked for."""

    def __init__(self, source: Checkpoint, plan: Plan):
        self.source, self.plan = source, plan

    def load(self, name: str) -> QuantizedTensor:
        """Codes and scales of a planned tensor, experts fused."""
        entry = self.plan.entries[name]
        codebook, rows = entry.codebook, entry.shape[:-1]
        columns = codebook.columns(entry.shape[-1])
        codes = torch.empty(math.prod(rows), columns, dtype=torch.uint8)
        scales = torch.empty(math.prod(rows), columns // codebook.group_size, dtype=codebook.scale_dtype)
        place = 0
        for weight in self._matrices(entry):
            part = slice(place, place := place + len(weight))
            rounded = without_calibration(weight, codebook)
            codes[part], scales[part] = rounded.codes, rounded.scales
        return QuantizedTensor(codes.view(*rows, -1), scales.view(*rows, -1), codebook)

    def _matrices(self, entry: PlanEntry) -> Iterator[Tensor]:
        """Weights `[out, in]` that make up an entry, in order."""
        fused = len(entry.shape) == 3 and len(entry.sources) == 1
        for name in entry.sources:
            for part in range(entry.shape[0]) if fused else [None]:
                yield self.source.read_sound(name, part)


def without_calibration(weight: Tensor, codebook: Codebook) -> QuantizedTensor:
    """Round a weight `[out, in]` knowing nothing else: norms where the codebook rotates, else searched scales."""
    return match_norms(weight, codebook) if codebook.rotation else round_to_nearest(weight, codebook)


def convert(config: Config, out: str | Path) -> Path:
    """Write the model of `config`, rounded by its plan, to the new folder `out` in its export format."""
    if config.export.format is None:
        raise UserError("export.format is null, so there is nothing to write; set it")
    skeleton, plan = prepare(config, torch.device("cpu"))
    return export_run(Rounded(skeleton.checkpoint, plan), config.export.format, out, SHARD)
