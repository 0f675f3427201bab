"""Programs of `bench/` on tiny models: rows are what they say, and so are predictions and correlations."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

import models
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gsq.errors import UserError
from gsq.model.checkpoint import Checkpoint
from gsq.model.resolve import load_tokenizer
from gsq.run import Run


def program(name: str) -> ModuleType:
    """A program of `bench/`, whose folder is where modules are looked for only meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
        return import_module(name)


plans = program("plans")
WIDTHS = [2, 3, 4, 5, 6, 8]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config whose own plan is in the way, with a text to measure on beside it."""
    folder = tmp_path_factory.mktemp("bench")
    letters = np.random.default_rng(0).integers(97, 123, 2000).astype(np.uint8).tobytes().decode()
    (folder / "text.txt").write_text(letters)
    content = {
        "model": {"name": str(models.tiny_llama(folder / "model", layers=3))},
        "plan": {
            "rules": [{"role": "attention", "bits": "sensitivity", "codebook": "affine", "group_size": 64}],
            "target_bpw": 4.0,
            "sensitivity": {"windows": 2, "length": 32},
        },
        "calib": {"source": str(folder / "text.txt"), "windows": 6, "length": 32, "validation": 2},
        "refine": {"steps": 2, "windows": 2},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder / "config.yaml"


def test_plans_are_quantized_and_rows_state_their_bits(config: Path, tmp_path: Path):
    names = ["uniform 2 bits g32 (3.0)", "by role (3.6)", "kurtosis (3.6)", "sensitivity (3.6)"]
    plans.compare(config, config.with_name("text.txt"), tmp_path, ",".join(names), "GPTQ", windows=2, length=64)
    rows = {row["method"]: row for row in json.loads((tmp_path / "table.json").read_text())}
    assert "bits" not in rows["original"]
    assert {name.removeprefix("GPTQ ") for name in rows} == {"original", *names}
    assert 3.3 < rows["GPTQ sensitivity (3.6)"]["bits"] <= 3.6
    uniform = rows["GPTQ uniform 2 bits g32 (3.0)"]
    assert uniform["bits"] == 3
    assert f"| {uniform['method']} | 3.000 | {uniform['kl']:.4f} |" in (tmp_path / "table.md").read_text()
    found = {path.parent.name: Run.open(path.parent).plan.targets() for path in tmp_path.glob("*/plan.json")}
    widths = {name: {entry.codebook.bits for entry in targets} for name, targets in found.items()}
    assert widths["gptq-by-role--3-6-"] == {2, 3, 4, 8}
    assert widths["gptq-kurtosis--3-6-"] <= {3, 4, 5}
    assert {path.name for path in tmp_path.glob("measured.*.json")} == {
        "measured.kurtosis.json",
        "measured.sensitivity.json",
    }


def test_methods_differ_in_what_they_do_with_a_plan(config: Path, tmp_path: Path):
    plans.compare(config, config.with_name("text.txt"), tmp_path, "uniform 3 bits g64 (3.5)", windows=2, length=64)
    gptq, gsq = (Run.open(tmp_path / f"{name}-uniform-3-bits-g64--3-5-").config for name in ("gptq", "gsq"))
    assert gptq.plan == gsq.plan
    assert (gptq.init.polish, gptq.refine.enabled, gsq.init.polish, gsq.refine.enabled) == (0, False, 2, True)


def test_a_plan_or_method_that_does_not_exist_is_refused(config: Path, tmp_path: Path):
    with pytest.raises(UserError, match="there is no 'uniform'; choose from uniform 2 bits g32"):
        plans.compare(config, config.with_name("text.txt"), tmp_path, "uniform")
    with pytest.raises(UserError, match="there is no 'AWQ'; choose from GPTQ, GSQ"):
        plans.compare(config, config.with_name("text.txt"), tmp_path, methods="GPTQ,AWQ")


def test_random_plans_are_predicted_and_measured(config: Path, tmp_path: Path):
    plans.random(config, config.with_name("text.txt"), tmp_path, count=3, means="2.5,5", windows=2, length=64)
    found = json.loads((tmp_path / "random.json").read_text())
    sensitivity = json.loads((tmp_path / "measured.sensitivity.json").read_text())["sensitivity"]
    for number, row in enumerate(found["plans"], 1):
        run = Run.open(tmp_path / "random" / f"random-{number}")
        bits = {entry.name: str(entry.codebook.bits) for entry in run.plan.targets()}
        assert len(bits) == 3 * 7
        expected = sum(s["kl"] * s["errors"][bits[s["unit"][0]]] / s["errors"]["2"] for s in sensitivity)
        assert row["predicted"] == pytest.approx(expected)
        assert row["bits"] == run.plan.summary()["bits_per_quantized_weight"]
    few, many, *_ = found["plans"]
    assert few["bits"] < many["bits"]
    assert few["kl"] > many["kl"] > 0


@given(st.lists(st.sampled_from(WIDTHS), min_size=2, unique=True), st.floats(0.05, 0.95))
@settings(deadline=None)
def test_widths_are_drawn_with_the_mean_that_was_asked_for(widths: list[int], share: float):
    mean = min(widths) + share * (max(widths) - min(widths))
    probabilities = plans.tilted(widths, mean)
    assert probabilities @ widths == pytest.approx(mean)
    assert probabilities.sum() == pytest.approx(1)
    logs = dict(zip(widths, np.log(probabilities), strict=True))
    slopes = [(logs[b] - logs[a]) / (b - a) for a in widths for b in widths if a < b]
    assert slopes == pytest.approx([slopes[0]] * len(slopes), abs=1e-6)


@pytest.mark.parametrize("mean", [2.0, 8.0, 9.0])
def test_a_mean_that_no_plan_has_is_refused(mean: float):
    with pytest.raises(UserError, match="are not between 2 and 8"):
        plans.tilted(WIDTHS, mean)


@given(st.dictionaries(st.from_regex(r"layers\.\d{1,2}\.[a-z_]{1,8}\.weight", fullmatch=True), st.sampled_from(WIDTHS)))
@settings(deadline=None, max_examples=30)
def test_rules_give_every_parameter_its_bits(bits: dict[str, int]):
    rules = plans.rules_of(bits)
    for name, width in bits.items():
        assert [rule["bits"] for rule in rules if re.search(rule["match"], name)] == [width]
        assert not any(re.search(rule["match"], f"{name}s") for rule in rules)


def test_correlations_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    predicted, measured = np.exp(np.random.default_rng(1).normal(size=(2, 12)))
    spearman, pearson = plans.correlations(predicted, measured)
    assert spearman == pytest.approx(stats.spearmanr(predicted, measured).statistic)
    assert pearson == pytest.approx(stats.pearsonr(np.log(predicted), np.log(measured)).statistic)


def test_tools_of_mlx_lm_get_our_tokens_and_have_our_size(config: Path, tmp_path: Path):
    pytest.importorskip("mlx_lm")
    tools = program("mlx_tools")
    tools.main(config, config.with_name("text.txt"), tmp_path, "2:4", "gptq", "GPTQ", windows=2, length=64)
    rows = {row["method"]: row for row in json.loads((tmp_path / "table.json").read_text())}
    size = "2 bits (embedding 4)"
    assert set(rows) == {"original", f"mlx_lm rtn {size}", f"mlx_lm gptq {size}", f"GPTQ {size}"}
    ours = stored(tmp_path / "gptq-2-bits--embedding-4-" / "export")
    assert stored(tmp_path / "rtn-2-4") == stored(tmp_path / "gptq-2-4") == ours
    tokens = tools.stored_tokens(tmp_path / "tokens.safetensors", 6, 32)
    told = (tmp_path / "home" / ".cache" / "mlx-lm" / "calibration_v5.txt").read_text()
    assert load_tokenizer(config.with_name("model"))(told)["input_ids"] == tokens.flatten().tolist()


def test_a_tool_of_mlx_lm_that_takes_too_long_is_stopped_and_has_no_row(config: Path, tmp_path: Path):
    pytest.importorskip("mlx_lm")
    tools = program("mlx_tools")
    tools.main(config, config.with_name("text.txt"), tmp_path, "3", "awq", limit=1, windows=2, length=64)
    outcomes = json.loads((tmp_path / "tools.json").read_text())
    assert outcomes["mlx_lm rtn 3 bits"] == "done"
    assert re.fullmatch(r"failed; stopped; [12] CPU seconds", outcomes["mlx_lm awq 3 bits"])
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [row["method"] for row in rows] == ["original", "mlx_lm rtn 3 bits"]


def stored(folder: Path) -> dict[str, tuple]:
    """Shape and type of every tensor of a checkpoint."""
    return {name: (info.shape, info.dtype) for name, info in Checkpoint.open(folder).tensors.items()}
