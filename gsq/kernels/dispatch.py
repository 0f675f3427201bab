"""Where a kernel runs: in Triton on a GPU that can, as its plain PyTorch twin anywhere else.

This is the only place that decides. A kernel's public function lives in `gsq/kernels/NAME.py`, with
its twin; it asks `triton_runs` and hands over to the function of the same name and signature in
`gsq/kernels/NAME_triton.py`, imported only then.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

CAPABILITY = (8, 0)  # the oldest GPU with bfloat16 arithmetic: Ampere
_interpreting = False


def triton_runs(*tensors: Tensor) -> bool:
    """Whether work on `tensors` goes to Triton; a `ValueError` if they are on different devices."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"a kernel needs its tensors on one device, got {', '.join(sorted(map(str, devices)))}")
    device = devices.pop()
    if device.type == "cpu":
        return _interpreting
    return device.type == "cuda" and _can(device)


@contextmanager
def interpreted() -> Iterator[None]:
    """Inside, tensors on the CPU go to Triton too, for tests without a GPU.

    Triton interprets kernels only if `TRITON_INTERPRET=1` was set before they were imported.
    """
    global _interpreting
    before, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = before


@cache
def _can(device: torch.device) -> bool:
    """Whether a GPU runs the kernels; the reason why not is said once."""
    if find_spec("triton") is None:
        lack = "Triton is not installed (pip install triton)"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < CAPABILITY:
        lack = f"{torch.cuda.get_device_name(device)} is older than compute capability {CAPABILITY[0]}.{CAPABILITY[1]}"
    else:
        return True
    warnings.warn(f"GSQ's kernels do not run on {device}: {lack}; plain PyTorch is used, slower", stacklevel=3)
    return False
