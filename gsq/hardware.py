"""What a run has to work with: memory, disk, processes, and how fast the machine is.

`Hardware.here` asks this machine, within what a container allows; `Hardware.named` takes published facts of a GPU.
`Speed` turns counted work (`gsq.trace.Work`) into seconds; that of a CPU is measured in about a second.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from gsq.config import Config
from gsq.errors import UserError
from gsq.files import free_bytes
from gsq.trace import CACHED, Work

GB = 1e9
SHARE = 0.9  # of what is free, that a run takes unless told otherwise
LATER = 0.3 * GB  # resident on top of what a process has at its start: tokenizer, kernels, scratch of libraries,
CONTEXT = 2.5 * GB  # and in all with the libraries of CUDA
RESERVED = 1.0 * GB  # of an accelerator: CUDA's context, and what the allocator cannot give out
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Speed:
    """Rates of one process, per second.

    `products` floating point operations of matrix products of activations, `exact` of those in float32 (as
    Hessians and GPTQ have them), `factors` of Cholesky factorizations; `bandwidth` bytes from memory and `cache`
    bytes of small operations; `latency` seconds that a call takes besides, or, if `ahead`, that the processor needs
    to ask for it while the device still works. `disk` bytes read or written.
    """

    products: float
    exact: float
    factors: float
    bandwidth: float
    cache: float
    latency: float
    disk: float
    ahead: bool

    def seconds(self, work: Work) -> float:
        """What `work` takes."""
        busy = work.flops / self.products + work.exact / self.exact
        busy += work.bytes / self.bandwidth + work.small / self.cache
        asked = work.calls * self.latency
        return max(busy, asked) if self.ahead else busy + asked


@dataclass(frozen=True)
class Hardware:
    """One machine of a run, with `local` of its `processes`. All bytes: what the run may take.

    `accelerator` bytes are of each accelerator; None: there is none. `host` is for all processes of the machine
    together, `base` what each of them takes before it has done anything. `disk` is free where hidden states go.
    """

    name: str
    host: float
    accelerator: float | None
    disk: float
    base: float
    processes: int = 1
    local: int = 1
    speed: Speed | None = None

    @classmethod
    def here(cls, device: torch.device, folder: Path, processes: int | None = None) -> Hardware:
        """This machine; `folder` is where hidden states would go. Its speed is unknown until `measured`."""
        count = int(os.environ.get("WORLD_SIZE", "1")) if processes is None else processes
        local = int(os.environ.get("LOCAL_WORLD_SIZE", str(count)))
        own = psutil.Process().memory_info().rss
        free = torch.cuda.mem_get_info(device)[1] - RESERVED if device.type == "cuda" else None
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine"
        host = SHARE * (available_bytes() + own * local)
        base = own + LATER if device.type == "cpu" else max(own + LATER, CONTEXT)
        return cls(name, host, free and SHARE * free, free_bytes(folder), base, count, local)

    @classmethod
    def named(cls, name: str, folder: Path, processes: int = 1) -> Hardware:
        """So many GPUs of that name, eight to a machine, with the memory and disk of this machine."""
        if name not in GPUS:
            raise UserError(f"unknown device {name!r}; known are {', '.join(GPUS)}, or leave it out for this machine")
        gpu, local = GPUS[name], min(processes, 8)
        device = SHARE * (gpu.memory - RESERVED)
        host = SHARE * available_bytes()
        return cls(name, host, device, free_bytes(folder), CONTEXT, processes, local, gpu.speed)

    @property
    def share(self) -> float:
        """Bytes of the host that one process may take."""
        return self.host / self.local

    def limited(self, config: Config) -> Hardware:
        """The same within the budgets of a config."""
        host, device = config.memory.host_gb, config.memory.device_gb
        given = self if host is None else replace(self, host=host * GB)
        return given if device is None or self.accelerator is None else replace(given, accelerator=device * GB)

    def measured(self, device: torch.device, dtype: torch.dtype, width: int) -> Hardware:
        """The same with its speed, for activations of this dtype and so many features."""
        return replace(self, speed=measure(device, dtype, width))


@dataclass(frozen=True)
class GPU:
    """Published facts: bytes of memory, dense bfloat16 and float32 FLOP/s, bytes/s of memory."""

    memory: float
    bfloat16: float
    float32: float
    bandwidth: float

    @property
    def speed(self) -> Speed:
        """What programs reach of it: of products half, as they are of moderate size; of bandwidth three quarters.

        Products in float32 are exact ones. Factorizations and their triangular solves reach a tenth.
        """
        exact = 0.5 * self.float32
        return Speed(
            products=0.5 * self.bfloat16, exact=exact, factors=0.1 * exact, bandwidth=0.75 * self.bandwidth,
            cache=0.75 * self.bandwidth, latency=8e-6, disk=1e9, ahead=True,
        )  # fmt: skip


GPUS = {  # data sheets of the manufacturer: SXM boards where there are several
    "h200": GPU(141e9, 989e12, 67e12, 4.8e12),
    "h100": GPU(80e9, 989e12, 67e12, 3.35e12),
    "a100-80gb": GPU(80e9, 312e12, 19.5e12, 2.04e12),
    "rtx-4090": GPU(24e9, 165e12, 82.6e12, 1.01e12),
    "rtx-5090": GPU(32e9, 210e12, 105e12, 1.79e12),
}


def available_bytes() -> float:
    """Bytes of memory that programs may still take here: the system's, or less where a container has a limit."""
    free = float(psutil.virtual_memory().available)
    for limit, usage, statistics in CGROUPS:
        allowed, used = _number(limit), _number(usage)
        if allowed is not None and used is not None:
            free = min(free, max(0.0, allowed - used + _reclaimable(statistics)))
    return free


