"""The column loops of GPTQ and of coordinate descent: in Triton, as plain PyTorch, and as the papers write them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gsq.codebook import Codebook
from gsq.init.gptq import damped, gptq, inverse_factor
from gsq.init.polish import descend as descend_all
from gsq.kernels import columns, dispatch

CODEBOOKS = {
    "integers": Codebook.integer(2, 32),
    "affine": Codebook.affine(3, 32),
    "uneven levels": Codebook.lloyd(4, 32),
    "many levels": Codebook.integer(8, 32),
}
LEVELS = {name: codebook.levels for name, codebook in CODEBOOKS.items()}


def problem(batch: int, rows: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, a Hessian, and a scale and an offset for each row, some scales zero or negative."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(batch, rows, n, generator=generator)
    x = torch.randn(batch, 3 * n, n, generator=generator)
    hessian = damped(x.mT @ x / len(x[0]), 0.01)
    scale = torch.randn(batch, rows, generator=generator)
    scale[:, ::5] = 0
    return weights, hessian, scale, torch.randn(batch, rows, generator=generator) / 4


def nearest_code(x: float, levels: tuple[float, ...]) -> int:
    return min(range(len(levels)), key=lambda code: abs(x - levels[code]))


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
def test_propagate_is_gptq_one_column_after_the_other(levels):
    weights, hessian, scale, offset = problem(2, 7, 16)
    upper = inverse_factor(hessian)
    left = weights.clone()
    codes = columns.propagate(left, upper, scale, offset, levels, 10)
    for b in range(2):
        for r in range(7):
            row, u = weights[b, r].double().clone(), upper[b].double()
            s, o = float(scale[b, r]), float(offset[b, r])
            for c in range(10):
                x = (float(row[c]) - o) / s if s else 0.0
                code = int(codes[b, r, c])
                assert abs(x - levels[code]) <= abs(x - levels[nearest_code(x, levels)]) + 1e-4
                error = (row[c] - levels[code] * s - o) / u[c, c]
                row[c + 1 :] -= error * u[c, c + 1 :]
                row[c] = error
            torch.testing.assert_close(left[b, r].double(), row, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
def test_descent_moves_every_code_to_its_best_value(levels):
    weights, hessian, scale, offset = problem(1, 6, 16)
    scales, offsets = scale[..., None].contiguous(), offset[..., None].contiguous()
    start = torch.zeros_like(weights)
    gradient, values = (weights - start) @ hessian, start.clone()
    codes = columns.descend(gradient, values, hessian, scales, offsets, levels, 16, 0)
    q, h, w = start[0].double(), hessian[0].double(), weights[0].double()
    for c in range(16):
        free = q[:, c] + ((w - q) @ h)[:, c] / h[c, c]
        for r in range(6):
            s, o = float(scale[0, r]), float(offset[0, r])
            x = (float(free[r]) - o) / s if s else 0.0
            code = int(codes[0, r, c])
            assert abs(x - levels[code]) <= abs(x - levels[nearest_code(x, levels)]) + 1e-4
            q[r, c] = levels[code] * s + o
    torch.testing.assert_close(-gradient[0].double(), q, rtol=1e-4, atol=1e-5)  # the moves, from zero


def both(run: Callable[[torch.device], Sequence[Tensor]]) -> zip:
    """Pairs of what `run` gives where Triton runs, compiled or interpreted, and of what the plain version gives."""
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with dispatch.interpreted():
        found = [t.cpu() for t in run(device)]
    return zip(found, run(torch.device("cpu")), strict=True)


def wider(block: Tensor, transposed: bool) -> Tensor:
    """The same numbers as columns of something wider, perhaps transposed."""
    if transposed:
        return torch.nn.functional.pad(block.mT, (0, 0, 2, 3)).contiguous()[:, 2:-3].mT
    return torch.nn.functional.pad(block, (2, 3)).contiguous()[..., 2:-3]


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from(sorted(LEVELS)), st.integers(1, 2), st.integers(1, 40), st.integers(1, 40), st.booleans(),
    st.integers(0, 1000),
)  # fmt: skip
def test_triton_propagates_as_the_plain_version(name: str, batch: int, rows: int, n: int, transposed: bool, seed: int):
    weights, hessian, scale, offset = problem(batch, rows, n, seed)
    upper, count = inverse_factor(hessian), 1 + seed % n

    def run(device: torch.device) -> tuple[Tensor, Tensor]:
        left = wider(weights.to(device), transposed)
        given = (t.to(device) for t in (upper, scale, offset))
        return columns.propagate(left, *given, LEVELS[name], count), left

    for ours, plain in both(run):
        assert torch.equal(ours, plain)


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from(sorted(LEVELS)), st.integers(1, 2), st.integers(1, 40), st.integers(1, 40), st.booleans(),
    st.integers(1, 24), st.integers(0, 30), st.integers(0, 1000),
)  # fmt: skip
def test_triton_descends_as_the_plain_version(
    name: str, batch: int, rows: int, n: int, transposed: bool, group: int, first: int, seed: int
):
    weights, hessian, scale, offset = problem(batch, rows, n, seed)
    share = torch.linspace(1, 2, -(-(first + n) // group))  # no two groups of a row are alike
    scales, offsets = scale[..., None] * share, offset[..., None] * share

    def run(device: torch.device) -> tuple[Tensor, Tensor]:
        gradient = wider((weights @ hessian).to(device), transposed)
        values = wider(weights.round().to(device), transposed)
        given = (t.to(device) for t in (hessian, scales, offsets))
        return columns.descend(gradient, values, *given, LEVELS[name], group, first), gradient

    for ours, plain in both(run):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize(
    ("levels", "ratios", "codes"),
    [
        ((-2.0, -1.0, 0.0, 1.0), [-2.5, -1.5, -0.5, 0.5, 1.5, -1e30, 1e30], [0, 0, 2, 2, 3, 0, 3]),  # half to even
        ((-3.0, -1.0, 1.0, 3.0), [-2.0, 0.0, 2.0, -1e30, 1e30], [0, 2, 2, 0, 3]),
        ((-3.0, -1.0, 0.5), [-2.0, -0.25, -1.9, -1e30, 1e30], [0, 1, 1, 0, 2]),  # half to the lower
    ],
    ids=["steps of one", "steps of two", "uneven"],
)
def test_halfway_between_levels_and_beyond_them(kernels: torch.device, levels, ratios, codes):
    left = torch.tensor(ratios, device=kernels)[None, :, None]
    one = torch.ones(1, 1, 1, device=kernels)
    scale, offset = torch.ones(1, len(ratios), device=kernels), torch.zeros(1, len(ratios), device=kernels)
    assert columns.nearest(left[0, :, 0], levels).tolist() == codes
    assert columns.propagate(left, one, scale, offset, levels, 1)[0, :, 0].tolist() == codes


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Absent:  # a GPU that is not there, but compiled for
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(Absent())
run, compiled = JITFunction.run, []
JITFunction.run = lambda *args, **options: compiled.append(run(*args, **options | {"warmup": True}))

from gsq.kernels import columns, dispatch

with dispatch.interpreted():
    for levels in ((-2.0, -1.0, 0.0, 1.0), (-3.0, -1.0, 0.5)):
        block, matrix, group = torch.randn(2, 5, 48), torch.eye(48).repeat(2, 1, 1), torch.ones(2, 5, 1)
        columns.propagate(block, matrix, group[..., 0], group[..., 0], levels, 32)
        columns.descend(block, block.clone(), matrix, group, group, levels, 48, 0)
for kernel in compiled:
    print(kernel.name, len(kernel.asm["cubin"]))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile")
def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path):
    """The interpreter takes more than the compiler does."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    sizes = [line.split() for line in found.stdout.splitlines()]
    assert [name for name, _ in sizes] == ["_propagate", "_descend"] * 2
    assert all(int(size) > 1000 for _, size in sizes)


