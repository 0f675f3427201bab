"""The relaxation's kernels: against autograd and Lion in float64, against their twin, and compiled without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec

import pytest
import torch
from hopper import compiled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gsq.kernels import relaxation
from gsq.kernels.relaxation import Draw, lion_step, philox, round_by_chance, soften

CPU = torch.device("cpu")
LR, DECAY, BETAS = 0.01, 0.5, (0.9, 0.95)
NOISE = (11, 3, 7)
BFLOAT_ULP = 2.0**-7  # from one bfloat16 to the next, relative; Triton's interpreter cuts off where a GPU rounds
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

if find_spec("triton"):
    import triton
    import triton.language as tl

    from gsq.kernels.relaxation_triton import DRAWN, random_words

    @triton.jit(do_not_specialize=DRAWN)
    def words_kernel(words, first, seed, stream, step, NUMBER: tl.constexpr, BLOCK: tl.constexpr):
        weight = tl.arange(0, BLOCK)
        drawn = random_words(weight.to(tl.int64), (first, seed, stream, step), NUMBER)
        for place in tl.static_range(4):
            tl.store(words + place * BLOCK + weight, drawn[place].to(tl.int64))


@pytest.fixture(params=["plain", "triton"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the relaxation runs, first as the plain version on a CPU, then as kernels."""
    return CPU if request.param == "plain" else request.getfixturevalue("kernels")


@dataclass
class Case:
    """The arguments of a step."""

    logits: Tensor
    momentum: Tensor
    gradient: Tensor
    draw: Draw

    def to(self, device: torch.device) -> Case:
        moved = {name: tensor.to(device) for name, tensor in vars(self.draw).items() if isinstance(tensor, Tensor)}
        return Case(*(t.to(device, copy=True) for t in self.tensors), replace(self.draw, **moved))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.logits, self.momentum, self.gradient

    def step(self, lr: float = LR, decay: float = DECAY) -> tuple[Tensor, Tensor, Tensor]:
        """Soft weights, and what comes of a step: gradients of scales and of offsets."""
        weights, tape = soften(self.logits, self.draw)
        return weights, *lion_step(*self.tensors, self.draw, tape, lr, decay, BETAS)


def make(
    count: int, groups: int, group: int, table: int | None = None, amplitude: float = 0.0,
    dtype: torch.dtype = torch.float32, first: int = 0, noise: tuple[int, int, int] = NOISE,
) -> Case:  # fmt: skip
    """Logits of which none has all the probability; windows into a table if there is one."""
    generator = torch.Generator().manual_seed(count + group)
    size = groups * group
    random = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    window = None
    if table:
        window = torch.randint(0, table - count + 1, (size,), generator=generator).to(torch.uint8)
    levels = random(table or count).sort().values
    draw = Draw(levels, window, random(groups), group, 0.7, 20.0, amplitude, noise, first)
    return Case((0.05 * random(count, size)).to(dtype), (0.3 * random(count, size)).to(dtype), random(size), draw)


@dataclass
class Expected:
    """A step in float64."""

    weights: Tensor
    by_scale: Tensor
    by_offset: Tensor
    momentum: Tensor
    update: Tensor


def expected(case: Case) -> Expected:
    """Softmax, autograd and Lion, each by its own formula."""
    draw, (count, size) = case.draw, case.logits.shape
    logits, log_scales = case.logits.double().requires_grad_(), torch.zeros(len(draw.scales)).double().requires_grad_()
    z = draw.kappa * logits
    if draw.amplitude:
        words = philox(*draw.noise, draw.first, size, count, CPU)
        z = z - draw.amplitude * torch.log(-torch.log(((words >> 9).double() + 0.5) / 2**23))
    lowest = torch.zeros(size).long() if draw.window is None else draw.window.long()
    level = draw.levels.double()[lowest + torch.arange(count)[:, None]]
    units = (torch.softmax(z / draw.tau, 0) * level).sum(0).view(-1, draw.group)
    weights = (units * (draw.scales * log_scales.exp())[:, None]).view(-1)
    weights.backward(case.gradient.double())
    lerp = lambda beta: beta * case.momentum.double() + (1 - beta) * logits.grad  # noqa: E731
    sums = case.gradient.double().view(-1, draw.group).sum(1)
    return Expected(weights.detach(), log_scales.grad, sums, lerp(BETAS[1]), lerp(BETAS[0]))


