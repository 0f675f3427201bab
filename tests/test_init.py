"""GPTQ against a literal version of the paper, scales and polish against brute force, moments against direct sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gsq.init.gptq as init_gptq
import gsq.init.polish as init_polish
import gsq.init.rtn as init_rtn
from gsq.calib import hessian as hessian_module
from gsq.calib.hessian import Moments, answer_original
from gsq.codebook import Codebook, QuantizedTensor
from gsq.init.gptq import damped, gptq, inverse_factor
from gsq.init.polish import descend, free_values, polish, refit_scales, relative_error, row_errors
from gsq.init.rtn import round_to_nearest
from gsq.init.scales import search_groups

ASYMMETRIC = (-3.0, -1.0, 0.5)  # not uniform, and without a zero
CASES = {
    "2 bits": (Codebook.integer(2, 32), 160),
    "2 bits, groups of 16": (Codebook.integer(2, 16), 144),
    "3 bits, groups of 64": (Codebook.integer(3, 64), 320),
    "4 bits": (Codebook.integer(4, 32, torch.float16), 160),
    "8 bits, groups of 16": (Codebook.integer(8, 16), 80),
    "ternary": (Codebook.ternary(64), 192),
    "not uniform": (Codebook((-1.51, -0.453, 0.453, 1.51), 16), 176),
    "asymmetric": (Codebook(ASYMMETRIC, 32), 96),
    "a group that does not divide a block": (Codebook.integer(2, 96), 288),
    "a group longer than a block": (Codebook.integer(2, 160), 320),
    "affine, 2 bits": (Codebook.affine(2, 32), 160),
    "affine, 3 bits, groups of 64": (Codebook.affine(3, 64, torch.float16), 320),
    "affine, a group longer than a block": (Codebook.affine(2, 160), 320),
}
SMALL = {
    "2 bits": Codebook.integer(2, 16),
    "3 bits": Codebook.integer(3, 16),
    "4 bits": Codebook.integer(4, 16),
    "8 bits": Codebook.integer(8, 16),
    "ternary": Codebook.ternary(16),
    "asymmetric": Codebook(ASYMMETRIC, 16),
    "affine, 2 bits": Codebook.affine(2, 16),
    "affine, 4 bits": Codebook.affine(4, 16),
    "affine, 8 bits": Codebook.affine(8, 16),
}
codebooks = pytest.mark.parametrize("codebook", SMALL.values(), ids=SMALL)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(batch: int, size: int, seed: int = 0, strength: float = 1.0) -> Tensor:
    """Hessians `[batch, size, size]` of columns that share a few directions, `strength` times as strong as the rest."""
    tokens = 3 * size
    x = random(batch, tokens, size, seed=seed)
    shared = random(batch, tokens, 4, seed=seed + 1) @ random(batch, 4, size, seed=seed + 2)
    x = (x + strength * shared) * (0.5 + random(batch, 1, size, seed=seed + 3).abs())
    return damped(x.mT @ x / tokens, 0.02)


def same(left: QuantizedTensor, right: QuantizedTensor) -> bool:
    """The same codes, scales and offsets."""
    alike = torch.equal(left.codes, right.codes) and torch.equal(left.scales, right.scales)
    return alike and (left.offsets is right.offsets is None or torch.equal(left.offsets, right.offsets))


def per_weight(q: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Scale and offset of every weight, float64."""
    scales = q.codebook.expand(q.scales.double())
    return scales, torch.zeros_like(scales) if q.offsets is None else q.codebook.expand(q.offsets.double())


