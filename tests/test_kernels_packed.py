"""Products with packed weights: against float64, on what the exporters store, and compiled for a GPU without one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hopper import compiled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gsq.codebook import Codebook, QuantizedTensor
from gsq.export import jangtq, turboquant
from gsq.export.integers import pack_levels
from gsq.kernels import packed
from gsq.kernels.affine import dequantize_affine, pack_affine, quantize_affine
from gsq.kernels.packed import PackedWeight, packed_grouped_matmul, packed_matmul

CPU = torch.device("cpu")
# Errors relative to the sum of |x * weight|. Triton's interpreter cuts numbers off where they are rounded to bfloat16.
SUMMED = {torch.float16: 2.0**-14, torch.bfloat16: 2.0**-14 if torch.cuda.is_available() else 2.0**-7}
KINDS = ("integers", "table", "offsets")


@dataclass(frozen=True)
class Case:
    """A packed weight and the weights that it stands for, `[..., out, in]`, float64."""

    weight: PackedWeight
    values: Tensor


def levels_of(kind: str, bits: int) -> tuple[float, ...]:
    if kind == "table":
        return tuple(float(i * abs(i)) / 4**bits for i in range(-(1 << bits), 1 << bits, 2))
    return (
        tuple(float(i) for i in range(1 << bits))
        if kind == "offsets"
        else tuple(range(-(1 << (bits - 1)), 1 << (bits - 1)))
    )


def make(kind: str, bits: int, shape: tuple[int, ...], group: int, device: torch.device = CPU, seed: int = 0) -> Case:
    """Random codes in a stream that NumPy packs, scales of both signs."""
    draw = np.random.default_rng(seed)
    levels = levels_of(kind, bits)
    codes = draw.integers(0, 1 << bits, shape)
    ones = (codes[..., None] >> np.arange(bits) & 1).astype(np.uint8)
    stream = np.packbits(ones.reshape(*shape[:-1], shape[-1] * bits), -1, "little")
    groups = (*shape[:-1], shape[-1] // group)
    dtype = torch.float32 if kind == "table" else torch.bfloat16
    scales, offsets = (torch.from_numpy(draw.normal(size=groups)).to(dtype) for _ in range(2))
    values = torch.tensor(levels, dtype=torch.float64)[codes] * scales.double().repeat_interleave(group, -1)
    if kind == "offsets":
        values += offsets.double().repeat_interleave(group, -1)
    words = surrounded(torch.from_numpy(stream), 0xFF, device)
    words = words if kind == "table" else words.view(torch.uint32 if kind == "offsets" else torch.int32)
    scales, offsets = (surrounded(numbers, torch.nan, device) for numbers in (scales, offsets))
    return Case(PackedWeight(words, scales, levels, offsets if kind == "offsets" else None), values)


def surrounded(tensor: Tensor, filler: float, device: torch.device) -> Tensor:
    """The same numbers in the middle of a larger buffer, so that reads outside of them show."""
    margin = 512
    buffer = torch.full((tensor.numel() + 2 * margin,), filler, dtype=tensor.dtype, device=device)
    inner = buffer[margin : margin + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)


def inputs(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    return surrounded(x.to(dtype), torch.nan, device)


def assert_close(y: Tensor, x: Tensor, values: Tensor) -> None:
    """`y` is `x` times `values` rounded to the dtype of x, up to rounding."""
    assert y.dtype == x.dtype
    x, values, eps = x.cpu().double(), values.float().to(x.dtype).double(), torch.finfo(x.dtype).eps
    exact, size = x @ values.mT, x.abs() @ values.abs().mT
    assert ((y.cpu().double() - exact).abs() <= eps * exact.abs() + SUMMED[y.dtype] * size).all()


def ends_of(counts: list[int], device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(device, dtype)


def by_expert(x: Tensor, counts: list[int], case: Case) -> Iterator[tuple[slice, Tensor]]:
    start = 0
    for count, values in zip(counts, case.values, strict=True):
        yield slice(start, start + count), values
        start += count


@pytest.fixture(params=["plain", "triton"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where products are computed, first by the plain version on a CPU, then by the kernels."""
    return CPU if request.param == "plain" else request.getfixturevalue("kernels")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("kind", "group"), [("integers", 32), ("table", 96), ("offsets", 192)])
def test_decoding_is_exact(kernels: torch.device, kind: str, group: int, bits: int):
    """Inputs of a single one bring out every weight, rounded once to their dtype, bit for bit."""
    case = make(kind, bits, (37, 192), group, kernels)
    wanted = case.weight.decode(torch.float16)
    y = packed_matmul(torch.eye(192, dtype=torch.float16, device=kernels), case.weight)
    assert torch.equal(y.mT, wanted)
    torch.testing.assert_close(wanted.cpu().double(), case.values, rtol=2**-10, atol=2**-20)


