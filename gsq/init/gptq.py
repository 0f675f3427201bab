"""GPTQ: quantize column by column, and let the columns still to come absorb each error.

Source: Frantar et al., https://arxiv.org/abs/2210.17323. Every matrix that shares a shape goes
through as one batch: `[batch, out, in]` weights, `[batch, in, in]` Hessians `sum x x^T`, both in the
codebook's basis.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsq.codebook import Codebook, QuantizedTensor
from gsq.init.rtn import search_groups

BLOCK = 128  # columns, about, whose errors are spread at once, by one matrix product


def gptq(weights: Tensor, hessian: Tensor, codebook: Codebook) -> QuantizedTensor:
    """Quantize `weights` `[batch, out, in]` under a damped `hessian` `[batch, in, in]` (see `damped`).

    Each group takes its scale from the weights as they stand when the loop reaches it, weighted by
    how much an error in each column will cost. Raises `torch.linalg.LinAlgError` if the Hessian is
    not positive definite.
    """
    batch, rows, columns = weights.shape
    size = codebook.group_size
    groups = codebook.groups(columns)
    upper = inverse_factor(hessian)  # [batch, in, in]
    pivots = upper.diagonal(dim1=-2, dim2=-1)  # [batch, in]
    table = codebook.level_table(weights.device)
    left = weights.float().clone()
    codes = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
    scales = torch.empty(batch, rows, groups, dtype=codebook.scale_dtype, device=weights.device)
    offsets, offset = torch.empty_like(scales) if codebook.offset else None, 0.0
    for start, end in _blocks(columns, size):
        current = left[..., start:end]
        errors = torch.empty_like(current)
        for column in range(start, end):
            here = column - start
            if column % size == 0:
                importance = pivots[:, None, column : column + size] ** -2
                found, found_offsets = search_groups(left[..., column : column + size], codebook, importance)
                scales[..., column // size] = found[..., 0]
                scale = found[..., 0].float()
                safe = torch.where(scale == 0, torch.inf, scale)
                if codebook.offset:
                    offsets[..., column // size] = found_offsets[..., 0]
                    offset = found_offsets[..., 0].float()
            code = codebook.nearest((current[..., here] - offset) / safe)
            codes[..., column] = code
            error = (current[..., here] - table[code.int()] * scale - offset) / pivots[:, None, column]
            errors[..., here] = error
            current[..., here + 1 :] -= error[..., None] * upper[:, None, column, column + 1 : end]
        left[..., end:] -= errors @ upper[:, start:end, end:]
    return QuantizedTensor(codes, scales, codebook, offsets)


def _blocks(columns: int, size: int) -> list[tuple[int, int]]:
    """Blocks of columns: whole groups, or parts of one, so that a scale sees every earlier error."""
    if size <= BLOCK:
        step = size * (BLOCK // size)
        return [(start, min(start + step, columns)) for start in range(0, columns, step)]
    ends = range(size, columns + 1, size)
    return [(start, min(start + BLOCK, end)) for end in ends for start in range(end - size, end, BLOCK)]


def damped(hessian: Tensor, damping: float) -> Tensor:
    """`hessian` `[batch, in, in]` plus `damping` times its mean diagonal; the identity where it is zero."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)  # [batch]
    ridge = torch.where(diagonal > 0, damping * diagonal, 1.0)
    return hessian + torch.eye(hessian.shape[-1], device=hessian.device) * ridge[:, None, None]


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular `U` with `inverse(hessian) = U^T U`, `[batch, in, in]`.

    Factored in float32, as the loop is; in float64 where that fails.
    """
    for dtype in (torch.float32, torch.float64):
        lower, info = torch.linalg.cholesky_ex(hessian.to(dtype))
        if not info.any():
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not info.any():
                return upper.float()
    raise torch.linalg.LinAlgError("the Hessian is not positive definite; raise init.damping")
