"""Humming's own kernels, on a GPU: what they pack, decode and multiply, ours do, bit for bit where that is defined."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gsq.kernels.packed import PackedWeight, packed_matmul
from gsq.kernels.packing import pack_dense, unpack_dense

OUT, COLUMNS, GROUP = 256, 512, 128  # whole tiles of Humming's kernels
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="Humming computes on a GPU only")


@pytest.fixture(scope="module")
def ops() -> ModuleType:
    """Humming's operations, if its compiler works here."""
    module = pytest.importorskip("humming.ops")
    try:
        module.pack_weight(torch.zeros(1, 32, dtype=torch.int32, device="cuda"), 2)
    except (RuntimeError, OSError, AssertionError) as error:
        pytest.skip(f"Humming's kernels do not compile here: {error}")
    return module


def codes_of(bits: int, *shape: int) -> Tensor:
    """Random codes uint8."""
    return torch.randint(1 << bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))


def weight_of(bits: int, scales: Tensor) -> PackedWeight:
    """Random codes on the GPU for bfloat16 scales `[..., out, groups]`, in Humming's levels."""
    *rows, groups = scales.shape
    half = 1 << (bits - 1)
    words = pack_dense(codes_of(bits, *rows, groups * GROUP).cuda(), bits)
    return PackedWeight(words, scales.bfloat16().cuda(), tuple(float(level) for level in range(-half, half)))


def schema_of(weight: PackedWeight) -> object:
    """How a checkpoint describes it to Humming."""
    from humming.schema import HummingWeightSchema

    config = {"b_dtype": f"uint{weight.bits}", "weight_scale_group_size": weight.group_size}
    return HummingWeightSchema.from_config(config | {"quant_method": "humming"})


def tensors_of(weight: PackedWeight) -> dict[str, Tensor]:
    return {"weight": weight.words, "weight_scale": weight.scales}


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_have_the_shape_that_humming_gives_them(bits: int):
    """Without a GPU: only shapes are computed."""
    ops = pytest.importorskip("humming.ops")
    ours = pack_dense(codes_of(bits, 3, 5, 96), bits)
    with FakeTensorMode():
        theirs = ops.pack_weight(torch.empty(3, 5, 96, dtype=torch.int32, device="cuda"), bits)
        back = ops.unpack_weight(theirs, bits)
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert back.shape == (3, 5, 96)


@on_a_gpu
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_words_are_those_that_humming_packs(ops: ModuleType, bits: int):
    codes = codes_of(bits, 3, 37, 96).cuda()  # more than one thread block, the last one not full
    words = ops.pack_weight(codes.int(), bits)
    assert torch.equal(words, pack_dense(codes, bits))
    assert torch.equal(ops.unpack_weight(words, bits), codes.int())
    assert torch.equal(unpack_dense(words, bits), codes)


@on_a_gpu
@pytest.mark.usefixtures("ops")
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("experts", [(), (3,)])
def test_weights_are_those_that_humming_decodes(bits: int, experts: tuple[int, ...]):
    weight = weight_of(bits, torch.randn(*experts, 40, 2))
    theirs = schema_of(weight).dequant_tensors(tensors_of(weight))
    assert theirs.dtype == torch.float32
    assert torch.equal(weight.decode(torch.float32), theirs)


def layer_of(weight: PackedWeight) -> torch.nn.Module:
    """As a server loads it: `layer(x, **settings)` is the product with `x` bfloat16 `[rows, in]`."""
    from humming.layer import HummingLayer

    out = weight.words.shape[0]
    layer = HummingLayer(
        shape_n=out, shape_k=weight.columns, weight_config=schema_of(weight), torch_dtype=torch.bfloat16
    ).cuda()
    layer.load_from_tensors(tensors_of(weight))
    layer.transform()
    return layer


def settings_of(layer: torch.nn.Module, rows: int) -> dict[str, dict]:
    """Without them a kernel is compiled for every number of rows, and some add rounded parts of a sum."""
    from humming.tune import get_heuristics_config

    tuning = get_heuristics_config(layer.humming_config, shape_m=rows, use_batch_invariant=True)
    return {"compute_config": {"use_batch_invariant": True}, "tuning_config": tuning}


@on_a_gpu
@pytest.mark.usefixtures("ops")
@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("bits", [2, 3])
def test_products_are_those_of_a_humming_layer(bits: int, rows: int):
    draw = torch.Generator().manual_seed(rows)
    powers = torch.randint(-2, 3, (OUT, COLUMNS // GROUP), generator=draw).float().exp2()
    weight = weight_of(bits, powers * torch.randn(powers.shape, generator=draw).sign())
    x = torch.randint(-8, 9, (rows, COLUMNS), generator=draw).bfloat16().cuda()
    layer = layer_of(weight)
    settings = settings_of(layer, rows)
    exact = x.double() @ weight.decode(torch.float32).double().mT  # a float32 holds it, and all sums on the way
    assert torch.equal(packed_matmul(x, weight), exact.bfloat16())
    assert torch.equal(layer(x, **settings), exact.bfloat16())

    weight = weight_of(bits, torch.randn(OUT, COLUMNS // GROUP, generator=draw))
    x = torch.randn(rows, COLUMNS, generator=draw).bfloat16().cuda()
    ours, theirs = packed_matmul(x, weight).double(), layer_of(weight)(x, **settings).double()
    exact = x.double() @ weight.decode(torch.bfloat16).double().mT
    for result in (ours, theirs):
        assert float((result - exact).norm() / exact.norm()) < 2**-8
    assert float((ours - theirs).norm() / exact.norm()) < 2**-8
