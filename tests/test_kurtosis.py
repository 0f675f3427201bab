"""Kurtosis is exact however it is read, read once, and decides about bits as the limits say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import mlx.core as mx
import models
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from turboquant_vllm.mlx_loader import load_tq3_model
from turboquant_vllm.weight_quant import select_bits

from gsq.cli import main
from gsq.config import Kurtosis, parse_config
from gsq.convert import convert
from gsq.errors import UserError
from gsq.export.base import check_plan, open_model
from gsq.export.dequantize import dequantize
from gsq.export.patterns import cover
from gsq.model.checkpoint import SINGLE, Checkpoint
from gsq.plan import kurtosis as module
from gsq.plan.kurtosis import Moments, bits_for, kurtosis_of, measured
from gsq.plan.rules import Plan
from gsq.prepare import prepare
from gsq.run import Run
from gsq.train import train

CPU = torch.device("cpu")
LIMITS = Kurtosis().limits()
Q, V, UP = "self_attn.q_proj.weight", "self_attn.v_proj.weight", "mlp.up_proj.weight"


def literal(weights: Tensor) -> float:
    """The definition, word for word."""
    deviation = weights.double() - weights.double().mean()
    return float(deviation.pow(4).mean() / deviation.pow(2).mean() ** 2)


def merged(weights: Tensor, size: int) -> float:
    first, *others = map(Moments.of, weights.split(size))
    return sum(others, start=first).kurtosis


def with_kurtosis(shape: tuple[int, ...], kurtosis: float) -> Tensor:
    """Weights in bfloat16, most of them 1 or -1, a few so much larger that the kurtosis is as wanted, nearly."""
    weights = torch.ones(shape).flatten()
    weights[1::2] = -1
    few, low, high = len(weights) // 64, 1.0, 100.0  # kurtosis grows with the size of the few, to 64
    scaled = weights.clone()
    for _ in range(40):
        middle = (low + high) / 2
        scaled[:few] = weights[:few] * middle
        low, high = (middle, high) if literal(scaled) < kurtosis else (low, middle)
    return scaled.view(shape).bfloat16()


def heavy_model(folder: Path, wanted: dict[str, float], make=models.tiny_llama) -> Path:
    """A tiny model of which tensors with `wanted` in their names have that kurtosis."""
    make(folder)
    tensors = load_file(folder / SINGLE)
    for name, tensor in tensors.items():
        values = [value for part, value in wanted.items() if part in name]
        if values:
            tensors[name] = with_kurtosis(tuple(tensor.shape), values[0])
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def content_of(source: Path, codebook: str = "tq", **sections: dict) -> dict:
    rule = {"match": "_proj", "codebook": codebook, "bits": "kurtosis", "group_size": 32}
    content = {"model": {"name": str(source)}, "plan": {"rules": [rule]}, "run": str(source.parent / "runs" / "one")}
    content["export"] = {"format": "tq" if codebook == "tq" else None}
    return content | sections


def plan_of(content: dict, **more) -> Plan:
    return prepare(parse_config(content), CPU, **more)[1]


def bits_of(plan: Plan, part: str) -> set[int | None]:
    return {entry.codebook and entry.codebook.bits for name, entry in plan.entries.items() if part in name}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that are read from now on."""
    names: list[str] = []
    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name, part=None: names.append(name) or read(self, name, part))
    return names


# The number


SAMPLES = {
    "gaussian": lambda: torch.randn(50_000),
    "heavy tails": lambda: torch.distributions.StudentT(3.0).sample((50_000,)),
    "skewed": lambda: torch.randn(50_000).exp(),
    "two values": lambda: torch.randint(0, 2, (50_000,)) * 2.0 - 1,
    "one outlier": lambda: torch.zeros(50_000).index_fill(0, torch.tensor([777]), 3.0),
    "bfloat16": lambda: (torch.randn(50_000) * 0.02).bfloat16(),
    "tiny": lambda: torch.randn(50_000) * 1e-20,
    "large mean": lambda: torch.randn(50_000, dtype=torch.float64) + 1e6,
    "drifting mean": lambda: torch.randn(50_000, dtype=torch.float64) + torch.arange(50_000) * 10.0,
}


@pytest.mark.parametrize("which", SAMPLES)
def test_chunks_together_have_the_kurtosis_of_the_definition(which: str):
    torch.manual_seed(0)
    weights = SAMPLES[which]()
    for size in (50_000, 4096, 333):
        assert merged(weights, size) == pytest.approx(literal(weights), rel=1e-9)


def test_known_values():
    torch.manual_seed(0)
    assert Moments.of(torch.randn(1 << 20)).kurtosis == pytest.approx(3, abs=0.03)
    assert Moments.of(torch.rand(1 << 20)).kurtosis == pytest.approx(1.8, abs=0.01)
    assert Moments.of(torch.tensor([1.0, -1.0])).kurtosis == 1