def literal_gptq(weights: Tensor, hessian: Tensor, codebook: Codebook) -> QuantizedTensor:
    """Column by column in float64, as Frantar et al. write it before they speed it up.

    Each column is rounded, the columns that are left take `-error / [H^-1]_cc * [H^-1]_c,:`, and column and
    row `c` are eliminated from the inverse.
    """
    table = codebook.level_table(dtype=torch.float64)
    left = weights.double().clone()
    inverses = [torch.linalg.inv(hessian.double())]
    for _ in range(weights.shape[-1] - 1):
        inverse = inverses[-1]
        without = inverse - inverse[:, :, :1] @ inverse[:, :1] / inverse[:, :1, :1]
        inverses.append(without[:, 1:, 1:])
    codes, scales, offsets = [], [], []
    for column, inverse in enumerate(inverses):
        if column % codebook.group_size == 0:
            part = slice(column, column + codebook.group_size)
            importance = torch.stack([1 / of_column[:, 0, 0] for of_column in inverses[part]], -1)
            scale, offset = search_groups(left[..., part].float(), codebook, importance[:, None])
            scales.append(scale)
            offsets.append(offset)
        values = table * scale.double() + (offset.double() if codebook.offset else 0)  # [batch, out, K]
        code = (values - left[..., column, None]).abs().argmin(-1)
        error = left[..., column] - values.gather(-1, code[..., None])[..., 0]
        left[..., column:] -= (error / inverse[:, None, 0, 0])[..., None] * inverse[:, None, 0]
        codes.append(code.to(torch.uint8))
    offsets = torch.cat(offsets, -1) if codebook.offset else None
    return QuantizedTensor(torch.stack(codes, -1), torch.cat(scales, -1), codebook, offsets)


# GPTQ


@pytest.mark.parametrize(("codebook", "columns"), CASES.values(), ids=CASES)
def test_gptq_is_the_literal_algorithm(codebook: Codebook, columns: int):
    weights, hessian = random(2, 5, columns, seed=1), correlated(2, columns, seed=2)
    found = gptq(weights, hessian, codebook)
    assert same(found, literal_gptq(weights, hessian, codebook))
    assert {part.dtype for part in (found.scales, found.offsets) if part is not None} == {codebook.scale_dtype}


@codebooks
def test_gptq_treats_each_matrix_of_a_batch_alone(codebook: Codebook):
    weights, hessian = random(3, 4, 160), correlated(3, 160)
    whole, alone = gptq(weights, hessian, codebook), gptq(weights[1:2], hessian[1:2], codebook)
    assert same(whole.map(lambda part: part[1:2]), alone)


@codebooks
def test_gptq_beats_rounding_when_columns_are_correlated(codebook: Codebook):
    weights, hessian = random(2, 16, 160), correlated(2, 160, strength=2.0)
    rounded = round_to_nearest(weights, codebook, hessian.diagonal(dim1=-2, dim2=-1)[:, None])
    found = gptq(weights, hessian, codebook)
    assert relative_error(weights, found, hessian) < 0.8 * relative_error(weights, rounded, hessian)


@codebooks
def test_gptq_under_the_identity_is_rounding(codebook: Codebook):
    weights = random(2, 8, 160)
    found = gptq(weights, torch.eye(160).repeat(2, 1, 1), codebook)
    assert same(found, round_to_nearest(weights, codebook))


@codebooks
def test_gptq_leaves_its_input_and_takes_zeros(codebook: Codebook):
    weights, hessian = random(2, 4, 160), correlated(2, 160)
    weights[:, 1] = 0  # a row
    weights[:, 2, 16:32] = 0  # a group, which will take errors of the one before
    weights[0, 3, :16] = 0  # a group that stays zero
    given = weights.clone()
    found = gptq(weights, hessian, codebook)
    assert torch.equal(weights, given)
    assert found.scales.isfinite().all()
    assert torch.equal(found.dequantize()[:, 1], torch.zeros(2, 160))
    assert (found.codes[:, 1] == codebook.nearest(torch.zeros(()))).all()
    assert torch.equal(found.dequantize()[0, 3, :16], torch.zeros(16))
    assert relative_error(weights[:, 2:3], found.rows(2, 3), hessian) < 0.7


@pytest.mark.parametrize(("codebook", "columns"), CASES.values(), ids=CASES)
def test_gptq_takes_transposed_weights(codebook: Codebook, columns: int):
    weights, hessian = random(2, 5, columns, seed=1), correlated(2, columns, seed=2)
    assert same(gptq(weights.mT.contiguous().mT, hessian, codebook), gptq(weights, hessian, codebook))


