"""Round to nearest: with scales found by search, or with the scale that a rotated format's own tools take.

A searched scale minimizes the weighted squared error of its group. `match_norms` needs nothing but
the weights, and gives what TurboQuant and JANG converters write.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gsq.codebook import Codebook, QuantizedTensor

CHUNK = {"cpu": 1 << 19}  # weights rounded at once: small for a CPU's cache, large beside the cost of a call;
ELSEWHERE = 1 << 27  # elsewhere half a gigabyte, of which the search makes some copies
CANDIDATES = 24  # scales tried per sign
REGRESSIONS = 3  # of a group's weights on their levels
# range of the candidates, relative to the scale at which the longest level reaches the largest weight
SHRINK = (0.25, 1.3)


def round_to_nearest(weights: Tensor, codebook: Codebook, importance: Tensor | None = None) -> QuantizedTensor:
    """Quantize `weights` `[..., out, in]` without looking at other weights' errors.

    `importance` `[..., 1 or out, in]` weighs the squared errors in the search for scales.
    """
    rows = weights.shape[-2]
    step = max(1, CHUNK.get(weights.device.type, ELSEWHERE) * rows // max(1, weights.numel()))
    if step < rows:
        given = (weights,) if importance is None else (weights, importance.expand(weights.shape))
        parts = [[t[..., start : start + step, :] for t in given] for start in range(0, rows, step)]
        return QuantizedTensor.stacked([round_to_nearest(w, codebook, *h) for w, *h in parts])
    scales, offsets = search_groups(weights, codebook, importance)
    return QuantizedTensor(codebook.encode(weights.float(), scales, offsets), scales, codebook, offsets)


def search_groups(
    weights: Tensor, codebook: Codebook, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales `[..., out, groups]` and, if the codebook has them, offsets of `weights` `[..., out, in]`."""
    if codebook.offset:
        return search_affine(weights, codebook, importance)
    return search_scales(weights, codebook, importance), None


def search_scales(weights: Tensor, codebook: Codebook, importance: Tensor | None = None) -> Tensor:
    """Scales `[..., out, groups]`, rounded to the codebook's dtype, of `weights` `[..., out, in]`.

    A grid of shrink factors of both signs (one sign if the levels are symmetric), then one
    least-squares step for the best of them.
    """
    w, h, table = _grouped(weights, codebook, importance)
    longest = table.abs().max()
    unit = w.abs().amax(-1, keepdim=True) / longest
    levels = codebook.level_table()  # on the CPU, so that nobody waits for a GPU
    symmetric = torch.equal(levels, -levels.flip(0))
    best = torch.zeros_like(unit)
    best_error = (h * w * w).sum(-1, keepdim=True)  # of scale zero
    for shrink in (1.0, *torch.linspace(*SHRINK, CANDIDATES).tolist()):  # 1 is best where nothing need be clipped
        for sign in (1.0,) if symmetric else (1.0, -1.0):
            best, best_error = _keep_better(w, h, codebook, table, sign * shrink * unit, best, best_error)
    reached = table[codebook.nearest(_divide(w, best)).int()]
    fitted = _divide((h * w * reached).sum(-1, keepdim=True), (h * reached * reached).sum(-1, keepdim=True))
    best, _ = _keep_better(w, h, codebook, table, fitted, best, best_error)
    return best.squeeze(-1).to(codebook.scale_dtype)


