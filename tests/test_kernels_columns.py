"""The column loops of GPTQ and of coordinate descent: in Triton, as plain PyTorch, and as the papers write them."""

from __future__ import annotations

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


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(sorted(LEVELS)), st.integers(1, 3), st.integers(1, 20), st.integers(1, 40), st.integers(0, 1000))
def test_triton_gives_the_bits_of_the_plain_version(name: str, batch: int, rows: int, n: int, seed: int):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    levels = LEVELS[name]
    weights, hessian, scale, offset = (t.to(device) for t in problem(batch, rows, n, seed))
    upper, count = inverse_factor(hessian), 1 + seed % n
    scales, offsets = scale[..., None].contiguous(), offset[..., None].contiguous()

    def both() -> list[Tensor]:
        left, gradient, values = weights.clone(), weights @ hessian, torch.zeros_like(weights)
        codes = columns.propagate(left, upper, scale, offset, levels, count)
        moved = columns.descend(gradient, values, hessian, scales, offsets, levels, n, 0)
        return [t.cpu() for t in (left, codes, gradient, moved)]

    with dispatch.interpreted():
        found = both()
    weights, hessian, upper, scale, offset, scales, offsets = (
        t.cpu() for t in (weights, hessian, upper, scale, offset, scales, offsets)
    )
    for ours, plain in zip(found, both(), strict=True):
        assert torch.equal(ours, plain)


def test_gptq_and_descent_run_on_the_kernels(kernels: torch.device):
    weights, hessian, _, _ = problem(2, 5, 64)
    for codebook in (CODEBOOKS["affine"], Codebook.integer(2, 64)):
        plain = gptq(weights, hessian, codebook)
        fast = gptq(weights.to(kernels), hessian.to(kernels), codebook).to("cpu")
        assert (fast.codes == plain.codes).float().mean() > 0.99
        better = descend_all(weights.to(kernels), fast.to(kernels), hessian.to(kernels)).to("cpu")
        before, after = (((weights - q.values()) @ hessian * (weights - q.values())).sum() for q in (fast, better))
        assert after <= before * (1 + 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"left": a["left"].double()}, "must be float32"),
        (lambda a: a | {"upper": a["upper"].mT}, "contiguous"),
        (lambda a: a | {"upper": a["upper"][:, :-1]}, r"must be \[2, 16, 16\]"),
        (lambda a: a | {"levels": tuple(map(float, range(300)))}, "2 to 256 levels"),
        (lambda a: a | {"count": 17}, "quantizes 1 to 16 columns"),
    ],
)
def test_what_kernels_do_not_take_is_refused(change, message: str):
    weights, hessian, scale, offset = problem(2, 8, 16)
    arguments = {"left": weights, "upper": hessian, "scale": scale, "offset": offset, "levels": LEVELS["affine"]}
    with pytest.raises(ValueError, match=message):
        columns.propagate(**change(arguments | {"count": 16}))
