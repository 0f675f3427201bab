"""Measured sensitivities are what a whole quantized model shows, and widths are the best that a size allows."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import kl_div

from gsq import prepare
from gsq.codebook import Codebook
from gsq.config import Config, parse_config
from gsq.convert import convert
from gsq.errors import UserError
from gsq.init.gptq import damped, gptq
from gsq.init.polish import relative_error
from gsq.model.checkpoint import Checkpoint
from gsq.model.skeleton import Skeleton
from gsq.plan.curve import curve_of
from gsq.plan.rules import Plan
from gsq.plan.sensitivity import BudgetError, Sensitivity, _try_widths, measure, remember, remembered, solve
from gsq.report import write_curve
from gsq.run import LAYERS
from gsq.tracking import read_metrics
from gsq.train import train

CPU = torch.device("cpu")
WIDTHS = {bits: Codebook.integer(bits, 32) for bits in (2, 3, 4)}


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[dict], int]:
    units = draw(st.integers(1, 5))
    options = [
        {
            bits: (step * bits, kl / bits)
            for bits in draw(st.lists(st.integers(2, 8), min_size=1, max_size=4, unique=True))
        }
        for step, kl in draw(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 9)), min_size=units, max_size=units))
    ]
    least, most = (sum(pick(size for size, _ in option.values()) for option in options) for pick in (min, max))
    return options, draw(st.integers(least, most + 5))


@settings(deadline=None, max_examples=200)
@given(problems())
def test_no_choice_of_widths_is_better(problem: tuple[list[dict], int]):
    options, budget = problem
    cost = lambda widths: [sum(column) for column in zip(*map(dict.get, options, widths), strict=True)]  # noqa: E731
    size, kl = cost(solve(options, budget))
    assert size <= budget
    assert kl == pytest.approx(min(cost(w)[1] for w in product(*options) if cost(w)[0] <= budget), abs=1e-9)


def test_sizes_beyond_counting_still_fit():
    """Sizes without a common divisor are rounded up, so that the budget holds."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(10**8, 10**9, (60, 3), generator=generator).sort().values.tolist()
    options = [{bits: (size, 1 / size) for bits, size in zip((2, 3, 4), row, strict=True)} for row in sizes]
    budget = sum(row[1] for row in sizes)
    used = sum(option[bits][0] for option, bits in zip(options, solve(options, budget), strict=True))
    assert 0.999 * budget < used <= budget


@pytest.mark.parametrize("budget", [40, 10**9])
def test_a_size_with_room_for_everything_gets_the_best_of_everything(budget: int):
    option = {2: (10, 1.0), 3: (15, 0.5), 4: (20, 0.2)}
    assert solve([option, option], budget) == [4, 4]


def test_a_size_below_the_least_says_what_the_least_is():
    with pytest.raises(BudgetError, match="at least 30 bytes, more than the 29"):
        solve([{2: (10, 1.0), 3: (15, 0.5)}, {2: (20, 1.0)}], 29)


def test_kl_grows_with_the_error_and_what_is_kept_adds_none():
    found = Sensitivity(0.5, {2: 0.2, 4: 0.01})
    assert found.predicted(2) == 0.5
    assert found.predicted(4) == pytest.approx(0.025)
    assert found.predicted(None) == 0
    assert Sensitivity(0.0, {2: 0.0, 3: 0.0}).predicted(3) == 0


