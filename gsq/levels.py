"""Lloyd-Max levels: the tables that round draws of a known distribution with the least squared error.

They are iterated as the readers of TQ and JANGTQ checkpoints iterate them, which stop before
convergence, so that the tables agree to the last float32 bit.

Sources: Lloyd, 1957/1982; Max, 1960; `turboquant_vllm.torch_ops`, `jang_tools.turboquant.codebook`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist

import numpy as np

GAUSSIAN_ROUNDS = 100
SPHERE_ROUNDS, GRID = 200, 10_000
COARSE = (-1.51, -0.453, 0.453, 1.51)  # the rounded Gaussian table of 2 bits that TQ readers carry


@lru_cache
def gaussian_levels(bits: int, d: int) -> tuple[float, ...]:
    """Levels of `N(0, 1/d)`, the coordinates of a rotated unit vector of `d` numbers; as TQ readers have them."""
    if bits == 2:
        return tuple(level / math.sqrt(d) for level in COARSE)
    normal, count = NormalDist(sigma=1 / math.sqrt(d)), 1 << bits
    bounds = [normal.inv_cdf(i / count) for i in range(1, count)]
    for _ in range(GAUSSIAN_ROUNDS):
        edges = [-math.inf, *bounds, math.inf]
        levels = [_gaussian_mean(normal.stdev, low, high) for low, high in pairwise(edges)]
        bounds = [(low + high) / 2 for low, high in pairwise(levels)]
    return tuple(levels)


def _gaussian_mean(sigma: float, low: float, high: float) -> float:
    """Mean of `N(0, sigma^2)` between `low` and `high`."""
    a, b = low / sigma, high / sigma
    density = lambda z: math.exp(-z * z / 2) / math.sqrt(2 * math.pi)  # noqa: E731
    mass = (math.erfc(-b / math.sqrt(2)) - math.erfc(-a / math.sqrt(2))) / 2
    if a > 0:  # the difference of two numbers near 1 would lose digits
        mass = (math.erfc(a / math.sqrt(2)) - math.erfc(b / math.sqrt(2))) / 2
    return sigma * (density(a) - density(b)) / mass


@lru_cache
def sphere_levels(bits: int, d: int) -> tuple[float, ...]:
    """Levels of one coordinate of a point on the unit sphere in `d` dimensions; as JANGTQ readers have them.

    Its density is proportional to `(1 - x^2)^((d - 3) / 2)`, taken on a grid over [-1, 1].
    """
    grid = np.linspace(-1.0, 1.0, GRID)
    density = np.exp((d - 3) / 2 * np.log(np.maximum(1 - grid**2, 1e-30))) if d > 2 else np.ones(GRID)
    step = np.diff(grid)
    mass = np.concatenate([[0], np.cumsum(step * (density[1:] + density[:-1]) / 2)])
    weighted = grid * density
    moment = np.concatenate([[0], np.cumsum(step * (weighted[1:] + weighted[:-1]) / 2)])
    support = 3.0 / math.sqrt(d)
    levels = np.linspace(-support, support, 1 << bits)
    for _ in range(SPHERE_ROUNDS):
        edges = np.concatenate([[-1.0], (levels[:-1] + levels[1:]) / 2, [1.0]])
        first = np.searchsorted(grid, edges[:-1])  # grid points with low <= x < high
        last = np.searchsorted(grid, edges[1:]) - 1
        last[-1] = GRID - 1
        inside = mass[last] - mass[first]
        means = np.where(last > first, (moment[last] - moment[first]) / np.maximum(inside, 1e-10 * mass[-1]), levels)
        if np.allclose(levels, means, atol=1e-10):
            break
        levels = means
    return tuple(sorted(levels.tolist()))