def test_gptq_takes_a_factor_that_is_at_hand(monkeypatch: pytest.MonkeyPatch):
    weights, hessian, codebook = random(2, 4, 160), correlated(2, 160), Codebook.integer(2, 32)
    expected, upper = gptq(weights, hessian, codebook), inverse_factor(hessian)
    monkeypatch.setattr(init_gptq, "inverse_factor", None)
    assert same(gptq(weights, hessian, codebook, upper), expected)


# The Hessian's factor and damping


@pytest.mark.parametrize("size", [1, 5, 160])
def test_inverse_factor(size: int):
    hessian = correlated(3, size)
    upper = inverse_factor(hessian)
    assert torch.equal(upper, upper.triu())
    product = upper.double().mT @ upper.double() @ hessian.double()
    torch.testing.assert_close(product, torch.eye(size).double().repeat(3, 1, 1), atol=2e-4, rtol=0)


def test_inverse_factor_of_a_hessian_too_close_to_singular_for_float32():
    generator = torch.Generator().manual_seed(0)
    x = 300 + torch.randint(-1, 2, (40, 40), generator=generator).double()
    hessian = (x.T @ x)[None]  # integers below 2^24, so float32 holds them exactly
    single = hessian.float()
    assert torch.equal(single.double(), hessian)
    assert torch.linalg.cholesky_ex(single).info.any()
    upper = inverse_factor(single).double()
    inverse = torch.linalg.inv(hessian)
    torch.testing.assert_close(upper.mT @ upper, inverse, atol=float(1e-3 * inverse.abs().max()), rtol=0)


def test_some_matrices_are_factored_at_a_time(monkeypatch: pytest.MonkeyPatch):
    hessian = correlated(5, 24)
    at_once = inverse_factor(hessian)
    monkeypatch.setattr(init_gptq, "FACTORED", 2 * 24**2)
    assert torch.equal(inverse_factor(hessian), at_once)


def test_a_matrix_that_needs_float64_leaves_its_neighbours_alone():
    generator = torch.Generator().manual_seed(0)
    x = 300 + torch.randint(-1, 2, (40, 40), generator=generator).float()
    hessian = correlated(3, 40)
    single = inverse_factor(hessian)
    hessian[1] = x.T @ x
    assert torch.linalg.cholesky_ex(hessian).info.tolist()[::2] == [0, 0]
    assert torch.linalg.cholesky_ex(hessian).info[1] > 0
    found = inverse_factor(hessian)
    assert torch.equal(found[::2], single[::2])
    assert torch.equal(found[1], inverse_factor(hessian[1:2])[0])


@pytest.mark.parametrize("bad", [-1.0, 0.0, torch.nan], ids=["indefinite", "singular", "not a number"])
def test_a_hessian_that_is_not_positive_definite(bad: float):
    hessian = torch.eye(32).repeat(2, 1, 1)
    hessian[1, 3, 3] = bad  # the other one of the batch is fine
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite"):
        inverse_factor(hessian)
    with pytest.raises(torch.linalg.LinAlgError, match=r"init\.damping"):
        gptq(random(2, 4, 32), hessian, Codebook.integer(2, 32))


