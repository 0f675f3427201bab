"""Exact improvements of a quantized matrix under `tr((W - Q) H (W - Q)^T)`: neither step can raise it.

`descend` moves every code, in turn, to its best value given all others; `refit_scales` solves for
the scales given the codes. Shapes and basis as in `gsq.init.gptq`: weights `[batch, out, in]`, `H` `[batch, in, in]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsq.codebook import QuantizedTensor

BLOCK = 64  # columns updated one by one before the rest of the gradient is, by one matrix product


def row_errors(weights: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> Tensor:
    """The objective of each row, `[batch, out]`: `d H d^T` with `d = w - q`."""
    difference = weights.float() - quantized.values()
    return ((difference @ hessian) * difference).sum(-1)


def relative_error(weights: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> float:
    """`tr(D H D^T) / tr(W H W^T)` over the whole batch."""
    reference = ((weights.float() @ hessian) * weights.float()).sum()
    return float(row_errors(weights, quantized, hessian).sum() / reference.clamp_min(1e-30))


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
    return values + ((weights.float() - values) @ hessian) / hessian.diagonal(dim1=-2, dim2=-1)[:, None]


def descend(weights: Tensor, quantized: QuantizedTensor, hessian: Tensor, sweeps: int = 1) -> QuantizedTensor:
    """Cyclic coordinate descent over the codes, scales fixed."""
    codebook, codes = quantized.codebook, quantized.codes.clone()
    table = codebook.level_table(weights.device)
    scales = quantized.scales.float()
    values = quantized.values()
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    for _ in range(sweeps):
        before = codes.clone()
        gradient = (weights.float() - values) @ hessian  # [batch, out, in], of half the objective, by -Q
        for start in range(0, weights.shape[-1], BLOCK):
            end = min(start + BLOCK, weights.shape[-1])
            local = gradient[..., start:end].clone()
            moved = values[..., start:end].clone()
            for column in range(start, end):
                here = column - start
                scale = scales[..., column // codebook.group_size]
                wanted = values[..., column] + local[..., here] / diagonal[:, None, column]
                code = codebook.nearest(wanted / torch.where(scale == 0, torch.inf, scale))
                value = table[code.int()] * scale
                local -= (value - values[..., column])[..., None] * hessian[:, None, column, start:end]
                codes[..., column], values[..., column] = code, value
            moved -= values[..., start:end]  # old minus new
            gradient += moved @ hessian[:, start:end]
        if torch.equal(codes, before):
            break
    return QuantizedTensor(codes, quantized.scales, codebook)


def refit_scales(weights: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> QuantizedTensor:
    """Least-squares scales of every row given its codes, rounded to their stored dtype.

    A row whose rounded solution is not better keeps its scales.
    """
    codebook, size = quantized.codebook, quantized.codebook.group_size
    levels = codebook.level_table(weights.device)[quantized.codes.int()]  # [batch, out, in]
    batch, rows, columns = levels.shape
    groups = columns // size
    target = ((weights.float() @ hessian) * levels).unflatten(-1, (groups, size)).sum(-1)  # [batch, out, groups]
    normal = torch.empty(batch, rows, groups, groups, device=weights.device)
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        product = levels[..., part] @ hessian[:, part]  # [batch, out, in]
        normal[..., group, :] = (product * levels).unflatten(-1, (groups, size)).sum(-1)
    trace = normal.diagonal(dim1=-2, dim2=-1)
    empty = torch.where(trace > 0, 1e-6 * trace, 1.0)  # a group of zero levels has no say
    lower, info = torch.linalg.cholesky_ex(normal + torch.diag_embed(empty))
    solution = torch.cholesky_solve(target[..., None], lower)[..., 0]
    solved = (info == 0)[..., None] & torch.isfinite(solution) & (trace > 0)
    scales = torch.where(solved, solution, quantized.scales.float()).to(codebook.scale_dtype)
    refitted = QuantizedTensor(quantized.codes, scales, codebook)
    better = row_errors(weights, refitted, hessian) < row_errors(weights, quantized, hessian)
    return QuantizedTensor(quantized.codes, torch.where(better[..., None], scales, quantized.scales), codebook)
