"""The relaxation against autograd and Lion, its noise against published answers, and refinement that never harms."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lion_pytorch import Lion
from torch import Tensor, nn
from torch.func import functional_call

from gsq.calib.stream import Calls
from gsq.codebook import Codebook, QuantizedTensor
from gsq.init.polish import free_values
from gsq.init.rtn import round_to_nearest
from gsq.kernels import relaxation
from gsq.kernels.relaxation import gumbel_noise, philox
from gsq.memory import Batch, Memory
from gsq.ranks import Ranks
from gsq.refine.gumbel import Relaxation, Temperature
from gsq.refine.loop import Refined, Schedule, refine
from gsq.refine.objective import HessianObjective, OutputObjective, epochs, token_sizes, token_weights

CPU = torch.device("cpu")
NOISE, SILENT = 1.0, 0.0
CODEBOOKS = {
    "2 bits": Codebook.integer(2, 16),
    "3 bits": Codebook.integer(3, 16),
    "ternary": Codebook.ternary(16),
    "not uniform": Codebook((-3.0, -1.0, 0.5), 16),
    "4 bits, a window": Codebook.integer(4, 16),
    "8 bits, a window": Codebook.integer(8, 16, torch.float32),
    "affine, 2 bits": Codebook.affine(2, 16),
    "affine, 3 bits": Codebook.affine(3, 16, torch.float16),
    "affine, 8 bits, a window": Codebook.affine(8, 16, torch.float32),
}
codebooks = pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS)
MILD = Temperature(tau=1.5, kappa=8.0, lr=0.01, scale_lr=0.02)  # no level has all the probability
COLD = Temperature(tau=1e-3, kappa=500.0, lr=0.0, scale_lr=0.0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relax(
    start: QuantizedTensor, wanted: Tensor, gap: float = 0.06, decay: float = 0.0, seed: int = 0, stream: int = 0,
    noise: float = NOISE, betas: tuple[float, float] = (0.9, 0.95), first: int = 0, dtype: torch.dtype = torch.float32,
) -> Relaxation:  # fmt: skip
    """The one place that knows how a relaxation is constructed."""
    return Relaxation(start, wanted, gap, decay, betas, seed, stream, noise, first, dtype)


def scattered(codebook: Codebook, *shape: int, seed: int = 0) -> QuantizedTensor:
    """Codes that use every level, and scales and offsets of both signs and several sizes."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, len(codebook.levels), shape, generator=generator).to(torch.uint8)
    groups = random(2, *shape[:-1], shape[-1] // codebook.group_size, seed=seed) * 0.3 + 0.05
    scales, offsets = groups.to(codebook.scale_dtype)
    return QuantizedTensor(codes, scales, codebook, offsets if codebook.offset else None)


def near(start: QuantizedTensor, seed: int = 1) -> Tensor:
    """Free values about a level away from the quantized ones."""
    weights = start.dequantize()
    return weights + start.codebook.expand(start.scales.float()) * random(*weights.shape, seed=seed)


def parts(q: QuantizedTensor) -> list[Tensor]:
    """Codes, scales and, if there are any, offsets."""
    return [part for part in (q.codes, q.scales, q.offsets) if part is not None]


def same(left: dict[str, QuantizedTensor], right: dict[str, QuantizedTensor]) -> bool:
    pairs = [pair for name in right for pair in zip(parts(left[name]), parts(right[name]), strict=True)]
    return all(torch.equal(*pair) for pair in pairs)


def moving(r: Relaxation) -> list[Tensor]:
    """What moves beside the logits."""
    return [r.log_scales, r.shifts] if r.codebook.offset else [r.log_scales]


def plain_soft(
    r: Relaxation, logits: Tensor, step: int, at: Temperature, log_scales: Tensor, shifts: Tensor | None = None
) -> Tensor:
    """Soft weights by the formula, in float64 and for autograd; shifts are in units of half a group's range."""
    count = len(logits)
    noise = gumbel_noise(r.seed, r.stream, step, 0, logits.shape[1], count, CPU).double() if r.noise else 0.0
    p = torch.softmax((at.kappa * logits + noise) / at.tau, dim=0)
    first = torch.zeros(logits.shape[1]).long() if r.window is None else r.window.long()
    level = r.codebook.level_table(dtype=torch.float64)[first + torch.arange(count)[:, None]]
    expand = lambda groups: groups.repeat_interleave(r.codebook.group_size)  # noqa: E731
    start = r.start_scales.double()
    if shifts is None:
        return ((p * level).sum(0) * expand(start * log_scales.exp())).view(r.shape)
    half = r.codebook.levels[-1] / 2
    middle = r.start_centers.double() + start.abs() * half * shifts
    return (((p * level).sum(0) - half) * expand(start * log_scales.exp()) + expand(middle)).view(r.shape)


# The relaxation


@codebooks
@pytest.mark.parametrize("noise", [NOISE, SILENT])
def test_gradients_are_those_of_autograd(codebook: Codebook, noise: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(relaxation.CHUNK, "cpu", 48)
    start = scattered(codebook, 2, 3, 32)
    r = relax(start, near(start), noise=noise, seed=5, stream=7)
    for index, parameter in enumerate(moving(r)):
        parameter.data += 0.3 * random(len(parameter), seed=index)
    logits = r.logits.double().requires_grad_()
    leaves = [parameter.detach().double().requires_grad_() for parameter in moving(r)]
    soft = r.soft(3, MILD)
    expected = plain_soft(r, logits, 3, MILD, *leaves)
    torch.testing.assert_close(soft.double(), expected, atol=1e-5, rtol=1e-4)
    slopes = random(2, 3, 32, seed=4)
    (expected * slopes.double()).sum().backward()
    r.update(slopes, MILD)
    found = r.momentum.double() / (1 - r.betas[1])  # momentum was zero
    scale = float(logits.grad.abs().max())
    torch.testing.assert_close(found, logits.grad, atol=1e-5 * scale, rtol=1e-3)
    for parameter, leaf in zip(moving(r), leaves, strict=True):
        torch.testing.assert_close(parameter.grad.double(), leaf.grad, atol=1e-5, rtol=1e-3)


@codebooks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_the_first_step_the_hard_result_is_the_start(codebook: Codebook, dtype: torch.dtype):
    start = scattered(codebook, 4, 6, 64)
    start.scales[0, 1] = 0
    if codebook.offset:
        start.offsets[1] *= 1e-4  # far smaller than the scales
    far = start.dequantize() + 50 * codebook.expand(start.scales.float()) * random(4, 6, 64)
    for wanted in (near(start), start.dequantize(), far, torch.zeros(4, 6, 64)):
        relaxed = relax(start, wanted, dtype=dtype)
        assert relaxed.logits.dtype == dtype
        found = relaxed.hard()
        assert same({"": found}, {"": start})
        assert {part.dtype for part in parts(found)[1:]} == {codebook.scale_dtype}


@codebooks
def test_starting_logits_do_not_depend_on_how_they_are_cut(codebook: Codebook, monkeypatch: pytest.MonkeyPatch):
    start = scattered(codebook, 2, 3, 32)
    whole = relax(start, near(start)).logits
    monkeypatch.setitem(relaxation.CHUNK, "cpu", 50)  # three groups, and a rest that is too small for one
    assert torch.equal(relax(start, near(start)).logits, whole)


@pytest.mark.parametrize("away", [1e4, 1e30])
def test_the_hard_result_is_the_start_even_if_wanted_is_far_away(away: float):
    start = scattered(CODEBOOKS["2 bits"], 1, 4, 64)
    wanted = start.dequantize() + away * start.codebook.expand(start.scales.float()) * random(1, 4, 64)
    assert torch.equal(relax(start, wanted).hard().codes, start.codes)


def test_the_likeliest_level_is_the_first_of_the_largest(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(relaxation.CHUNK, "cpu", 7)
    logits = torch.randint(0, 3, (5, 100), generator=torch.Generator().manual_seed(0)).float()
    expected = [row.index(max(row)) for row in logits.T.tolist()]
    assert relaxation.likeliest(logits).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["2 bits", "8 bits, a window", "affine, 3 bits"])
def test_rows_refined_apart_are_those_of_the_whole(name: str, dtype: torch.dtype):
    """As processes do: each draws by the number that a weight has in the whole target."""
    start = scattered(CODEBOOKS[name], 6, 32)
    wanted, gradient = near(start), random(6, 32, seed=4)
    whole = relax(start, wanted, dtype=dtype)
    parts = [relax(start.rows(a, b), wanted[a:b], first=32 * a, dtype=dtype) for a, b in ((0, 2), (2, 6))]
    for step in range(3):
        assert torch.equal(torch.cat([part.soft(step, MILD) for part in parts]), whole.soft(step, MILD))
        for relaxed, own in zip([*parts, whole], [gradient[:2], gradient[2:], gradient], strict=True):
            relaxed.update(own, MILD)
    assert torch.equal(torch.cat([part.logits for part in parts], 1), whole.logits)
    assert same({"": QuantizedTensor.stacked([part.hard() for part in parts])}, {"": whole.hard()})


@pytest.mark.parametrize("codebook", [CODEBOOKS["2 bits"], CODEBOOKS["affine, 2 bits"], Codebook.tq(3, 16, 64)])
def test_soft_weights_are_given_in_any_dtype(codebook: Codebook):
    start = scattered(codebook, 4, 64)
    exact, rounded = (relax(start, near(start)) for _ in range(2))
    assert torch.equal(rounded.soft(2, MILD, torch.bfloat16), exact.soft(2, MILD).bfloat16())
    for r in (exact, rounded):
        r.update(random(4, 64), MILD)
    assert torch.equal(rounded.log_scales.grad, exact.log_scales.grad)


@codebooks
def test_cold_soft_weights_are_the_hard_ones(codebook: Codebook):
    start = scattered(codebook, 4, 64)
    r = relax(start, near(start), noise=SILENT)
    torch.testing.assert_close(r.soft(0, COLD), start.dequantize())


@codebooks
def test_the_level_next_to_wanted_is_the_first_to_be_tried(codebook: Codebook):
    start = scattered(codebook, 8, 64)
    per_weight = codebook.expand(start.scales.float())
    wanted = start.dequantize() + 0.6 * per_weight  # between two levels, or past the last
    r = relax(start, wanted)
    table = codebook.level_table()
    order = r.logits.topk(2, dim=0).indices
    second = table[order[1] if r.window is None else order[1] + r.window.int()].view(8, 64)
    inside = start.codes < len(codebook.levels) - 1
    above = table[(start.codes.int() + 1).clamp_max(len(table) - 1)]
    assert torch.equal(second[inside], above[inside])


def test_windows_hold_the_start_and_its_neighbours():
    codebook = CODEBOOKS["4 bits, a window"]
    start = scattered(codebook, 4, 64)
    r = relax(start, near(start))
    assert r.logits.shape == (5, 256)
    inside = start.codes.view(-1).int() - r.window.int()
    middle = (start.codes.view(-1) >= 2) & (start.codes.view(-1) <= 13)
    assert (inside[middle] == 2).all()
    r.logits[:] = 0
    r.logits[4] = 1
    highest = r.hard().codes.view(-1)
    assert torch.equal(highest[middle], start.codes.view(-1)[middle] + 2)
    assert highest.max() == 15
    r.logits[0] = 2
    assert r.hard().codes.min() == 0


def test_hard_offsets_move_by_shares_of_their_scales_and_are_rounded():
    start = scattered(CODEBOOKS["affine, 2 bits"], 4, 64)
    start.scales[1, 2] = 0
    r = relax(start, near(start))
    for step in range(3):
        r.soft(step, MILD)
        r.update(torch.ones(4, 64), MILD)  # every offset is too large
    found = r.hard()
    middle = start.centers() - 3 * MILD.scale_lr * 1.5 * start.scales.float().abs()  # the middle level would be 1.5
    assert torch.equal(found.offsets, (middle - 1.5 * found.scales.float()).bfloat16())
    assert found.offsets[1, 2] == start.offsets[1, 2]


def test_hard_scales_move_with_their_logarithm_and_are_rounded():
    start = scattered(CODEBOOKS["2 bits"], 4, 64)
    r = relax(start, near(start))
    for step in range(3):
        r.soft(step, MILD)
        r.update(r.soft(step, MILD).sign(), MILD)  # every scale is too large
    found = r.hard()
    assert torch.equal(found.scales, (start.scales.float() * math.exp(-3 * MILD.scale_lr)).bfloat16())


@codebooks
def test_noise_is_drawn_from_seed_stream_and_step_alone(codebook: Codebook, monkeypatch: pytest.MonkeyPatch):
    start = scattered(codebook, 4, 64)
    soft = lambda step, **keys: relax(start, near(start), **keys).soft(step, MILD)  # noqa: E731
    drawn = soft(2, seed=1, stream=3)
    assert torch.equal(drawn, soft(2, seed=1, stream=3))
    for other in (soft(3, seed=1, stream=3), soft(2, seed=2, stream=3), soft(2, seed=1, stream=4)):
        assert not torch.isclose(drawn, other).all(-1).any()
    assert not torch.equal(drawn, soft(2, noise=SILENT))
    assert torch.equal(soft(2, noise=SILENT), soft(5, seed=9, stream=9, noise=SILENT))
    monkeypatch.setitem(relaxation.CHUNK, "cpu", 32)
    assert torch.equal(drawn, soft(2, seed=1, stream=3))


@pytest.mark.parametrize("decay", [0.0, 1.0])
@pytest.mark.parametrize("name", ["3 bits", "affine, 3 bits"])
def test_logits_scales_and_offsets_step_as_lion_does(name: str, decay: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(relaxation.CHUNK, "cpu", 48)
    codebook, betas = CODEBOOKS[name], (0.8, 0.95)
    start = scattered(codebook, 6, 32)
    r = relax(start, near(start), decay=decay, betas=betas)
    logits, leaves = r.logits.clone().requires_grad_(), [torch.zeros(12, requires_grad=True) for _ in moving(r)]
    reference = Lion([logits], lr=1.0, betas=betas, weight_decay=decay)
    for_groups = Lion(leaves, lr=1.0, betas=betas)
    for step in range(8):
        at = Temperature(2.0 / (step + 1), 5.0 + step, 0.02 / (step + 1), 0.01 / (step + 1))
        gradient = random(6, 32, seed=step)
        r.soft(step, at)
        outer = (gradient.view(-1, 16) * r._scales()[:, None]).view(-1)
        logits.grad = r._tape.slope * outer * (at.kappa / at.tau)
        soft = r._tape.weights.view(6, 32)
        products = [gradient * soft, gradient]  # Lion does not see by what a group's sum is multiplied
        for leaf, product in zip(leaves, products, strict=False):
            leaf.grad = product.view(-1, 16).sum(1)
        reference.param_groups[0]["lr"], for_groups.param_groups[0]["lr"] = at.lr, at.scale_lr
        reference.step()
        for_groups.step()
        r.update(gradient, at)
        torch.testing.assert_close(r.logits, logits.detach(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(moving(r), leaves, atol=1e-6, rtol=1e-5)
        momentum = reference.state[logits]["exp_avg"]
        torch.testing.assert_close(r.momentum, momentum, atol=1e-6, rtol=1e-5)


# Noise

KNOWN_ANSWERS = (  # philox4x32-10 of the Random123 distribution: counter, key, answer
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def literal_philox(counter: tuple, key: tuple) -> tuple:
    """Ten rounds in Python's integers."""
    (a, b, c, d), (left, right) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b = (second >> 32) ^ b ^ left, second % 2**32
        c, d = (first >> 32) ^ d ^ right, first % 2**32
        left, right = (left + 0x9E3779B9) % 2**32, (right + 0xBB67AE85) % 2**32
    return a, b, c, d


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_known_answers_of_philox(counter: tuple, key: tuple, answer: tuple):
    assert literal_philox(counter, key) == answer
    if counter[3] < 2:  # the last word counts blocks of draws
        found = philox(key[0] | key[1] << 32, counter[2], counter[1], counter[0], 1, 4, CPU)
        assert tuple(found[:, 0].tolist()) == answer


word = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**31, 2**32 - 1])


@settings(deadline=None, max_examples=60)
@given(seed=st.tuples(word, word), stream=word, step=word, first=st.integers(0, 2**32 - 4), draws=st.integers(1, 13))
def test_philox_is_the_literal_algorithm(seed: tuple, stream: int, step: int, first: int, draws: int):
    found = philox(seed[0] | seed[1] << 32, stream, step, first, 4, draws, CPU)
    assert found.shape == (draws, 4)
    for position, drawn in enumerate(found.T.tolist()):
        blocks = [literal_philox((first + position, step, stream, block), seed) for block in range(4)]
        assert drawn == [number for block in blocks for number in block][:draws]


def test_elements_past_the_first_four_billion_have_noise_of_their_own():
    early, late = philox(1, 2, 3, 0, 64, 5, CPU), philox(1, 2, 3, 2**32 - 32, 64, 5, CPU)
    assert not (late[:, 32:] == early[:, :32]).any()
    assert torch.equal(late[:, 32:], philox(1, 2, 3, 2**32, 32, 5, CPU))


def test_gumbel_noise_is_gumbel():
    noise = gumbel_noise(3, 1, 2, 0, 100_000, 5, CPU).double()
    assert noise.isfinite().all()
    assert noise.abs().max() < 16.7
    for draw in noise:
        assert float(draw.mean()) == pytest.approx(0.57722, abs=5 * 1.2825 / 100_000**0.5)
        assert float(draw.var()) == pytest.approx(math.pi**2 / 6, rel=5 * (4.4 / 100_000) ** 0.5)  # kurtosis 5.4
        expected = torch.exp(-torch.exp(-draw.sort().values))
        assert (expected - (torch.arange(100_000) + 0.5) / 100_000).abs().max() < 2.2 / 100_000**0.5  # p = 1e-4
    between = torch.corrcoef(noise) - torch.eye(5)
    neighbours = torch.corrcoef(torch.stack([noise[0, 1:], noise[0, :-1]]))[0, 1]
    steps = torch.corrcoef(torch.stack([noise[0], gumbel_noise(3, 1, 3, 0, 100_000, 1, CPU)[0].double()]))[0, 1]
    assert max(float(between.abs().max()), float(neighbours.abs()), float(steps.abs())) < 5 / 100_000**0.5


def test_the_rarest_uniforms_stay_finite(monkeypatch: pytest.MonkeyPatch):
    extremes = torch.tensor([[0, 2**32 - 1]])
    monkeypatch.setattr(relaxation, "philox", lambda *_: extremes)
    low, high = gumbel_noise(0, 0, 0, 0, 2, 1, CPU)[0].tolist()
    assert low == pytest.approx(-math.log(24 * math.log(2)), rel=1e-6)
    assert high == pytest.approx(24 * math.log(2), rel=1e-6)


def test_noise_does_not_depend_on_how_it_is_cut():
    whole = gumbel_noise(1, 2, 3, 10, 100, 6, CPU)
    parts = [gumbel_noise(1, 2, 3, first, count, 6, CPU) for first, count in ((10, 1), (11, 60), (71, 39))]
    assert torch.equal(whole, torch.cat(parts, 1))
    assert torch.equal(whole[:3], gumbel_noise(1, 2, 3, 10, 100, 3, CPU))


# Schedules


@pytest.mark.parametrize("steps", [2, 7, 640])
def test_schedules_fit_any_number_of_steps(steps: int):
    schedule = Schedule(steps, lr=0.01, scale_lr=0.003, tau=(2.0, 0.05), kappa=(100.0, 500.0))
    all_steps = [schedule.at(step) for step in range(steps)]
    first, last = all_steps[0], all_steps[-1]
    assert (first.tau, first.kappa, first.lr, first.scale_lr) == pytest.approx((2.0, 100.0, 0.01, 0.003))
    assert (last.tau, last.kappa) == pytest.approx((0.05, 500.0))
    assert 0 < last.lr <= 0.5 * first.lr
    assert last.scale_lr / last.lr == pytest.approx(0.3)
    for before, after in pairwise(all_steps):
        assert before.tau > after.tau
        assert before.kappa < after.kappa
        assert before.lr > after.lr


def test_a_schedule_of_one_step_starts_and_ends_there():
    assert Schedule(1, lr=0.01, tau=(2.0, 0.05)).at(0).lr == 0.01


@given(steps=st.integers(1, 300), checks=st.integers(1, 40))
def test_hard_results_are_judged_as_often_as_asked(steps: int, checks: int):
    schedule = Schedule(steps, checks=checks)
    judged = [step for step in range(steps) if schedule.judged(step)]
    assert len(judged) == min(steps, checks)
    assert judged[-1] == steps - 1
    gaps = [after - before for before, after in pairwise([-1, *judged])]
    assert max(gaps) - min(gaps) <= 1


# Objectives


def hessian(batch: int, size: int, seed: int = 0) -> Tensor:
    x = random(batch, 3 * size, size, seed=seed) @ (torch.eye(size) + random(size, size, seed=seed + 1) / size**0.5)
    return x.mT @ x / (3 * size)


def start_of(wanted: dict[str, Tensor], codebook: Codebook | None = None) -> dict[str, QuantizedTensor]:
    codebook = codebook or CODEBOOKS["2 bits"]
    return {name: round_to_nearest(weights, codebook) for name, weights in wanted.items()}


@pytest.mark.parametrize("shape", [(6, 32), (3, 6, 32)], ids=["one", "experts"])
def test_the_hessian_objective_and_its_gradient(shape: tuple):
    wanted = random(*shape)
    batched = wanted.view(-1, 6, 32)
    moments = hessian(len(batched), 32)
    objective = HessianObjective({"a": batched}, {"a": moments}, {"a": CODEBOOKS["2 bits"]})
    weights = (wanted + 0.3 * random(*shape, seed=1)).double().requires_grad_()
    difference = weights.view_as(batched) - batched.double()
    reference = torch.einsum("boi,bij,boj->", batched.double(), moments.double(), batched.double())
    expected = torch.einsum("boi,bij,boj->", difference, moments.double(), difference) / reference
    expected.backward()
    loss, gradients = objective.gradients(0, {"a": weights.detach().float()})
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    assert objective.error({"a": weights.detach().float()}) == loss
    torch.testing.assert_close(gradients["a"].double(), weights.grad, atol=1e-7, rtol=1e-3)
    assert objective.error({"a": wanted}) == 0


def test_the_hessian_objective_of_a_rotated_codebook_is_that_of_the_weights():
    codebook = Codebook.tq(3, 16, 40)  # 40 is padded to 48
    wanted, moments = random(2, 6, 40), hessian(2, 40)
    weights = {"a": wanted + 0.3 * random(2, 6, 40, seed=1)}
    plain = HessianObjective({"a": wanted}, {"a": moments}, {"a": CODEBOOKS["2 bits"]})
    rotated_inputs = {"a": codebook.rotate(wanted)}, {"a": codebook.rotate_moments(moments)}
    rotated = HessianObjective(*rotated_inputs, {"a": codebook})
    (loss, gradients), (expected, expected_gradients) = (o.gradients(0, weights) for o in (rotated, plain))
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-6, rtol=1e-4)


def test_a_rotation_stands_outside_the_relaxation():
    rotated = Codebook.tq(3, 16, 40)
    plain = Codebook(rotated.levels, 16, torch.float32)
    start = scattered(plain, 6, 48)
    wanted = near(start)
    a = relax(QuantizedTensor(start.codes, start.scales, rotated), wanted)
    b = relax(start, wanted)
    soft, gradient = b.soft(3, MILD), random(6, 40, seed=4)
    assert torch.equal(a.soft(3, MILD), rotated.unrotate(soft))
    a.update(gradient, MILD)
    b.update(rotated.rotate(gradient), MILD)
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.hard().dequantize(), QuantizedTensor(b.hard().codes, b.hard().scales, rotated).dequantize())


def test_the_gradients_of_two_targets_are_those_of_the_loss():
    _, _, objective = hessian_case()
    weights = {name: w + 0.1 * random(*w.shape, seed=4) for name, w in objective.wanted.items()}
    direction = random(*weights["a"].shape, seed=5)
    moved = [weights | {"a": weights["a"] + side * direction} for side in (0.01, -0.01)]
    slope = (objective.error(moved[0]) - objective.error(moved[1])) / 0.02
    gradient = objective.gradients(0, weights)[1]["a"]
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=0.01)


class Experts(nn.Module):
    """A gated pair of Linears, and fused experts `[experts, out, in]` between which each token is split."""

    def __init__(self, size: int = 16, experts: int = 3):
        super().__init__()
        self.up, self.down = nn.Linear(size, 2 * size, bias=False), nn.Linear(2 * size, size, bias=False)
        self.experts = nn.Parameter(torch.empty(experts, size, size))
        for index, parameter in enumerate(self.parameters()):
            parameter.data = random(*parameter.shape, seed=index) * parameter.shape[-1] ** -0.5
        self.requires_grad_(False)  # as the layers of a run

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        chosen = (flat[:, :3].argmax(-1)) if len(flat) else flat.new_zeros(0).long()
        routed = torch.stack([row @ self.experts[e].T for row, e in zip(flat, chosen.tolist(), strict=True)])
        return self.down(nn.functional.silu(self.up(x))) + routed.view_as(x)


WINDOWS, LENGTH, SIZE = 12, 32, 16


def in_order(step: int, per_step: int, windows: int) -> list[int]:
    return [(place + step) % windows for place in range(per_step)]


def output_objective(
    module: nn.Module, held_out: int = 4, per_step: int = 8, micro_batch: int = 3, massive: float = 1.0,
    order: Callable[[int, int, int], list[int]] = in_order,
) -> tuple[OutputObjective, Tensor]:  # fmt: skip
    """An objective whose module was recorded as a run records it, and the inputs that it saw."""
    x = random(WINDOWS, LENGTH, SIZE, seed=9)
    x[:, 0] *= massive
    calls, size = Calls(LENGTH, WINDOWS, Memory(CPU)), 0
    handle = module.register_forward_hook(calls.hook(lambda: size), with_kwargs=True)
    for part in x.split(5):
        size = len(part)
        with torch.no_grad():
            module(part)
    handle.remove()
    weights = token_weights(token_sizes(calls.outputs), Ranks())
    return OutputObjective(module, calls, calls.outputs, weights, held_out, per_step, Batch(micro_batch), order), x


def plain_output_error(module: nn.Module, weights: dict[str, Tensor], x: Tensor, objective: OutputObjective) -> Tensor:
    """Weighted squared error of every window, in float64, `[windows]`."""
    double = Experts().double()
    output = functional_call(double, weights, (x.double(),))
    difference = (output - objective.wanted.double()).square().sum(-1)
    return (difference * objective.token_weights.double()).sum(-1)


def perturbed(module: nn.Module) -> dict[str, Tensor]:
    weights = {"up.weight": module.up.weight, "experts": module.experts}
    return {name: w.detach() + 0.1 * random(*w.shape, seed=3) for name, w in weights.items()}


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
@pytest.mark.parametrize("massive", [1.0, 100.0])
def test_the_output_objective_and_its_gradient(micro_batch: int, massive: float):
    module = Experts()
    objective, x = output_objective(module, held_out=4, per_step=6, micro_batch=micro_batch, massive=massive)
    weights = perturbed(module)
    leaves = {name: w.double().requires_grad_() for name, w in weights.items()}
    errors = plain_output_error(module, leaves, x, objective)
    sizes = (objective.wanted.double().square().sum(-1) * objective.token_weights.double()).sum(-1)
    step = 5
    chosen = [5, 6, 7, 0, 1, 2]  # of the eight that are not held out
    expected = errors[chosen].mean() / sizes.mean()
    expected.backward()
    loss, gradients = objective.gradients(step, {name: w.clone() for name, w in weights.items()})
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    for name, leaf in leaves.items():
        scale = float(leaf.grad.abs().max())
        torch.testing.assert_close(gradients[name].double(), leaf.grad, atol=1e-4 * scale, rtol=1e-3)
    held_out = float(errors[8:].sum().detach() / sizes[8:].sum())
    assert objective.error(weights) == pytest.approx(held_out, rel=1e-4)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_without_windows_to_hold_out_all_of_them_judge():
    module = Experts()
    objective, x = output_objective(module, held_out=0)
    weights = perturbed(module)
    errors = plain_output_error(module, {name: w.double() for name, w in weights.items()}, x, objective)
    sizes = (objective.wanted.double().square().sum(-1) * objective.token_weights.double()).sum(-1)
    assert objective.error(weights) == pytest.approx(float((errors.sum() / sizes.sum()).detach()), rel=1e-4)
    exact = {name: module.get_parameter(name).detach() for name in weights}
    assert objective.error(exact) < 1e-10


def test_an_objective_asked_twice_answers_the_same():
    module = Experts()
    objective, _ = output_objective(module)
    weights = perturbed(module)
    first = {name: gradient.clone() for name, gradient in objective.gradients(0, weights)[1].items()}
    second = objective.gradients(0, weights)[1]
    for name in weights:
        torch.testing.assert_close(second[name], first[name])


def test_a_target_that_no_token_reaches_has_no_gradient():
    module = Experts()
    objective, _ = output_objective(module)
    module.unused = nn.Linear(SIZE, SIZE, bias=False)
    _, gradients = objective.gradients(0, perturbed(module) | {"unused.weight": random(SIZE, SIZE)})
    assert torch.equal(gradients["unused.weight"], torch.zeros(SIZE, SIZE))


def test_token_weights_are_even_for_ordinary_tokens_and_small_for_massive_ones():
    residual = random(20, 50, 256)
    residual[3, 7] *= 1000
    weights = token_weights(token_sizes(residual.bfloat16()), Ranks())
    assert float(weights.mean()) == pytest.approx(1.0, rel=1e-5)
    ordinary = weights[weights > 1e-3]
    assert len(ordinary) == 999
    assert ordinary.min() > 0.8
    assert ordinary.max() < 1.25
    assert float(weights[3, 7]) == pytest.approx(2e-6, rel=0.3)


@pytest.mark.parametrize("per_step", [1, 4, 10, 20])
def test_epochs_show_every_window_once_before_any_again(per_step):
    order = epochs(7)
    seen = [window for step in range(40 // per_step) for window in order(step, per_step, 20)]
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20))
    assert seen[:20] != seen[20:] or per_step == 20  # all at once have no order
    assert order(1, per_step, 20) == seen[per_step : 2 * per_step]  # whatever was asked before
    assert per_step == 20 or order(0, per_step, 20) != epochs(8)(0, per_step, 20)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_processes_have_equal_shares_of_every_step(ranks: int):
    shares = [Ranks(index, ranks).share(21) for index in range(ranks)]
    for step in range(10):
        chosen = epochs(3)(step, 8, 21)
        assert len(set(chosen)) == 8
        assert [sum(map(len, share.places(chosen))) for share in shares] == [8 // ranks] * ranks


# The loop


def hessian_case(codebook: Codebook | None = None) -> tuple[dict, dict, HessianObjective]:
    """Two targets, one of experts: their start, their free values, and the objective."""
    wanted = {"a": random(1, 8, 64, seed=1), "b": 5 * random(3, 8, 64, seed=2)}
    hessians = {name: hessian(len(w), 64, seed=index) for index, (name, w) in enumerate(wanted.items())}
    start = start_of(wanted, codebook)
    free = {name: free_values(wanted[name], start[name], hessians[name]) for name in wanted}
    return start, free, HessianObjective(wanted, hessians, {name: q.codebook for name, q in start.items()})


def output_case() -> tuple[dict, dict, OutputObjective]:
    module = Experts()
    objective, _ = output_objective(module, micro_batch=8)
    wanted = {name: module.get_parameter(name).detach() for name in ("up.weight", "experts")}
    return start_of(wanted), wanted, objective


CASES = {
    "hessian": hessian_case,
    "output": output_case,
    "affine": partial(hessian_case, CODEBOOKS["affine, 2 bits"]),
    "affine, a window": partial(hessian_case, Codebook.affine(4, 16)),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def run(case: tuple, schedule: Schedule, seed: int = 0, **more: Any) -> Refined:
    start, free, objective = case
    return refine(start, free.__getitem__, objective, schedule, seed, {name: i for i, name in enumerate(start)}, **more)


def check(refined: Refined, case: tuple) -> None:
    """What holds for every refinement: the errors are true, and the last is not above the first."""
    start, _, objective = case
    error = lambda targets: objective.error({name: q.dequantize() for name, q in targets.items()})  # noqa: E731
    assert refined.error_init == error(start)
    assert refined.error_final == pytest.approx(error(refined.targets), rel=1e-6)
    assert refined.error_final <= refined.error_init
    for name, q in start.items():
        for after, before in zip(parts(refined.targets[name]), parts(q), strict=True):
            assert after.shape == before.shape
            assert after.dtype == before.dtype


@pytest.mark.parametrize("name", CASES)
def test_refinement_improves(name: str):
    case, share = CASES[name], 0.97 if name == "output" else 0.8
    found = run(case(), Schedule(60))
    check(found, case())
    assert found.error_final < share * found.error_init
    assert 0 < found.best_step <= 60


def test_refinement_improves_with_bfloat16_logits():
    """Though most of its steps are smaller than what bfloat16 can tell apart."""
    given, schedule = hessian_case(), Schedule(60, logits="bfloat16")
    found = run(given, schedule)
    check(found, given)
    assert found.error_final < 0.8 * found.error_init
    assert same(found.targets, run(hessian_case(), schedule).targets)
    assert not same(found.targets, run(hessian_case(), schedule, seed=1).targets)


def test_an_objective_is_given_the_dtype_that_it_takes():
    start, free, objective = hessian_case()
    seen = []

    class Narrow:
        """Takes note of what it is given."""

        def gradients(self, step: int, weights: dict) -> tuple[float, dict]:
            seen.extend(weight.dtype for weight in weights.values())
            return objective.gradients(step, weights)

        error = staticmethod(objective.error)

    found = run((start, free, Narrow()), Schedule(60), dtype=torch.bfloat16)
    assert set(seen) == {torch.bfloat16}
    assert found.error_final < 0.8 * found.error_init


def test_weights_are_drawn_for_by_their_numbers_in_the_whole_target():
    schedule, places = Schedule(30, noise=NOISE), {"a": 8 * 64, "b": 0}
    first, moved = run(hessian_case(), schedule), run(hessian_case(), schedule, firsts=places)
    assert not same({"a": first.targets["a"]}, {"a": moved.targets["a"]})
    assert same({"b": first.targets["b"]}, {"b": moved.targets["b"]})


@codebooks
def test_refinement_improves_with_every_codebook(codebook: Codebook):
    found = run(hessian_case(codebook), Schedule(60, lr=0.01, tau=(2.0, 0.05)))
    check(found, hessian_case(codebook))
    assert found.error_final < found.error_init


@cases
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("lr", [1e-4, 0.01, 30.0])
def test_refinement_never_harms(case: Callable, steps: int, lr: float):
    found = run(case(), Schedule(steps, lr=lr, scale_lr=lr))
    check(found, case())
    if found.best_step == 0:
        assert same(found.targets, case()[0])


@cases
def test_a_rate_at_which_everything_overflows_leaves_the_start(case: Callable):
    found = run(case(), Schedule(6, lr=1e3, scale_lr=1e6, checks=6))
    assert same(found.targets, case()[0])
    assert found.error_final == found.error_init


@cases
def test_refinement_moves_all_that_there_is(case: Callable):
    start = case()[0]
    found = run(case(), Schedule(60)).targets
    for name in start:
        assert not any(torch.equal(*pair) for pair in zip(parts(found[name]), parts(start[name]), strict=True))


@cases
def test_refinement_is_deterministic(case: Callable):
    schedule = Schedule(30, checks=10, noise=NOISE)
    first, again, other = run(case(), schedule), run(case(), schedule), run(case(), schedule, seed=1)
    assert same(first.targets, again.targets)
    assert first.error_final == again.error_final
    assert not same(first.targets, other.targets)


@cases
def test_refinement_leaves_its_start_and_its_module(case: Callable):
    given = case()
    before = {name: q.map(Tensor.clone) for name, q in given[0].items()}
    run(given, Schedule(5, lr=0.01))
    assert same(given[0], before)
    if isinstance(given[2], OutputObjective):
        for parameter, fresh in zip(given[2].module.parameters(), Experts().parameters(), strict=True):
            assert torch.equal(parameter, fresh)


def test_every_step_is_reported():
    seen = []
    run(hessian_case(), schedule := Schedule(7), on_step=lambda *report: seen.append(report))
    assert [step for step, _, _ in seen] == list(range(7))
    assert [at for _, _, at in seen] == [schedule.at(step) for step in range(7)]
    assert all(0 < loss < math.inf for _, loss, _ in seen)


def test_a_target_that_is_better_off_with_its_start_goes_back_to_it():
    start, free, objective = hessian_case()

    class Misled:
        """Drives `b` away from what is wanted, and hardly minds when it judges."""

        def gradients(self, step: int, weights: dict) -> tuple[float, dict]:
            loss, gradients = objective.gradients(step, weights)
            return loss, gradients | {"b": -gradients["b"]}

        def error(self, weights: dict) -> float:
            exact = objective.wanted
            alone = [objective.error({"a": weights["a"], "b": exact["b"]})]
            alone += [1e-3 * objective.error({"a": exact["a"], "b": weights["b"]})]
            return sum(alone)

    found = run((start, free, Misled()), Schedule(40))
    check(found, (start, free, Misled()))
    assert same({"b": found.targets["b"]}, {"b": start["b"]})
    assert not same({"a": found.targets["a"]}, {"a": start["a"]})


def test_the_best_hard_result_is_kept_not_the_last():
    start, free, objective = hessian_case()
    errors = []

    class Watched:
        """Turns around after half the steps."""

        def gradients(self, step: int, weights: dict) -> tuple[float, dict]:
            loss, gradients = objective.gradients(step, weights)
            return loss, {name: g if step < 20 else -1e3 * g for name, g in gradients.items()}

        def error(self, weights: dict) -> float:
            errors.append(objective.error(weights))
            return errors[-1]

    found = run((start, free, Watched()), Schedule(40, checks=40))
    judged = errors[: 1 + 40]
    assert judged[-1] > min(judged)
    assert found.best_step == judged.index(min(judged))
    assert found.error_final <= min(judged)