def test_gptq_and_descent_run_on_the_kernels(kernels: torch.device):
    weights, hessian, _, _ = problem(2, 5, 64)
    for codebook in (CODEBOOKS["affine"], Codebook.integer(2, 64)):
        plain = gptq(weights, hessian, codebook)
        fast = gptq(weights.to(kernels), hessian.to(kernels), codebook).to("cpu")
        assert (fast.codes == plain.codes).float().mean() > 0.99
        better = descend_all(weights.to(kernels), fast.to(kernels), hessian.to(kernels)).to("cpu")
        before, after = (((weights - q.values()) @ hessian * (weights - q.values())).sum() for q in (fast, better))
        assert after <= before * (1 + 1e-5)


def far_apart(left: Tensor) -> Tensor:
    return torch.empty_strided(left.shape, (1, 1, 1 << 28), device="meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left": Tensor.double}, r"left must be float32, .*left\.float\(\)"),
        ({"left": lambda t: t[0]}, "add dimensions of 1"),
        ({"left": far_apart}, r"too far apart .*left\.contiguous\(\)"),
        ({"upper": lambda t: t.mT}, r"gaps .*upper\.contiguous\(\)"),
        ({"upper": lambda t: t[:, :-1]}, r"upper must be \[2, 16, 16\], not \[2, 15, 16\]"),
        ({"scale": lambda t: t.mT.contiguous().mT}, r"gaps .*scale\.contiguous\(\)"),
        ({"offset": lambda t: t[:, :1]}, r"offset must be \[2, 8\], not \[2, 1\]"),
        ({"levels": lambda _: tuple(map(float, range(257)))}, "2 to 256 levels apart, not 257"),
        ({"count": lambda _: 17}, "1 to 16 columns"),
        ({"count": lambda _: 0}, "1 to 16 columns"),
    ],
)
def test_what_propagate_does_not_take(change: dict[str, Callable], message: str):
    weights, hessian, scale, offset = problem(2, 8, 16)
    given = {"left": weights, "upper": hessian, "scale": scale, "offset": offset, "levels": (0.0, 1.0), "count": 16}
    with pytest.raises(ValueError, match=message):
        columns.propagate(**given | {name: of(given[name]) for name, of in change.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient": Tensor.half}, r"gradient must be float32, not torch\.float16"),
        ({"values": lambda t: t[:, 1:]}, r"values must be \[2, 8, 16\]"),
        ({"hessian": lambda t: t[:, 1:]}, r"hessian must be \[2, 16, 16\], not \[2, 15, 16\]"),
        ({"scales": lambda t: t.repeat(1, 1, 2)[..., ::2]}, r"gaps .*scales\.contiguous\(\)"),
        ({"offsets": lambda t: t.repeat(1, 1, 2)}, r"offsets must be \[2, 8, 1\]"),
        ({"first": lambda _: 1}, "columns 1 to 17 do not lie in 1 groups of 16"),
        ({"first": lambda _: -1}, "columns -1 to 15 do not lie"),
        ({"levels": lambda _: (0.0,)}, "2 to 256 levels apart, not 1"),
    ],
)
def test_what_descend_does_not_take(change: dict[str, Callable], message: str):
    weights, hessian, scale, offset = problem(2, 8, 16)
    given = {
        "gradient": weights, "values": weights, "hessian": hessian, "scales": scale[..., None],
        "offsets": offset[..., None], "levels": (0.0, 1.0), "group": 16, "first": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        columns.descend(**given | {name: of(given[name]) for name, of in change.items()})