@pytest.mark.parametrize("value", [0.0, 0.1, -3e8, 1e-30])
def test_weights_that_are_all_alike_count_as_the_least_kurtosis(value: float):
    assert merged(torch.full((1000,), value), 300) == 1
    assert Moments.of(torch.tensor([value])).kurtosis == 1


def test_measuring_leaves_the_weights_alone():
    weights = torch.randn(100, dtype=torch.float64)
    before = weights.clone()
    Moments.of(weights)
    assert torch.equal(weights, before)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("read", "chunk"), [(1 << 24, 1 << 16), (1000, 77), (1, 1 << 16)])
def test_experts_count_as_one_tensor(fused: bool, read: int, chunk: int, tmp_path: Path, monkeypatch):
    source = Checkpoint.open(models.tiny_qwen3_5_moe(tmp_path / "moe", layers=2, fused=fused))
    monkeypatch.setattr(module, "READ", read)
    monkeypatch.setattr(module, "CHUNK", chunk)
    names = [
        name for name in source.tensors if re.search(r"language_model.*layers\.0\.mlp\.experts\..*(gate|up)_", name)
    ]
    assert len(names) == (1 if fused else 8)
    weights = torch.cat([source.read(name).flatten() for name in names])
    assert kurtosis_of(source, names) == pytest.approx(literal(weights), rel=1e-9)


def test_memory_holds_a_part_of_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = Checkpoint.open(models.tiny_llama(tmp_path / "model"))
    monkeypatch.setattr(module, "READ", 640)
    parts: list[Tensor] = []
    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda *args: parts.append(read(*args)) or parts[-1])
    kurtosis_of(source, ["model.layers.0." + UP])
    assert [tuple(part.shape) for part in parts] == [(10, 64)] * 12 + [(8, 64)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_named(value: float, tmp_path: Path):
    folder = models.tiny_llama(tmp_path / "model")
    tensors = load_file(folder / SINGLE)
    tensors["model.layers.1." + V][3, 5] = value
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.v_proj\.weight holds NaN or Inf"):
        plan_of(content_of(folder))
    assert not list(tmp_path.glob("runs/*"))


# The rule


@pytest.mark.parametrize(
    ("kurtosis", "integer", "tq"),
    [(1, 3, 3), (3.999, 3, 3), (4, 4, 4), (7.999, 4, 4), (8, 5, None), (14.999, 5, None), (15, None, None)],
)
def test_limits(kurtosis: float, integer: int | None, tq: int | None):
    assert bits_for(kurtosis, LIMITS, range(2, 9)) == integer
    assert bits_for(kurtosis, LIMITS, range(2, 5)) == tq


@pytest.mark.parametrize(("codebook", "fives"), [("integer", 5), ("tq", None), ("lloyd", None)])
def test_bits_of_a_plan_follow_kurtosis(codebook: str, fives: int | None, tmp_path: Path):
    source = heavy_model(tmp_path / "model", {"0." + Q: 5.2, UP: 10, V: 40})
    plan = plan_of(content_of(source, codebook))
    assert (bits_of(plan, UP), bits_of(plan, V), bits_of(plan, "k_proj")) == ({fives}, {None}, {3})
    assert (bits_of(plan, "layers.0." + Q), bits_of(plan, "layers.1." + Q)) == ({4}, {3})
    entry = plan.entries["model.layers.0." + Q]
    assert entry.kurtosis == pytest.approx(5.2, rel=0.03)
    assert (entry.rule, entry.reason) == ("_proj", f"_proj (kurtosis {entry.kurtosis:.2f})")
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    assert Plan.from_json(path).entries == plan.entries


def test_limits_can_be_moved(tmp_path: Path):
    content = content_of(heavy_model(tmp_path / "model", {Q: 5.2, V: 40}))
    content["plan"]["kurtosis"] = {"three_bits": 6, "four_bits": float("inf"), "five_bits": float("inf")}
    with pytest.raises(UserError, match=r"plan\.kurtosis: three_bits, four_bits and five_bits must ascend"):
        parse_config(content)
    content["plan"]["kurtosis"] = {"three_bits": 6, "four_bits": 50, "five_bits": float("inf")}
    plan = plan_of(content)
    assert (bits_of(plan, Q), bits_of(plan, V)) == ({3}, {4})


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"bits": "kurtosys"}, "Input should be 2, 3, 4, 5, 6, 7, 8, 'kurtosis' or 'sensitivity'"),
        ({"bits": 5, "codebook": "tq"}, "codebook tq needs bits: one of 2, 3, 4, kurtosis, sensitivity"),
        ({"bits": "kurtosis", "keep": True}, "exactly one of"),
    ],
)
def test_rules_with_mistakes(rule: dict, message: str, tmp_path: Path):
    content = content_of(tmp_path) | {"plan": {"rules": [{"match": "_proj"} | rule]}}
    with pytest.raises(UserError, match=message):
        parse_config(content)


