"""MLX's affine quantization: a group of weights is `scale * code + bias`, codes counted from an end of its range.

The bias is the group's largest value in magnitude, so that this weight is exact and the scale has
the sign that leads from it to the other end; the scale is stretched so that zero is exact as well.
Codes, scales and biases are bit for bit those of `mlx.core.quantize` on a CPU, of any dtype, and
decoding those of `mlx.core.dequantize`.

Source: `mlx/backend/cpu/quantized.cpp`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsq.kernels.packing import WORD, pack_bytes, unpack_bytes

BITS = (2, 3, 4, 5, 6, 8)  # widths and group sizes that MLX has
GROUPS = (32, 64, 128)
SMALLEST = 1e-7  # step of a group whose weights are all alike
CHUNK = 1 << 22  # weights worked on at once, so that little memory is needed beside the result


def quantize_affine(weights: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 `[..., in]`, scales and biases `[..., groups]` of floating-point `weights` `[..., in]`.

    Scales and biases have the dtype of the weights. Raises `ValueError` if MLX has no such format.
    """
    if bits not in BITS or group_size not in GROUPS or weights.shape[-1] % group_size:
        raise ValueError(f"MLX has no {bits} bits in groups of {group_size} for rows of {weights.shape[-1]}")
    groups = weights.reshape(-1, group_size)
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=weights.device)
    scales, biases = weights.new_empty(len(groups), 1), weights.new_empty(len(groups), 1)
    step = CHUNK // group_size
    for start in range(0, len(groups), step):
        part = slice(start, start + step)
        codes[part], scales[part], biases[part] = _quantize(groups[part].float(), (1 << bits) - 1)
    shape = (*weights.shape[:-1], -1)
    return codes.view(weights.shape), scales.view(shape), biases.view(shape)


def dequantize_affine(codes: Tensor, scales: Tensor, biases: Tensor) -> Tensor:
    """Weights `[..., in]` in the dtype of the scales; product and sum are rounded to it, as MLX does."""
    grouped = codes.view(*scales.shape, -1).to(scales.dtype)
    return grouped.mul_(scales[..., None]).add_(biases[..., None]).view(codes.shape)


def pack_affine(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 `[..., in]` as MLX stores them: uint32 words `[..., in * bits / 32]`, one stream of bits per row."""
    return pack_bytes(codes, bits).view(torch.uint32)


def unpack_affine(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_affine`."""
    return unpack_bytes(words.contiguous().view(torch.uint8), bits)


def affine_columns(words: int, bits: int) -> int:
    """Codes in a row of so many words."""
    return words * WORD // bits


def _quantize(x: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[n, g]` up to `top`, scales and biases `[n, 1]` of groups `x` `[n, g]`, float32."""
    low, high = x.aminmax(dim=1, keepdim=True)
    below = low.abs() > high.abs()
    scale = ((high - low) / top).clamp_min_(SMALLEST)
    scale = torch.where(below, scale, -scale)
    edge = torch.where(below, low, high)
    steps = (edge / scale).round_()  # from the edge to zero
    reached = steps != 0
    scale = torch.where(reached, edge / torch.where(reached, steps, 1), scale)
    bias = torch.where(reached, edge, 0)
    codes = ((x - bias) / scale).round_().clamp_(0, top)
    return codes.to(torch.uint8), scale, bias
