"""The processes of one run: which share of the work each has, and sums over all of them.

Calibration windows are divided over the processes, and so are the rows of every target (the experts,
where it has them): a process observes and multiplies its own windows, and initializes and relaxes its own
rows. What crosses between them is sums over windows, and soft weights once per step. A run of one
process is not a special case: its share is everything.

Sums of floats depend on their order. So windows run in eight lanes, whoever runs them: what a lane adds
up is added over the lanes as over the leaves of one fixed binary tree, inside a process and between
them. One, two, four and eight processes then get the same bits; other numbers, the same up to rounding.

`accelerate launch` or `torchrun` start the processes and say in the environment how many there are.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gsq.errors import UserError

LANES = 8
GLANCE = 0.1  # seconds between looks whether the first process is done with what the others wait for
ROLL_CALL = timedelta(seconds=10)
T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Windows of one process: `numbers` among the `total` of all, lane by lane, and each lane's places among them."""

    numbers: tuple[int, ...]
    lanes: tuple[range, ...]
    total: int

    @classmethod
    def whole(cls, total: int) -> Share:
        """All windows in their order, in one lane."""
        return cls(tuple(range(total)), (range(total),), total)

    def below(self, limit: int) -> list[range]:
        """Places of the windows with numbers below `limit`, by lane."""
        counts = [sum(self.numbers[place] < limit for place in lane) for lane in self.lanes]
        return [lane[:count] for lane, count in zip(self.lanes, counts, strict=True)]

    def places(self, numbers: Iterable[int]) -> list[list[int]]:
        """Places of those windows, of these `numbers`, that are this process's, by lane."""
        wanted = set(numbers)
        return [[place for place in lane if self.numbers[place] in wanted] for lane in self.lanes]


class Ranks:
    """`count` processes, of which this one is number `index`."""

    def __init__(self, index: int = 0, count: int = 1):
        self.index, self.count = index, count
        self._errands = 0

    @classmethod
    def join(cls, patience: float) -> Ranks:
        """Meet the other processes that were started with this one, if there are any.

        They give up on one that stays away from a sum for `patience` minutes.
        """
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(minutes=patience))
        return cls(state.process_index, state.num_processes)

    def leave(self) -> None:
        """Part from the others, once there is nothing left to share."""
        if self.count > 1:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.index == 0

    def share(self, total: int) -> Share:
        """This process's windows of `total`; those of a lane are alike modulo the number of lanes."""
        own = [range(lane, total, LANES) for lane in range(LANES)[self.span(LANES)]]
        starts = [sum(map(len, own[:place])) for place in range(len(own))]
        lanes = tuple(range(start, start + len(lane)) for start, lane in zip(starts, own, strict=True))
        return Share(tuple(number for lane in own for number in lane), lanes, total)

    def span(self, length: int) -> slice:
        """This process's part of a dimension of `length`; parts differ in length by one at most."""
        return _spans(length, self.count)[self.index]

    def total(self, *numbers: float) -> list[float]:
        """Each number summed over all processes, in float64."""
        if self.count == 1:
            return list(numbers)
        own = torch.tensor(numbers, dtype=torch.float64, device=_device())
        with self._explained():
            dist.all_reduce(own)
        return own.tolist()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes."""
        if self.count == 1:
            return tensor
        flat = tensor.reshape(-1)
        return self.joined(self.own_sum(flat), len(flat)).view(tensor.shape)

    def own_sum(self, tensor: Tensor) -> Tensor:
        """This process's `span` of the first dimension of the sum over all processes."""
        if self.count == 1:
            return tensor
        given = [tensor[span].contiguous() for span in _spans(len(tensor), self.count)]
        taken = [torch.empty_like(given[self.index]) for _ in given]
        with self._explained():
            dist.all_to_all(taken, given)
        return tree_sum(taken)

    def joined(self, own: Tensor, length: int) -> Tensor:
        """The whole tensor, of which each process has its `span` of the first dimension, `length` in all."""
        return self._gathered(own, [span.stop - span.start for span in _spans(length, self.count)])

    def concatenated(self, own: Tensor) -> Tensor:
        """The tensors `[n, ...]` of all processes one behind the other; `n` may differ between them."""
        lengths = self.total(*(len(own) * (rank == self.index) for rank in range(self.count)))
        return self._gathered(own, [int(length) for length in lengths])

    def errand(self, work: Callable[[], T]) -> T | None:
        """What the first process makes of `work`, while the others wait; None for them."""
        if self.count == 1:
            return work()
        self._errands += 1
        key = f"gsq errand {self._errands}"
        if self.first:
            done = work()
            _store().set(key, "done")
            return done
        try:
            while not _store().check([key]):  # in steps, so that signals are heard
                time.sleep(GLANCE)
        except RuntimeError as error:
            raise UserError(
                f"process 0 of {self.count} ended ({str(error).splitlines()[0]}); its own message says why"
            ) from None
        return None

    def _gathered(self, own: Tensor, lengths: Sequence[int]) -> Tensor:
        if self.count == 1:
            return own
        missing = max(lengths) - len(own)
        padded = torch.cat([own, own.new_zeros(missing, *own.shape[1:])]) if missing else own.contiguous()
        parts = [torch.empty_like(padded) for _ in lengths]
        with self._explained():
            dist.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the end of the others' patience, or of one of them, into a message that says whose it was."""
        try:
            yield
        except RuntimeError as error:
            silent = self._silent()
            who = (
                f"process {', '.join(map(str, silent))} of {self.count}" if silent else "the network between processes"
            )
            raise UserError(
                f"{who} failed or stopped answering ({str(error).splitlines()[0]}); finished layers are kept, "
                "continue the run with --resume"
            ) from error

    def _silent(self) -> list[int]:
        """Processes that do not answer a roll call; the first keeps the roll, so without it there is none."""
        deadline = time.monotonic() + ROLL_CALL.total_seconds()
        try:
            _store().set(f"gsq alive {self.index}", "yes")
            keys = {rank: f"gsq alive {rank}" for rank in range(self.count)}
            while time.monotonic() < deadline and not all(_store().check([key]) for key in keys.values()):
                time.sleep(0.2)
            return [rank for rank, key in keys.items() if not _store().check([key])]
        except RuntimeError:
            return [0]


def tree_sum(parts: Sequence[Tensor | None] | Sequence[Callable[[], Tensor | None]]) -> Tensor | None:
    """Sum of tensors of one shape as over a balanced binary tree, whose halves are added first; None is nothing.

    Parts may be functions, which are called when their tensors are needed: of `n`, at most `log2(n) + 2`
    are there at once.
    """
    if len(parts) == 1:
        return parts[0]() if callable(parts[0]) else parts[0]
    middle = len(parts) // 2
    left, right = tree_sum(parts[:middle]), tree_sum(parts[middle:])
    if left is None or right is None:
        return left if right is None else right
    return left.add_(right)


def _spans(length: int, count: int) -> list[slice]:
    ends = [length * rank // count for rank in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