def test_damped():
    hessian = torch.zeros(3, 4, 4)
    hessian[0] = torch.diag(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    hessian[1, 2, 2] = 4
    hessian[1, 0, 1] = hessian[1, 1, 0] = 0.5
    given = hessian.clone()
    found = damped(hessian, 0.1)
    assert torch.equal(hessian, given)
    torch.testing.assert_close(found[0], torch.diag(torch.tensor([1.3, 2.3, 3.3, 6.3])))
    torch.testing.assert_close(found[1], given[1] + 0.1 * torch.eye(4))
    assert torch.equal(found[2], torch.eye(4))  # nothing seen: every error costs the same


# Scales and offsets

Groups = tuple[Tensor, Tensor | None]  # scales and, if the codebook has them, offsets


def rounded(weights: Tensor, codebook: Codebook, groups: Groups) -> Tensor:
    """What the nearest levels stand for."""
    return codebook.decode(codebook.encode(weights, *groups), *groups)


def weighted_errors(weights: Tensor, codebook: Codebook, groups: Groups, importance: Tensor | float = 1.0) -> Tensor:
    """Weighted squared error of every group, `[..., out, groups]`."""
    error = (rounded(weights, codebook, groups) - weights).square() * importance
    return error.unflatten(-1, (-1, codebook.group_size)).sum(-1)


def obvious(weights: Tensor, codebook: Codebook) -> list[Groups]:
    """Levels from zero to the largest weight, of either sign if that differs; or, with offsets, over the range."""
    grouped = weights.unflatten(-1, (-1, codebook.group_size))
    if codebook.offset:
        low, high = grouped.aminmax(dim=-1)
        return [(((high - low) / codebook.levels[-1]).to(codebook.scale_dtype), low.to(codebook.scale_dtype))]
    largest = grouped.abs().amax(-1) / max(abs(level) for level in codebook.levels)
    signs = (1, -1) if codebook.levels[0] != -codebook.levels[-1] else (1,)
    return [((sign * largest).to(codebook.scale_dtype), None) for sign in signs]


@codebooks
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32), size=st.sampled_from([1e-4, 1.0, 300.0]), power=st.sampled_from([1, 3]))
def test_found_groups_are_never_worse_than_the_obvious_ones(codebook: Codebook, seed: int, size: float, power: int):
    weights = size * random(64, 48, seed=seed) ** power
    importance = random(64, 48, seed=seed + 1).square()
    found = weighted_errors(weights, codebook, search_groups(weights, codebook, importance), importance)
    slack = 1 + 1e-5
    assert (found <= slack * (weights.square() * importance).unflatten(-1, (3, 16)).sum(-1)).all()
    for groups in obvious(weights, codebook):
        assert (found <= slack * weighted_errors(weights, codebook, groups, importance)).all()


@pytest.mark.parametrize("size", [16, 24, 1])
@pytest.mark.parametrize("kind", [Codebook.integer, Codebook.affine, Codebook.lloyd], ids=lambda kind: kind.__name__)
def test_groups_are_found_alike_in_any_company(kind: Callable, size: int, monkeypatch: pytest.MonkeyPatch):
    """Bit for bit: processes share out rows and experts, and each searches some at a time."""
    codebook = kind(3, size)
    weights, importance = random(3, 37, 144), random(3, 1, 144).square()
    scales, offsets = search_groups(weights, codebook, importance)
    some, experts = slice(5, 18), slice(1, 2)
    monkeypatch.setattr("gsq.init.scales.CHUNK", {"cpu": 7 * size})
    found, shifts = search_groups(weights[experts, some], codebook, importance[experts])
    assert torch.equal(found, scales[experts, some])
    assert codebook.offset == (shifts is not None)
    assert shifts is None or torch.equal(shifts, offsets[experts, some])


@pytest.mark.parametrize(("kind", "share"), [(Codebook.integer, 0.73), (Codebook.affine, 0.62)])
def test_found_groups_beat_the_obvious_ones_at_two_bits(kind: Callable, share: float):
    codebook, weights = kind(2, 32), random(64, 128)
    found = weighted_errors(weights, codebook, search_groups(weights, codebook)).sum()
    for groups in obvious(weights, codebook):
        assert found < share * weighted_errors(weights, codebook, groups).sum()


@pytest.mark.parametrize("kind", [Codebook.integer, Codebook.affine], ids=["integer", "affine"])
def test_importance_is_respected(kind: Callable):
    codebook = kind(2, 16, torch.float32)
    weights = random(32, 64)
    weights = weights.sign() * weights.abs().clamp(0.5, 1.5)
    importance = torch.full((1, 64), 1e-6)
    importance[:, ::16] = 1.0  # one column of each group is all that counts, in every row
    decoded = rounded(weights, codebook, search_groups(weights, codebook, importance))
    torch.testing.assert_close(decoded[:, ::16], weights[:, ::16], atol=1e-3, rtol=0)
    by_row = 10 ** (2 * random(32, 64, seed=1))
    blind, seeing = search_groups(weights, codebook), search_groups(weights, codebook, by_row)
    cost = lambda found, importance=1.0: weighted_errors(weights, codebook, found, importance).sum()  # noqa: E731
    assert cost(seeing, by_row) < 0.8 * cost(blind, by_row)
    assert cost(blind) < cost(seeing)