@pytest.mark.parametrize("make", [models.tiny_llama, models.tiny_qwen3_5_moe])
def test_it_is_the_divergence_of_a_model_with_one_unit_quantized(make, tmp_path: Path):
    skeleton = Skeleton(Checkpoint.open(make(tmp_path / "model")), CPU, torch.float32)
    layers = skeleton.layer_names
    names = [name for name, parameter in skeleton.model.named_parameters() if name.startswith(layers[0])]
    joined = tuple(name for name in names if "gate_proj" in name or "up_proj" in name)[:2]
    last = next(n for n, _ in skeleton.model.named_parameters() if n.startswith(layers[-1]) and "down_proj" in n)
    tokens = torch.randint(8, models.VOCAB, (3, 32), generator=torch.Generator().manual_seed(1))
    units = {joined: dict.fromkeys(joined, WIDTHS), (last,): {last: WIDTHS}}
    found = measure(skeleton, tokens, units, 0.02, 64.0, batch=2)
    assert list(found) == list(units)
    original = logits(skeleton, tokens, {})
    for unit, sensitivity in found.items():
        assert sensitivity.errors[2] > sensitivity.errors[3] > sensitivity.errors[4] > 0
        if len(skeleton.model.get_parameter(unit[0]).shape) == 3:
            continue  # the Hessians of experts are a test of their own
        weights = {name: by_hand(skeleton, tokens, name) for name in unit}
        log_q = logits(skeleton, tokens, {name: q for name, (q, _) in weights.items()})
        expected = kl_div(log_q, original, log_target=True, reduction="none").sum(-1).mean()
        assert sensitivity.kl == pytest.approx(float(expected), rel=2e-3)
        assert sensitivity.errors[2] == pytest.approx(sum(error for _, error in weights.values()) / len(unit), rel=1e-3)


