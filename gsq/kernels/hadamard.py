"""The fast Walsh-Hadamard transform: `log2(d)` passes of sums and differences instead of a `d x d` product.

The order of operations is that of the usual butterfly (strides 1, 2, 4, ...), element by element, so
that results agree bit for bit with other programs that use it. What goes with a transform wherever
one is used (signs on either side, a factor, padding, another dtype) is done in the same pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsq.kernels.dispatch import triton_runs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 1 << 14  # block that Triton transforms: one program holds all of it
CHUNK = {"cpu": 1 << 19}  # numbers transformed at once: on a CPU they stay in its cache,
ELSEWHERE = 1 << 26  # elsewhere the copies stay small beside the whole


def hadamard(
    x: Tensor,
    block: int | None = None,
    before: Tensor | None = None,
    after: Tensor | None = None,
    factor: float = 1.0,
    divisor: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """`after * (H (before * x) * factor / divisor)` for every block of every row of `x` `[..., in]`.

    `H` is the unnormalized Hadamard matrix in natural order, `[block, block]`; a row is one block unless
    `block` is given. `before` and `after` `[block]`, float32, multiply every block alike. A factor and a
    divisor round differently, which matters to readers of a format.

    `x` is float32, bfloat16 or float16, the arithmetic float32. The result goes into `out` `[..., columns]`
    (of any of the three; rows may be parts of longer rows), or into a new tensor like `x`. Blocks count
    from the start of a row: the last one is filled up with zeros where `x` ends, and cut where `out` ends.
    There is no gradient. Raises `ValueError` if something does not fit.
    """
    block = x.shape[-1] if block is None else block
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    _check(x, out, block, before, after)
    if x.shape[-1] == out.shape[-1] and x.shape[-1] % block == 0:
        rows, target = x.reshape(-1, block), out.view(-1, block)
    else:
        rows, target = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    transform = _transform
    if triton_runs(*(tensor for tensor in (x, out, before, after) if tensor is not None)) and block <= LARGEST:
        from gsq.kernels.hadamard_triton import transform
    transform(rows, target, block, before, after, factor, divisor)
    return out


def _check(x: Tensor, out: Tensor, block: int, before: Tensor | None, after: Tensor | None) -> None:
    """Raise `ValueError` unless everything fits."""
    if block <= 0 or block & (block - 1):
        raise ValueError(f"a Hadamard transform needs a power of two, got {block}")
    if x.dtype not in DTYPES or out.dtype not in DTYPES:
        raise ValueError(f"a Hadamard transform takes float32, bfloat16 and float16, got {x.dtype} for {out.dtype}")
    if x.shape[:-1] != out.shape[:-1] or -(-x.shape[-1] // block) != -(-out.shape[-1] // block):
        raise ValueError(f"{[*x.shape]} in blocks of {block} does not fit into {[*out.shape]}")
    if out.shape[-1] > 1 and out.stride(-1) != 1:
        raise ValueError("a Hadamard transform writes to a tensor that is dense along its rows")
    for signs in (before, after):
        if signs is not None and (signs.shape != (block,) or signs.dtype != torch.float32):
            raise ValueError(f"signs must be float32 [{block}], got {signs.dtype} {[*signs.shape]}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("a Hadamard transform has no gradient here; use torch.no_grad()")


def _transform(
    x: Tensor, out: Tensor, block: int, before: Tensor | None, after: Tensor | None, factor: float, divisor: float
) -> None:
    """The plain version: rows `x` `[n, in]` into `out` `[n, columns]`, in chunks."""
    blocks = -(-x.shape[-1] // block)
    padding = blocks * block - x.shape[-1]
    step = max(1, CHUNK.get(x.device.type, ELSEWHERE) // (blocks * block))
    for start in range(0, len(x), step):
        rows = x[start : start + step].float().contiguous()
        if padding:
            rows = torch.nn.functional.pad(rows, (0, padding))
        rows = rows.reshape(-1, block)
        columns = _butterfly(rows.T, before)
        if factor != 1:
            columns.mul_(factor)
        if divisor != 1:
            columns.div_(divisor)
        if after is not None:
            columns.mul_(after[:, None])
        target = out[start : start + step]
        result = columns.T if target.is_contiguous() else columns.T.contiguous()  # one odd stride at a time is fast
        target.copy_(result.reshape(len(target), -1)[:, : target.shape[-1]])


def _butterfly(columns: Tensor, signs: Tensor | None) -> Tensor:
    """Columns `[d, n]`, times `signs` `[d]`, transformed; laid out so that every pass reads and writes long runs."""
    d, n = columns.shape
    source = columns.clone(memory_format=torch.contiguous_format)
    if signs is not None:
        source.mul_(signs[:, None])
    target = torch.empty_like(source)
    stride = 1
    while stride < d:
        read, write = (t.view(d // (2 * stride), 2, stride, n) for t in (source, target))
        torch.add(read[:, 0], read[:, 1], out=write[:, 0])
        torch.sub(read[:, 0], read[:, 1], out=write[:, 1])
        source, target = target, source
        stride *= 2
    return source
