"""Settings of all tests, and where kernels are tested."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported

import pytest

from gsq.kernels import dispatch

# The matrices of these tests are so small that threads only wait for each other. Set once: LU
# factorizations of MKL fail when the number of threads changes in between.
torch.set_num_threads(1)


@pytest.fixture
def kernels():
    """The device on which Triton kernels run, on a GPU compiled, on a CPU interpreted; they are used inside."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
    else:
        pytest.importorskip("triton")
        with dispatch.interpreted():
            yield torch.device("cpu")
