"""Where that may lie which a run holds, and where it ends up within budgets.

There are two sorts of items. Some must be where they are: weights, activations, temporaries. The others
`gsq.memory.Memory` hands out: on a CPU all of them may lie in files, on an accelerator those that kernels do not
work on. `Working.rooms` is what a budget leaves for these.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from gsq.hardware import Hardware
from gsq.memory import Rooms

DEVICE, HOST, NEAR, FAR = "device", "host", "near", "far"  # fixed in two places; handed out, for kernels or not
PLACES = {  # in words, by whether there is an accelerator
    True: {DEVICE: "device", NEAR: "device", FAR: "device, host or files", HOST: "host"},
    False: {DEVICE: "host", NEAR: "host or files", FAR: "host or files", HOST: "host"},
}


@dataclass(frozen=True)
class Item:
    """Something held at some point of a run, and where it may be."""

    name: str
    bytes: float
    place: str


Moment = tuple[Item, ...]  # all that is held at one point of a run


@dataclass(frozen=True)
class Working:
    """What one process holds, by the point of the run."""

    moments: Mapping[str, Moment]
    on_device: bool

    def most(self, *places: str) -> float:
        """Bytes in these places together, at the point where they are most."""
        return max(bytes_in(held, *places) for held in self.moments.values())

    @property
    def fixed_host(self) -> float:
        """Bytes that must be in the host's memory."""
        return self.most(HOST) if self.on_device else self.most(HOST, DEVICE)

    @property
    def fixed_device(self) -> float:
        """Bytes that must be on the accelerator, together with what kernels work on."""
        return self.most(DEVICE, NEAR) if self.on_device else 0.0

    def largest(self, *places: str) -> tuple[str, list[Item]]:
        """The point where these places hold most, and what they hold there, largest first."""
        point, held = max(self.moments.items(), key=lambda pair: bytes_in(pair[1], *places))
        return point, sorted((item for item in held if item.place in places), key=lambda item: -item.bytes)

    def rooms(self, hardware: Hardware) -> Rooms:
        """What is left of the budgets for tensors that are handed out.

        Whatever kernels work on is counted when it is there, so that its place is kept free for it.
        """
        host = max(0.0, hardware.share - self.fixed_host)
        device = max(0.0, (hardware.accelerator or 0.0) - self.fixed_device)
        return Rooms(device if self.on_device else math.inf, host)

    def placed(self, hardware: Hardware) -> dict[str, dict[str, float]]:
        """Bytes by point and by where they end up, `device`, `host` and `file`, if budgets are kept."""
        room = self.rooms(hardware)
        return {point: self._placed(held, room) for point, held in self.moments.items()}

    def _placed(self, held: Moment, room: Rooms) -> dict[str, float]:
        sums = Counter()
        for item in held:
            sums[item.place] += item.bytes
        if self.on_device:
            on_device = min(sums[FAR], room.device)
            rest = sums[FAR] - on_device
            device, host = sums[DEVICE] + sums[NEAR] + on_device, sums[HOST]
        else:
            device, rest, host = 0.0, sums[NEAR] + sums[FAR], sums[DEVICE] + sums[HOST]
        in_host = min(rest, room.host)
        return {"device": device, "host": host + in_host, "file": rest - in_host}

    def peak(self, hardware: Hardware, place: str) -> float:
        """Bytes at the worst point."""
        return max(sums[place] for sums in self.placed(hardware).values())


def bytes_in(held: Moment, *places: str) -> float:
    """Bytes of the items that may be in these places."""
    return sum(item.bytes for item in held if item.place in places)
