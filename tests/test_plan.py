"""The plan decides about every tensor before any weight is read, and its bytes are those of the export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import tiny_llama, tiny_qwen3_5, tiny_qwen3_5_moe, tiny_qwen3_moe
from runs import MemoryRun
from safetensors.torch import load_file

from gsq.codebook import Codebook
from gsq.config import Plan as Settings
from gsq.config import Rule, load_config
from gsq.errors import UserError
from gsq.export.base import export_run
from gsq.export.inspect import inspect
from gsq.model.checkpoint import Checkpoint
from gsq.model.skeleton import Skeleton
from gsq.plan.roles import ROLES, Role
from gsq.plan.rules import Plan, candidates, make_plan


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
        "model.embed_tokens.weight": "no rule has its role",
        "model.norm.weight": "not a target",
    }
    assert {name: plan.entries[name].rule for name in reasons} == reasons
    assert [entry.layer for entry in plan.targets()] == [0, 1]


def test_a_pattern_that_matches_nothing_names_tensors_near_it(llama: Path):
    with pytest.raises(
        UserError, match=r"'self_atn.q_proj' matches no tensor .* nearest are .*self_attn\.q_proj\.weight"
    ):
        plan_of(llama, {"match": "_proj", "bits": 2}, {"match": "self_atn.q_proj", "bits": 4})


@pytest.mark.parametrize("match", ["lm_head", "norm"])
def test_a_rule_cannot_quantize_what_is_no_target(llama: Path, match: str):
    with pytest.raises(UserError, match=f"'{match}' matches no tensor that can be quantized"):
        plan_of(llama, {"match": match, "bits": 4}, {"match": "_proj", "bits": 2, "group_size": 32})


def test_a_rule_behind_a_wider_one_is_refused(llama: Path):
    with pytest.raises(UserError, match="'q_proj' decides about nothing: earlier rules, such as '_proj'"):
        plan_of(llama, {"match": "_proj", "bits": 2, "group_size": 32}, {"match": "q_proj", "bits": 4})


# Roles and layers


def test_roles_and_layers_are_conditions_like_patterns(llama: Path):
    plan = plan_of(
        llama,
        {"role": "attention q v", "layers": "first 1", "bits": 8, "group_size": 64},
        {
            "role": ["mlp down", "attention"],
            "layers": [1, "last 1"],
            "match": "down|k_proj",
            "bits": 4,
            "group_size": 64,
        },
        {"role": "mlp", "layers": "1-2", "bits": 3, "group_size": 32},
        {"layers": "0-1", "bits": 2, "group_size": 16},
    )
    assert stored(plan, "layers.0.self_attn.q_proj") == stored(plan, "layers.0.self_attn.v_proj") == {"256 g64"}
    assert stored(plan, "layers.0.self_attn.k_proj") == stored(plan, "layers.0.mlp") == {"4 g16"}
    assert stored(plan, "layers.1.mlp.down_proj") == stored(plan, "layers.2.self_attn.k_proj") == {"16 g64"}
    assert stored(plan, "layers.1.mlp.up_proj") == stored(plan, "layers.2.mlp.gate_proj") == {"8 g32"}
    assert stored(plan, "layers.1.self_attn.o_proj") == {"4 g16"}
    assert stored(plan, "layers.2.self_attn.o_proj") == {"keep"}
    reasons = {name: plan.entries[f"model.layers.1.{name}_proj.weight"].rule for name in ("mlp.down", "self_attn.o")}
    assert reasons == {"mlp.down": "mlp down, attention · layers 1, last 1 · down|k_proj", "self_attn.o": "layers 0-1"}


ANY = {"match": "_proj", "bits": 2, "group_size": 32}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"role": "expert down"},
            r"'expert down' matches no .*; what can be quantized there is attention q k v o, mlp",
        ),
        ({"role": "norm"}, "'norm' matches no tensor that can be quantized"),
        (
            {"role": "mlp", "match": "q_proj"},
            r"'mlp · q_proj' matches no .*; nearest are model\.layers\.0\.mlp\.\w+_proj",
        ),
        (
            {"role": "embedding", "layers": 0},
            r"'embedding · layers 0' matches .* is attention q k v o, mlp gate up down$",
        ),
        ({"role": "head"}, "'head' matches no .*, embedding; its head is the embedding"),
        ({"match": "embed_tokens"}, "by its name alone; for model.embed_tokens.weight add role: embedding"),
        ({"layers": "first 4"}, "'layers first 4' is for layers beyond those of the model, which are 0 to 2"),
        ({"layers": "last 4"}, "'layers last 4' is for layers beyond"),
        ({"layers": [0, 3]}, "'layers 0, 3' is for layers beyond"),
    ],
)
def test_rules_that_fit_nothing_say_why(rule: dict, message: str, llama: Path):
    with pytest.raises(UserError, match=message):
        plan_of(llama, ANY, {"bits": 4, "group_size": 32} | rule)


def test_fused_experts_have_one_codebook(moe: Path):
    gate, up = ({"role": f"expert {part}", "bits": 2, "group_size": 32} for part in ("gate", "up"))
    plan = plan_of(moe, gate, up)
    entry = plan.entries["model.layers.1.mlp.experts.gate_up_proj"]
    assert (entry.codebook, entry.rule) == (Codebook.integer(2, 32), "expert gate and expert up")
    with pytest.raises(
        UserError, match=r"gate_up_proj is one tensor .*: expert gate by 'expert gate', expert up by none"
    ):
        plan_of(moe, gate)
    with pytest.raises(UserError, match="expert up by 'expert up'; use one rule with role: expert gate up"):
        plan_of(moe, gate, up | {"bits": 3})
    assert len(plan_of(moe, gate, {"role": "expert", "bits": 2, "group_size": 32}).targets()) == 4


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_are_quantized_by_role(tied: bool, tmp_path: Path):
    folder = tiny_llama(tmp_path / "model", tied=tied)
    outside = {"role": ["embedding", "head"], "bits": 8, "codebook": "affine", "group_size": 32}
    plan = plan_of(folder, {"match": ".", "layers": 0, "bits": 2, "group_size": 32}, outside, max_layers=1)
    found = {entry.name: (entry.role, entry.layer) for entry in plan.targets() if entry.layer is None}
    assert found == {"model.embed_tokens.weight": ("embedding", None)} | (
        {} if tied else {"lm_head.weight": ("head", None)}
    )
    assert {plan.entries[name].codebook for name in found} == {Codebook.affine(8, 32)}
    assert plan.entries["model.embed_tokens.weight"].bytes_after == 128 * 64 * (8 + 32 / 32) // 8
    assert len(plan_of(folder, outside).targets()) == len(found)


def test_rules_without_a_role_leave_embedding_and_head_alone(tmp_path: Path):
    folder = tiny_llama(tmp_path / "model", tied=False)
    plan = plan_of(folder, {"match": ".", "bits": 2, "group_size": 32})
    assert {entry.layer for entry in plan.targets()} == {0, 1}
    kept = {"match": "lm_head", "keep": True}
    plan = plan_of(folder, kept, {"role": ["embedding", "head"], "bits": 8, "group_size": 32})
    assert [entry.name for entry in plan.targets()] == ["model.embed_tokens.weight"]
    assert plan.entries["lm_head.weight"].rule == "lm_head"


def test_rules_of_ones_own_go_before_those_of_a_preset(moe: Path):
    own = [{"role": "expert", "bits": 4, "group_size": 32}]
    rules = Settings(preset="gsq2", rules=own).all_rules
    plan = make_plan(Skeleton(Checkpoint.open(moe), torch.device("cpu"), torch.float32), rules)
    assert {entry.rule for entry in plan.targets()} == {"expert"}


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
    assert (entry.shape, len(entry.sources), entry.role) == ((4, 128, 64), 8, "expert gate up")
    assert sum(len(entry.sources) for entry in plan.entries.values()) == len(Checkpoint.open(moe).tensors)


def test_every_tensor_has_a_role_and_is_counted_once(tmp_path: Path):
    folder = tiny_qwen3_5_moe(tmp_path / "model", layers=2)
    plan = plan_of(folder, {"match": "experts", "bits": 2, "group_size": 32})
    families = {Role.read(entry.role).family for entry in plan.entries.values()}
    assert families == ROLES.keys() - {"mlp", "other"}
    named = [source for entry in plan.entries.values() for source in entry.sources]
    assert sorted(named) == sorted(Checkpoint.open(folder).tensors)
    assert plan.entries["mtp.fc.weight"].rule == "not walked"


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
    rules = [rule.model_copy(update={"group_size": 32}) for rule in config.plan.all_rules]
    folder = TINY[config.model.name](tmp_path / "model", layers=5)
    skeleton = Skeleton(Checkpoint.open(folder), torch.device("cpu"), torch.float32)
    plan = make_plan(skeleton, rules, dict.fromkeys(candidates(skeleton, rules), 3.0))
    reasons = {entry.rule for entry in plan.entries.values()}
    assert {str(rule) for rule in rules if not rule.keep} <= reasons


def test_json_round_trip(moe: Path, tmp_path: Path):
    plan = plan_of(moe, {"match": "experts", "ternary": True, "group_size": 32})
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    assert Plan.from_json(path).entries == plan.entries
