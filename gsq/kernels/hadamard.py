"""The fast Walsh-Hadamard transform: `log2(d)` passes of sums and differences instead of a `d x d` product.

The order of operations is that of the usual butterfly (strides 1, 2, 4, ...), element by element, so
that results agree bit for bit with other programs that use it. This is the plain PyTorch version.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = {"cpu": 1 << 19}  # numbers transformed at once: on a CPU they stay in its cache,
ELSEWHERE = 1 << 26  # elsewhere the copies stay small beside the whole


def hadamard(x: Tensor) -> Tensor:
    """Transform each row of `x` `[..., d]`, float32, with the unnormalized Hadamard matrix in natural order.

    `d` is a power of two, or a `ValueError` is raised. Twice the transform is `d` times the identity.
    """
    d = x.shape[-1]
    if d & (d - 1) or not d:
        raise ValueError(f"a Hadamard transform needs a power of two, got {d}")
    rows = x.reshape(-1, d)
    out = torch.empty_like(rows)
    step = max(1, CHUNK.get(x.device.type, ELSEWHERE) // d)
    for start in range(0, len(rows), step):
        out[start : start + step] = _butterfly(rows[start : start + step].T).T
    return out.view(x.shape)


def _butterfly(columns: Tensor) -> Tensor:
    """Columns `[d, n]` transformed; laid out so that every pass reads and writes long runs."""
    d, n = columns.shape
    source = columns.clone(memory_format=torch.contiguous_format)
    target = torch.empty_like(source)
    stride = 1
    while stride < d:
        read, write = (t.view(d // (2 * stride), 2, stride, n) for t in (source, target))
        torch.add(read[:, 0], read[:, 1], out=write[:, 0])
        torch.sub(read[:, 0], read[:, 1], out=write[:, 1])
        source, target = target, source
        stride *= 2
    return source
