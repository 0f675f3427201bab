"""compressed-tensors exports: the package's decoder, transformers, what vLLM makes of config.json, and the way back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import models
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name, match_targets
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import Entry, MemoryRun
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CompressedTensorsConfig

from gsq.codebook import Codebook, QuantizedTensor
from gsq.errors import UserError
from gsq.export import compressed_tensors
from gsq.export.base import FORMATS, check_plan, export_run, format_of, open_model
from gsq.export.dequantize import dequantize
from gsq.export.inspect import inspect
from gsq.export.integers import pack_levels
from gsq.export.verify import verify
from gsq.model.checkpoint import SINGLE, Checkpoint

FORMAT, WIDE = "compressed-tensors", "compressed-tensors-wide"
TWO, THREE, FOUR, EIGHT = (Codebook.integer(bits, 32) for bits in (2, 3, 4, 8))
TERNARY = Codebook.ternary(64)
LAYERS = r"^model\.(language_model\.)?layers\."
ALL = {LAYERS + r".*_proj\.": TWO}
EXPERTS = {LAYERS + r".*mlp\.experts\.": THREE}
MIXED = {
    LAYERS + r".*down_proj": FOUR,
    LAYERS + r"[13]\.mlp\..*_proj": TERNARY,
    LAYERS + r"[02]\.mlp\..*_proj": THREE,
    LAYERS + r".*_proj\.": TWO,
    "lm_head": EIGHT,
}
WHOLE_MOE = {LAYERS + r".*mlp\.experts\.": TWO, LAYERS + r".*(_proj|shared_expert)": FOUR}
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def quantization_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def served(config: dict, module: str) -> dict | None:
    """What vLLM makes of a module name: `ignore` before targets, the name before those of its parts."""

    def found(targets: Iterable[str], name: str) -> list[str]:
        return [target for target in targets if re.match(target.removeprefix("re:"), name)]

    leaf = module.rpartition(".")[2]
    parts = [module.removesuffix(leaf) + part for part in FUSED.get(leaf, [leaf])]
    ignored = {bool(found(config["ignore"], module) or found(config["ignore"], part)) for part in parts}
    assert len(ignored) == 1, f"parts of {module} differ"
    if ignored.pop():
        return None
    targets = {target: group["weights"] for group in config["config_groups"].values() for target in group["targets"]}
    if not found(targets, module) and not all(found(targets, part) for part in parts):
        return None
    return targets[(found(targets, module) or found(targets, parts[0]))[0]]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryRun, Path]:
    """A dense model of five settings, head included, and its export."""
    folder = tmp_path_factory.mktemp("dense")
    run = MemoryRun(models.tiny_qwen3(folder / "source", layers=4), MIXED)
    return run, export_run(run, FORMAT, folder / "export")


@pytest.fixture(scope="module")
def flagship(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryRun, Path]:
    """The small flagship, its experts quantized, and the export."""
    folder = tmp_path_factory.mktemp("flagship")
    run = MemoryRun(models.tiny_qwen3_5_moe(folder / "source", shards=3), EXPERTS)
    return run, export_run(run, FORMAT, folder / "export")


# The package


@given(st.integers(2, 8), st.integers(1, 3), st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_words_are_those_of_the_package(bits: int, rows: int, blocks: int, seed: int):
    codes = torch.randint(0, 1 << bits, (rows, 32 * blocks), generator=torch.Generator().manual_seed(seed))
    quantized = QuantizedTensor(codes.to(torch.uint8), torch.ones(rows, blocks).bfloat16(), Codebook.integer(bits, 32))
    levels = (codes - (1 << (bits - 1))).to(torch.int8)
    for container in range(bits, 9):
        words = pack_levels(quantized, container)
        assert torch.equal(words, pack_to_int32(levels, container))
        assert torch.equal(unpack_from_int32(words, container, levels.shape), levels)


@pytest.mark.parametrize("format", [FORMAT, WIDE])
def test_the_package_decodes_every_module_to_the_same_bits(tmp_path: Path, format: str):
    run = MemoryRun(models.tiny_qwen3(tmp_path / "source", layers=4), MIXED)
    folder = export_run(run, format, tmp_path / "export")
    stored, ours = Checkpoint.open(folder), open_model(folder)
    config = QuantizationConfig.model_validate(quantization_config(folder))
    compressor = BaseCompressor.get_value_from_registry(config.format)
    planned = {name for name, entry in run.plan.entries.items() if entry.codebook}
    for module in {name.rpartition(".")[0] for name, info in stored.tensors.items() if len(info.shape) == 2}:
        groups = [g for g in config.config_groups.values() if match_targets(module, torch.nn.Linear(1, 1), g.targets)]
        ignored = any(match_name(module, target) for target in config.ignore)
        assert ignored == (module + ".weight" not in planned), module
        if not ignored:
            assert len(groups) == 1, module  # so readers that order matches in other ways agree
            state = {leaf: stored.read(f"{module}.{leaf}") for leaf in compressor.compression_param_names(groups[0])}
            theirs = compressor.decompress(state, groups[0])["weight"]
            assert theirs.dtype == torch.bfloat16
            assert torch.equal(theirs, run.load(module + ".weight").dequantize(torch.bfloat16))
            assert torch.equal(theirs, ours.read(module + ".weight"))
            assert torch.equal(theirs[3], ours.read(module + ".weight", 3))


# transformers


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model.eval()(input_ids=models.random_tokens()).logits


@pytest.mark.parametrize(
    ("build", "rules", "auto", "format"),
    [
        (models.tiny_llama, ALL, AutoModelForCausalLM, FORMAT),
        (models.tiny_llama, {LAYERS + r".*_proj\.": TERNARY}, AutoModelForCausalLM, FORMAT),
        (lambda folder: models.tiny_qwen3(folder, layers=4), MIXED, AutoModelForCausalLM, FORMAT),
        (lambda folder: models.tiny_qwen3(folder, layers=4), MIXED, AutoModelForCausalLM, WIDE),
        (models.tiny_qwen3_moe, EXPERTS, AutoModelForCausalLM, FORMAT),
        (models.tiny_qwen3_moe, WHOLE_MOE, AutoModelForCausalLM, FORMAT),
        (models.tiny_qwen3_5, ALL, AutoModelForImageTextToText, FORMAT),
        (models.tiny_qwen3_5_moe, EXPERTS, AutoModelForCausalLM, WIDE),
        (models.tiny_qwen3_5_moe, WHOLE_MOE, AutoModelForImageTextToText, FORMAT),
    ],
)
def test_transformers_computes_the_same(tmp_path: Path, build, rules: dict, auto, format: str):
    folder = export_run(MemoryRun(build(tmp_path / "source"), rules), format, tmp_path / "export")
    loaded, info = auto.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    expected = auto.from_pretrained(dequantize(folder, tmp_path / "dense"), dtype=torch.bfloat16)
    assert torch.equal(logits(loaded), logits(expected))


def test_transformers_dequantizes_on_load(tmp_path: Path):
    folder = export_run(MemoryRun(models.tiny_llama(tmp_path / "source"), ALL), FORMAT, tmp_path / "export")
    asked = CompressedTensorsConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=asked)
    expected = AutoModelForCausalLM.from_pretrained(dequantize(folder, tmp_path / "dense"), dtype=torch.bfloat16)
    assert torch.equal(logits(loaded), logits(expected))


def test_a_reader_of_one_setting_for_all_experts_finds_the_widest(tmp_path: Path):
    """And fails on narrower ones, instead of reading them as what they are not."""
    rules = {r"layers\.0\..*experts": Codebook.integer(2, 16), r"layers\.1\..*": Codebook.integer(4, 16)}
    folder = export_run(MemoryRun(models.tiny_qwen3_moe(tmp_path / "source"), rules), FORMAT, tmp_path / "export")
    config = QuantizationConfig.model_validate(quantization_config(folder))
    holders = [g for g in config.config_groups.values() if any("experts" in target for target in g.targets)]
    assert [group.weights.num_bits for group in holders] == [4, 2]
    stored, module = Checkpoint.open(folder), "model.layers.0.mlp.experts.0.up_proj."
    state = {leaf: stored.read(module + leaf) for leaf in ("weight_packed", "weight_scale", "weight_shape")}
    with pytest.raises(RuntimeError):
        BaseCompressor.get_value_from_registry(config.format).decompress(state, holders[0])


# vLLM


@pytest.mark.parametrize(
    ("module", "bits"),
    [
        ("language_model.model.layers.0.mlp.experts.0.gate_proj", 3),
        ("language_model.model.layers.3.mlp.experts.0.down_proj", 3),
        ("language_model.model.layers.3.self_attn.qkv_proj", None),
        ("language_model.model.layers.0.linear_attn.in_proj_qkvz", None),
        ("language_model.model.layers.0.mlp.shared_expert.gate_up_proj", None),
        ("language_model.model.layers.0.mlp.gate", None),
        ("language_model.lm_head", None),
        ("visual.blocks.0.attn.qkv", None),
        ("mtp.layers.0.mlp.experts.0.up_proj", None),
        ("mtp.layers.0.self_attn.qkv_proj", None),
    ],
)
def test_names_that_vllm_gives_its_own_modules(flagship: tuple[MemoryRun, Path], module: str, bits: int | None):
    weights = served(quantization_config(flagship[1]), module)
    assert (weights and weights["num_bits"]) == bits


@pytest.mark.parametrize(
    ("module", "bits", "group_size"),
    [
        ("model.layers.0.mlp.gate_up_proj", 3, 32),
        ("model.layers.2.self_attn.qkv_proj", 2, 32),
        ("model.layers.1.mlp.gate_up_proj", 2, 64),
        ("model.layers.1.mlp.down_proj", 4, 32),
        ("language_model.model.layers.2.mlp.down_proj", 4, 32),
        ("lm_head", 8, 32),
    ],
)
def test_mixed_settings(dense: tuple[MemoryRun, Path], module: str, bits: int, group_size: int):
    weights = served(quantization_config(dense[1]), module)
    assert (weights["num_bits"], weights["group_size"]) == (bits, group_size)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_every_plan_is_described_exactly(dense: tuple[MemoryRun, Path], data: st.DataObject):
    """Codebooks drawn for every module that vLLM loads as one."""
    source, entries, drawn = dense[0].source, {}, {}
    for name, entry in dense[0].plan.entries.items():
        prefix, _, leaf = name.removesuffix(".weight").rpartition(".")
        fused = next((whole for whole, parts in FUSED.items() if leaf in parts), leaf)
        if len(entry.shape) == 2 and fused != "embed_tokens" and (prefix, fused) not in drawn:
            drawn[prefix, fused] = data.draw(st.sampled_from([None, TWO, FOUR, Codebook.integer(4, 64)]), label=name)
        entries[name] = Entry(name, entry.shape, drawn.get((prefix, fused)), entry.sources)
    if not any(drawn.values()):
        return
    config = compressed_tensors.quantization_config(source, entries, (2, 3, 4, 8))
    for (prefix, fused), codebook in drawn.items():
        for root in ("", "language_model."):
            weights = served(config, f"{root}{prefix}.{fused}" if prefix else fused)
            found = weights and (weights["num_bits"], weights["group_size"])
            assert found == (codebook and (codebook.bits, codebook.group_size))


# The way back


@pytest.mark.parametrize("which", ["dense", "flagship"])
def test_verify_agrees(which: str, request: pytest.FixtureRequest):
    run, folder = request.getfixturevalue(which)
    report = verify(folder, run)
    quantized = [run.load(e.name) for e in run.plan.entries.values() if e.codebook]
    assert report.format == FORMAT
    assert report.quantized_weights == sum(q.codes.numel() for q in quantized)
    assert report.quantized_bytes + report.kept_bytes == Checkpoint.open(folder).nbytes


def test_everything_else_is_copied(flagship: tuple[MemoryRun, Path]):
    run, folder = flagship
    exported = Checkpoint.open(folder)
    kept = [name for name, entry in run.plan.entries.items() if entry.codebook is None]
    assert any(name.startswith("mtp.") for name in kept)
    for name in kept:
        assert torch.equal(exported.read(name).view(torch.int16), run.source.read(name).view(torch.int16))
    assert {path.name for path in exported.side_files()} == {path.name for path in run.source.side_files()}
    assert {k: v for k, v in exported.config.items() if k != "quantization_config"} == run.source.config


@pytest.mark.parametrize("fused", [True, False])
def test_experts_are_stored_one_by_one(tmp_path: Path, fused: bool):
    run = MemoryRun(models.tiny_qwen3_moe(tmp_path / "source", fused=fused), EXPERTS)
    model = open_model(export_run(run, FORMAT, tmp_path / "export"))
    gate, up = run.load("model.layers.1.mlp.experts.gate_up_proj").dequantize(torch.bfloat16)[3].chunk(2)
    assert torch.equal(model.read("model.layers.1.mlp.experts.3.gate_proj.weight"), gate)
    assert torch.equal(model.read("model.layers.1.mlp.experts.3.up_proj.weight"), up)
    assert verify(tmp_path / "export", run).quantized_tensors == 2 * 3 * models.EXPERTS


@pytest.mark.parametrize(("format", "label", "bits"), [(FORMAT, "uint2 g32", 2), (WIDE, "uint4 g32", 4)])
def test_inspect_counts_what_is_stored(tmp_path: Path, format: str, label: str, bits: int):
    run = MemoryRun(models.tiny_llama(tmp_path / "source"), ALL)
    folder = export_run(run, format, tmp_path / "export")
    *rows, total = inspect(folder)
    row = next(row for row in rows if row["kind"] == "model.layers.*.mlp.down_proj.weight")
    shape_bytes = 2 * 8  # of weight_shape, in either of two layers
    assert row["stored as"] == label
    assert row["bytes"] == 2 * (64 * 128 * (bits + 16 / 32) / 8 + shape_bytes)
    assert total["bytes"] == Checkpoint.open(folder).nbytes
    assert verify(folder, run).quantized_weights == sum(r["weights"] for r in rows if r["stored as"] == label)


def flip_a_code(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.2.mlp.up_proj.weight_packed"][5, 1] ^= 1 << 17


def change_a_scale(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.2.self_attn.q_proj.weight_scale"].view(torch.int16)[0, 0] ^= 1


def change_a_shape(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.2.self_attn.q_proj.weight_shape"][1] -= 1


def narrow_a_shape(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.2.self_attn.q_proj.weight_shape"
    tensors[name] = tensors[name].to(torch.int32)


def drop_a_shape(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.0.mlp.down_proj.weight_shape"]


def change_a_kept_tensor(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"].view(torch.int16)[3] ^= 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_code, r"model\.layers\.2\.mlp\.up_proj: codes differ"),
        (change_a_scale, r"model\.layers\.2\.self_attn\.q_proj: scales differ"),
        (change_a_shape, r"model\.layers\.2\.self_attn\.q_proj: weight_shape is not \[64, 64\]"),
        (narrow_a_shape, r"model\.layers\.2\.self_attn\.q_proj: weight_shape is not"),
        (drop_a_shape, r"model\.layers\.0\.mlp\.down_proj\.weight_shape is missing"),
        (change_a_kept_tensor, r"model\.norm\.weight differs from the source"),
    ],
)
def test_verify_catches(tmp_path: Path, dense: tuple[MemoryRun, Path], damage, message: str):
    folder = export_run(dense[0], FORMAT, tmp_path / "export")
    tensors = load_file(folder / SINGLE)
    damage(tensors)
    save_file(tensors, folder / SINGLE)
    with pytest.raises(UserError, match=message):
        verify(folder, dense[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "float-quantized"}, "'float-quantized'; GSQ reads its own pack-quantized exports only"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "GSQ reads its own symmetric integers only"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4}}}}, "own symmetric integers only"),
        ({"config_groups": {}}, "is packed, but .* says it is not"),
        ({"ignore": ["re:.*q_proj"]}, r"q_proj is packed, but .* says it is not"),
    ],
)
def test_a_config_that_says_something_else_is_refused(tmp_path: Path, change: dict, message: str):
    run = MemoryRun(models.tiny_llama(tmp_path / "source"), ALL)
    folder = export_run(run, FORMAT, tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    assert format_of(Checkpoint.open(folder)) == FORMAT
    with pytest.raises(UserError, match=message):
        open_model(folder)
    with pytest.raises(UserError, match=r"own|config\.json says it is not quantized"):
        verify(folder, run)


def test_groups_that_overlap_are_refused(tmp_path: Path):
    run = MemoryRun(models.tiny_llama(tmp_path / "source"), {LAYERS + r".*mlp.*_proj": FOUR, **ALL})
    folder = export_run(run, FORMAT, tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_1"]["targets"].append("re:.*proj")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="matches targets of several config_groups"):
        open_model(folder)


# What the format cannot hold, and which ones can


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"k_proj": Codebook((-1.5, -0.5, 0.5, 1.5), 32)},
            r"layers\.0\.self_attn\.k_proj\.weight.*integer levels.*no fo",
        ),
        ({"k_proj": Codebook((0.0, 128.0), 32)}, "integer levels"),
        ({"k_proj": Codebook.integer(2, 32, torch.float16)}, "bfloat16 scales"),
        ({"_proj": Codebook.affine(4, 32)}, "holds no offsets"),
        ({"_proj": Codebook.tq(3, 32, 64)}, "holds no rotated weights"),
        ({"k_proj": Codebook.integer(2, 48)}, "48 does not divide in_features 64; use 64 or 32"),
        ({"embed": TWO}, r"embed_tokens\.weight: transformers loads no packed embeddings"),
        ({"k_proj": TWO}, r"differ, but vLLM reads both as one module model\.layers\.0\.self_attn\.qkv_proj"),
        ({"nothing": TWO}, "quantizes nothing"),
    ],
)
@pytest.mark.parametrize("format", [FORMAT, WIDE])
def test_what_the_format_cannot_hold_is_refused_before_writing(tmp_path: Path, rules: dict, message: str, format: str):
    run = MemoryRun(models.tiny_llama(tmp_path / "source", tied=False), {})
    for name, entry in run.plan.entries.items():
        wanted = next((rules[pattern] for pattern in rules if pattern in name), None)
        run.plan.entries[name] = Entry(name, entry.shape, wanted, entry.sources)
    with pytest.raises(UserError, match=message):
        export_run(run, format, tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_rows_must_be_whole_words(tmp_path: Path):
    source = models.tiny_llama(tmp_path / "source")
    save_file(load_file(source / SINGLE) | {"model.odd.weight": torch.randn(4, 48)}, source / SINGLE)
    with pytest.raises(UserError, match=r"model\.odd\.weight.*multiple of 32"):
        export_run(MemoryRun(source, {"odd": Codebook.integer(2, 16)}), FORMAT, tmp_path / "export")


def test_experts_of_two_widths_are_refused(tmp_path: Path):
    run = MemoryRun(models.tiny_qwen3_moe(tmp_path / "source"), {"down_proj": FOUR, "gate_up_proj": TWO})
    with pytest.raises(UserError, match=r"as one module model\.layers\.0\.mlp\.experts"):
        export_run(run, FORMAT, tmp_path / "export")


def test_one_expert_that_differs_is_noticed(tmp_path: Path):
    run = MemoryRun(models.tiny_qwen3_moe(tmp_path / "source"), {})
    tensors = run.source.tensors
    experts = {name: tensors[name].shape for name in tensors if "layers.0.mlp.experts." in name}
    entries = {
        name: Entry(name, shape, None if "experts.2." in name else TWO, [name]) for name, shape in experts.items()
    }
    with pytest.raises(UserError, match=r"experts\.2\.\w+ \(kept\) and .*as one module model\.layers\.0\.mlp\.experts"):
        check_plan(FORMAT, run.source, entries)


def tq(width: int) -> Codebook:
    return Codebook.tq(3, 32, width)


@pytest.mark.parametrize(
    ("rules", "formats"),
    [
        (ALL, {"humming", FORMAT, WIDE}),
        ({LAYERS + r".*_proj\.": TERNARY}, {"humming", FORMAT, WIDE}),
        ({"lm_head": EIGHT, **ALL}, {FORMAT, WIDE}),
        ({LAYERS + r".*_proj\.": Codebook.integer(4, 8)}, {FORMAT, WIDE}),
        ({LAYERS + r".*_proj\.": tq}, {"tq"}),
        ({LAYERS + r".*_proj\.": Codebook.lloyd(3, 32)}, set()),
    ],
)
def test_a_run_goes_to_every_format_that_holds_it_and_errors_name_those(tmp_path: Path, rules: dict, formats: set[str]):
    run = MemoryRun(models.tiny_llama(tmp_path / "source", tied=False), rules)
    values = {name: run.load(name).dequantize(torch.bfloat16) for name, e in run.plan.entries.items() if e.codebook}
    ours = {"humming", FORMAT, WIDE, "tq", "jangtq"}
    for format in ours & FORMATS.keys():
        if format in formats:
            model = open_model(export_run(run, format, tmp_path / format))
            assert all(torch.equal(model.read(name), value) for name, value in values.items())
            assert verify(tmp_path / format, run).quantized_tensors == len(values)
        else:
            with pytest.raises(UserError) as refusal:
                check_plan(format, run.source, run.plan.entries)
            named = re.search(r"; formats that hold this plan: (.*)$", str(refusal.value))
            assert (set(named[1].split(", ")) & ours if named else set()) == formats
