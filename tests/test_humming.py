"""Humming exports: what Humming's own schema accepts, what a reader makes of config.json, and the way back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import models
import pytest
import torch
from humming.schema.humming import HummingWeightSchema
from runs import MemoryRun
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from gsq.codebook import Codebook
from gsq.errors import UserError
from gsq.export import humming
from gsq.export.base import check_plan, export_run, open_model
from gsq.export.dequantize import dequantize
from gsq.export.inspect import inspect
from gsq.export.verify import verify
from gsq.model.checkpoint import INDEX, SINGLE, Checkpoint, CheckpointWriter

TWO, FOUR, TERNARY = Codebook.integer(2, 32), Codebook.integer(4, 64), Codebook.ternary(64)
LAYERS = r"^model\.(language_model\.)?layers\."
EXPERTS = {LAYERS + r".*mlp\.experts\.": TWO}
MLP = {LAYERS + r".*mlp\..*_proj\.": TWO}
MIXED = {
    LAYERS + r".*down_proj": FOUR,
    LAYERS + r"[13]\.mlp\..*_proj": TERNARY,
    LAYERS + r".*_proj\.": TWO,
}  # a rule per role, one per layer, and a default; lm_head, norms and embeddings kept


def published(config: dict, module: str) -> dict | None:
    """What vLLM makes of a module name, written from its documentation: substrings, `lm_head`, then `dynamic`."""
    if any(entry in module for entry in config["ignore"]) or "lm_head" in module:
        return None
    for rule in config["dynamic"]:
        if rule[:1] == "-" and re.match(rule[2:], module):
            return None
    for rule, override in config["dynamic"].items():
        if rule[:1] == "+" and re.match(rule[2:], module):
            return config | override
    return config


def quantization_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def modules(folder: Path) -> dict[str, bool]:
    """Every module of an export that has a matrix, and whether its tensors are packed."""
    tensors = Checkpoint.open(folder).tensors
    matrices = {name: info for name, info in tensors.items() if len(info.shape) >= 2 and "weight_scale" not in name}
    return {name.removesuffix(".weight"): info.dtype == torch.int32 for name, info in matrices.items()}


@pytest.fixture(scope="module")
def flagship(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryRun, Path]:
    """The small flagship, its experts quantized, and the export."""
    folder = tmp_path_factory.mktemp("flagship")
    run = MemoryRun(models.tiny_qwen3_5_moe(folder / "source", shards=3), EXPERTS)
    return run, export_run(run, "humming", folder / "export")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryRun, Path]:
    """A dense model of mixed widths and its export, one shard."""
    folder = tmp_path_factory.mktemp("dense")
    run = MemoryRun(models.tiny_qwen3(folder / "source", layers=4), MIXED)
    return run, export_run(run, "humming", folder / "export")


@pytest.mark.parametrize("which", ["flagship", "dense"])
def test_humming_accepts_every_tensor(which: str, request: pytest.FixtureRequest):
    _, folder = request.getfixturevalue(which)
    stored, config = Checkpoint.open(folder), quantization_config(folder)
    packed = [module for module, is_packed in modules(folder).items() if is_packed]
    dense = open_model(folder)
    assert packed
    for module in packed:
        schema = HummingWeightSchema.from_config(published(config, module))
        tensors = {leaf: stored.read(f"{module}.{leaf}") for leaf in ("weight", "weight_scale")}
        assert torch.equal(dense.read(f"{module}.weight", 3), dense.read(f"{module}.weight")[3])
        schema.validate_tensors(tensors, *dense.tensors[f"{module}.weight"].shape, torch.bfloat16)


@pytest.mark.parametrize("which", ["flagship", "dense"])
def test_exactly_the_packed_modules_count_as_quantized(which: str, request: pytest.FixtureRequest):
    _, folder = request.getfixturevalue(which)
    config = quantization_config(folder)
    for module, is_packed in modules(folder).items():
        assert (published(config, module) is not None) == is_packed, module
    assert not any(entry.startswith("re:") for entry in config["ignore"])


def test_the_flagship_needs_few_patterns(flagship: tuple[MemoryRun, Path]):
    config = quantization_config(flagship[1])
    assert config["ignore"] == [
        "embed_tokens", "linear_attn", "lm_head", "mlp.gate", "mtp", "self_attn",
        "shared_expert", "shared_expert_gate", "visual",
    ]  # fmt: skip
    assert config["dynamic"] == {}
    assert (config["b_dtype"], config["weight_scale_group_size"]) == ("uint2", 32)


@pytest.mark.parametrize(
    ("module", "quantized"),
    [
        ("language_model.model.layers.0.mlp.experts", True),
        ("language_model.model.layers.3.self_attn.qkv_proj", False),
        ("language_model.model.layers.0.linear_attn.in_proj_qkvz", False),
        ("language_model.model.layers.0.mlp.shared_expert.gate_up_proj", False),
        ("language_model.model.layers.0.mlp.gate", False),
        ("language_model.lm_head", False),
        ("visual.blocks.0.attn.qkv", False),
        ("mtp.layers.0.mlp.experts", False),
        ("mtp.layers.0.self_attn.qkv_proj", False),
    ],
)
def test_names_that_vllm_gives_its_own_modules(flagship: tuple[MemoryRun, Path], module: str, quantized: bool):
    assert (published(quantization_config(flagship[1]), module) is not None) == quantized


@pytest.mark.parametrize(
    ("module", "b_dtype", "group_size"),
    [
        ("model.layers.0.mlp.gate_up_proj", "uint2", 32),
        ("model.layers.2.self_attn.qkv_proj", "uint2", 32),
        ("model.layers.1.mlp.gate_up_proj", "uint2", 64),
        ("model.layers.3.mlp.up_proj", "uint2", 64),
        ("model.layers.1.mlp.down_proj", "uint4", 64),
        ("language_model.model.layers.2.mlp.down_proj", "uint4", 64),
    ],
)
def test_mixed_widths(dense: tuple[MemoryRun, Path], module: str, b_dtype: str, group_size: int):
    setting = published(quantization_config(dense[1]), module)
    assert (setting["b_dtype"], setting["weight_scale_group_size"]) == (b_dtype, group_size)


def test_a_router_beside_quantized_gates_is_told_apart(tmp_path: Path):
    """`mlp.gate` is a substring of `mlp.gate_proj`, so it needs a pattern with an end."""
    source = models.tiny_qwen3_moe(tmp_path / "source")
    tensors = load_file(source / SINGLE)
    tensors |= {f"model.layers.2.mlp.{part}_proj.weight": torch.randn(64, 64) for part in ("gate", "up", "down")}
    tensors["model.layers.1.mlp.gate_extra.weight"] = torch.randn(64, 64)
    save_file(tensors, source / SINGLE)
    folder = export_run(MemoryRun(source, MLP | EXPERTS), "humming", tmp_path / "export")
    config = quantization_config(folder)
    assert any(rule.startswith("-:") for rule in config["dynamic"])
    for module, is_packed in modules(folder).items():
        assert (published(config, module) is not None) == is_packed, module


def test_kept_layers_are_told_apart(tmp_path: Path):
    source = models.tiny_llama(tmp_path / "source", layers=13)
    run = MemoryRun(source, {r"layers\.([02-9]|1[0-2])\..*_proj": TWO})  # all but layer 1
    folder = export_run(run, "humming", tmp_path / "export")
    config = quantization_config(folder)
    for module, is_packed in modules(folder).items():
        assert (published(config, module) is not None) == is_packed, module
    assert published(config, "model.layers.1.self_attn.qkv_proj") is None
    assert published(config, "model.layers.12.self_attn.qkv_proj")


def test_ternary_takes_the_upper_three_codes(dense: tuple[MemoryRun, Path]):
    run, folder = dense
    name = "model.layers.1.mlp.gate_proj.weight"
    codes = torch.from_numpy(load_file(folder / SINGLE)[name].numpy().view("uint8").copy())
    pairs = torch.stack([codes >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(1)
    assert pairs.unique().tolist() == [1, 2, 3]
    assert torch.equal(pairs, run.load(name).codes + 1)


@pytest.mark.parametrize("fused", [True, False])
def test_experts_are_stored_one_by_one(tmp_path: Path, fused: bool):
    run = MemoryRun(models.tiny_qwen3_moe(tmp_path / "source", fused=fused), EXPERTS)
    model = open_model(export_run(run, "humming", tmp_path / "export"))
    fused_up = run.load("model.layers.1.mlp.experts.gate_up_proj").dequantize(torch.bfloat16)
    gate, up = fused_up[3].chunk(2)
    assert torch.equal(model.read("model.layers.1.mlp.experts.3.gate_proj.weight"), gate)
    assert torch.equal(model.read("model.layers.1.mlp.experts.3.up_proj.weight"), up)
    down = run.load("model.layers.1.mlp.experts.down_proj").dequantize(torch.bfloat16)
    assert torch.equal(model.read("model.layers.1.mlp.experts.0.down_proj.weight"), down[0])
    assert "model.layers.1.mlp.experts.gate_up_proj" not in model.tensors
    assert verify(tmp_path / "export", run).quantized_tensors == 2 * 3 * models.EXPERTS


def test_everything_else_is_copied(flagship: tuple[MemoryRun, Path]):
    run, folder = flagship
    exported = Checkpoint.open(folder)
    kept = [name for name, entry in run.plan.entries.items() if entry.codebook is None]
    assert any(name.startswith("mtp.") for name in kept)
    assert any(name.startswith("model.visual.") for name in kept)
    for name in kept:
        assert torch.equal(exported.read(name).view(torch.int16), run.source.read(name).view(torch.int16))
    assert {path.name for path in exported.side_files()} == {path.name for path in run.source.side_files()}
    assert {k: v for k, v in exported.config.items() if k != "quantization_config"} == run.source.config


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"k_proj": Codebook((-1.5, -0.5, 0.5, 1.5), 32)}, r"layers\.0\.self_attn\.k_proj\.weight.*integer levels"),
        ({"k_proj": Codebook((0.0, 128.0), 32)}, "integer levels"),
        ({"k_proj": Codebook.integer(2, 32, torch.float16)}, "bfloat16 scales"),
        ({"k_proj": Codebook.integer(2, 8)}, "groups of at least 16"),
        ({"k_proj": Codebook.integer(2, 48)}, "48 does not divide in_features 64; use 64 or 32"),
        ({"lm_head": TWO}, "never read for lm_head"),
        ({"embed": TWO}, r"embed_tokens.*never read for lm_head and embeddings"),
        ({"k_proj": TWO}, r"differ, but vLLM reads both as one module model\.layers\.0\.self_attn\.qkv_proj"),
        (
            {"gate_proj": TWO, "up_proj": FOUR},
            r"give all parts of model\.layers\.0\.mlp\.gate_up_proj the same codebook",
        ),
        ({"nothing": TWO}, "quantizes nothing"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_writing(tmp_path: Path, rules: dict, message: str):
    source = models.tiny_llama(tmp_path / "source", tied=False)
    plan = MemoryRun(source, dict.fromkeys(rules, TWO))
    entries = {}
    for name, entry in plan.plan.entries.items():
        wanted = next((rules[pattern] for pattern in rules if pattern in name), None)
        entries[name] = type(entry)(name, entry.shape, wanted, entry.sources)
    plan.plan.entries.update(entries)
    with pytest.raises(UserError, match=message):
        check_plan("humming", plan.source, entries)
    with pytest.raises(UserError, match=message):
        export_run(plan, "humming", tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_rows_must_be_whole_words(tmp_path: Path):
    source = models.tiny_llama(tmp_path / "source")
    save_file(load_file(source / SINGLE) | {"model.odd.weight": torch.randn(4, 48)}, source / SINGLE)
    with pytest.raises(UserError, match=r"model\.odd\.weight.*multiple of 32"):
        export_run(MemoryRun(source, {"odd": Codebook.integer(2, 16)}), "humming", tmp_path / "export")


def test_experts_of_two_widths_are_refused(tmp_path: Path):
    """vLLM's fused experts have one schema for all their projections."""
    run = MemoryRun(models.tiny_qwen3_moe(tmp_path / "source"), {"down_proj": FOUR, "gate_up_proj": TWO})
    with pytest.raises(UserError, match=r"as one module model\.layers\.0\.mlp\.experts"):
        export_run(run, "humming", tmp_path / "export")


