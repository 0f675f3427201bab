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
    codebook = quantized.codebook
    normal, target = _normal_equations(weights.float(), quantized, hessian)
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


def _normal_equations(weights: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """`N` `[batch, out, unknowns, unknowns]` and `t` `[batch, out, unknowns]`: a row's error is `s N s - 2 s t + ...`.

    For the `s` of `_unknowns`. Between groups, what one of the two has to say of the other is computed once.
    """
    codebook, (batch, rows, groups) = quantized.codebook, quantized.scales.shape
    size, unknowns = codebook.group_size, groups * (1 + codebook.offset)
    table = codebook.level_table(weights.device) - codebook.center
    by_group = lambda x: x.unflatten(-1, (-1, size))  # noqa: E731
    levels = by_group(columns.levels_of(quantized.codes, table))  # [batch, out, groups, size]
    aims = by_group(weights @ hessian)
    target = (aims * levels).sum(-1)
    normal = torch.empty(batch, rows, unknowns, unknowns, device=weights.device)
    for group in range(groups):
        first = group * size
        reached = by_group(levels[:, :, group] @ hessian[:, first : first + size, first:])  # from this group on
        own = reached.mul_(levels[:, :, group:]).sum(-1)
        normal[..., group, group:groups] = normal[..., group:groups, group] = own
    if codebook.offset:
        moved = by_group(
            hessian.unflatten(1, (groups, size)).sum(2)
        )  # [batch, groups, groups, size], of all rows alike
        cross = torch.einsum("bokc,blkc->bokl", levels, moved)
        normal[..., :groups, groups:], normal[..., groups:, :groups] = cross, cross.mT
        normal[..., groups:, groups:] = moved.sum(-1)[:, None]
        target = torch.cat([target, aims.sum(-1)], -1)
    return normal, target


def _unknowns(quantized: QuantizedTensor) -> Tensor:
    """Scales and, if there are offsets, what the middle of the levels stands for, `[batch, out, unknowns]`."""
    scales = quantized.scales.float()
    return torch.cat([scales, quantized.centers()], -1) if quantized.codebook.offset else scales