@pytest.mark.parametrize("sign", [1, -1])
def test_asymmetric_levels_take_the_sign_that_reaches_further(sign: int):
    codebook = Codebook.integer(2, 4)
    weights = sign * torch.tensor([[-1.0, -0.5, 0.0, 0.5]])
    scales = search_groups(weights, codebook)[0]
    assert torch.equal(scales, torch.tensor([[0.5 * sign]], dtype=torch.bfloat16))
    assert torch.equal(codebook.decode(codebook.encode(weights, scales.float()), scales), weights)


def test_symmetric_levels_need_one_sign():
    assert (search_groups(random(64, 64), Codebook.ternary(16))[0] > 0).all()
    assert (search_groups(random(64, 64), Codebook.integer(2, 16))[0] < 0).any()


def test_scales_of_zeros_and_of_what_their_dtype_cannot_hold():
    weights = torch.zeros(2, 32)
    weights[1, 16:] = 1e30
    scales = search_groups(weights, Codebook.integer(2, 16, torch.float16))[0]
    assert torch.equal(scales, torch.zeros(2, 2, dtype=torch.float16))
    scales, offsets = search_groups(weights, Codebook.affine(2, 16, torch.float16))
    assert torch.equal(scales, torch.zeros(2, 2, dtype=torch.float16))
    assert offsets.tolist() == [[0, 0], [0, 65504]]


