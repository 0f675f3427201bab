"""Short patterns that tell some modules from others, for formats whose readers find settings by pattern."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from gsq.errors import UserError

ROOTS = ("model", "language_model")  # readers rename these, so no pattern contains them


def cover(names: set[str], avoid: list[str], exact: set[bool]) -> list[tuple[str, bool]]:
    """Few short runs of path segments that occur in all `names` and in none of `avoid`, greedily.

    Each comes with how it must be matched: by whole segments (True) or as a substring (False); `exact`
    says which of these a reader can do. Raises `UserError` if there is no such choice.
    """
    text = "\n".join(f".{name}." for name in avoid)
    holders: dict[str, set[str]] = defaultdict(set)
    for name in names:
        for run in _runs(name):
            holders[run].add(name)
    chosen: list[tuple[str, bool]] = []
    left = set(names)
    while left:
        ranked = sorted(
            ((run, whole) for run in holders if holders[run] & left for whole in exact),
            key=lambda candidate: (
                -len(holders[candidate[0]] & left),
                candidate[1],
                candidate[0].count("."),
                candidate[0],
            ),
        )
        fits = (c for c in ranked if (f".{c[0]}." if c[1] else c[0]) not in text)
        choice = next(fits, None)
        if choice is None:
            raise UserError(f"no pattern tells {min(left)} from modules with another codebook; give them the same one")
        chosen.append(choice)
        left -= holders[choice[0]]
    return chosen


def _runs(name: str) -> Iterator[str]:
    """Contiguous path segments of a module name, without the roots that readers rename and without leading indices."""
    segments = name.split(".")
    while len(segments) > 1 and segments[0] in ROOTS:
        segments = segments[1:]
    for start, segment in enumerate(segments):
        if not segment.isdigit():
            for end in range(start + 1, len(segments) + 1):
                yield ".".join(segments[start:end])
