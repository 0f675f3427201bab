"""`gsq quantize` under watch: what it holds in memory at which place of the program, and what its peak consists of.

    python bench/watch.py MEMORY.json CONFIG [options of gsq quantize]

A thread beside the program reads, every few milliseconds, its memory from the system and from where in the
package the program is (a path of functions, such as `walk > LayerWork.run > LayerWork._initialize`). Whenever
the peak has grown it also lists all tensors that Python holds. Nothing of the package knows of it. MEMORY.json
is written at every new peak, so that it tells why a program was killed for its memory, too. Linux only.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from bisect import bisect_right
from collections import Counter
from itertools import takewhile
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn

import gsq
from gsq.cli import main

PACKAGE = str(Path(gsq.__file__).parent)
INTERVAL = 0.02  # seconds between looks
DEPTH = 4  # functions that name a place
GROWTH = 1.02  # of the peak, after which tensors are listed again
LISTED = 20  # kinds of tensors, the largest ones
START = "start"  # the place before `train` is reached


class Watch(threading.Thread):
    """Looks at the main thread's place and the process's memory until `stop`; bytes everywhere."""

    def __init__(self, file: Path):
        super().__init__(daemon=True)
        self.file = file
        self.places: dict[str, dict[str, float]] = {}
        self.peak: dict = {"anon": 0}
        self._main, self._over = threading.main_thread().ident, threading.Event()
        self._last = time.perf_counter()

    def run(self) -> None:
        """Look until told to stop."""
        while not self._over.wait(INTERVAL):
            self.look()

    def look(self) -> None:
        """Take one sample, and list tensors if there has never been more."""
        now = memory()
        place = place_of(sys._current_frames().get(self._main))
        seen = self.places.setdefault(place, {"seconds": 0.0} | dict.fromkeys(now, 0))
        before, self._last = self._last, time.perf_counter()
        seen["seconds"] += self._last - before
        seen |= {key: max(seen[key], value) for key, value in now.items()}
        if now["anon"] > GROWTH * self.peak["anon"]:
            self.peak = now | {"place": place, "tensors": tensors(), "time": time.time()}
            self.write()

    def stop(self) -> None:
        """Write what was seen."""
        self._over.set()
        self.join()
        self.write()

    def write(self) -> None:
        """The file as of now."""
        written = int(Path("/proc/self/io").read_text().partition("write_bytes: ")[2].split()[0])
        found = {"peak": self.peak, "most_resident": status()["VmHWM"], "places": self.places, "written": written}
        self.file.write_text(json.dumps(found, indent=1))


def memory() -> dict[str, int]:
    """Bytes of this process: resident, those of them that no file backs (`anon`), and what tensors take on the GPU.

    What a file backs the system can drop or write back; what none backs a machine must have.
    """
    now = status()
    device = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
    return {"resident": now["VmRSS"], "anon": now["VmRSS"] - now["RssFile"], "device": device}


def status() -> dict[str, int]:
    """What the system says of this process's memory, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[-1] == "kB"}


def place_of(frame: FrameType | None) -> str:
    """The functions of the package, below `train`, that are at work in a thread; the outermost `DEPTH` of them."""
    names = []
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE) and "<" not in code.co_qualname.rpartition(".")[2]:
            names.append(code.co_qualname.replace(".<locals>", ""))
        frame = frame.f_back
    inner = list(takewhile(lambda name: name != "train", names))
    return START if len(inner) == len(names) else " > ".join(inner[::-1][:DEPTH]) or "train"


def tensors() -> list[dict]:
    """Kinds of CPU tensors that Python objects hold: dtype, shape, how many, and bytes no file backs; largest first.

    A storage counts once, for its largest tensor. What autograd or an operator at work holds is not seen.
    """
    storages: dict[int, Tensor] = {}
    # What refers to a class is mostly its instances. Not `gc.get_objects()`: it also gives out tuples that the main
    # thread is still building, and these then fail.
    for item in gc.get_referrers(Tensor, nn.Parameter):
        if type(item) in (Tensor, nn.Parameter) and item.device.type == "cpu":
            address = item.untyped_storage().data_ptr()
            if item.numel() >= storages.get(address, item).numel():
                storages[address] = item
    backed, kinds, sizes = mapped_files(), Counter(), Counter()
    for address, tensor in storages.items():
        if not _within(address, backed):
            kind = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            kinds[kind] += 1
            sizes[kind] += tensor.untyped_storage().nbytes()
    return [
        {"dtype": kind[0], "shape": kind[1], "count": kinds[kind], "bytes": size}
        for kind, size in sizes.most_common(LISTED)
    ]


def mapped_files() -> list[tuple[int, int]]:
    """Address ranges, ascending, that files back; pages shared between processes are listed as those of `/dev/zero`."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, inode, *name = line.split()
        if inode != "0" and name[:1] != ["/dev/zero"]:
            start, end = (int(address, 16) for address in addresses.split("-"))
            ranges.append((start, end))
    return ranges


def _within(address: int, ranges: list[tuple[int, int]]) -> bool:
    place = bisect_right(ranges, (address, sys.maxsize)) - 1
    return place >= 0 and address < ranges[place][1]


if __name__ == "__main__":
    watch = Watch(Path(sys.argv[1]))
    watch.start()
    try:
        main(["quantize", *sys.argv[2:]])
    finally:
        watch.stop()
