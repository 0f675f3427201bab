"""Seconds of counted work on a machine: what modules do, and passes over numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gsq.hardware import Speed
from gsq.trace import CACHED, Work

MODULE = 9.0  # calls of Python for each that is dispatched by a module,
PLAIN = 0.5  # and what its passes, which add and multiply, take of one that rounds and looks up

# Passes over memory that one evaluation of a formula makes, each a read and a write of float32. Counted in the code,
# then corrected by runs on a CPU: see bench/estimate.py. Those of one formula stand beside it.
PASS = 8  # bytes
DECODE = 1  # from codes to values
ERROR = 4  # rows' errors, beside the product
ROTATE = 4  # of a Hadamard transform


@dataclass(frozen=True)
class Pace:
    """A machine's speed at the sorts of work that a run has."""

    speed: Speed

    def modules(self, work: Work) -> float:
        """Seconds of modules at work, whose own code takes time between calls."""
        plain = replace(work, bytes=PLAIN * work.bytes, small=PLAIN * work.small, calls=MODULE * work.calls)
        return self.speed.seconds(plain)

    def over(self, numbers: float, passes: float, at_once: float) -> float:
        """Seconds of `passes` over so many float32 `numbers`, worked on `at_once`."""
        if not numbers:
            return 0.0
        nbytes, calls = PASS * numbers * passes, passes * math.ceil(numbers / max(at_once, 1))
        small = min(at_once, numbers) * PASS <= CACHED
        return self.speed.seconds(Work(bytes=0.0 if small else nbytes, small=nbytes if small else 0.0, calls=calls))

    def products(self, operations: float, calls: float = 0.0) -> float:
        """Seconds of products of matrices in float32."""
        return self.speed.seconds(Work(exact=operations, calls=calls))
