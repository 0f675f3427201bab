"""Seconds that the init of a group takes: searched scales, GPTQ, polish."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gsq.estimate.pace import DECODE, ERROR, PASS, ROTATE, Pace
from gsq.estimate.shapes import Group, Shapes
from gsq.init import gptq, polish, scales
from gsq.kernels.columns import spacing

# Passes, as in `pace`
SEARCH, SHIFTED = 4, 2  # of one candidate for a scale; more where there are offsets
BOUND = 1.4  # more of these for each bound between uneven levels
COLUMN = 18  # calls for one column of GPTQ or descent, and passes over it
FACTOR = 4 / 3  # of n^3: a Cholesky factor, the inverse by it, and the factor of that


@dataclass(frozen=True)
class Part:
    """A part of an init: seconds of its own loops, and what is counted for all parts together.

    `products` of all rows with their Hessians, `passes` over all weights, `calls` beside those of both, and
    operations of what is `factored`.
    """

    loops: tuple[float, ...] = ()
    products: float = 0.0
    passes: float = 0.0
    calls: float = 0.0
    factored: float = 0.0


class GroupInit:
    """GPTQ and polish of this process's share of a group, with the errors that are reported."""

    def __init__(self, shapes: Shapes, pace: Pace, group: Group):
        first, ranks = group.first, shapes.ranks
        self.config, self.pace, self.book = shapes.config.init, pace, first.codebook
        self.columns, self.weights = first.columns, group.codes / ranks.count
        self.rows = self.weights / self.columns
        self.squares = first.batch / (ranks.count if first.fused else 1)  # Hessians
        self.crossed = shapes.crossed(group)
        self.chunk = scales.CHUNK.get(shapes.device.type, scales.ELSEWHERE)

    def seconds(self) -> float:
        """Of the whole init."""
        return self._seconds(list(self._parts()))

    def trial(self, factored: bool) -> float:
        """Of GPTQ and its error alone, with or without what is factored of the Hessian."""
        own = self._gptq()
        error = Part(products=2.0, passes=ERROR)
        return self._seconds([own if factored else replace(own, factored=0.0), error])

    def _seconds(self, parts: list[Part]) -> float:
        products = sum(part.products for part in parts) * (2.0 * self.weights * self.columns)
        factored = sum(part.factored for part in parts) / self.pace.speed.factors
        counted = self.pace.products(products, sum(part.calls for part in parts)) + factored
        passes = self.pace.over(self.weights, sum(part.passes for part in parts), self.weights)
        return sum([*(loop for part in parts for loop in part.loops), counted, self._rotated(), passes])

    def _parts(self) -> Iterator[Part]:
        """In their order."""
        yield Part((self.pace.over(self.weights, self._search, self.chunk),), products=2.0, passes=2.0 * ERROR)
        if self.config.method == "gptq":
            yield self._gptq()
        if self.crossed:
            yield Part(products=2, factored=self.squares * self.columns**3 / 3)
        if self.config.polish:
            yield self._polish()
        if self.book.rotation:
            yield Part(passes=ROTATE)

    @property
    def _search(self) -> float:
        """Passes of a search for scales."""
        book, levels = self.book, self.book.levels
        asymmetric = not book.offset and [-level for level in levels[::-1]] != list(levels)
        uneven = spacing(levels) is None  # which are found by comparing with each bound between them
        tries = (scales.CANDIDATES + 1) * (1 + asymmetric) + (scales.REGRESSIONS if book.offset else 1)
        return tries * (SEARCH + SHIFTED * book.offset + BOUND * (min(len(levels), 16) - 1) * uneven)

    def _gptq(self) -> Part:
        searched = self.pace.over(self.weights, self._search, min(self.rows * self.book.group_size, self.chunk))
        factored = FACTOR * self.squares * self.columns**3
        return Part((searched, self._over_columns(gptq.BLOCK)), products=1.5, passes=ERROR + 6, factored=factored)

    def _polish(self) -> Part:
        rounds = self.config.polish
        sweeps, groups = 2 * (rounds + 1), self.book.groups(self.columns)
        systems = rounds * self.rows
        regressed = self.pace.over(self.weights, 0.75 * groups, min(self.weights, polish.PRODUCTS))
        return Part(
            loops=(sweeps * self._over_columns(polish.BLOCK), rounds * regressed),
            products=1 + 1.5 * sweeps + 1.5 * rounds,
            passes=ERROR + (DECODE + 4) * sweeps + rounds * (DECODE + 2),
            calls=0 if self.pace.speed.ahead else systems,  # of a library that factors one after the other
            factored=systems * (groups * (1 + self.book.offset)) ** 3,
        )

    def _over_columns(self, block: int) -> float:
        """A loop over columns: each goes through some operations, and then into the others of its block."""
        numbers = self.rows * self.columns
        if self.pace.speed.ahead:  # a kernel that keeps the block at hand
            return self.pace.over(numbers, 4, numbers) + numbers * block / self.pace.speed.exact
        own = self.pace.over(numbers, COLUMN, self.rows)
        return own + self.pace.over(numbers, block / 2 * 12 / PASS, self.rows * block / 2)

    def _rotated(self) -> float:
        """Hessians in the codebook's basis."""
        entries = self.squares * self.columns**2
        return self.pace.over(entries, 2 * ROTATE, entries) if self.book.rotation else 0.0
