"""Every parameter has a role, whatever its model calls its parts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from models import tiny_llama, tiny_qwen3_5_moe, tiny_qwen3_moe
from torch import nn

from gsq.model.checkpoint import Checkpoint
from gsq.model.skeleton import Skeleton
from gsq.plan.roles import Role, find_roles, role_of_unloaded, together


def roles_of(folder: Path) -> dict[str, str]:
    """Roles by name, from the first number on."""
    skeleton = Skeleton(Checkpoint.open(folder), torch.device("cpu"), torch.float32)
    found = find_roles(skeleton.model, skeleton.layer_names)
    assert found.keys() >= dict(skeleton.model.named_parameters()).keys()
    return {re.sub(r"^.*?(?=\d)", "", name): str(role) for name, role in found.items()}


def test_roles_of_the_flagship(tmp_path: Path):
    roles = roles_of(tiny_qwen3_5_moe(tmp_path / "model", layers=2))
    expected = {
        "0.linear_attn.A_log": "linear attention",
        "0.linear_attn.conv1d.weight": "convolution",
        "0.linear_attn.norm.weight": "norm",
        "0.linear_attn.in_proj_qkv.weight": "linear attention in",
        "0.linear_attn.in_proj_a.weight": "linear attention in",
        "0.linear_attn.out_proj.weight": "linear attention out",
        "1.self_attn.q_proj.weight": "attention q",
        "1.self_attn.o_proj.weight": "attention o",
        "1.self_attn.k_norm.weight": "norm",
        "1.mlp.gate.weight": "router",
        "1.mlp.shared_expert_gate.weight": "router",
        "1.mlp.shared_expert.gate_proj.weight": "shared expert gate",
        "1.mlp.shared_expert.down_proj.weight": "shared expert down",
        "1.mlp.experts.gate_up_proj": "expert gate up",
        "1.mlp.experts.down_proj": "expert down",
        "1.input_layernorm.weight": "norm",
        "0.attn.qkv.weight": "vision",
        "lm_head.weight": "head",
        "model.language_model.embed_tokens.weight": "embedding",
        "model.language_model.norm.weight": "norm",
    }
    assert {name: roles[name] for name in expected} == expected


def test_roles_of_a_dense_model_and_of_experts_stored_one_by_one(tmp_path: Path):
    dense, moe = roles_of(tiny_llama(tmp_path / "dense")), roles_of(tiny_qwen3_moe(tmp_path / "moe"))
    assert {dense[f"1.mlp.{part}_proj.weight"] for part in ("gate", "up", "down")} == {"mlp gate", "mlp up", "mlp down"}
    assert (dense["model.embed_tokens.weight"], dense["lm_head.weight"]) == ("embedding", "head")
    assert (moe["0.mlp.experts.gate_up_proj"], moe["0.mlp.gate.weight"]) == ("expert gate up", "router")


def module(**children: nn.Module) -> nn.Module:
    parent = nn.Module()
    for name, child in children.items():
        parent.add_module(name, child)
    return parent


class Model(nn.Module):
    """One decoder layer with blocks as other models name them."""

    def __init__(self, **blocks: nn.Module):
        super().__init__()
        self.wte, self.out, self.layers = nn.Embedding(2, 2), nn.Linear(2, 2), nn.ModuleList([module(**blocks)])

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def get_output_embeddings(self) -> nn.Module:
        return self.out


def linear() -> nn.Module:
    return nn.Linear(2, 2)


def moe() -> nn.Module:
    return module(experts=nn.ModuleList([module(w1=linear(), w2=linear(), w3=linear())]), router=linear())


def mixer() -> nn.Module:
    return module(conv=nn.Conv1d(2, 2, 2), in_proj=linear())


@pytest.mark.parametrize(
    ("blocks", "name", "role"),
    [
        ({"attention": module(query_key_value=linear())}, "attention.query_key_value.weight", "attention q k v"),
        ({"attention": module(dense=linear())}, "attention.dense.weight", "attention o"),
        ({"self_attn": module(kv_b_proj=linear())}, "self_attn.kv_b_proj.weight", "attention k v"),
        ({"self_attn": module(q_a_proj=linear())}, "self_attn.q_a_proj.bias", "attention q"),
        ({"mlp": module(gate_up_proj=linear())}, "mlp.gate_up_proj.weight", "mlp gate up"),
        ({"fc2": linear()}, "fc2.weight", "mlp down"),
        ({"shared_mlp": module(up_proj=linear())}, "shared_mlp.up_proj.weight", "shared expert up"),
        ({"moe": moe()}, "moe.experts.0.w3.weight", "expert up"),
        ({"moe": moe()}, "moe.router.weight", "router"),
        ({"mixer": mixer()}, "mixer.in_proj.weight", "linear attention in"),
        ({"mixer": mixer()}, "mixer.conv.weight", "convolution"),
        ({"ln": nn.LayerNorm(2)}, "ln.bias", "norm"),
    ],
)
def test_roles_by_structure_and_common_names(blocks: dict, name: str, role: str):
    assert str(find_roles(Model(**blocks), ["layers.0"])["layers.0." + name]) == role


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("mtp.layers.0.mlp.experts.3.down_proj.weight", "mtp"),
        ("model.layers.2.eh_proj.weight", "mtp"),  # behind the last layer
        ("model.layers.1.extra", "other"),
        ("model.visual.blocks.0.mlp.linear_fc1.weight", "vision"),
    ],
)
def test_roles_of_tensors_that_are_not_loaded(name: str, role: str):
    assert str(role_of_unloaded(name, ["model.layers.0", "model.layers.1"])) == role


def test_roles_in_words():
    for text in ("attention", "shared expert gate up", "linear attention in", "norm"):
        assert str(Role.read(text)) == text
        assert Role.read(text).known
    assert not any(Role.read(text).known for text in ("routed experts", "attention x", "", "expert gate wrong"))
    roles = [Role.read(text) for text in ("norm", "mlp down", "mlp gate up", "attention k", "routed experts")]
    assert list(map(str, together(roles))) == ["attention k", "mlp gate up down", "norm", "routed experts"]


def test_what_a_role_covers():
    fused = Role.read("expert gate up")
    assert Role.read("expert").covers(fused)
    assert Role.read("expert up down").covers(fused)
    assert not Role.read("expert down").covers(fused)
    assert not Role.read("shared expert").covers(fused)
    assert not Role.read("attention q").covers(Role("attention"))
