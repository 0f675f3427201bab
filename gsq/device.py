"""The one place that decides device and dtype."""

from __future__ import annotations

import ctypes
import os
import resource
import sys

import torch


def pick_device() -> torch.device:
    """The accelerator of this process, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # which the launcher counts on each machine


def activation_dtype(device: torch.device, wanted: str = "auto") -> torch.dtype:
    """The dtype that activations are computed in: bfloat16 where the hardware multiplies it natively, else float32."""
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
    native = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of freed tensors rather than give it back to the system at once.

    A walk on a CPU allocates the same megabytes again and again; asking the kernel for them each time
    costs a third of the time. Tensors above 32 MB, glibc's limit, stay with the kernel: on the heap
    they would leave holes that nothing fits. Does nothing where the C library is another.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_threshold = -1, -3  # from malloc.h
    if mallopt:
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 << 20)


def peak_memory(device: torch.device) -> tuple[float, float]:
    """Peak resident memory of this process and peak memory of the device, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    return host, torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
