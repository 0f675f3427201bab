"""Short patterns that tell some modules from others, for formats whose readers find settings by pattern."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from gsq.errors import UserError

ROOTS = ("model", "language_model")  # readers rename these, so no pattern contains them


def cover(names: set[str], avoid: list[str], exact: set[bool], within: str = "") -> list[tuple[str, bool]]:
    """Few short runs of path segments that occur in all `names` and in none of `avoid`, greedily.

    Each contains the text `within`, and comes with how it must be matched: by whole segments (True) or as a
    substring (False); `exact` says which of these a reader can do. Raises `UserError` if there is no such choice.
    """
    text = "\n".join(f".{name}." for name in avoid)
    taken = {run for name in avoid for run in _runs(name)}  # most of what `text` holds, found quickly
    holders: dict[str, set[str]] = defaultdict(set)
    for name in names:
        for run in _runs(name):
            if within in run:
                holders[run].add(name)
    left = set(names)
    # The best candidate first: most names, then a substring, then the fewest segments. As names are covered a
    # candidate only gets worse, so one whose place is still right when it comes up is the best of all.
    ranked = [(-len(holders[run]), whole, run.count("."), run) for run in holders.keys() - taken for whole in exact]
    heapify(ranked)
    chosen: list[tuple[str, bool]] = []
    while left:
        if not ranked:
            raise UserError(f"no pattern tells {min(left)} from modules with another codebook; give them the same one")
        count, whole, segments, run = heappop(ranked)
        now = -len(holders[run] & left)
        if now and now != count:
            heappush(ranked, (now, whole, segments, run))
        elif now and (f".{run}." if whole else run) not in text:
            chosen.append((run, whole))
            left -= holders[run]
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