def check(case: Case, device: torch.device) -> None:
    """One step on `device` against the same in float64."""
    want, moved = expected(case), case.to(device)
    found = [tensor.cpu().double() for tensor in (*moved.step(), moved.momentum, moved.logits)]
    weights, by_scale, by_offset, momentum, logits = found
    torch.testing.assert_close(weights, want.weights, atol=2e-5, rtol=2e-4)
    size = case.draw.group**0.5
    torch.testing.assert_close(by_scale, want.by_scale, atol=2e-5 * size, rtol=2e-4)
    torch.testing.assert_close(by_offset, want.by_offset, atol=2e-6 * size, rtol=1e-5)
    steepest = float(want.update.abs().max())
    ulp = BFLOAT_ULP if case.logits.dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(momentum, want.momentum, atol=1e-5 * steepest, rtol=2e-4 + ulp)
    kept = case.logits.double() * (1 - LR * DECAY)
    sure = want.update.abs() > 1e-5 * steepest  # elsewhere rounding may decide where to go
    assert sure.double().mean() > 0.9
    reached = kept - LR * want.update.sign()
    allowed = 1e-7 + ulp * torch.maximum(reached.abs(), logits.abs())
    assert ((logits - reached).abs() <= allowed)[sure].all()
    assert ((logits - kept).abs() <= LR + 2 * allowed).all()


def assert_alike(found: Tensor, wanted: Tensor) -> None:
    """The same to the bit, but for the rare numbers that rounding in float32 decides."""
    assert found.shape == wanted.shape
    assert (found.cpu() != wanted.cpu()).double().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("amplitude", [0.0, 1.5], ids=["silent", "noisy"])
@pytest.mark.parametrize(
    ("count", "table", "group"),
    [
        (2, None, 64),
        (3, None, 96),
        (4, None, 32),
        (5, None, 576),
        (6, None, 64),
        (7, None, 96),
        (8, None, 576),
        (5, 16, 64),
        (5, 256, 576),
        (8, 9, 32),
        (3, 16, 96),
    ],
)
def test_a_step_is_that_of_autograd_and_lion(
    device: torch.device, count: int, table: int | None, group: int, amplitude: float, dtype: torch.dtype
):
    check(make(count, 1152 // group, group, table, amplitude, dtype), device)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_step_of_any_shape(kernels: torch.device, data: st.DataObject):
    count = data.draw(st.integers(2, 8), "count")
    table = data.draw(st.none() | st.integers(max(count, 9), 256), "table")
    group, groups = data.draw(st.integers(1, 200), "group"), data.draw(st.integers(1, 6), "groups")
    word = st.integers(0, 2**32 - 1)
    noise = data.draw(st.tuples(st.integers(-(2**63), 2**64 - 1), word, word), "noise")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]), "dtype")
    amplitude, first = data.draw(st.sampled_from([0.0, 1.0]), "amplitude"), data.draw(st.integers(0, 2**40), "first")
    check(make(count, groups, group, table, amplitude, dtype, first, noise), kernels)


@pytest.mark.parametrize("dtype", relaxation.WEIGHTS)
def test_dtypes_of_weights_and_gradients(device: torch.device, dtype: torch.dtype):
    case = make(4, 20, 64)
    rounded = Case(case.logits, case.momentum, case.gradient.to(dtype).float(), case.draw).to(device)
    narrow = Case(case.logits, case.momentum, case.gradient.to(dtype), case.draw).to(device)
    weights = soften(narrow.logits, narrow.draw, dtype)[0]
    assert weights.dtype == dtype
    exact = soften(narrow.logits, narrow.draw)[0]
    torch.testing.assert_close(weights.float(), exact, atol=1e-7, rtol=torch.finfo(dtype).eps)
    torch.testing.assert_close(narrow.step(), rounded.step(), atol=1e-5, rtol=1e-5)
    assert_alike(narrow.logits, rounded.logits)


def test_logits_and_momentum_may_differ_in_dtype(device: torch.device):
    case = make(4, 20, 64)
    mixed = Case(case.logits, case.momentum.bfloat16(), case.gradient, case.draw)
    alike = Case(case.logits, mixed.momentum.float(), case.gradient, case.draw).to(device)
    mixed = mixed.to(device)
    mixed.step()
    alike.step()
    assert_alike(mixed.logits, alike.logits)
    torch.testing.assert_close(mixed.momentum.float(), alike.momentum, atol=1e-7, rtol=BFLOAT_ULP)


