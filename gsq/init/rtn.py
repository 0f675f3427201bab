"""Round to nearest: with scales found by search, or with the scale that a rotated format's own tools take.

`match_norms` needs nothing but the weights, and gives what TurboQuant and JANG converters write.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gsq.codebook import Codebook, QuantizedTensor
from gsq.init.scales import search_groups

CHUNK = {"cpu": 1 << 19}  # weights rounded at once: small for a CPU's cache, large beside the cost of a call;
ELSEWHERE = 1 << 27  # elsewhere half a gigabyte, of which the search makes some copies


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