def logits(skeleton: Skeleton, tokens: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities of the model, some of whose weights are others."""
    hidden, calls = skeleton.embed(tokens)
    for index, prefix in enumerate(skeleton.layer_names):
        layer = skeleton.load_layer(index)
        for name, weight in weights.items():
            if name.startswith(prefix + "."):
                layer.get_parameter(name.removeprefix(prefix + ".")).data.copy_(weight)
        hidden = skeleton.run_layer(layer, hidden, calls[index])
    return skeleton.head(hidden).log_softmax(-1)


def by_hand(skeleton: Skeleton, tokens: torch.Tensor, name: str) -> tuple[torch.Tensor, float]:
    """A Linear's weight by GPTQ at 2 bits on the original model's inputs, and its relative error."""
    hidden, calls = skeleton.embed(tokens)
    for index, prefix in enumerate(skeleton.layer_names):
        layer, read = skeleton.load_layer(index), []
        if name.startswith(prefix + "."):
            module = layer.get_submodule(name.removeprefix(prefix + ".").removesuffix(".weight"))
            module.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0].flatten(0, -2)))
        hidden = skeleton.run_layer(layer, hidden, calls[index])
        if read:
            hessian = damped((read[0].T @ read[0] / len(read[0]))[None], 0.02)
            found = gptq(module.weight[None], hessian, WIDTHS[2])
            return found.dequantize()[0], relative_error(module.weight[None], found, hessian)
    raise AssertionError(name)


@pytest.mark.parametrize(
    "book",
    [
        lambda bits: Codebook.affine(bits, 16),
        lambda bits: Codebook.tq(bits, 32, 80),
        lambda bits: Codebook.jangtq(bits, 80),
    ],
    ids=["affine", "tq", "jangtq"],
)
def test_widths_tried_together_err_as_they_do_alone(book):
    generator = torch.Generator().manual_seed(0)
    inputs, weight = (torch.randn(rows, 80, generator=generator) for rows in (200, 48))
    hessian = damped((inputs.T @ inputs)[None], 0.02)
    probe, errors = _try_widths(weight, hessian, {bits: book(bits) for bits in (4, 2, 3)})
    for bits, error in errors.items():
        codebook = book(bits)
        wanted, moments = codebook.rotate(weight[None]), codebook.rotate_moments(hessian)
        found = gptq(wanted, moments, codebook)
        assert error == relative_error(wanted, found, moments)
        if bits == 2:
            assert torch.equal(probe, found.dequantize()[0])
    assert errors[2] > errors[3] > errors[4] > 0


def test_what_was_measured_is_remembered_unless_circumstances_differ(tmp_path: Path):
    cache, found = tmp_path / "run.sensitivity.json", {("a", "b"): Sensitivity(0.1, {2: 0.3, 4: 0.01})}
    assert remembered(cache, {"model": 1}) is None
    remember(cache, {"model": 1}, found)
    assert remembered(cache, {"model": 1}) == found
    assert remembered(cache, {"model": 2}) is None
    cache.write_text(cache.read_text()[:-30])
    assert remembered(cache, {"model": 1}) is None


# Through the config


ALL = {"role": ["attention", "mlp"], "bits": "sensitivity", "group_size": 32}


def config_of(folder: Path, plan: dict, format: str | None = "humming", **more: object) -> Config:
    """A config for a tiny Llama beside `folder`'s run."""
    model, text = folder / "model", folder / "text.txt"
    if not model.exists():
        models.tiny_llama(model, layers=3)
        text.write_text("a quick brown fox jumps over the lazy dog. " * 200)
    content = {
        "model": {"name": str(model)}, "calib": {"source": str(text), "windows": 8, "length": 32, "validation": 2},
        "plan": {"rules": [ALL], "sensitivity": {"widths": [2, 3, 4, 8], "windows": 2, "length": 16}} | plan,
        "export": {"format": format}, "run": str(folder / "run"),
    }  # fmt: skip
    return parse_config(content | more)


def bits_of(config: Config) -> dict[str, int]:
    _, plan = prepare.prepare(config, CPU)
    return {entry.name: entry.codebook.bits for entry in plan.targets()}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose model was measured for its default config, so that plans of any target are solved at once."""
    folder = tmp_path_factory.mktemp("measured")
    prepare.prepare(config_of(folder, {"target_bpw": 3.3}), CPU)
    return folder


def test_the_plan_meets_its_target(measured: Path):
    _, plan = prepare.prepare(config_of(measured, {"target_bpw": 3.3}), CPU)
    assert 0.93 * 3.3 < plan.summary()["bits_per_quantized_weight"] <= 3.3
    assert len({entry.codebook.bits for entry in plan.targets()}) > 1


@pytest.mark.parametrize("format", ["mlx", "compressed-tensors-wide"])
def test_an_export_meets_the_target_size(format: str, tmp_path: Path):
    """As it is stored: biases of MLX count, and so do the containers of narrow codes."""
    target = 0.000095
    config = config_of(tmp_path, {"target_size": target}, format)
    bits = bits_of(config)
    assert 0.95 * target < Checkpoint.open(convert(config, tmp_path / "export")).nbytes / 1e9 <= target
    assert len(set(bits.values())) > 1
    if format == "compressed-tensors-wide":  # what costs the same is not made worse
        assert set(bits.values()) == {4, 8}


def test_what_servers_fuse_has_one_width(tmp_path: Path):
    fused = bits_of(config_of(tmp_path, {"target_bpw": 3.6}))
    for name, bits in fused.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            assert bits == fused[name.replace("k_proj", "q_proj").replace("v_proj", "q_proj")]
    free = {"rules": [ALL | {"codebook": "affine"}], "target_bpw": 4.2}
    alone = bits_of(config_of(tmp_path, free, "mlx"))
    layers = [[alone[f"model.layers.{i}.self_attn.{part}_proj.weight"] for part in "qkv"] for i in range(3)]
    assert any(len(set(bits)) > 1 for bits in layers)


def test_another_target_is_solved_without_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = bits_of(config_of(tmp_path, {"target_bpw": 2.8}))
    monkeypatch.setattr(prepare, "measure", lambda *_: pytest.fail("measured again"))
    assert bits_of(config_of(tmp_path, {"target_bpw": 2.8})) == small
    large = bits_of(config_of(tmp_path, {"target_bpw": 4.0}))
    assert sum(large.values()) > sum(small.values())
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        bits_of(config_of(tmp_path, {"target_bpw": 2.8}, seed=1))


def test_another_text_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = config_of(tmp_path, {"target_bpw": 3.3})
    bits_of(config)
    monkeypatch.setattr(prepare, "measure", lambda *_: pytest.fail("measured again"))
    bits_of(config)
    (tmp_path / "text.txt").write_text("sphinx of black quartz, judge my vow. " * 200)
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        bits_of(config)


def test_measurements_do_not_drown_in_the_rounding_of_activations(tmp_path: Path):
    measured = []
    for dtype in ("float32", "bfloat16"):
        plan = {"target_bpw": 8.5, "sensitivity": {"widths": [8], "windows": 2, "length": 16}}
        bits_of(config_of(tmp_path, plan, dtype=dtype))
        measured.append(json.loads((tmp_path / "run.sensitivity.json").read_text())["sensitivity"])
    assert measured[0] == measured[1]
    assert max(fields["kl"] for fields in measured[0]) < 1e-4


def test_a_run_goes_on_with_the_plan_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever became of the measurements, and also for another export."""
    refine = {"refine": {"enabled": False}, "init": {"polish": 0}}
    config = config_of(tmp_path, {"target_bpw": 3.3}, None, **refine)
    run = train(config)
    layers = {path.name: path.read_bytes() for path in (run.folder / LAYERS).iterdir()}
    assert run.folder == tmp_path / "run"
    monkeypatch.setattr(prepare, "measure", lambda *_: pytest.fail("measured again"))
    (tmp_path / "run.sensitivity.json").unlink()
    for first_lost in (2, 0):
        (run.folder / LAYERS / f"{first_lost:05d}.safetensors").unlink()
        again = train(config_of(tmp_path, {"target_bpw": 3.3}, "humming", **refine), resume=True)
        assert {path.name: path.read_bytes() for path in (run.folder / LAYERS).iterdir()} == layers
        assert again.plan == run.plan
    assert read_metrics(run.folder)[1]["bytes_after"] == run.plan.summary()["bytes_after"]
    with pytest.raises(UserError, match="format tq holds codebook tq only"):
        train(config_of(tmp_path, {"target_bpw": 3.3}, "tq", **refine), resume=True)
    with pytest.raises(UserError, match="exists already"):
        train(config_of(tmp_path, {"target_bpw": 3.3}, None, **refine))


def test_rules_with_bits_of_their_own_are_paid_for(tmp_path: Path):
    rules = [{"role": "mlp down", "bits": 8, "group_size": 32}, ALL]
    _, plan = prepare.prepare(config_of(tmp_path, {"rules": rules, "target_bpw": 4.0}), CPU)
    assert {entry.codebook.bits for entry in plan.targets() if "down" in entry.name} == {8}
    assert 3.7 < plan.summary()["bits_per_quantized_weight"] <= 4.0


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"target_bpw": 2.4}, r"needs at least 2\.5 bits per quantized weight, and its target is 2\.4"),
        ({"target_size": 1e-5}, r"needs at least 0\.\d+ GB, and its target is 1e-05"),
        ({}, "goes with one of target_bpw and target_size"),
        ({"target_bpw": 3, "target_size": 1}, "goes with one of"),
        ({"rules": [{"role": "mlp", "bits": 2}], "target_bpw": 3}, "goes with one of"),
        ({"rules": [{"role": "embedding", "bits": "sensitivity"}], "target_bpw": 3}, "is in no decoder layer"),
        ({"rules": [ALL | {"group_size": 48}], "target_bpw": 3}, "group size 48 does not divide"),
        ({"rules": [ALL | {"codebook": "tq"}], "target_bpw": 5}, "format humming holds no rotated weights"),
        (
            {"rules": [ALL | {"codebook": "tq"}], "sensitivity": {"widths": [5, 8]}, "target_bpw": 6},
            r"codebook tq has 2, 3, 4 bits, none of plan\.sensitivity\.widths",
        ),
        ({"sensitivity": {"length": 1}, "target_bpw": 3}, "greater than or equal to 2"),
    ],
)
def test_impossible_targets_are_refused_before_work(plan: dict, message: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(prepare, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(UserError, match=message):
        prepare.prepare(config_of(tmp_path, plan), CPU)


def test_widths_that_a_format_cannot_mix_are_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prepare, "measure", lambda *_: pytest.fail("measured"))
    config = config_of(tmp_path, {"rules": [ALL | {"codebook": "tq"}], "target_bpw": 4}, "tq")
    with pytest.raises(UserError, match=r"two widths at most.*give plan\.sensitivity\.widths fewer widths"):
        prepare.prepare(config, CPU)


def test_a_hessian_that_cannot_be_factored_says_what_helps(tmp_path: Path):
    with pytest.raises(UserError, match=r"layers\.0\..*not positive definite; raise init\.damping"):
        prepare.prepare(config_of(tmp_path, {"target_bpw": 3.3}, init={"damping": 1e-12}), CPU)


def test_the_curve_falls_and_holds_the_plan(measured: Path, tmp_path: Path):
    config = config_of(measured, {"target_bpw": 3.3})
    skeleton, plan = prepare.prepare(config, CPU)
    curve = prepare.curve(config, skeleton, plan)
    sizes, divergences = zip(*curve.solved, strict=True)
    assert list(sizes) == sorted(sizes)
    assert list(divergences) == sorted(divergences, reverse=True)
    assert list(curve.others) == ["2 bits", "3 bits", "4 bits", "8 bits"]
    step = (sizes[-1] - sizes[0]) / (len(sizes) - 1)
    for size, kl in (curve.chosen, *curve.others.values()):  # nothing lies below the curve
        assert min(solved for at, solved in curve.solved if at <= size + 1.01 * step) <= kl * (1 + 1e-9)
    assert curve.chosen[0] == pytest.approx(plan.summary()["bits_per_quantized_weight"])
    assert prepare.curve(config_of(measured, {"rules": [ALL | {"bits": 2}]}), skeleton, plan) is None
    write_curve(curve.to_dict(), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_presets_on_the_curve_of_a_dense_model(measured: Path):
    """What they say of experts goes for the MLP. Groups of 128 do not divide its rows, and kurtosis is not measured."""
    config = config_of(measured, {"target_bpw": 3.3})
    curve = prepare.curve(config, *prepare.prepare(config, CPU))
    assert list(curve.presets) == ["config-i (MLP for experts)", "jangtq2 (MLP for experts)", "tq3"]
    size, kl = curve.presets["tq3"]
    assert kl == curve.others["3 bits"][1]
    assert size > curve.others["3 bits"][0]  # rows of 64 are padded to 128
    size, kl = curve.presets["config-i (MLP for experts)"]  # of three layers, each is one of the first or last two
    assert kl == curve.others["8 bits"][1]
    assert size == 8.5  # with two numbers of 16 bits for 64 weights
    size, kl = curve.presets["jangtq2 (MLP for experts)"]  # attention is kept
    assert 0 < kl < curve.others["2 bits"][1]
    rows = 3 * (128 * 2 + 64)
    assert size == 8 * (3 * (24_576 / 4 + 2 * 12_288) + 2 * rows) / (3 * 36_864)


def test_presets_on_the_curve_of_a_mixture_of_experts(tmp_path: Path):
    models.tiny_qwen3_moe(tmp_path / "model", layers=3)
    (tmp_path / "text.txt").write_text("a quick brown fox jumps over the lazy dog. " * 200)
    rules = [{"role": ["attention", "expert"], "bits": "sensitivity", "group_size": 32}]
    config = config_of(tmp_path, {"rules": rules, "target_bpw": 3.3})
    assert "jangtq2" in prepare.curve(config, *prepare.prepare(config, CPU)).presets


def test_ternary_weights_are_not_taken_for_two_bits(measured: Path):
    config = config_of(measured, {"target_bpw": 3.3})
    skeleton, plan = prepare.prepare(config, CPU)
    allocation = prepare.measured_allocation(config, skeleton, prepare.planner(config, skeleton, {}))
    entries = {entry.name: replace(entry, codebook=Codebook.integer(2, 32)) for entry in plan.targets()}
    two = Plan(plan.entries | entries)
    name = next(iter(entries))
    ternary = Plan(two.entries | {name: replace(entries[name], codebook=Codebook.ternary(32))})
    assert curve_of(allocation, plan, {"two": two, "ternary": ternary}).presets.keys() == {"two"}