@pytest.mark.parametrize("count", [4, 8])
def test_twin_and_kernels_round_alike(kernels: torch.device, count: int):
    case = make(count, 40, 64, amplitude=1.0, dtype=torch.bfloat16, first=2**32 - 1000)
    twin, moved = case.to(CPU), case.to(kernels)
    weights, tape = relaxation._soften(twin.logits, twin.draw, torch.float32)
    relaxation._lion_step(*twin.tensors, twin.draw, tape, LR, DECAY, BETAS)
    torch.testing.assert_close(moved.step()[0].cpu(), weights, atol=2e-5, rtol=2e-4)
    assert_alike(moved.logits, twin.logits)
    assert (moved.logits.cpu() != case.logits).double().mean() > 0.9


@pytest.mark.parametrize(("group", "columns", "count"), [(72, 576, 8), (80, 640, 8), (24, 576, 3)])
@pytest.mark.parametrize("kept", [0, relaxation.KEPT])
def test_rows_are_softened_and_moved_alike_in_any_share(
    group: int, columns: int, count: int, kept: int, monkeypatch: pytest.MonkeyPatch
):
    """Bit for bit, though groups do not divide what a CPU works on at once: processes share out the rows."""
    monkeypatch.setattr(relaxation, "KEPT", kept)
    rows = 256
    case = make(count, rows * columns // group, group)
    whole = Case(case.logits.clone(), case.momentum.clone(), case.gradient, case.draw)
    weights = whole.step()[0]
    for shares in (2, 8):
        size = rows // shares * columns
        for first in range(0, rows * columns, size):
            span, groups = slice(first, first + size), slice(first // group, (first + size) // group)
            draw = replace(case.draw, scales=case.draw.scales[groups], first=case.draw.first + first)
            part = Case(
                case.logits[:, span].contiguous(), case.momentum[:, span].contiguous(), case.gradient[span], draw
            )
            assert torch.equal(part.step()[0], weights[span])
            assert torch.equal(part.logits, whole.logits[:, span])


def test_a_weight_is_drawn_for_by_its_number_alone(device: torch.device):
    """Two parts, one after the other, are the whole."""
    whole = make(5, 30, 64, 16, 1.0, torch.bfloat16, first=100)
    cut = 11
    span = slice(0, cut * 64), slice(cut * 64, None)
    groups = slice(0, cut), slice(cut, None)
    weights = [whole.to(device).step()[0]]
    for own, own_groups, first in zip(span, groups, (100, 100 + cut * 64), strict=True):
        draw = replace(
            whole.draw, scales=whole.draw.scales[own_groups], window=whole.draw.window[own].clone(), first=first
        )
        part = Case(whole.logits[:, own].contiguous(), whole.momentum[:, own].contiguous(), whole.gradient[own], draw)
        part = part.to(device)
        weights.append(part.step()[0])
        whole.logits[:, own] = part.logits.cpu()
    assert torch.equal(weights[0], torch.cat(weights[1:]))
    again = make(5, 30, 64, 16, 1.0, torch.bfloat16, first=100).to(device)
    again.step()
    assert torch.equal(again.logits.cpu(), whole.logits)


@pytest.mark.parametrize("count", [2, 7])
def test_rounding_by_chance_is_right_on_average(device: torch.device, count: int):
    size = 10_000 // count
    case = make(count, size, 1, dtype=torch.bfloat16).to(device)
    case.logits[:], case.momentum[:], case.gradient[:] = 0.1, 0.0, 0.0  # so only decay moves the logits
    start = float(case.logits[0, 0])
    case.step(lr=1.0, decay=1e-4)
    exact, ulp = start * (1 - 1e-4), 2.0**-11
    below = exact // ulp * ulp
    share = (exact - below) / ulp
    assert set(case.logits.unique().tolist()) == {below, below + ulp}
    assert float((case.logits.double().mean() - below) / ulp) == pytest.approx(
        share, abs=5 * (share * (1 - share) / case.logits.numel()) ** 0.5
    )


@settings(deadline=None, max_examples=50)
@given(st.floats(width=32), st.integers(0, 2**63))
def test_rounding_by_chance_goes_to_a_neighbour(number: float, first: int):
    x = torch.full((8, 20), number)
    found = round_by_chance(x, NOISE, first % 2**40)
    if x.isnan().any():
        assert found.isnan().all()
        return
    toward_zero = (x.view(torch.int32) & (-1 << 16)).view(torch.float32)
    away = (toward_zero.view(torch.int32) + (1 << 16)).view(torch.float32)
    assert ((found == toward_zero) | ((found == away) & (x != toward_zero))).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy, in Triton's interpreter
def test_what_is_not_a_number_is_not_rounded_to_one(device: torch.device):
    case = make(4, 2, 64, dtype=torch.bfloat16).to(device)
    case.logits[0, 3], case.logits[1, 5] = torch.nan, torch.inf
    before = case.logits.clone()
    case.gradient[:] = 0
    case.momentum[:] = 0
    case.step(lr=0.0)
    assert torch.equal(case.logits.isnan(), before.isnan())
    assert torch.equal(case.logits.nan_to_num(0.0), before.nan_to_num(0.0))


@pytest.mark.parametrize("seed", [0, 1, -1, -(2**40) - 3, 2**31, 2**63 + 9, 2**64 - 1])
@pytest.mark.parametrize(("stream", "step", "first"), [(0, 0, 0), (2**32 - 1, 2**31, 2**32 - 30), (5, 16, 2**41 + 7)])
def test_kernels_draw_the_words_of_their_twin(kernels: torch.device, seed: int, stream: int, step: int, first: int):
    for block in (0, 1, relaxation.ROUNDING):
        found = torch.zeros(4, 64, dtype=torch.int64, device=kernels)
        words_kernel[(1,)](found, first, seed, stream, step, NUMBER=block, BLOCK=64)
        assert torch.equal(found.cpu(), philox(seed, stream, step, first, 64, 4, CPU, block))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_to_do(device: torch.device, dtype: torch.dtype):
    """A process may own no row of a small target."""
    case = make(4, 0, 64, dtype=dtype).to(device)
    assert [tuple(t.shape) for t in case.step()] == [(0,), (0,), (0,)]
    assert relaxation.likeliest(case.logits).shape == (0,)


def test_the_backward_pass_needs_no_tape():
    case = make(4, 6, 64, amplitude=1.0)
    taped, bare = case.to(CPU), case.to(CPU)
    sums = taped.step()[1:]
    for found, wanted in zip(lion_step(*bare.tensors, bare.draw, None, LR, DECAY, BETAS), sums, strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(bare.logits, taped.logits)


def test_kernels_keep_nothing(kernels: torch.device):
    case = make(4, 6, 64).to(kernels)
    assert soften(case.logits, case.draw)[1] is None


GOOD = make(4, 6, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(9, 384)}, "2 to 8 levels, not 9; relax a window"),
        ({"logits": torch.zeros(1, 384)}, "2 to 8 levels, not 1"),
        ({"logits": torch.zeros(3, 384)}, "3 levels do not fit a table of 4; without a window"),
        ({"logits": torch.zeros(4, 383)}, r"logits must be of shape \[4, 384\], got \[4, 383\]"),
        ({"logits": torch.zeros(384, 4).T}, "logits must be contiguous"),
        ({"logits": torch.zeros(4, 384).half()}, "logits must be float32 or bfloat16, got float16"),
        ({"momentum": torch.zeros(4, 768)[:, :384]}, "momentum must be contiguous"),
        ({"momentum": torch.zeros(4, 384).double()}, "momentum must be float32 or bfloat16"),
        ({"momentum": torch.zeros(4, 64)}, r"momentum must be of shape \[4, 384\]"),
        ({"gradient": torch.zeros(6, 64)}, r"gradient must be of shape \[384\]"),
        ({"gradient": torch.zeros(384).double()}, "gradient must be float32 or bfloat16 or float16, got float64"),
        ({"gradient": torch.zeros(768)[::2]}, "gradient must be contiguous"),
    ],
)
def test_tensors_that_do_not_fit(change: dict[str, Tensor], message: str):
    case = replace(GOOD, **change)
    with pytest.raises(ValueError, match=message):
        lion_step(*case.tensors, case.draw, None, LR, DECAY, BETAS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": torch.zeros(2, 2)}, r"levels must be of shape \[4\], got \[2, 2\]"),
        ({"levels": torch.zeros(4).double()}, "levels must be float32, got float64"),
        ({"scales": torch.zeros(6).bfloat16()}, "scales must be float32, got bfloat16"),
        ({"scales": torch.zeros(12)[::2]}, "scales must be contiguous"),
        ({"group": 0}, "at least one weight, not 0"),
        ({"tau": 0.0}, "tau must be positive"),
        ({"window": torch.zeros(384)}, "window must be uint8, got float32"),
        ({"window": torch.zeros(6, dtype=torch.uint8)}, r"window must be of shape \[384\]"),
        ({"window": torch.zeros(384, dtype=torch.uint8), "levels": torch.zeros(257)}, "at most 256 levels, not 257"),
    ],
)
def test_draws_that_do_not_fit(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(GOOD.draw, **change)


def test_logits_of_more_levels_than_there_are():
    draw = replace(GOOD.draw, window=torch.zeros(384, dtype=torch.uint8))
    with pytest.raises(ValueError, match="5 levels do not fit a table of 4; relax fewer"):
        soften(torch.zeros(5, 384), draw)


def test_soft_weights_of_a_dtype_that_no_module_takes():
    with pytest.raises(ValueError, match="soft weights are float32 or bfloat16 or float16, not"):
        soften(GOOD.logits, GOOD.draw, torch.float64)


def test_compiled_by_torch_it_does_the_same():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def step(case: Case) -> tuple[Tensor, ...]:
        weights, tape = soften(case.logits, case.draw)
        return weights, *lion_step(case.logits, case.momentum, 2 * weights, case.draw, tape, LR, DECAY, BETAS)

    plain, compiled = (make(4, 6, 64).to(device) for _ in range(2))
    found = torch.compile(step, backend="aot_eager", fullgraph=device.type == "cpu")(compiled)
    torch.testing.assert_close(found, step(plain))
    torch.testing.assert_close(compiled.tensors, plain.tensors)


@gpu
@pytest.mark.parametrize(("count", "least"), [(8, 2**29), (2, 2**31)])
def test_tensors_of_more_than_two_billion_numbers(kernels: torch.device, count: int, least: int):
    """The last weights of a large tensor are treated as those of a small one, all others left alone."""
    group = 576
    groups, tail = least // group + 5, 4 * group
    size = groups * group
    small = make(count, 4, group, amplitude=1.0, dtype=torch.bfloat16, first=size - tail).to(kernels)
    logits, momentum = (torch.zeros(count, size, dtype=torch.bfloat16, device=kernels) for _ in range(2))
    gradient, scales = (torch.zeros(length, device=kernels) for length in (size, groups))
    scales[-4:] = small.draw.scales
    large = Case(logits, momentum, gradient, replace(small.draw, scales=scales, first=0))
    for whole, part in zip(large.tensors, small.tensors, strict=True):
        whole[..., -tail:] = part
    found, wanted = large.step(), small.step()
    for whole, part in zip(found, wanted, strict=True):
        torch.testing.assert_close(whole[-len(part) :], part, atol=1e-5, rtol=1e-5)
    for whole, part in zip(large.tensors, small.tensors, strict=True):
        assert_alike(whole[..., -tail:], part)
    assert not large.logits[:, :-tail].any()


COMPILE = """
import torch
from gsq.kernels import relaxation_triton
from gsq.kernels.relaxation import Draw, lion_step, soften
relaxation_triton.BLOCK = 64  # a weight for each thread, so that little is compiled
for count, table, group, dtype, amplitude in ((4, 4, 64, torch.bfloat16, 0.0), (5, 16, 72, torch.float32, 1.0)):
    window = torch.zeros(2 * group, dtype=torch.uint8) if table > count else None
    draw = Draw(torch.zeros(table), window, torch.zeros(2), group, 0.5, 100.0, amplitude, (2**63, 2**31, 1), 2**33)
    logits = torch.zeros(count, 2 * group, dtype=dtype)
    soft, tape = soften(logits, draw, torch.bfloat16)
    lion_step(logits, logits.clone(), soft, draw, tape, 1e-3, 0.0, (0.9, 0.95))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="all other tests compile the kernels")
def test_a_compiler_takes_what_the_interpreter_takes(tmp_path):
    """Machine code for Hopper, which Triton makes without a GPU: both kernels, and every branch of them."""
    assert len(compiled(COMPILE, tmp_path)) == 4