@pytest.mark.parametrize("rows", [1, 3, 16, 40])
@pytest.mark.parametrize(
    ("kind", "bits", "out", "columns", "group"),
    [("integers", 2, 65, 160, 32), ("table", 3, 24, 288, 96), ("offsets", 4, 70, 128, 64), ("table", 8, 7, 72, 72)],
)
def test_products(device: torch.device, kind: str, bits: int, out: int, columns: int, group: int, rows: int):
    case, x = make(kind, bits, (out, columns), group, device), inputs(rows, columns, torch.float16, device)
    assert_close(packed_matmul(x, case.weight), x, case.values)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_width_and_group(device: torch.device, data: st.DataObject):
    bits, group = (
        data.draw(st.integers(1, 8), "bits"),
        data.draw(st.sampled_from([1, 2, 3, 8, 12, 20, 32, 64]), "group"),
    )
    columns = 32 * group // np.gcd(32, group) * data.draw(st.integers(1, 2), "units")
    rows, out = data.draw(st.integers(1, 20), "rows"), data.draw(st.integers(1, 40), "out")
    case = make(data.draw(st.sampled_from(KINDS), "kind"), bits, (out, columns), group, device, seed=columns)
    x = inputs(rows, columns, torch.float16, device)
    assert_close(packed_matmul(x, case.weight), x, case.values)


@pytest.mark.parametrize(("dtype", "rows"), [(torch.bfloat16, 2), (torch.bfloat16, 17), (torch.float32, 2)])
def test_columns_are_divided_among_programs(device: torch.device, dtype: torch.dtype, rows: int):
    """Long rows of a narrow weight, so that parts of the sums are added in a second step."""
    case, x = make("integers", 3, (9, 1056), 1056, device), inputs(rows, 1056, dtype, device)
    y = packed_matmul(x, case.weight)
    if dtype == torch.float32:
        torch.testing.assert_close(y.cpu().double(), x.cpu().double() @ case.values.mT, rtol=1e-5, atol=1e-4)
    else:
        assert_close(y, x, case.values)
    assert torch.equal(packed_matmul(x, case.weight), y)


@pytest.mark.parametrize(
    "counts",
    [[0, 3, 0, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 33], [18, 0, 1, 17, 16], [0, 0, 0, 0, 0], [81, 0, 2, 0, 0]],
)
@pytest.mark.parametrize("kind", ["integers", "offsets"])
def test_experts_with_uneven_rows(device: torch.device, kind: str, counts: list[int]):
    case = make(kind, 3, (5, 33, 64), 32, device)
    unowned = 2
    x = inputs(sum(counts) + unowned, 64, torch.float16, device)
    y = packed_grouped_matmul(x, ends_of(counts, device, torch.int64), case.weight)
    for rows, values in by_expert(x, counts, case):
        assert_close(y[rows], x[rows], values)
    assert not y[-unowned:].any()


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_any_distribution_of_rows(kernels: torch.device, counts: list[int]):
    case, x = make("integers", 2, (len(counts), 5, 32), 32, kernels), inputs(sum(counts), 32, torch.float16, kernels)
    y = packed_grouped_matmul(x, ends_of(counts, kernels), case.weight)
    for rows, values in by_expert(x, counts, case):
        assert_close(y[rows], x[rows], values)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0)])
def test_nothing_to_multiply(device: torch.device, shape: tuple[int, int]):
    rows, out = shape
    case = make("integers", 2, (out, 32), 32, device)
    assert packed_matmul(inputs(rows, 32, torch.float16, device), case.weight).shape == shape


@pytest.mark.parametrize("codebook", [Codebook.integer(3, 32), Codebook.ternary(64)])
def test_humming_words(device: torch.device, codebook: Codebook):
    """As exported: two's complement shifted by half, in which ternary leaves a code unused."""
    quantized = random_quantized(codebook, (40, 128))
    bits, half = codebook.bits, 1 << (codebook.bits - 1)
    words = pack_levels(quantized, bits)
    levels = tuple(float(level) for level in range(-half, half))
    weight = PackedWeight(words.to(device), quantized.scales.to(device), levels)
    x = inputs(6, 128, torch.bfloat16, device)
    assert_close(packed_matmul(x, weight), x, quantized.dequantize().double())