def test_what_a_codebook_holds_exactly_is_found():
    """Levels that are all taken, and groups of one value."""
    weights = torch.tensor([[[-0.5, 0.25, 1.0, 1.75], [3.0, 3.0, 3.0, 3.0], [0.0, -1.0, -2.0, -3.0]]]).flatten(1)
    assert torch.equal(round_to_nearest(weights, Codebook.affine(2, 4)).dequantize(), weights)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_shift_of_a_group_changes_nothing_but_its_offset(bits: int):
    codebook = Codebook.affine(bits, 16, torch.float32)  # in which offsets are not rounded
    weights, hessian = random(2, 16, 160), correlated(2, 160)
    shift = torch.linspace(-3, 6, 10)  # of each group; bfloat16 holds them
    moved = weights + codebook.expand(shift)
    plain, shifted = round_to_nearest(weights, codebook), round_to_nearest(moved, codebook)
    assert (plain.codes == shifted.codes).float().mean() > 0.999
    torch.testing.assert_close(shifted.scales, plain.scales, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shifted.offsets, plain.offsets + shift, atol=1e-5, rtol=1e-5)
    for algorithm in (gptq, lambda w, h, c: polish(w, round_to_nearest(w, c), h, rounds=2)):
        errors = [row_errors(w, algorithm(w, hessian, codebook), hessian).sum() for w in (weights, moved)]
        assert float(errors[1]) == pytest.approx(float(errors[0]), rel=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_offsets_serve_weights_with_a_mean(bits: int):
    weights, hessian = 3 + random(2, 16, 160), correlated(2, 160)
    symmetric, affine = (gptq(weights, hessian, kind(bits, 32)) for kind in (Codebook.integer, Codebook.affine))
    assert relative_error(weights, affine, hessian) < 0.5 * relative_error(weights, symmetric, hessian)


@codebooks
def test_round_to_nearest_of_experts(codebook: Codebook):
    weights, importance = random(3, 4, 48), random(3, 1, 48, seed=1).square()
    found = round_to_nearest(weights, codebook, importance)
    for part in (found.scales, found.offsets) if codebook.offset else (found.scales,):
        assert part.dtype == codebook.scale_dtype
        assert part.shape == (3, 4, 3)
    scales, offsets = per_weight(found)
    every = codebook.level_table()[:, None, None, None] * scales + offsets
    nearest = (every - weights).abs().amin(0).float()
    torch.testing.assert_close((found.dequantize() - weights).abs(), nearest, atol=1e-6, rtol=0)
    alone = round_to_nearest(weights[2], codebook, importance[2])
    assert same(found.map(lambda part: part[2]), alone)


@codebooks
@pytest.mark.parametrize("rows", [1, 4], ids=["importance of columns", "of weights"])
def test_some_rows_are_rounded_at_a_time(codebook: Codebook, rows: int, monkeypatch: pytest.MonkeyPatch):
    weights, importance = random(3, 4, 48), random(3, rows, 48, seed=1).square()
    at_once = round_to_nearest(weights, codebook, importance), round_to_nearest(weights, codebook)
    monkeypatch.setattr(init_rtn, "CHUNK", {"cpu": 3 * 48 * 3})  # three rows of each matrix, and then one
    assert same(round_to_nearest(weights, codebook, importance), at_once[0])
    assert same(round_to_nearest(weights, codebook), at_once[1])


# Polish


def literal_descent(weights: Tensor, start: QuantizedTensor, hessian: Tensor, sweeps: int) -> Tensor:
    """Codes after cyclic descent in float64, where every level of every column is tried in full."""
    table, codes = start.codebook.level_table(dtype=torch.float64), start.codes.clone()
    scales, offsets = per_weight(start)
    for column in list(range(weights.shape[-1])) * sweeps:
        errors = []
        for code in range(len(table)):
            codes[..., column] = code
            difference = weights.double() - table[codes.int()] * scales - offsets
            errors.append(((difference @ hessian.double()) * difference).sum(-1))
        codes[..., column] = torch.stack(errors).argmin(0).to(torch.uint8)
    return codes


def problem(codebook: Codebook, seed: int = 0, columns: int = 80) -> tuple[Tensor, QuantizedTensor, Tensor]:
    """Weights, how they are rounded, and their Hessians: two matrices of four rows."""
    weights = random(2, 4, columns, seed=seed)
    return weights, round_to_nearest(weights, codebook), correlated(2, columns, seed=seed, strength=1.5)


@pytest.mark.parametrize("name", ["2 bits", "ternary", "asymmetric", "affine, 2 bits", "affine, 4 bits"])
@pytest.mark.parametrize("sweeps", [1, 2])
def test_descent_is_the_literal_algorithm(name: str, sweeps: int):
    weights, start, hessian = problem(SMALL[name], columns=144)  # three blocks
    found = descend(weights, start, hessian, sweeps)
    assert not torch.equal(found.codes, start.codes)
    assert same(found, replace(start, codes=literal_descent(weights, start, hessian, sweeps)))


@codebooks
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32), noise=st.sampled_from([0.0, 0.3, 3.0]), empty=st.booleans())
def test_no_step_of_polish_raises_the_error_of_a_row(codebook: Codebook, seed: int, noise: float, empty: bool):
    weights, start, hessian = problem(codebook, seed)
    drawn = noise * start.scales * random(2, *start.scales.shape, seed=seed + 5).to(start.scales.dtype)
    start.scales += drawn[0]
    if codebook.offset:
        start.offsets += drawn[1]
    if empty:
        start.scales[:, :2, 1] = 0
        start.codes[:, 1:, 16:32] = codebook.nearest(torch.zeros(1))
    given = start.map(Tensor.clone)
    slack = 1e-5 * ((weights @ hessian) * weights).sum(-1)
    for step in (descend, refit_scales, lambda *case: polish(*case, rounds=2)):
        found = step(weights, start, hessian)
        assert found.values().isfinite().all()
        assert (row_errors(weights, found, hessian) <= row_errors(weights, start, hessian) + slack).all()
    assert same(start, given)


@codebooks
def test_polish_ends_where_no_code_and_no_scale_can_move(codebook: Codebook):
    weights, start, hessian = problem(codebook)
    found = polish(weights, start, hessian, rounds=40, sweeps=20)
    assert relative_error(weights, found, hessian) < 0.9 * relative_error(weights, start, hessian)
    again = polish(weights, found, hessian, rounds=1)
    assert same(again, found)
    if len(codebook.levels) <= 16:
        assert torch.equal(literal_descent(weights, found, hessian, 1), found.codes)