def test_rules_that_cannot_hold_are_refused_before_weights_are_read(tmp_path: Path, reads: list[str]):
    content = content_of(models.tiny_llama(tmp_path / "model"), "integer")
    for change, message in [
        ({"group_size": 48}, "48 does not divide in_features 64"),
        ({"match": "head"}, "no tensor"),
    ]:
        content["plan"]["rules"][0] |= change
        with pytest.raises(UserError, match=message):
            plan_of(content)
    assert not reads


def test_only_what_a_rule_needs_is_measured(tmp_path: Path, reads: list[str]):
    content = content_of(
        models.tiny_llama(tmp_path / "model", layers=3), model={"name": str(tmp_path / "model"), "max_layers": 2}
    )
    content["plan"]["rules"][0]["match"] = "up_proj"
    content["plan"]["rules"].append({"match": "down_proj", "codebook": "tq", "bits": 4, "group_size": 32})
    plan = plan_of(content)
    assert set(reads) == {"model.layers.0." + UP, "model.layers.1." + UP}
    assert {name for name, entry in plan.entries.items() if entry.kurtosis is not None} == set(reads)
    assert plan.entries["model.layers.2." + UP].reason == "beyond model.max_layers"
    plan_of(content, scan=True)
    assert len(reads) == len(set(reads)) == 2 * 7  # all Linears of two layers, none twice


# What is remembered


def test_weights_are_read_once(tmp_path: Path, reads: list[str]):
    content = content_of(models.tiny_llama(tmp_path / "model"))
    first = plan_of(content)
    assert len(reads) == 14
    assert plan_of(content).entries == first.entries
    assert plan_of(content, scan=True).entries == first.entries
    assert len(reads) == 14
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["one.kurtosis.json"]


def test_another_checkpoint_and_a_broken_file_are_measured_anew(tmp_path: Path, reads: list[str]):
    source = Checkpoint.open(models.tiny_llama(tmp_path / "model"))
    name, cache = "model.layers.0." + UP, tmp_path / "cache.json"
    first = measured(source, {name: [name]}, cache)
    for text in (
        "",
        "[]",
        "{}",
        '{"fingerprint": 3}',
        cache.read_text().replace('"fingerprint": "', '"fingerprint": "0'),
    ):
        cache.write_text(text)
        assert measured(source, {name: [name]}, cache) == first
    assert len(reads) == 6
    other = Checkpoint.open(models.tiny_llama(tmp_path / "other", seed=1))
    assert measured(other, {name: [name]}, cache) != first


def test_a_place_that_cannot_be_written_is_found_before_reading(tmp_path: Path, reads: list[str]):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*one\.kurtosis\.json"):
        plan_of(content_of(models.tiny_llama(tmp_path / "model")))
    assert not reads


# Commands


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    source = heavy_model(tmp_path / "model", {"0." + Q: 5.2, "0." + UP: 10, "1." + V: 40})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content_of(source)))
    return path


def test_scan_prints_families_and_then_the_plan(recipe: Path, capsys: pytest.CaptureFixture, reads: list[str]):
    printed = []
    for arguments in (["--scan", "kurtosis"], ["--scan", "kurtosis"], []):
        with pytest.raises(SystemExit) as end:
            main(["plan", str(recipe), *arguments])
        assert end.value.code == 0
        printed.append(capsys.readouterr().out)
    rows = [[cell for cell in re.split(r"\s{2,}", line.strip())] for line in printed[0].splitlines() if line.strip()]
    head = [
        "family",
        "tensors",
        "mean kurtosis",
        "max",
        "3 bits (< 4)",
        "4 bits (< 8)",
        "5 bits or keep (< 15)",
        "keep",
    ]
    assert rows[0] == head
    families = {row[0]: row for row in rows[2:4]}
    assert (families["attention"][1], families["attention"][4:]) == ("8", ["6", "1", "0", "1"])
    assert (families["mlp"][1], families["mlp"][4:]) == ("6", ["5", "0", "1", "0"])
    assert float(families["attention"][3]) == pytest.approx(40, rel=0.05)
    assert re.search(r" 4 +32 .*_proj \(kurtosis 5\.\d\d\)", printed[0])
    assert re.search(r" 3 +32 .*_proj \(kurtosis \d\.\d\d to \d\.\d\d\)", printed[0])
    assert "tensors quantized" in printed[0]
    assert printed[1] == printed[0]
    assert "family" not in printed[2]
    assert len(reads) == 14