@pytest.mark.parametrize(("width", "bits"), [(96, 3), (80, 2)])
def test_tq_rows_with_rotated_inputs(device: torch.device, width: int, bits: int):
    """Against weights rotated back by the exporter's codebook; 80 is padded to 96."""
    codebook = Codebook.tq(bits, 32, width)
    quantized = random_quantized(codebook, (40, 96))
    octets, norms = turboquant.pack(quantized)
    weight = PackedWeight(
        octets.view(40, -1).to(device), norms.to(device), codebook.levels, rotate=codebook.rotation.rotate
    )
    x = inputs(5, width, torch.float16, device)
    assert_near(packed_matmul(x, weight), x, quantized.dequantize())


def test_jangtq_experts_with_rotated_inputs(device: torch.device):
    """Whole rows are a group, and 96 is rotated as 64 and 32."""
    codebook = Codebook.jangtq(2, 96)
    quantized = random_quantized(codebook, (2, 20, 96))
    stored = jangtq.pack("experts", quantized)
    words, norms = stored["experts" + jangtq.PACKED].to(device), stored["experts" + jangtq.NORMS].to(device)
    weight = PackedWeight(words, norms[..., None], codebook.levels, rotate=codebook.rotation.rotate)
    x = inputs(7, 96, torch.float16, device)
    y = packed_grouped_matmul(x, ends_of([4, 3], device), weight)
    for rows, expert in ((slice(0, 4), 0), (slice(4, 7), 1)):
        assert_near(y[rows], x[rows], quantized.dequantize()[expert])


def test_mlx_words_with_biases(device: torch.device):
    codes, scales, biases = quantize_affine(torch.randn(24, 128, generator=torch.Generator().manual_seed(0)), 6, 64)
    words = pack_affine(codes, 6).to(device)
    weight = PackedWeight(words, scales.to(device), tuple(range(64)), biases.to(device))
    x = inputs(3, 128, torch.float16, device)
    assert_close(packed_matmul(x, weight), x, dequantize_affine(codes, scales, biases).double())


def random_quantized(codebook: Codebook, shape: tuple[int, ...]) -> QuantizedTensor:
    draw = torch.Generator().manual_seed(1)
    codes = torch.randint(len(codebook.levels), shape, dtype=torch.uint8, generator=draw)
    groups = (*shape[:-1], codebook.groups(shape[-1]))
    return QuantizedTensor(codes, torch.randn(groups, generator=draw).to(codebook.scale_dtype), codebook)


def assert_near(y: Tensor, x: Tensor, weights: Tensor) -> None:
    """`y` is `x` times `weights`, up to roundings to 16 bits in another basis."""
    wanted = x.cpu().double() @ weights.double().mT
    assert float((y.cpu().double() - wanted).norm() / wanted.norm()) < 2**-9


def test_little_is_decoded_at_once(monkeypatch: pytest.MonkeyPatch):
    case, x = make("offsets", 5, (23, 64), 32), inputs(3, 64, torch.float16, CPU)
    whole = packed_matmul(x, case.weight)
    monkeypatch.setattr(packed, "CHUNK", 5 * 64)
    torch.testing.assert_close(packed_matmul(x, case.weight), whole, rtol=2**-10, atol=2**-10)
    assert torch.equal(packed_matmul(x, replace(case.weight, rotate=torch.Tensor.to)), packed_matmul(x, case.weight))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="touches 9 GB, which Triton's interpreter copies")
