"""The affine codec against MLX's own, bit for bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gsq.kernels import affine
from gsq.kernels.affine import dequantize_affine, pack_affine, quantize_affine, unpack_affine

DTYPES = {torch.float16: mx.float16, torch.bfloat16: mx.bfloat16, torch.float32: mx.float32}
widths = st.sampled_from(affine.BITS)
sizes = st.sampled_from(affine.GROUPS)
dtypes = st.sampled_from(list(DTYPES))


def to_mlx(tensor: Tensor) -> mx.array:
    return mx.array(tensor.float().numpy()).astype(DTYPES[tensor.dtype])


def from_mlx(array: mx.array) -> Tensor:
    """Floating-point values as float32, which holds them exactly."""
    return torch.from_numpy(np.array(array.astype(mx.float32)))


def same(ours: Tensor, theirs: mx.array) -> bool:
    """Equal to the last bit, signs of zeros included."""
    return torch.equal(ours.float().view(torch.int32), from_mlx(theirs).view(torch.int32))


def agrees(weights: Tensor, bits: int, size: int) -> None:
    """Everything that MLX stores and decodes is ours."""
    codes, scales, biases = quantize_affine(weights, bits, size)
    words, their_scales, their_biases = mx.quantize(to_mlx(weights), group_size=size, bits=bits)
    assert np.array_equal(pack_affine(codes, bits).numpy(), np.array(words))
    assert torch.equal(unpack_affine(pack_affine(codes, bits), bits), codes)
    assert scales.dtype == biases.dtype == weights.dtype
    assert same(scales, their_scales)
    assert same(biases, their_biases)
    assert same(
        dequantize_affine(codes, scales, biases),
        mx.dequantize(words, their_scales, their_biases, group_size=size, bits=bits),
    )


@settings(deadline=None, max_examples=60)
@given(widths, sizes, dtypes, st.integers(0, 2**16), st.floats(-6, 3), st.floats(-2, 2))
def test_random_weights_are_quantized_as_mlx_does(bits, size, dtype, seed, exponent, shift):
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.randn(3, 2 * size, generator=generator) + shift) * 10**exponent
    agrees(weights.to(dtype), bits, size)


VALUES = st.floats(-65504, 65504, width=16) | st.sampled_from([0.0, -0.0, 6e-8, -6e-8, 1e-7, 65504.0])


@settings(deadline=None, max_examples=60)
@given(widths, st.lists(VALUES, min_size=32, max_size=32))
def test_any_float16_weights_are_quantized_as_mlx_does(bits, values):
    agrees(torch.tensor([values], dtype=torch.float16), bits, 32)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.5, 5e-8, -5e-8])
@pytest.mark.parametrize("bits", affine.BITS)
def test_a_group_of_one_value(bits: int, value: float):
    agrees(torch.full((2, 64), value, dtype=torch.float16), bits, 64)


def test_a_batch_is_quantized_row_by_row(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(affine, "CHUNK", 256)  # several chunks, the last one not full
    weights = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(0)).half()
    agrees(weights, 8, 64)
    codes, scales, biases = quantize_affine(weights, 8, 64)
    assert (codes.shape, scales.shape, biases.shape) == ((3, 5, 128), (3, 5, 2), (3, 5, 2))
    error = (dequantize_affine(codes, scales, biases) - weights).abs()
    assert (error <= 1.2 * scales.abs().repeat_interleave(64, -1)).all()


@pytest.mark.parametrize(("bits", "size", "width"), [(7, 64, 64), (8, 16, 64), (8, 64, 96)])
def test_what_mlx_does_not_have_is_refused(bits: int, size: int, width: int):
    with pytest.raises(ValueError, match=f"MLX has no {bits} bits in groups of {size} for rows of {width}"):
        quantize_affine(torch.zeros(2, width), bits, size)
