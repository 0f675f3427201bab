"""Settings of all tests."""

import torch

# The matrices of these tests are so small that threads only wait for each other. Set once: LU
# factorizations of MKL fail when the number of threads changes in between.
torch.set_num_threads(1)