def test_more_than_2_to_the_31_words(kernels: torch.device):
    experts, out, columns = 64, 1 << 19, 256
    words = torch.zeros(experts, out, columns // 4, dtype=torch.int32, device=kernels)
    scales = torch.ones(experts, out, 1, dtype=torch.bfloat16, device=kernels)
    last = make("integers", 8, (100, columns), columns, kernels)
    words[-1, -100:], scales[-1, -100:] = last.weight.words, last.weight.scales
    x, ends = inputs(3, columns, torch.bfloat16, kernels), ends_of([0] * 63 + [3], kernels)
    y = packed_grouped_matmul(x, ends, PackedWeight(words, scales, last.weight.levels))
    assert_close(y[:, -100:], x, last.values)


TWO_BITS = (-2.0, -1.0, 0.0, 1.0)


def words_of(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("words", "scales", "levels", "offsets", "message"),
    [
        (words_of(4, 2), torch.ones(4, 1), (-1.0, 0.0, 1.0), None, "a level for each of 2, 4, ... or 256 codes, not 3"),
        (words_of(4, 2, dtype=torch.int64), torch.ones(4, 1), TWO_BITS, None, r"not int64 \(4, 2\)"),
        (words_of(8), torch.ones(1), TWO_BITS, None, r"\[out, words\] or \[experts, out, words\].*not int32 \(8,\)"),
        (words_of(4, 0), torch.ones(4, 1), TWO_BITS, None, "not 0 bits"),
        (words_of(4, 5, dtype=torch.uint8), torch.ones(4, 1), TWO_BITS, None, "whole words.*not 40 bits"),
        (words_of(4, 2), torch.ones(4, 1), tuple(range(8)), None, "of 3 bits needs.*not 64 bits"),
        (words_of(4, 1), torch.ones(4, 1), tuple(range(256)), None, "multiple of 8 codes, not 32 bits"),
        (words_of(4, 2), torch.ones(3, 1), TWO_BITS, None, r"rows of 32, does not fit scales float32 \(3, 1\)"),
        (words_of(4, 2), torch.ones(4, 5), TWO_BITS, None, "does not fit scales"),
        (words_of(4, 2), torch.ones(4, 1).double(), TWO_BITS, None, "does not fit scales float64"),
        (words_of(4, 2), torch.ones(4, 1), TWO_BITS, torch.ones(4, 2), "does not fit offsets"),
        (words_of(2, 4).mT, torch.ones(4, 1), TWO_BITS, None, "contiguous tensors"),
        (words_of(17, dtype=torch.uint8)[1:].view(2, 8), torch.ones(2, 1), TWO_BITS, None, "start at a multiple of 4"),
        (words_of(4, 2), torch.ones(4, 1, device="meta"), TWO_BITS, None, "on one device, not cpu, meta"),
        (
            torch.empty(1, 1 << 24, dtype=torch.int32, device="meta"), torch.ones(1, 1, device="meta"), TWO_BITS, None,
            "rows of at most 134217728 weights, not 268435456",
        ),
    ],
)  # fmt: skip
def test_what_kernels_do_not_hold(words: Tensor, scales: Tensor, levels: tuple, offsets: Tensor | None, message: str):
    with pytest.raises(ValueError, match=message):
        PackedWeight(words, scales, levels, offsets)


SINGLE = PackedWeight(words_of(4, 2), torch.ones(4, 1), TWO_BITS)
STACK = PackedWeight(words_of(3, 4, 2), torch.ones(3, 4, 1), TWO_BITS)


@pytest.mark.parametrize(
    ("x", "ends", "weight", "message"),
    [
        (torch.ones(2, 32), None, STACK, r"experts \(3, 4, 2\) need packed_grouped_matmul"),
        (torch.ones(2, 31), None, SINGLE, r"rows of 32 takes no input float32 \(2, 31\)"),
        (torch.ones(32), None, SINGLE, r"\[rows, in\].*not float32 \(32,\)"),
        (torch.ones(2, 32).double(), None, SINGLE, "not float64"),
        (torch.ones(2, 32), None, replace(SINGLE, rotate=lambda x, dtype: x.double()), "takes no input float64"),
        (torch.ones(2, 32), [1, 2], SINGLE, "needs packed_matmul"),
        (torch.ones(2, 32), [1, 2], STACK, r"3 experts need as many ends, int32 or int64, not int64 \(2,\)"),
        (torch.ones(2, 32), [1.0, 1.0, 2.0], STACK, "not float32"),
        (torch.ones(2, 32), [1, 0, 2], STACK, r"must ascend up to at most 2.*not \[1, 0, 2\]"),
        (torch.ones(2, 32), [1, 2, 3], STACK, "must ascend"),
        (torch.ones(2, 32), [-1, 1, 2], STACK, "must ascend"),
    ],
)
def test_inputs_that_do_not_fit(x: Tensor, ends: list | None, weight: PackedWeight, message: str):
    with pytest.raises(ValueError, match=message):
        packed_matmul(x, weight) if ends is None else packed_grouped_matmul(x, torch.tensor(ends), weight)


@pytest.mark.skipif(torch.cuda.is_available(), reason="all other tests compile the kernel")
def test_a_compiler_takes_what_the_interpreter_takes(tmp_path: Path):
    """Every branch of the kernel: integers and a table, one Linear and experts, words that codes straddle, offsets."""
    body = """
import torch
from gsq.kernels.packed import PackedWeight, packed_grouped_matmul, packed_matmul
x, scales = torch.ones(1, 64).bfloat16(), torch.ones(3, 16, 1)
packed_matmul(x, PackedWeight(torch.zeros(16, 4, dtype=torch.int32), scales[0], tuple(range(4))))
levels, words = (0.0, 0.1, 0.3, 0.6, 1.0, 1.5, 2.1, 2.8), torch.zeros(3, 16, 6, dtype=torch.int32)
packed_grouped_matmul(x, torch.tensor([0, 1, 1]), PackedWeight(words, scales, levels, scales))
"""
    assert compiled(body, tmp_path) == ["_kernel"] * 2
