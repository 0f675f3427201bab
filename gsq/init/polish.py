"""Exact improvements of a quantized matrix under `tr((W - Q) H (W - Q)^T)`: neither step can raise it.

`descend` moves every code, in turn, to its best value given all others; `refit_scales` solves for
the scales, and offsets, given the codes. Shapes and basis as in `gsq.init.gptq`: weights
`[batch, out, in]`, `H` `[batch, in, in]`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gsq.codebook import QuantizedTensor
from gsq.kernels import columns

BLOCK = 64  # columns updated one by one before the rest of the gradient is, by one matrix product
SYSTEMS = 1 << 28  # coefficients of the linear systems that are solved at once: a gigabyte
PRODUCTS = 1 << 27  # weights whose products with the Hessian are held at once: half a gigabyte each, in some copies


def quadratic(values: Tensor, hessian: Tensor) -> Tensor:
    """`v H v^T` of each row of `values` `[batch, out, in]`, `[batch, out]`."""
    return (values.float() @ hessian).mul_(values).sum(-1)


def row_errors(weights: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> Tensor:
    """The objective of each row, `[batch, out]`: `d H d^T` with `d = w - q`."""
    return quadratic(weights - quantized.values(), hessian)


def relative_error(weights: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> float:
    """`tr(D H D^T) / tr(W H W^T)` over the whole batch."""
    error, size = row_errors(weights, quantized, hessian).sum(), quadratic(weights, hessian).sum()
    return float(error / size.clamp_min(1e-30))


def polish(
    weights: Tensor, quantized: QuantizedTensor, hessian: Tensor, rounds: int, sweeps: int = 2
) -> QuantizedTensor:
    """`rounds` times: `sweeps` of `descend`, then `refit_scales`; and a last descent for the last scales."""
    for _ in range(rounds):
        quantized = descend(weights, quantized, hessian, sweeps)
        quantized = refit_scales(weights, quantized, hessian)
    return descend(weights, quantized, hessian, sweeps) if rounds else quantized


def free_values(weights: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> Tensor:
    """Best real value of each weight given all others as quantized, `[batch, out, in]`."""
    values = quantized.values()
    moves = ((weights.float() - values) @ hessian).div_(hessian.diagonal(dim1=-2, dim2=-1)[:, None])
    return values.add_(moves)


def descend(weights: Tensor, quantized: QuantizedTensor, hessian: Tensor, sweeps: int = 1) -> QuantizedTensor:
    """Cyclic coordinate descent over the codes, scales fixed."""
    levels, group = quantized.codebook.levels, quantized.codebook.group_size
    hessian, scales = hessian.contiguous(), quantized.scales.float().contiguous()
    offsets = torch.zeros_like(scales) if quantized.offsets is None else quantized.offsets.float().contiguous()
    for _ in range(sweeps):
        values, codes = quantized.values(), torch.empty_like(quantized.codes)
        gradient = (weights.float() - values) @ hessian  # [batch, out, in], of half the objective, by -Q
        for start in range(0, weights.shape[-1], BLOCK):
            block, behind = slice(start, start + BLOCK), slice(start + BLOCK, None)
            of_block = gradient[..., block], values[..., block], hessian[:, block, block]
            codes[..., block] = columns.descend(*of_block, scales, offsets, levels, group, start)
            moves = gradient[..., block]  # which have taken the place of the gradient
            gradient[..., behind].baddbmm_(moves, hessian[:, block, behind])
        before, quantized = quantized.codes, replace(quantized, codes=codes)
        if torch.equal(codes, before):
            break
    return quantized


def refit_scales(weights: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> QuantizedTensor:
    """Least-squares scales and offsets of every row given its codes, rounded to their stored dtype.

    A row whose rounded solution is not better keeps what it has.
    """
    batch, rows, groups = quantized.scales.shape
    unknowns = groups * (1 + quantized.codebook.offset)
    step = max(1, min(SYSTEMS // unknowns**2, PRODUCTS // weights.shape[-1]) // batch)
    if step < rows:
        spans = [(start, min(start + step, rows)) for start in range(0, rows, step)]
        parts = [refit_scales(weights[:, start:end], quantized.rows(start, end), hessian) for start, end in spans]
        return QuantizedTensor.stacked(parts)
    codebook, size = quantized.codebook, quantized.codebook.group_size
    table = codebook.level_table(weights.device) - codebook.center
    levels = columns.levels_of(quantized.codes, table)  # [batch, out, in]
    basis = [levels, torch.ones_like(levels)] if codebook.offset else [levels]

    def by_group(x: Tensor) -> Tensor:
        """Sums over each group of the products of `x` `[batch, out, in]` with each of the basis, side by side."""
        return torch.cat([(x * b).unflatten(-1, (groups, size)).sum(-1) for b in basis], dim=-1)

    target = by_group(weights.float() @ hessian)  # [batch, out, unknowns]
    normal = torch.empty(*target.shape, target.shape[-1], device=weights.device)
    for unknown in range(target.shape[-1]):
        part = slice(unknown % groups * size, (unknown % groups + 1) * size)
        normal[..., unknown, :] = by_group(basis[unknown // groups][..., part] @ hessian[:, part])
    trace = normal.diagonal(dim1=-2, dim2=-1)
    has_say = trace > 0  # unlike a group of zero levels
    exact = trace.clone()
    trace += torch.where(has_say, 1e-6 * trace, 1.0)
    lower, info = torch.linalg.cholesky_ex(normal)
    trace.copy_(exact)
    solution = torch.cholesky_solve(target[..., None], lower)[..., 0]
    solved = (info == 0)[..., None] & torch.isfinite(solution) & has_say
    scales = torch.where(solved[..., :groups], solution[..., :groups], quantized.scales.float())
    refitted = replace(quantized, scales=scales.to(codebook.scale_dtype))
    if codebook.offset:
        centers = torch.where(solved[..., groups:], solution[..., groups:], quantized.centers())
        refitted.offsets = refitted.offsets_for(centers)
    old, new = _unknowns(quantized), _unknowns(refitted)
    change = (normal @ (old + new)[..., None])[..., 0] - 2 * target  # times the move, it is that of the row's error
    better = ((new - old).double() * change).sum(-1) < 0
    take = lambda new, old: torch.where(better[..., None], new, old)  # noqa: E731
    offsets = take(refitted.offsets, quantized.offsets) if codebook.offset else None
    return QuantizedTensor(quantized.codes, take(refitted.scales, quantized.scales), codebook, offsets)


def _unknowns(quantized: QuantizedTensor) -> Tensor:
    """Scales and, if there are offsets, what the middle of the levels stands for, `[batch, out, unknowns]`."""
    scales = quantized.scales.float()
    return torch.cat([scales, quantized.centers()], -1) if quantized.codebook.offset else scales
