"""The kurtosis of weights, and the bits it asks for: a tensor with heavy tails wants more levels.

Kurtosis is the fourth standardized moment, `mean((x - m)^4) / mean((x - m)^2)^2`: 3 for a Gaussian,
large where a few weights are far from the rest. One pass over a checkpoint reads a bounded chunk
at a time; central moments of the chunks are merged in float64, so that neither a large mean nor a
long tensor costs digits. Knows names and tensors of a checkpoint, but no rules and no model.

Source of the merging: Pébay, "Formulas for robust, one-pass parallel computation of covariances and
arbitrary-order statistical moments", Sandia report SAND2008-6212 (2008).
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import torch
from torch import Tensor

from gsq.files import explained, write_whole
from gsq.model.checkpoint import Checkpoint, fingerprint, sound

READ = 1 << 24  # weights read at once, unless a single row or expert has more
CHUNK = 1 << 16  # weights whose moments are taken at once: their float64 copies stay in a cache
LEAST = 1.0  # no kurtosis is smaller; weights that are all alike, which have none, count as this
ALIKE = 1e-13  # relative deviation from the mean that is no more than rounding


@dataclass(frozen=True)
class Moments:
    """Of `count` numbers: their mean, and sums of the powers 2, 3 and 4 of their deviations from it."""

    count: int
    mean: float
    second: float
    third: float
    fourth: float

    @classmethod
    def of(cls, numbers: Tensor) -> Moments:
        """Of a tensor `[n]`, n > 0, in float64."""
        deviation = numbers.to(torch.float64, copy=True)
        mean = deviation.mean()
        deviation -= mean
        square = deviation.square()
        second, third, fourth = square.sum(), square.dot(deviation), square.dot(square)
        return cls(len(numbers), float(mean), float(second), float(third), float(fourth))

    def __add__(self, other: Moments) -> Moments:
        """Of the numbers of both."""
        count = self.count + other.count
        a, b = self.count / count, other.count / count  # shares of the whole
        distance = other.mean - self.mean
        square, each = distance * distance, count * a * b
        second = self.second + other.second + square * each
        third = self.third + other.third + distance * square * each * (a - b)
        third += 3 * distance * (a * other.second - b * self.second)
        fourth = self.fourth + other.fourth + square * square * each * (a * a - a * b + b * b)
        fourth += 6 * square * (a * a * other.second + b * b * self.second)
        fourth += 4 * distance * (a * other.third - b * self.third)
        return Moments(count, self.mean + distance * b, second, third, fourth)

    @property
    def kurtosis(self) -> float:
        """The fourth standardized moment."""
        if self.second <= self.count * (ALIKE * self.mean) ** 2:
            return LEAST
        return self.count * self.fourth / self.second**2


def bits_for(kurtosis: float, limits: Mapping[int, float], widths: Collection[int]) -> int | None:
    """The bits whose limit in `limits` (ascending) is the first above `kurtosis`; None, which means keep the
    tensor, if there is none, or if its codebook has no such width."""
    bits = next((bits for bits, limit in limits.items() if kurtosis < limit), None)
    return bits if bits in widths else None


def measured(source: Checkpoint, parameters: Mapping[str, list[str]], cache: Path) -> dict[str, float]:
    """Kurtosis of each of `parameters`, which come with the names of their tensors in `source`.

    What `cache` remembers of this checkpoint is not measured again, and what is measured is added to it.
    """
    mark = fingerprint(source)
    known = _remembered(cache, mark)
    missing = {name: tensors for name, tensors in parameters.items() if name not in known}
    if missing:
        with explained(cache, 0):  # found before hours of reading
            cache.parent.mkdir(parents=True, exist_ok=True)
        known |= {name: kurtosis_of(source, tensors) for name, tensors in missing.items()}
        text = json.dumps({"fingerprint": mark, "kurtosis": known}, indent=1)
        write_whole(cache, lambda partial: partial.write_text(text), len(text))
    return {name: known[name] for name in parameters}


def kurtosis_of(source: Checkpoint, tensors: list[str]) -> float:
    """Kurtosis of all weights of `tensors` together, such as the experts of a layer."""
    return reduce(add, (moments for name in tensors for moments in _moments(source, name))).kurtosis


def _moments(source: Checkpoint, name: str) -> Iterator[Moments]:
    """Moments of the chunks of one tensor, of any shape; raises `UserError` if it holds what is no number."""
    rows, *rest = source.tensors[name].shape
    step = max(1, READ // math.prod(rest))
    for start in range(0, rows, step):
        for chunk in source.read(name, slice(start, start + step)).flatten().split(CHUNK):
            moments = Moments.of(chunk)
            if not math.isfinite(moments.fourth):
                sound(name, chunk)
            yield moments


def _remembered(cache: Path, mark: str) -> dict[str, float]:
    """What the file holds of the checkpoint with this fingerprint; nothing, if it is not there or is broken."""
    try:
        content = json.loads(cache.read_text())
        return content["kurtosis"] if content["fingerprint"] == mark else {}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return {}