def measure(device: torch.device, dtype: torch.dtype, width: int) -> Speed:
    """Speed of `device`, in about a second: products of `width` features, operations large, small and tiny.

    With one thread the seconds are the processor's, so that other programs do not count.
    """
    cpu, width = device.type == "cpu", max(64, min(width, 2048))
    tokens, count = (1024, 1 << 23) if cpu else (16384, 1 << 28)
    clock = _Clock(device)

    def product(kind: torch.dtype) -> float:
        x, w = (torch.randn(size, width, device=device).to(kind) for size in (tokens, width))
        return 2 * tokens * width**2 / clock(lambda: torch.nn.functional.linear(x, w))

    def elementwise(count: int) -> float:
        """Ten passes over so many numbers, such as roundings and relaxations make, of 8 bytes each."""
        x, table = torch.rand(count, device=device), torch.rand(4, device=device)

        def work() -> None:
            codes = torch.where(x == 0, 0, x / table[1]).round_().clamp_(0, 3).to(torch.uint8)
            table[codes.int()].mul_(x).sub_(x).square_()

        return 10 * 8 * count / clock(work)

    square = torch.rand(width, width, device=device)
    square += square.T + 2 * width * torch.eye(width, device=device)
    tiny = torch.zeros(64, device=device)
    return Speed(
        products=product(dtype), exact=product(torch.float32),
        factors=width**3 / 3 / clock(lambda: torch.linalg.cholesky_ex(square)),
        bandwidth=elementwise(count), cache=elementwise(CACHED // 32 if cpu else count),
        latency=clock(lambda: tiny + tiny, 1000), disk=1e9, ahead=not cpu,
    )  # fmt: skip


class _Clock:
    """Times calls on a device."""

    def __init__(self, device: torch.device):
        self.device = device
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self.now = time.process_time if alone else time.perf_counter

    def __call__(self, work: Callable[[], object], times: int = 1) -> float:
        """Seconds of one call: the best of some series of so many `times`."""
        return min(self._series(work, times) for _ in range(9)) / times

    def _series(self, work: Callable[[], object], times: int) -> float:
        self._wait()
        start = self.now()
        for _ in range(times):
            work()
        self._wait()
        return self.now() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _number(path: str) -> float | None:
    """The number in a file; None if there is none, as where nothing is limited."""
    try:
        return float(Path(path).read_text())
    except (OSError, ValueError):
        return None


def _reclaimable(path: str) -> float:
    """Bytes of cached files, which count as used and are given back when asked for."""
    try:
        lines = (line.split() for line in Path(path).read_text().splitlines())
        return sum(float(value) for key, value in lines if key in ("inactive_file", "total_inactive_file"))
    except (OSError, ValueError):
        return 0.0