def search_affine(weights: Tensor, codebook: Codebook, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scales and offsets `[..., out, groups]`, rounded to the codebook's dtype, of `weights` `[..., out, in]`.

    The range of a group shrinks toward its mean; the best one goes through regressions of the
    weights on their levels.
    """
    w, h, table = _grouped(weights, codebook, importance)
    low, high = w.aminmax(dim=-1, keepdim=True)
    total = h.sum(-1, keepdim=True)
    mean, middle = _divide((h * w).sum(-1, keepdim=True), total), (high + low) / 2
    largest = torch.finfo(codebook.scale_dtype).max
    stored = lambda t: t.clamp(-largest, largest).to(codebook.scale_dtype).float()  # noqa: E731
    best, offset = torch.zeros_like(mean), stored(mean)
    best_error = (h * (w - offset).square()).sum(-1, keepdim=True)

    def keep_better(scale: Tensor, shift: Tensor) -> None:
        nonlocal best, offset, best_error
        error = _rounding_error(w - shift, h, codebook, table, scale)
        better = error < best_error
        best, offset = torch.where(better, scale, best), torch.where(better, shift, offset)
        best_error = torch.where(better, error, best_error)

    keep_better(stored((high - low) / table[-1]), stored(low))  # coarse offsets may favour the plain range
    for shrink in (1.0, *torch.linspace(*SHRINK, CANDIDATES).tolist()):
        scale = stored(shrink * (high - low) / table[-1])
        keep_better(scale, stored(torch.lerp(mean, middle, min(shrink, 1.0)) - scale * codebook.center))
    for _ in range(REGRESSIONS):
        levels = table[codebook.nearest(_divide(w - offset, best)).int()]
        level = _divide((h * levels).sum(-1, keepdim=True), total)  # on average
        apart = levels - level
        scale = stored(_divide((h * w * apart).sum(-1, keepdim=True), (h * apart * apart).sum(-1, keepdim=True)))
        keep_better(scale, stored(mean - scale * level))
    return best.squeeze(-1).to(codebook.scale_dtype), offset.squeeze(-1).to(codebook.scale_dtype)


def _grouped(weights: Tensor, codebook: Codebook, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and importance `[..., out, groups, g]`, float32, and the levels."""
    groups = codebook.groups(weights.shape[-1])
    w = weights.float().unflatten(-1, (groups, codebook.group_size))
    h = torch.ones_like(w) if importance is None else importance.float().unflatten(-1, w.shape[-2:]).expand_as(w)
    return w, h, codebook.level_table(w.device)


def _keep_better(
    w: Tensor, h: Tensor, codebook: Codebook, table: Tensor, scale: Tensor, best: Tensor, best_error: Tensor
) -> tuple[Tensor, Tensor]:
    """Where `scale` `[..., groups, 1]`, rounded as it will be stored, has the smaller error, take it."""
    scale = scale.to(codebook.scale_dtype).float()
    error = _rounding_error(w, h, codebook, table, scale)
    better = error < best_error
    return torch.where(better, scale, best), torch.where(better, error, best_error)


def _rounding_error(w: Tensor, h: Tensor, codebook: Codebook, table: Tensor, scale: Tensor) -> Tensor:
    """Weighted squared error `[..., groups, 1]` of rounding under `scale`."""
    return table[codebook.nearest(_divide(w, scale)).int()].mul_(scale).sub_(w).square_().mul_(h).sum(-1, keepdim=True)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and zero where the denominator is zero."""
    return torch.where(denominator == 0, 0, numerator / torch.where(denominator == 0, 1, denominator))


def match_norms(weights: Tensor, codebook: Codebook) -> QuantizedTensor:
    """Round `weights` `[..., out, in]`, on the CPU, under a rotated codebook; each group is scaled by its own norm.

    Order of operations and rounding are those of the format's own converter, for equal codes:
    `turboquant_vllm.torch_ops.PolarQuantTorch.quantize` takes the norm before the rotation and
    corrects it for what rounding took away; `jang_tools.turboquant.linear.tq_quantize_weight` takes
    it after the rotation, and leaves it.
    """
    rows = weights.reshape(-1, weights.shape[-1])
    columns, size = codebook.columns(rows.shape[1]), codebook.group_size
    codes = torch.empty(len(rows), columns, dtype=torch.uint8)
    scales = torch.empty(len(rows), columns // size, dtype=codebook.scale_dtype)
    step = max(1, CHUNK["cpu"] // columns)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        codes[part], scales[part] = _match_norms(rows[part].float(), codebook)
    shape = weights.shape[:-1]
    return QuantizedTensor(codes.view(*shape, columns), scales.view(*shape, -1), codebook)


def _match_norms(rows: Tensor, codebook: Codebook) -> tuple[Tensor, Tensor]:
    """Codes `[n, columns]` and norms `[n, groups]` of a few rows, float32."""
    size, rotation = codebook.group_size, codebook.rotation
    if rotation.scales_first:  # JANG: the norm of the rotated row
        rotated = rotation.rotate(rows)
        norms = torch.from_numpy(np.sqrt(_sum_one_by_one(rotated.square())))[:, None]
        return codebook.nearest(rotated / norms.clamp_min(1e-10)), norms
    padding = rotation.columns - rotation.width
    groups = (torch.nn.functional.pad(rows, (0, padding)) if padding else rows).view(-1, size)
    norms = torch.linalg.norm(groups, dim=1)
    units = groups / torch.where(norms > 0, norms, 1)[:, None]
    codes = codebook.nearest(rotation.of_group().rotate(units))
    reached = codebook.level_table().index_select(0, codes.view(-1).int()).view_as(units)
    reached = torch.linalg.norm(reached, dim=1)
    norms = norms / torch.where(reached > 0, reached, 1)
    return codes.view(len(rows), -1), norms.view(len(rows), -1)


def _sum_one_by_one(rows: Tensor) -> np.ndarray:
    """Sums of `rows` `[n, columns]` as MLX computes them on a CPU, from the first number to the last."""
    if len(rows) == 1:
        return np.cumsum(rows.numpy())[-1:]
    return np.add.reduce(rows.T.contiguous().numpy(), axis=0)  # NumPy adds pairs first only where they are neighbours
