"""Machine code for a GPU that is not there: what Triton's interpreter takes, its compiler may not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = """
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import Autotuner
from triton.runtime.jit import KernelInterface
from gsq.kernels import dispatch

class Hopper:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

def compile_only(kernel, grid):
    tuned = isinstance(kernel, Autotuner)
    if tuned:
        kernel.configs = kernel.configs[:1]
    def launch(*args, **options):
        made = kernel.warmup(*args, grid=(1,), **options)
        for binary in made if tuned else [made]:
            assert binary.asm["cubin"]
            print(binary.name)
    return launch

triton.runtime.driver.set_active(Hopper())
KernelInterface.__getitem__ = compile_only
with dispatch.interpreted():
"""


def compiled(body: str, cache: Path) -> list[str]:
    """Names of the kernels that `body` launches, each compiled for Hopper instead, in a process of its own.

    `body` calls kernels with tensors on the CPU; what it computes is void. A kernel that is tuned is
    compiled in its first configuration. Binaries go to the folder `cache`. The calling test is skipped
    without Triton.
    """
    pytest.importorskip("triton")
    program = HARNESS + "".join(f"    {line}\n" for line in body.strip().splitlines())
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()