def test_more_rounds_are_better_and_none_changes_nothing():
    weights, start, hessian = problem(SMALL["2 bits"], columns=160)
    assert polish(weights, start, hessian, rounds=0) is start
    errors = [relative_error(weights, polish(weights, start, hessian, rounds), hessian) for rounds in (0, 1, 4)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("name", SMALL)
def test_many_systems_are_solved_some_rows_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch):
    weights, start, hessian = problem(SMALL[name])
    at_once = refit_scales(weights, start, hessian)
    groups = start.scales.shape[-1]
    for limit, size in {"SYSTEMS": 2 * groups**2 * 3, "PRODUCTS": 2 * 80 * 3}.items():  # some rows, not all alike
        with monkeypatch.context() as patch:
            patch.setattr(init_polish, limit, size)
            found = refit_scales(weights, start, hessian)
        for part, expected in zip(found.tensors, at_once.tensors, strict=True):
            torch.testing.assert_close(part, expected)


@pytest.mark.parametrize("name", ["2 bits", "4 bits", "asymmetric", "affine, 2 bits", "affine, 4 bits"])
def test_refitted_scales_and_offsets_are_least_squares(name: str):
    codebook = replace(SMALL[name], scale_dtype=torch.float32)
    weights, start, hessian = problem(codebook)
    found = refit_scales(weights, start, hessian)
    assert torch.equal(found.codes, start.codes)
    roots = torch.linalg.cholesky(hessian.double()).mT  # |root (w - q)|^2 is the error of a row
    levels = codebook.level_table(dtype=torch.float64)[start.codes.int()]
    columns = torch.zeros(2, 4, 80, 10, dtype=torch.float64)  # what scale g, and then what offset g, adds to a row
    for group in range(5):
        part = slice(16 * group, 16 * (group + 1))
        columns[..., part, group] = levels[..., part]
        columns[..., part, group + 5] = 1
    columns = columns if codebook.offset else columns[..., :5]
    design = roots[:, None] @ columns
    wanted = (roots[:, None] @ weights.double()[..., None])[..., 0]
    best = torch.linalg.lstsq(design, wanted).solution
    solution = torch.cat([found.scales, found.offsets], -1) if codebook.offset else found.scales
    torch.testing.assert_close(solution.double(), best, atol=1e-4, rtol=1e-3)


def test_scales_that_rounding_would_spoil_are_kept():
    """Two groups that only matter together: each rounds down, and the sum, which is nearly right, would go wrong."""
    start = QuantizedTensor(
        torch.ones(1, 2, 2, dtype=torch.uint8),
        torch.tensor([[[1.0078125, 1.0], [2.0, 2.0]]], dtype=torch.bfloat16),
        Codebook((-1.0, 1.0), 1),
    )
    weights = torch.tensor([[[1.003, 1.003], [1.003, 1.003]]])
    found = refit_scales(weights, start, torch.tensor([[[1.0, 0.999], [0.999, 1.0]]]))
    assert found.scales.tolist() == [[[1.0078125, 1.0], [1.0, 1.0]]]


@pytest.mark.parametrize("name", ["2 bits", "affine, 2 bits", "affine, 4 bits"])
def test_a_group_of_zeros_or_of_one_level_does_not_keep_the_others_from_their_scales(name: str):
    weights, start, hessian = problem(SMALL[name])
    start.codes[..., 16:32] = 2
    found = refit_scales(weights, start, hessian)
    assert found.values().isfinite().all()
    assert (row_errors(weights, found, hessian) < row_errors(weights, start, hessian)).all()


def test_errors_by_definition():
    weights, start, hessian = problem(SMALL["2 bits"])
    difference = weights.double() - start.dequantize().double()
    whole = torch.einsum("boi,bij,boj->bo", difference, hessian.double(), difference)
    torch.testing.assert_close(row_errors(weights, start, hessian).double(), whole, rtol=1e-4, atol=0)
    size = torch.einsum("boi,bij,boj->", weights.double(), hessian.double(), weights.double())
    assert relative_error(weights, start, hessian) == pytest.approx(float(whole.sum() / size), rel=1e-4)


