"""The bytes of a plan are those that its export has, in every format, for every tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

from gsq import files
from gsq.codebook import Codebook
from gsq.config import Config, parse_config
from gsq.convert import convert
from gsq.errors import UserError
from gsq.export.base import FORMATS, stored_bytes
from gsq.model.checkpoint import SINGLE, Checkpoint
from gsq.plan.roles import Role
from gsq.plan.rules import Plan
from gsq.prepare import prepare

CPU = torch.device("cpu")
INTEGERS = [
    {"role": ["mlp down", "shared expert down"], "bits": 4, "group_size": 64},
    {"role": ["attention", "linear attention out"], "ternary": True, "group_size": 64},
    {"role": ["mlp gate up", "expert", "shared expert"], "bits": 3, "group_size": 32},
]
AFFINE = [
    {"role": "embedding", "bits": 8, "codebook": "affine", "group_size": 64},
    {"role": "attention", "bits": 5, "codebook": "affine", "group_size": 32},
    {"role": ["mlp", "expert"], "bits": 3, "group_size": 32},
]
TQ = [
    {"role": ["mlp down", "expert down"], "bits": 4, "codebook": "tq", "group_size": 128},
    {"role": ["attention", "mlp", "expert"], "bits": 3, "codebook": "tq", "group_size": 128},
]
JANGTQ = [
    {"role": "expert down", "bits": 4, "codebook": "jangtq"},
    {"role": "expert", "bits": 2, "codebook": "jangtq"},
]
CASES = {  # format, model, rules
    "humming": ("humming", models.tiny_qwen3, INTEGERS),
    "humming, experts one by one": ("humming", models.tiny_qwen3_moe, INTEGERS),
    "compressed-tensors": ("compressed-tensors", models.tiny_llama, INTEGERS),
    "compressed-tensors, experts": ("compressed-tensors", models.tiny_qwen3_5_moe, INTEGERS),
    "compressed-tensors-wide": ("compressed-tensors-wide", models.tiny_qwen3_moe, INTEGERS),
    "tq, padded": ("tq", models.tiny_llama, TQ),
    "tq, fused experts": ("tq", models.tiny_qwen3_5_moe, TQ),
    "jangtq": ("jangtq", models.tiny_qwen3_5_moe, JANGTQ),
    "mlx": ("mlx", models.tiny_llama, AFFINE),
    "mlx, integers": ("mlx", models.tiny_qwen3_5, INTEGERS),
    "mlx, hybrid with experts": ("mlx", models.tiny_qwen3_5_moe, AFFINE),
    "mlx, experts kept one by one": ("mlx", models.tiny_qwen3_moe, AFFINE[:2]),
}
DROPPED = {"mlx": {"vision", "mtp"}, "jangtq": {"mtp"}}  # families of roles


def config_of(source: Path, format: str | None, rules: list[dict]) -> Config:
    fitting = [rule for rule in rules if set(roles_of(rule)) & set(roles_in(source))]
    return parse_config({"model": {"name": str(source)}, "plan": {"rules": fitting}, "export": {"format": format}})


def roles_of(rule: dict) -> list[str]:
    roles = rule["role"] if isinstance(rule["role"], list) else [rule["role"]]
    return [Role.read(role).family for role in roles]


def roles_in(source: Path) -> set[str]:
    names = " ".join(Checkpoint.open(source).tensors)
    marks = {"attention": "self_attn", "mlp": "mlp.gate_proj", "expert": "experts", "shared expert": "shared_expert."}
    marks |= {"linear attention": "linear_attn", "embedding": "embed_tokens"}
    return {family for family, mark in marks.items() if mark in names}


def with_other_dtypes(source: Path) -> Path:
    """The model with a norm in float32, as some are published."""
    file = source / SINGLE
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.0.input_layernorm.weight"))
    save_file(tensors | {name: tensors[name].float()}, file, {"format": "pt"})
    return source


def test_every_format_is_compared():
    assert {format for format, *_ in CASES.values()} == FORMATS.keys()


@pytest.mark.parametrize("case", CASES)
def test_a_plan_has_the_bytes_of_its_export(case: str, tmp_path: Path):
    format, make, rules = CASES[case]
    config = config_of(with_other_dtypes(make(tmp_path / "source", layers=2)), format, rules)
    skeleton, plan = prepare(config, CPU)
    exported = Checkpoint.open(convert(config, tmp_path / "export"))
    summary = plan.summary()
    assert summary["bytes_after"] == exported.nbytes
    assert summary["bytes_before"] == skeleton.checkpoint.nbytes
    families = {Role.read(entry.role).family for entry in plan.entries.values() if not entry.bytes_after}
    assert families == DROPPED.get(format, set()) & {Role.read(e.role).family for e in plan.entries.values()}
    stored = sum(entry.numel for entry in plan.entries.values() if entry.bytes_after)
    assert summary["bits_per_weight"] == pytest.approx(8 * exported.nbytes / stored)


PLAIN = [{"role": ["attention", "mlp"], "bits": 2, "group_size": 32}]
PACKED = {  # bits per quantized weight of 2 bits in groups of 32 of bfloat16 scales
    "humming": 2.5,
    "compressed-tensors": 2.5 + 8 * 16 * 14 / 73_728,  # and the shapes of 14 Linears
    "compressed-tensors-wide": 4.5 + 8 * 16 * 14 / 73_728,
    "mlx": 3.0,  # and biases
    None: 2.5,
}


@pytest.mark.parametrize("format", PACKED, ids=str)
def test_the_same_codes_have_other_sizes_in_other_formats(format: str | None, tmp_path: Path):
    _, plan = prepare(config_of(models.tiny_llama(tmp_path / "source"), format, PLAIN), CPU)
    summary = plan.summary()
    assert summary["quantized_weights"] == 73_728
    assert summary["bits_per_quantized_weight"] == pytest.approx(PACKED[format], rel=1e-12)


def test_without_a_format_codes_have_their_exact_width(tmp_path: Path):
    source = models.tiny_qwen3_5_moe(tmp_path / "source", layers=2)
    _, plan = prepare(config_of(source, None, AFFINE), CPU)
    for entry in plan.entries.values():
        exact = entry.codebook.nbytes(entry.shape) if entry.codebook else entry.bytes_before
        assert entry.bytes_after == exact


def test_words_of_jangtq_hold_whole_codes(tmp_path: Path):
    """Ten of 3 bits in 32: 3.2 bits each. Sizes need no weights, so the entry may be made up."""
    source = models.tiny_qwen3_5_moe(tmp_path / "source", layers=2)
    _, plan = prepare(config_of(source, "jangtq", JANGTQ), CPU)
    entry = plan.entries["model.language_model.layers.0.mlp.experts.down_proj"]
    wide = replace(entry, shape=(4, 64, 80), codebook=Codebook.jangtq(3, 80))
    sizes = stored_bytes("jangtq", Checkpoint.open(source), plan.entries | {entry.name: wide})
    assert sizes[entry.name] == 4 * 64 * (8 * 4 + 2) + 1


def test_the_disk_must_have_room_for_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = config_of(models.tiny_qwen3_5(tmp_path / "source", layers=2), "mlx", INTEGERS)
    needed = prepare(config, CPU)[1].summary()["bytes_after"]
    monkeypatch.setattr(files, "free_bytes", lambda path: needed - 1)
    with pytest.raises(UserError, match=r"export needs .* free there"):
        convert(config, tmp_path / "export")
    monkeypatch.setattr(files, "free_bytes", lambda path: needed)
    assert Checkpoint.open(convert(config, tmp_path / "export")).nbytes == needed


def test_a_plan_read_back_has_the_same_bytes(tmp_path: Path):
    _, plan = prepare(config_of(models.tiny_qwen3_5(tmp_path / "source", layers=2), "mlx", INTEGERS), CPU)
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    assert Plan.from_json(path) == plan
