"""Where large tensors live: on the device, in the host's memory, or in files mapped into it.

Hidden states of all calibration tokens, Hessians of hundreds of experts and the state of a relaxation are asked
for here, by size alone, and the first place that has room takes them. Whoever computes brings pieces to the device;
where a tensor lives changes no bit of any result.

Files have no name, so nothing of them outlives the process, however it ends.
"""

from __future__ import annotations

import copy
import gc
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from gsq import units
from gsq.errors import UserError
from gsq.files import free_bytes

T = TypeVar("T")
WINDOWS = 8  # in a micro-batch where nobody knows better; the caches of a CPU gain nothing from more
SMALL = 1 << 20  # bytes below which a tensor is not worth counting


@dataclass
class Rooms:
    """Bytes that large tensors may take of the device (an accelerator's) and of the host's memory."""

    device: float = math.inf
    host: float = math.inf


class Memory:
    """Gives out tensors, and knows what is taken until they are let go.

    On a CPU the device's memory is the host's.
    """

    def __init__(self, device: torch.device, rooms: Rooms | None = None, folder: Path | None = None):
        """`folder` is where files are put once `rooms` are full; None: the system's for temporary files."""
        self.device, self.rooms, self.folder = device, rooms or Rooms(), folder
        self.taken = {"device": 0, "host": 0, "file": 0}  # bytes now
        self.most = dict(self.taken)  # and at most so far

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, near: bool = False) -> Tensor:
        """An uninitialized tensor; `near` says that kernels work on it, so that it must be on the device.

        Raises `UserError` if no place is left for it.
        """
        size = math.prod(shape) * dtype.itemsize
        if size < SMALL:
            return torch.empty(shape, dtype=dtype, device=self.device)
        place = self._place(size, near)
        make = {"device": self._on_device, "host": self._on_host, "file": self._in_file}[place]
        tensor = make(size).view(dtype).view(shape)
        self.taken[place] += size
        self.most[place] = max(self.most[place], self.taken[place])
        weakref.finalize(tensor.untyped_storage(), self._release, place, size)  # which all its views share
        return tensor

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, near: bool = False) -> Tensor:
        """The same, filled with zeros."""
        return self.empty(shape, dtype, near).zero_()

    def copied(self, module: nn.Module) -> nn.Module:
        """A copy of a module, its parameters among the tensors given out, where kernels can work on them."""
        memo = {}
        for parameter in module.parameters():
            own = self.empty(parameter.shape, parameter.dtype, near=True).copy_(parameter)
            memo[id(parameter)] = nn.Parameter(own, requires_grad=parameter.requires_grad)
        return copy.deepcopy(module, memo)

    def _place(self, size: int, near: bool) -> str:
        if self.device.type != "cpu" and (near or self.taken["device"] + size <= self.rooms.device):
            return "device"
        return "host" if self.taken["host"] + size <= self.rooms.host else "file"

    def _release(self, place: str, size: int) -> None:
        self.taken[place] -= size

    def _on_device(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def _on_host(self, size: int) -> Tensor:
        """Pages that go back to the system as soon as they are let go; an accelerator reads them without a detour."""
        pages = _PinnedPages(-1, size) if self.device.type == "cuda" else mmap.mmap(-1, size)
        tensor = torch.frombuffer(pages, dtype=torch.uint8)
        if self.device.type == "cuda":
            pages.pin(tensor.data_ptr(), size)
        return tensor

    def _in_file(self, size: int) -> Tensor:
        folder = Path(self.folder or tempfile.gettempdir())
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is found now, not as a signal later
                return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)
        except OSError as error:
            held = ", ".join(f"{units.size(taken)} {place}" for place, taken in self.taken.items() if taken)
            raise UserError(
                f"no room for {units.size(size)} more of hidden states and the like ({held or 'nothing'} taken): "
                f"{folder} has {units.size(free_bytes(folder))} free ({error.strerror or error}); raise memory.host_gb "
                "or memory.device_gb, let memory.disk_dir name a larger disk, or take fewer calib.windows"
            ) from None


class _PinnedPages(mmap.mmap):
    """Pages that the CUDA driver has locked; torch's own pinned memory takes the next power of two."""

    address = None

    def pin(self, address: int, size: int) -> None:
        if int(torch.cuda.cudart().cudaHostRegister(address, size, 0)) == 0:  # if refused, copies are slower, no more
            self.address = address

    def __del__(self) -> None:
        if self.address is not None:
            torch.cuda.cudart().cudaHostUnregister(self.address)


class Batch:
    """How many windows go through a module at once: half as many from when the device's memory does not hold them."""

    def __init__(self, windows: int):
        self.windows = windows

    def fitted(self, work: Callable[[], T]) -> T:
        """What `work` gives, which is done again with fewer windows whenever memory runs out.

        It must ask for `windows` itself, and leave nothing behind that a second run would count twice. Raises
        `UserError` if a single window is too much.
        """
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                if self.windows == 1:
                    raise UserError(
                        f"one window of calibration tokens does not fit the device ({str(error).splitlines()[0]}); "
                        "lower calib.length, set refine.logits: bfloat16 or refine.stage: module, or use more processes"
                    ) from None
            self.windows = (self.windows + 1) // 2
            gc.collect()  # outside the handler, which keeps what failed alive
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