@codebooks
def test_free_values_minimize_the_error_one_weight_at_a_time(codebook: Codebook):
    weights, start, hessian = problem(codebook, columns=32)
    found = free_values(weights, start, hessian)
    double = hessian.double()
    for column in range(32):
        values = start.dequantize().double()
        values[..., column] = found[..., column]
        values.requires_grad_()
        difference = weights.double() - values
        ((difference @ double) * difference).sum().backward()
        at_minimum = values.grad[..., column] / (2 * double[:, None, column, column])  # distance to it
        torch.testing.assert_close(at_minimum, torch.zeros(2, 4).double(), atol=1e-4, rtol=0)


# Moments


def test_moments_are_the_sums_over_tokens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hessian_module, "CHUNK", 16)
    moments = Moments(3, 24, torch.device("cpu"), cross=True)
    hessians, cross = torch.zeros(3, 24, 24).double(), torch.zeros(3, 24, 24).double()
    for call, (index, tokens) in enumerate([(0, 50), (2, 16), (0, 7), (2, 0)]):
        x, original = random(tokens, 24, seed=call).bfloat16(), random(tokens, 24, seed=call + 9).bfloat16()
        moments.add(index, x, original)
        hessians[index] += x.double().T @ x.double()
        cross[index] += original.double().T @ x.double()
    assert moments.tokens.tolist() == [57, 0, 16]
    torch.testing.assert_close(moments.hessian.double(), hessians, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(moments.cross.double(), cross, atol=1e-4, rtol=1e-5)


def test_moments_without_cross():
    assert Moments(1, 4, torch.device("cpu")).cross is None


@pytest.mark.parametrize("prior", [0.0, 1.0, 64.0])
def test_experts_of_few_tokens_are_drawn_toward_the_mean(prior: float):
    moments = Moments(3, 16, torch.device("cpu"))
    moments.add(0, random(200, 16))
    moments.add(1, 3 * random(4, 16, seed=1))
    per_token = moments.hessian / torch.tensor([200, 4, 1])[:, None, None]
    mean = moments.hessian.sum(0) / 204
    found = moments.shrunk(prior)
    for expert, tokens in enumerate((200, 4)):
        own = tokens / (tokens + prior)
        torch.testing.assert_close(found[expert], own * per_token[expert] + (1 - own) * mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[2], mean, rtol=1e-5, atol=1e-5)  # it saw none


def test_one_matrix_is_not_shrunk_and_may_have_seen_nothing():
    moments = Moments(1, 8, torch.device("cpu"))
    assert torch.equal(damped(moments.shrunk(64.0), 0.02), torch.eye(8)[None])
    moments.add(0, random(20, 8))
    torch.testing.assert_close(moments.shrunk(64.0), moments.hessian / 20)


def test_answer_original_is_the_least_squares_solution():
    batch, rows, columns, tokens, damping = 2, 3, 16, 60, 0.05
    moments = Moments(batch, columns, torch.device("cpu"), cross=True)
    weights = random(batch, rows, columns)
    inputs = [random(tokens, columns, seed=matrix + 1) for matrix in range(batch)]
    originals = [x + 0.5 * random(tokens, columns, seed=matrix + 5) for matrix, x in enumerate(inputs)]
    for matrix in range(batch):
        moments.add(matrix, inputs[matrix], originals[matrix])
    hessian = damped(moments.hessian / tokens, damping)
    found = answer_original(weights, moments, hessian)
    share = tokens**-0.5
    for matrix in range(batch):
        ridge = (hessian - moments.hessian / tokens)[matrix, 0, 0].double().sqrt()
        design = torch.cat([share * inputs[matrix].double(), ridge * torch.eye(columns)])
        answers = (
            torch.cat([share * originals[matrix].double(), ridge * torch.eye(columns)]) @ weights[matrix].T.double()
        )
        best = torch.linalg.lstsq(design, answers).solution.T
        torch.testing.assert_close(found[matrix].double(), best, atol=1e-4, rtol=1e-4)


def test_answer_original_gives_back_weights_where_nothing_differs_or_nothing_was_seen():
    moments = Moments(2, 16, torch.device("cpu"), cross=True)
    x = random(60, 16)
    moments.add(0, x, x)
    weights = random(2, 3, 16)
    found = answer_original(weights, moments, damped(moments.shrunk(8.0), 0.02))
    torch.testing.assert_close(found, weights, atol=1e-4, rtol=1e-4)
