"""Grouped products with few different numbers of rows: the same results, and few programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from gsq.calib.grouped import LEAST, SIZES, EvenGroups, even, even_groups
from gsq.calib.observe import ObserveLinears
from gsq.model.checkpoint import Checkpoint
from gsq.model.skeleton import Skeleton


class Rows(TorchFunctionMode):
    """Notes how many rows each expert's products have."""

    def __init__(self):
        super().__init__()
        self.counts: set[int] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch._grouped_mm:
            self.counts |= set(torch.diff(kwargs["offs"], prepend=torch.zeros(1, dtype=torch.int32)).tolist())
        return function(*args, **(kwargs or {}))


def product(counts: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """A grouped product of tokens and experts, and gradients of both."""
    torch.manual_seed(0)
    ends = torch.tensor(counts).cumsum(0).int()
    x = torch.randn(int(ends[-1]), 64).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), 64, 48).to(dtype).requires_grad_()
    result = torch.nn.functional.grouped_mm(x, weight, offs=ends)
    return result, *torch.autograd.grad(result.square().sum(), [x, weight])


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(0, 300), min_size=1, max_size=6).filter(any))
def test_results_and_gradients_are_those_of_the_plain_product(counts: list[int]):
    plain = product(counts, torch.bfloat16)
    with Rows() as seen, EvenGroups():
        even_ones = product(counts, torch.bfloat16)
    for found, expected in zip(even_ones, plain, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=2**-6)
    assert seen.counts == set(even(torch.tensor(counts)).tolist())


@pytest.mark.parametrize(
    ("build", "dtype", "helps"),
    [
        (models.tiny_qwen3_5_moe, torch.bfloat16, True),
        (models.tiny_qwen3_5_moe, torch.float32, False),
        (models.tiny_qwen3_5, torch.bfloat16, False),
    ],
)
def test_only_experts_in_16_bits_need_it(tmp_path: Path, build: Callable, dtype: torch.dtype, helps: bool):
    skeleton = Skeleton(Checkpoint.open(build(tmp_path / "model")), torch.device("cpu"), dtype)
    with even_groups(skeleton) as active:
        assert isinstance(active, EvenGroups) == helps


def test_float32_stays_as_it_is():
    with Rows() as seen, EvenGroups():
        product([3, 5], torch.float32)
    assert seen.counts == {3, 5}


def test_tokens_of_no_expert_are_left_alone():
    ends = torch.tensor([3, 5], dtype=torch.int32)
    with Rows() as seen, EvenGroups():
        torch._grouped_mm(torch.ones(9, 64).bfloat16(), torch.ones(2, 64, 48).bfloat16(), offs=ends)
    assert seen.counts == {3, 2}


@pytest.mark.parametrize("most", [100, 1000, 5000])
def test_numbers_of_rows_are_few_and_little_larger(most: int):
    counts = torch.arange(most + 1)
    rounded = even(counts)
    assert (rounded >= counts).all()
    assert (rounded - counts <= torch.clamp_min(counts // SIZES, LEAST - 1)).all()
    assert len(rounded.unique()) <= 1 + min(most / LEAST + 1, SIZES * torch.log2(torch.tensor(most / LEAST)))


def test_who_observes_inside_sees_the_tokens_alone():
    weight = torch.randn(2, 64, 48).bfloat16()
    x, ends = torch.randn(8, 64).bfloat16(), torch.tensor([3, 8], dtype=torch.int32)
    read = {}
    with EvenGroups(), ObserveLinears({"experts": weight}, lambda name, expert, x: read.update({expert: x})):
        torch.nn.functional.grouped_mm(x, weight, offs=ends)
    assert torch.equal(read[0], x[:3])
    assert torch.equal(read[1], x[3:])
