"""GPTQ: quantize column by column, and let the columns still to come absorb each error.

Source: Frantar et al., https://arxiv.org/abs/2210.17323. Every matrix that shares a shape goes
through as one batch: `[batch, out, in]` weights, `[batch, in, in]` Hessians `sum x x^T`, both in the
codebook's basis.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsq.codebook import Codebook, QuantizedTensor
from gsq.init.scales import search_groups
from gsq.kernels.columns import propagate

BLOCK = 128  # columns, about, whose errors are spread at once, by one matrix product
FACTORED = 1 << 27  # entries of Hessians factored at once: some copies, in float64 at worst, take 6 GB


def gptq(weights: Tensor, hessian: Tensor, codebook: Codebook, upper: Tensor | None = None) -> QuantizedTensor:
    """Quantize `weights` `[batch, out, in]` under a damped `hessian` `[batch, in, in]` (see `damped`).

    Each group takes its scale from the weights as they stand when the loop reaches it, weighted by
    how much an error in each column will cost. `upper` is `inverse_factor(hessian)`, if it is at
    hand. Raises `torch.linalg.LinAlgError` if the Hessian is not positive definite.
    """
    size = codebook.group_size
    blocks = _blocks(codebook.groups(weights.shape[-1]), size)
    upper = inverse_factor(hessian) if upper is None else upper  # [batch, in, in]
    importance = upper.diagonal(dim1=-2, dim2=-1)[:, None] ** -2  # [batch, 1, in]
    left = weights.to(torch.float32, copy=True)
    codes = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
    scales, offsets = [], []  # of each group, [batch, out, 1]
    for start, end in blocks:
        for first in range(start, end, size):
            if first % size == 0:
                group = slice(first, first + size)
                scale, offset = search_groups(left[..., group], codebook, importance[..., group])
                scales.append(scale)
                offsets.append(torch.zeros_like(scale) if offset is None else offset)
            last, rest = min(first + size, end), slice(first, end)
            scale, offset = (found[-1][..., 0].float() for found in (scales, offsets))
            codes[..., first:last] = propagate(
                left[..., rest], upper[:, rest, rest], scale, offset, codebook.levels, last - first
            )
        errors = left[..., start:end]  # which have taken the place of the weights
        left[..., end:].baddbmm_(errors, upper[:, start:end, end:], alpha=-1)
    return QuantizedTensor(codes, torch.cat(scales, -1), codebook, torch.cat(offsets, -1) if codebook.offset else None)


def _blocks(groups: int, size: int) -> list[tuple[int, int]]:
    """Blocks of columns: whole groups, or parts of one, so that a scale sees every earlier error."""
    columns = groups * size
    if size <= BLOCK:
        step = size * (BLOCK // size)
        return [(start, min(start + step, columns)) for start in range(0, columns, step)]
    ends = range(size, columns + 1, size)
    return [(start, min(start + BLOCK, end)) for end in ends for start in range(end - size, end, BLOCK)]


def damped(hessian: Tensor, damping: float) -> Tensor:
    """`hessian` `[batch, in, in]` plus `damping` times its mean diagonal; the identity where it is zero."""
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)  # [batch, 1]
    result = hessian.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(torch.where(mean > 0, damping * mean, 1.0))
    return result


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular `U` with `inverse(hessian) = U^T U`, `[batch, in, in]`, float32.

    Factored in float32, as the loop is; a matrix for which that fails, in float64.
    """
    upper = torch.empty(hessian.shape, device=hessian.device)
    step = max(1, FACTORED // hessian[0].numel())
    for some, found in zip(hessian.split(step), upper.split(step), strict=True):
        single, failed = _inverse_factor(some.float())
        found.copy_(single)
        if failed.any():
            double, still = _inverse_factor(some[failed].double())
            found[failed], failed = double.float(), still
        if failed.any():
            raise torch.linalg.LinAlgError("the Hessian is not positive definite; raise init.damping")
    return upper


def _inverse_factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """`U` in the Hessian's dtype, and for which matrices there is none, bool `[batch]`."""
    lower, info = torch.linalg.cholesky_ex(hessian)
    failed = info != 0
    lower[failed] = torch.eye(hessian.shape[-1], dtype=lower.dtype, device=lower.device)  # has an inverse
    upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return upper, failed | (info != 0)