def test_scan_knows_kurtosis_only(recipe: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as end:
        main(["plan", str(recipe), "--scan", "colour"])
    assert end.value.code == 2
    assert "'kurtosis'" in capsys.readouterr().err


def test_a_conversion_holds_what_the_reader_expects(recipe: Path, tmp_path: Path):
    content = yaml.safe_load(recipe.read_text())
    folder = convert(parse_config(content), tmp_path / "out")
    config = json.loads((folder / "tq_config.json").read_text())
    assert (config["bits"], config["sensitive_bits"]) == (3, 4)
    assert config["sensitive_patterns"] == ["layers.0.self_attn.q_proj"]
    export = open_model(folder)
    widths = {
        name: select_bits(name, config["bits"], config["sensitive_bits"], tuple(config["sensitive_patterns"]))
        for name in export.packed
    }
    planned = {name: entry.codebook.bits for name, entry in plan_of(content).entries.items() if entry.codebook}
    assert widths == planned
    assert not {"model.layers.0." + UP, "model.layers.1." + V} & export.packed.keys()
    assert export.read("model.layers.1." + V).dtype == torch.float16
    tokens = models.random_tokens()
    served, _ = load_tq3_model(str(folder))
    served.set_dtype(mx.float32)  # its float16 kernels need Metal
    logits = torch.from_numpy(np.array(served(mx.array(tokens.numpy()))))
    dense = AutoModelForCausalLM.from_pretrained(dequantize(folder, tmp_path / "dense"), dtype=torch.float32)
    with torch.no_grad():
        expected = dense(tokens).logits
    assert (logits - expected).abs().amax(-1).median() < 0.02 * expected.abs().max()


def test_a_run_plans_by_kurtosis_and_is_resumed_with_its_limits(recipe: Path, tmp_path: Path, reads: list[str]):
    text = tmp_path / "text.txt"
    text.write_text("some words to read, " * 40)
    content = yaml.safe_load(recipe.read_text()) | {
        "calib": {"source": str(text), "windows": 3, "length": 16, "validation": 1},
        "init": {"method": "rtn", "polish": 0}, "refine": {"enabled": False},
    }  # fmt: skip
    plan_of(content)
    scanned = len(reads)
    run = train(parse_config(content), tmp_path / "elsewhere")
    assert scanned == 14  # the run found what the plan had measured
    assert bits_of(run.plan, "layers.0." + Q) == {4}
    assert Run.open(run.folder).plan.entries == plan_of(content).entries
    moved = content | {"plan": content["plan"] | {"kurtosis": {"three_bits": 3.5}}}
    with pytest.raises(UserError, match=r"plan\.kurtosis\.three_bits was 4\.0, is 3\.5"):
        train(parse_config(moved), run.folder, resume=True)


# What the TQ format can tell apart


def test_widths_that_vary_by_layer_are_told_apart_by_short_patterns():
    names = [f"model.layers.{layer}.{leaf}" for layer in range(24) for leaf in (Q, V, UP)]
    for seed in range(5):
        chosen = torch.rand(len(names), generator=torch.Generator().manual_seed(seed)) < 0.3
        wanted = {name for name, is_wanted in zip(names, chosen.tolist(), strict=True) if is_wanted}
        patterns = tuple(run for run, _ in cover(wanted, [name for name in names if name not in wanted], {False}))
        assert all((select_bits(name, 3, 4, patterns) == 4) == (name in wanted) for name in names)
        assert len(patterns) <= len(wanted)


def test_names_that_no_pattern_tells_apart_are_refused():
    names = ["model.layers.1.mlp.up_proj.weight", "model.extra.layers.1.mlp.up_proj.weight.more"]
    with pytest.raises(UserError, match=r"no pattern tells model\.layers\.1\.mlp\.up_proj\.weight from modules"):
        cover({names[0]}, [names[1]], {False})


def test_a_third_width_beside_those_of_kurtosis_is_refused(recipe: Path):
    content = yaml.safe_load(recipe.read_text())
    content["plan"]["rules"].insert(0, {"match": "down_proj", "codebook": "tq", "bits": 2, "group_size": 32})
    with pytest.raises(UserError, match=r"two widths at most, the plan has \[2, 3, 4\]"):
        plan_of(content)


def test_humming_names_modules_that_it_cannot_tell_apart(tmp_path: Path):
    source = heavy_model(tmp_path / "model", {"0." + Q: 5.2})
    config = parse_config(content_of(source, "integer"))
    skeleton, plan = prepare(config, CPU)
    with pytest.raises(UserError, match=r"self_attn\.\w_proj .* differ, but vLLM reads both as one"):
        check_plan("humming", skeleton.checkpoint, plan.entries)
