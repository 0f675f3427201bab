"""The plan decides about every tensor before any weight is read, and its bytes are those of the export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import tiny_llama, tiny_qwen3_5, tiny_qwen3_5_moe, tiny_qwen3_moe
from runs import MemoryRun
from safetensors.torch import load_file

from gsq.codebook import Codebook
from gsq.config import Rule, load_config
from gsq.errors import UserError
from gsq.export.base import export_run
from gsq.export.inspect import inspect
from gsq.model.checkpoint import Checkpoint
from gsq.model.skeleton import Skeleton
from gsq.plan.rules import Plan, candidates, make_plan, role_of


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama", layers=3)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3_moe(tmp_path_factory.mktemp("models") / "moe")


def plan_of(folder: Path, *rules: dict, max_layers: int | None = None) -> Plan:
    skeleton = Skeleton(Checkpoint.open(folder), torch.device("cpu"), torch.float32, max_layers)
    return make_plan(skeleton, [Rule(**rule) for rule in rules])


def stored(plan: Plan, part: str) -> set[str]:
    """How the entries with `part` in their name are stored."""
    books = (entry.codebook for name, entry in plan.entries.items() if part in name)
    return {"keep" if book is None else f"{len(book.levels)} g{book.group_size}" for book in books}


def test_the_first_matching_rule_decides(llama: Path):
    plan = plan_of(
        llama,
        {"match": r"layers\.0\.", "keep": True},
        {"match": "down_proj", "bits": 4, "group_size": 64},
        {"match": r"mlp\.", "ternary": True, "group_size": 32},
        {"match": "_proj", "bits": 2, "group_size": 16},
    )
    assert stored(plan, "layers.0.") == {"keep"}
    assert stored(plan, "layers.1.mlp.down_proj") == {"16 g64"}
    assert stored(plan, "layers.2.mlp.up_proj") == {"3 g32"}
    assert stored(plan, "layers.1.self_attn.") == {"4 g16"}
    assert stored(plan, "norm") == stored(plan, "embed") == {"keep"}
    assert plan.entries["model.layers.1.mlp.down_proj.weight"].rule == "down_proj"
    assert {entry.layer for entry in plan.targets()} == {1, 2}


def test_what_no_rule_matches_is_kept_and_says_why(llama: Path):
    plan = plan_of(llama, {"match": "q_proj|embed", "bits": 2, "group_size": 32}, max_layers=2)
    reasons = {
        "model.layers.1.self_attn.q_proj.weight": "q_proj|embed",
        "model.layers.2.self_attn.q_proj.weight": "beyond model.max_layers",
        "model.layers.1.self_attn.k_proj.weight": "no rule matches",
        "model.embed_tokens.weight": "not a target",
    }
    assert {name: plan.entries[name].rule for name in reasons} == reasons
    assert [entry.layer for entry in plan.targets()] == [0, 1]


def test_a_pattern_that_matches_nothing_names_tensors_near_it(llama: Path):
    with pytest.raises(
        UserError, match=r"'self_atn.q_proj' matches no tensor .* nearest are .*self_attn\.q_proj\.weight"
    ):
        plan_of(llama, {"match": "_proj", "bits": 2}, {"match": "self_atn.q_proj", "bits": 4})


@pytest.mark.parametrize("match", ["lm_head", "embed_tokens", "norm"])
def test_a_rule_cannot_quantize_what_is_no_target(llama: Path, match: str):
    with pytest.raises(UserError, match=f"'{match}' matches no tensor that can be quantized"):
        plan_of(llama, {"match": match, "bits": 4}, {"match": "_proj", "bits": 2, "group_size": 32})


def test_a_rule_behind_a_wider_one_is_refused(llama: Path):
    with pytest.raises(UserError, match="'q_proj' decides about nothing: earlier rules, such as '_proj'"):
        plan_of(llama, {"match": "_proj", "bits": 2, "group_size": 32}, {"match": "q_proj", "bits": 4})


def test_a_rule_that_keeps_need_not_match(llama: Path):
    plan = plan_of(llama, {"match": "mtp|visual", "keep": True}, {"match": "q_proj", "bits": 2, "group_size": 32})
    assert len(plan.targets()) == 3


@pytest.mark.parametrize("rules", [[{"match": "_proj", "keep": True}], [{"match": r"layers\.2\..*_proj", "bits": 2}]])
def test_a_plan_that_quantizes_nothing_is_refused(llama: Path, rules: list[dict]):
    with pytest.raises(UserError, match="quantizes nothing"):
        plan_of(llama, *({"group_size": 32} | rule for rule in rules), max_layers=2)


def test_a_group_size_that_does_not_divide_names_tensor_and_remedy(llama: Path):
    message = (
        r"model.layers.0.self_attn.q_proj.weight: group size 128 does not divide in_features 64; use 64 or 32 or 16"
    )
    with pytest.raises(UserError, match=message):
        plan_of(llama, {"match": "_proj", "bits": 2, "group_size": 128})


@pytest.mark.parametrize("model", ["llama", "moe"])
def test_bytes_are_those_of_the_export(model: str, tmp_path: Path, request: pytest.FixtureRequest):
    folder = request.getfixturevalue(model)
    found = plan_of(
        folder,
        {"match": r"layers\.0\.self_attn", "keep": True},
        {"match": r"self_attn\.\w+_proj", "bits": 3, "group_size": 32},
        {"match": "mlp.*_proj", "bits": 2, "group_size": 64},
    )
    codebooks = {
        r"layers\.1\.self_attn\.\w_proj|layers\.2\.self_attn\.\w_proj": Codebook.integer(3, 32),
        "mlp.*_proj": Codebook.integer(2, 64),
    }
    out = export_run(MemoryRun(folder, codebooks), "humming", tmp_path / "export")
    summary, total = found.summary(), inspect(out)[-1]
    tensors = load_file(out / "model.safetensors")
    assert summary["bytes_after"] == total["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert summary["bits_per_weight"] == pytest.approx(total["bits per weight"])
    assert summary["bytes_before"] == Checkpoint.open(folder).nbytes
    packed = [name.removesuffix("_scale") for name in tensors if name.endswith("weight_scale")]
    nbytes = sum(tensors[name].nbytes + tensors[name + "_scale"].nbytes for name in packed)
    assert summary["bits_per_quantized_weight"] == pytest.approx(8 * nbytes / summary["quantized_weights"])


def test_fused_experts_stored_one_by_one_are_one_entry(moe: Path):
    plan = plan_of(moe, {"match": "experts.gate_up_proj", "bits": 2, "group_size": 32})
    entry = plan.entries["model.layers.0.mlp.experts.gate_up_proj"]
    assert (entry.shape, len(entry.sources), entry.role) == ((4, 128, 64), 8, "routed experts")
    assert sum(len(entry.sources) for entry in plan.entries.values()) == len(Checkpoint.open(moe).tensors)


def test_every_tensor_has_a_role_and_is_counted_once(tmp_path: Path):
    folder = tiny_qwen3_5_moe(tmp_path / "model", layers=2)
    plan = plan_of(folder, {"match": "experts", "bits": 2, "group_size": 32})
    assert {entry.role for entry in plan.entries.values()} == {
        "mtp", "vision", "routed experts", "shared expert", "linear attention", "attention", "router", "head",
        "embedding", "norm",
    }  # fmt: skip
    named = [source for entry in plan.entries.values() for source in entry.sources]
    assert sorted(named) == sorted(Checkpoint.open(folder).tensors)
    assert plan.entries["mtp.fc.weight"].rule == "not walked"


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.layers.3.mlp.gate.weight", "router"),
        ("model.layers.3.mlp.gate_proj.weight", "mlp"),
        ("model.layers.3.mlp.experts.down_proj", "routed experts"),
        ("model.layers.3.mlp.shared_expert_gate.weight", "shared expert"),
        ("model.layers.3.linear_attn.A_log", "linear attention"),
        ("model.layers.3.self_attn.q_norm.weight", "attention"),
        ("model.visual.blocks.0.mlp.linear_fc1.weight", "vision"),
        ("mtp.layers.0.mlp.experts.down_proj", "mtp"),
        ("model.layers.3.input_layernorm.weight", "norm"),
        ("something", "other"),
    ],
)
def test_roles(name: str, role: str):
    assert role_of(name) == role


TINY = {  # the architecture of a recipe's model, in small
    "HuggingFaceTB/SmolLM2-135M-Instruct": tiny_llama,
    "Qwen/Qwen3.6-27B": tiny_qwen3_5,
    "Qwen/Qwen3.6-35B-A3B": tiny_qwen3_5_moe,
    "tiny-qwen35-moe": tiny_qwen3_5_moe,
}
RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_rule_of_a_published_recipe_decides_about_something(path: Path, tmp_path: Path):
    config = load_config(path)
    if config.model.name not in TINY:
        pytest.skip(f"no tiny model is like {config.model.name}")
    rules = [rule.model_copy(update={"group_size": 32}) for rule in config.plan.rules]
    folder = TINY[config.model.name](tmp_path / "model")
    skeleton = Skeleton(Checkpoint.open(folder), torch.device("cpu"), torch.float32)
    plan = make_plan(skeleton, rules, dict.fromkeys(candidates(skeleton, rules), 3.0))
    deciding = {entry.rule for entry in plan.entries.values()}
    assert {rule.match for rule in rules} == deciding - {"not a target", "no rule matches", "not walked"}


def test_json_round_trip(moe: Path, tmp_path: Path):
    plan = plan_of(moe, {"match": "experts", "ternary": True, "group_size": 32})
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    assert Plan.from_json(path).entries == plan.entries