def test_unknown_formats(tmp_path: Path, flagship: tuple[MemoryRun, Path]):
    with pytest.raises(UserError, match=r"unknown export format 'gguf'; GSQ writes humming"):
        export_run(flagship[0], "gguf", tmp_path / "export")
    folder = models.tiny_llama(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UserError, match="'awq', which GSQ does not read"):
        open_model(folder)


@pytest.mark.parametrize("which", ["flagship", "dense"])
def test_verify_agrees(which: str, request: pytest.FixtureRequest):
    run, folder = request.getfixturevalue(which)
    report = verify(folder, run)
    quantized = [run.load(e.name) for e in run.plan.entries.values() if e.codebook]
    assert report.quantized_weights == sum(q.codes.numel() for q in quantized)
    assert report.quantized_bytes + report.kept_bytes == Checkpoint.open(folder).nbytes
    assert "bit for bit" in str(report)


def flip_a_code(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"][5, 1] ^= 1 << 17


def change_a_scale(tensors: dict[str, Tensor]) -> None:
    scales = tensors["model.layers.2.self_attn.q_proj.weight_scale"].view(torch.int16)
    scales[0, 0] ^= 1


def change_a_kept_tensor(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"].view(torch.int16)[3] ^= 1


def drop_a_kept_tensor(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.0.input_layernorm.weight"]


def drop_the_scales(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.0.mlp.down_proj.weight_scale"]


def add_a_tensor(tensors: dict[str, Tensor]) -> None:
    tensors["stray"] = torch.zeros(2)


def widen_the_scales(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.0.mlp.down_proj.weight_scale"
    tensors[name] = tensors[name].float()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_code, r"model\.layers\.2\.mlp\.up_proj: codes differ"),
        (change_a_scale, r"model\.layers\.2\.self_attn\.q_proj: scales differ"),
        (change_a_kept_tensor, r"model\.norm\.weight differs from the source"),
        (drop_a_kept_tensor, r"model\.layers\.0\.input_layernorm\.weight is missing"),
        (drop_the_scales, r"model\.layers\.0\.mlp\.down_proj\.weight_scale is missing"),
        (add_a_tensor, "stray belongs to no tensor"),
        (widen_the_scales, "scales are stored as F32"),
    ],
)
def test_verify_catches(tmp_path: Path, dense: tuple[MemoryRun, Path], damage, message: str):
    run, _ = dense
    folder = export_run(run, "humming", tmp_path / "export")
    tensors = load_file(folder / SINGLE)
    damage(tensors)
    save_file(tensors, folder / SINGLE)
    with pytest.raises(UserError, match=message):
        verify(folder, run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "beyond quantization_config"),
        ({"quantization_config": {"b_dtype": "uint4"}}, "codes are stored as"),
        ({"quantization_config": {"weight_scale_group_size": 64}}, "says group size 64, the run has 32"),
        ({"quantization_config": {"ignore": ["mlp"]}}, "says it is not quantized"),
    ],
)
def test_verify_reads_the_config(tmp_path: Path, dense: tuple[MemoryRun, Path], change: dict, message: str):
    run, _ = dense
    folder = export_run(run, "humming", tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    merged = {key: config[key] | value if isinstance(value, dict) else value for key, value in change.items()}
    (folder / "config.json").write_text(json.dumps(config | merged))
    with pytest.raises(UserError, match=message):
        verify(folder, run)


def test_verify_checks_the_index_and_the_files(tmp_path: Path, flagship: tuple[MemoryRun, Path]):
    run, _ = flagship
    writer = CheckpointWriter(tmp_path / "export", shard_bytes=100_000)
    humming.write(run, writer)
    folder = writer.finish()
    assert verify(folder, run).quantized_tensors == 4 * 3 * models.EXPERTS
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | {"metadata": {"total_size": 1}}))
    with pytest.raises(UserError, match="does not say that the tensors have"):
        verify(folder, run)
    del index["weight_map"]["lm_head.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"disagree on lm_head\.weight"):
        verify(folder, run)
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        verify(folder, run)


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model.eval()(input_ids=models.random_tokens()).logits


@pytest.mark.parametrize(
    ("build", "rules", "auto"),
    [
        (models.tiny_llama, MLP, AutoModelForCausalLM),
        (models.tiny_qwen3, MIXED, AutoModelForCausalLM),
        (models.tiny_qwen3_moe, EXPERTS, AutoModelForCausalLM),
        (models.tiny_qwen3_5, MLP, AutoModelForImageTextToText),
        (models.tiny_qwen3_5_moe, EXPERTS, AutoModelForCausalLM),
        (models.tiny_qwen3_5_moe, EXPERTS, AutoModelForImageTextToText),
    ],
)
def test_dequantized_models_load_and_compute_the_same(tmp_path: Path, build, rules: dict, auto):
    run = MemoryRun(build(tmp_path / "source"), rules)
    folder = dequantize(export_run(run, "humming", tmp_path / "export"), tmp_path / "dense")
    loaded, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    expected = auto.from_pretrained(run.source.folder)
    parameters = dict(expected.named_parameters())
    for entry in run.plan.entries.values():
        if entry.codebook:
            name = entry.name if entry.name in parameters else entry.name.replace("model.language_model.", "model.")
            assert not torch.equal(parameters[name], run.load(entry.name).dequantize(torch.bfloat16))
            parameters[name].data.copy_(run.load(entry.name).dequantize())
    assert torch.equal(logits(loaded), logits(expected))


def test_a_dense_model_is_not_dequantized(tmp_path: Path):
    folder = models.tiny_llama(tmp_path / "model")
    assert type(open_model(folder)) is Checkpoint
    with pytest.raises(UserError, match="dense already"):
        dequantize(folder, tmp_path / "out")


def test_inspect_counts_what_is_stored(flagship: tuple[MemoryRun, Path]):
    run, folder = flagship
    *rows, total = inspect(folder)
    experts = next(row for row in rows if row["kind"] == "model.language_model.layers.*.mlp.experts.*.down_proj.weight")
    assert experts["stored as"] == "uint2 g32"
    assert experts["bits per weight"] == 2.5
    assert experts["tensors"] == 4 * models.EXPERTS
    assert total["bytes"] == Checkpoint.open(folder).nbytes
    assert total["weights"] == sum(info.numel for info in run.source.tensors.values())
    assert inspect(run.source.folder)[-1]["bits per weight"] == 16
