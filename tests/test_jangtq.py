"""JANGTQ exports: what jang's converter would have written, and what its classes and MLX read from them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import models
import numpy as np
import pytest
import torch
from jang_tools.capabilities import verify_directory
from jang_tools.turboquant.linear import TurboQuantSwitchLinear, tq_quantize_experts
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import load_model
from runs import MemoryRun
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from gsq.codebook import Codebook
from gsq.config import parse_config
from gsq.convert import convert
from gsq.errors import UserError
from gsq.eval.quality import evaluate
from gsq.export.base import check_plan, export_run, open_model
from gsq.export.dequantize import dequantize
from gsq.export.inspect import inspect
from gsq.export.jangtq import pack
from gsq.export.verify import verify
from gsq.init.rtn import match_norms
from gsq.model.checkpoint import Checkpoint

EXPERTS = r"^model\.language_model\..*\.mlp\.experts\."


def jangtq(bits: int):
    return lambda width: Codebook.jangtq(bits, width)


CASES = {  # experts fused on disk, rules
    "two bits": (True, {EXPERTS: jangtq(2)}),
    "two widths": (True, {EXPERTS + "down_proj": jangtq(4), EXPERTS: jangtq(2)}),
    "layers differ": (True, {r"language_model\.layers\.0\.mlp\.experts": jangtq(4), EXPERTS: jangtq(2)}),
    "experts one by one": (False, {EXPERTS: jangtq(4)}),
}


@pytest.fixture(scope="module", params=CASES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryRun, Path]:
    folder = tmp_path_factory.mktemp("jangtq")
    fused, rules = CASES[request.param]
    run = MemoryRun(models.tiny_qwen3_5_moe(folder / "source", fused=fused), rules)
    return run, export_run(run, "jangtq", folder / "export")


def simple(folder: Path) -> tuple[MemoryRun, Path]:
    run = MemoryRun(models.tiny_qwen3_5_moe(folder / "source", layers=2), {EXPERTS: jangtq(2)})
    return run, export_run(run, "jangtq", folder / "export")


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def read_json(folder: Path, file: str) -> dict:
    return json.loads((folder / file).read_text())


# What the format's own converter writes


def config_of(source: Path, bits: dict[str, int]) -> dict:
    rules = [{"match": EXPERTS + part, "codebook": "jangtq", "bits": width} for part, width in bits.items()]
    return {"model": {"name": str(source)}, "plan": {"rules": rules}, "export": {"format": "jangtq"}}


@pytest.mark.parametrize(
    ("profile", "bits"), [("JANGTQ2", {"": 2}), ("JANGTQ4", {"": 4}), ("JANGTQ_K", {"gate_up": 2, "down": 4})]
)
def test_conversion_writes_what_jangs_own_converter_writes(profile: str, bits: dict[str, int], tmp_path: Path):
    source = models.tiny_qwen3_5_moe(tmp_path / "source", shards=2)  # it reads shards only
    config = read_json(source, "config.json")
    config["text_config"]["mtp_num_hidden_layers"] = 1
    (source / "config.json").write_text(json.dumps(config))
    converter = [sys.executable, "-m", "jang_tools.convert_qwen35_jangtq", str(source), str(tmp_path / "theirs")]
    subprocess.run([*converter, profile], check=True, capture_output=True)
    convert(parse_config(config_of(source, bits)), tmp_path / "ours")
    files, tensors = [], []
    for who in ("ours", "theirs"):
        files.append(sorted(path.name for path in (tmp_path / who).iterdir()))
        tensors.append(all_tensors(tmp_path / who))
    ours, theirs = tensors
    assert files[0] == files[1]
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name
    for file in ("config.json", "jang_config.json"):
        assert read_json(tmp_path / "ours", file) == read_json(tmp_path / "theirs", file)
    indices = [read_json(tmp_path / who, "model.safetensors.index.json") for who in ("ours", "theirs")]
    assert indices[0]["weight_map"] == indices[1]["weight_map"]
    assert indices[0]["metadata"]["format"] == indices[1]["metadata"]["format"] == "jangtq"


@pytest.mark.parametrize(("bits", "width"), [(2, 64), (3, 80), (4, 72)])
def test_experts_are_packed_as_jang_packs_them(bits: int, width: int):
    weights = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(bits))
    ours = pack("m", match_norms(weights, Codebook.jangtq(bits, width)))
    theirs = tq_quantize_experts(weights.numpy(), bits=bits)
    assert np.array_equal(ours["m.tq_packed"].numpy(), theirs["packed"])
    assert np.array_equal(ours["m.tq_norms"].numpy(), theirs["norms"])


# What readers make of it


def read_as_published(tensors: dict[str, Tensor], module: str, width: int) -> mx.array:
    """Experts `[experts, out, in]`, float32, as jang's plain MLX class decodes them."""
    packed, norms = tensors[module + ".tq_packed"], tensors[module + ".tq_norms"]
    experts, rows = norms.shape
    layer = TurboQuantSwitchLinear(width, rows, experts, bits=int(tensors[module + ".tq_bits"][0]))
    layer.packed, layer.norms = mx.array(packed.numpy()), mx.array(norms.numpy())
    return layer._dequant_experts(list(range(experts)))


def test_the_reader_computes_our_weights_exactly(exported: tuple[MemoryRun, Path]):
    run, folder = exported
    tensors = all_tensors(folder)
    for entry in (entry for entry in run.plan.entries.values() if entry.codebook):
        prefix = entry.name.replace("model.language_model", "language_model.model").rpartition(".experts.")[0]
        parts = ["gate_proj", "up_proj"] if entry.name.endswith("gate_up_proj") else ["down_proj"]
        theirs = [
            np.array(read_as_published(tensors, f"{prefix}.switch_mlp.{part}", entry.shape[-1])) for part in parts
        ]
        ours = run.load(entry.name).dequantize()
        assert torch.equal(torch.from_numpy(np.concatenate(theirs, axis=1)), ours)


def test_jang_accepts_the_folder(exported: tuple[MemoryRun, Path]):
    accepted, message = verify_directory(exported[1])
    assert accepted, message


def test_an_export_is_verified_and_decoded(exported: tuple[MemoryRun, Path], tmp_path: Path):
    run, folder = exported
    report = verify(folder, run)
    quantized = [entry for entry in run.plan.entries.values() if entry.codebook]
    assert report.quantized_weights == sum(torch.Size(entry.shape).numel() for entry in quantized)
    dense = Checkpoint.open(dequantize(folder, tmp_path / "dense"))
    assert dense.config.items() <= (run.source.config | {"eos_token_id": dense.config["eos_token_id"]}).items()
    assert not (dense.folder / "jang_config.json").exists()
    for entry in quantized:
        ours = run.load(entry.name).dequantize(torch.bfloat16)
        assert torch.equal(dense.read(entry.name), ours)
        assert torch.equal(open_model(folder).read(entry.name, 2), ours[2])
    replaced = {name for entry in quantized for name in entry.sources}
    for name in run.source.tensors.keys() - replaced:
        if name.startswith("mtp."):
            assert name not in dense.tensors
            continue
        source, stored = run.source.read(name).float(), dense.read(name)
        assert stored.dtype == torch.float16
        assert stored.shape == source.shape
        torch.testing.assert_close(stored.float(), source, rtol=0, atol=0.01 * float(source.abs().max()))  # 8 bits
    kinds = {row["stored as"] for row in inspect(folder)}
    assert {"affine8 g64", "float16"} < kinds


def test_jangs_loader_finds_a_module_for_all_experts(tmp_path: Path):
    """All of its loader that runs without Metal; in a process of its own, since it patches classes of MLX."""
    _, folder = simple(tmp_path)
    program = "import sys; from jang_tools.load_jangtq import load_jangtq_model; load_jangtq_model(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    assert "Replaced 6 modules" in done.stdout  # three in each of two layers
    assert "eos_token_ids=[2]" in done.stdout


def test_mlx_computes_what_the_dense_model_does(exported: tuple[MemoryRun, Path], tmp_path: Path):
    """Everything but the experts is read by MLX's own loader; its kernels for those need Metal."""
    _, folder = exported
    served, _ = load_model(folder, strict=False)
    tensors = all_tensors(folder)
    for number, layer in enumerate(served.language_model.model.layers):
        for part in ("gate_proj", "up_proj", "down_proj"):
            weights = read_as_published(tensors, f"language_model.model.layers.{number}.mlp.switch_mlp.{part}", 64)
            experts = SwitchLinear(weights.shape[2], weights.shape[1], weights.shape[0], bias=False)
            experts.weight = weights
            layer.mlp.switch_mlp[part] = experts
    served.set_dtype(mx.float32)
    tokens = models.random_tokens()
    logits = np.array(served(mx.array(tokens.numpy())))
    dense = AutoModelForCausalLM.from_pretrained(dequantize(folder, tmp_path / "dense"), dtype=torch.float32)
    with torch.no_grad():
        expected = dense(tokens).logits.numpy()
    differences = np.abs(logits - expected).max(-1)  # of each token; a router that is almost undecided may flip
    assert np.median(differences) < 0.02 * np.abs(expected).max()


def test_an_export_is_measured_against_its_original(tmp_path: Path):
    run, folder = simple(tmp_path)
    tokens = models.random_tokens()
    result = evaluate(open_model(folder), open_model(run.source.folder), tokens)
    again = evaluate(open_model(dequantize(folder, tmp_path / "dense")), open_model(run.source.folder), tokens)
    assert result["kl"] == again["kl"] > 0
    assert result["perplexity"] == again["perplexity"]


# What does not pass


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("layers.1.mlp.switch_mlp.up_proj.tq_packed", lambda t: t.view(torch.int32).bitwise_xor_(4)),
        ("layers.0.mlp.switch_mlp.down_proj.tq_norms", lambda t: t.mul_(1.01)),
        ("layers.0.mlp.switch_mlp.gate_proj.tq_bits", lambda t: t.add_(2)),
        ("layers.0.input_layernorm.weight", lambda t: t.add_(0.01)),
        ("layers.1.self_attn.q_proj.weight", lambda t: t.view(torch.int32).bitwise_xor_(1)),
        ("embed_tokens.biases", lambda t: t.mul_(1.01)),
    ],
)
def test_a_changed_export_does_not_pass(tensor: str, change, tmp_path: Path):
    run, folder = simple(tmp_path)
    shard = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(shard)
    change(tensors["language_model.model." + tensor])
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match=tensor.rpartition(".")[0]):
        verify(folder, run)


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        ("config.json", {"mxtq_bits": 4}, "config.json does not describe"),
        ("config.json", {"mxtq_seed": 43}, "config.json does not describe"),
        ("config.json", {"quantization": {"group_size": 64, "bits": 4}}, "config.json does not describe"),
        ("config.json", {"tie_word_embeddings": True}, "config.json does not describe"),
        ("jang_config.json", {"mxtq_seed": 43}, "jang_config.json does not describe the rotation"),
        ("jang_config.json", {"mxtq_bits": {"routed_expert": 4}}, "jang_config.json does not describe the widths"),
    ],
)
def test_a_changed_config_does_not_pass(file: str, change: dict, match: str, tmp_path: Path):
    run, folder = simple(tmp_path)
    (folder / file).write_text(json.dumps(read_json(folder, file) | change))
    with pytest.raises(UserError, match=match):
        verify(folder, run)


def test_wrong_signs_beside_the_tensors_do_not_pass(tmp_path: Path):
    run, folder = simple(tmp_path)
    beside = folder / "jangtq_runtime.safetensors"
    save_file({name: -tensor for name, tensor in load_file(beside).items()}, beside)
    with pytest.raises(UserError, match=r"lacks signs\.64\.42"):
        verify(folder, run)


def test_a_missing_part_is_told(tmp_path: Path):
    _, folder = simple(tmp_path)
    index = read_json(folder, "model.safetensors.index.json")
    del index["weight_map"]["language_model.model.layers.0.mlp.switch_mlp.up_proj.tq_norms"]
    tensors = load_file(folder / "model-00001-of-00001.safetensors")
    tensors.pop("language_model.model.layers.0.mlp.switch_mlp.up_proj.tq_norms")
    save_file(tensors, folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"up_proj\.tq_norms.*is missing; export again"):
        open_model(folder)


# What the format cannot hold


def refused(source: Path, rules: dict, match: str, format: str = "jangtq") -> None:
    run = MemoryRun(source, rules)
    with pytest.raises(UserError, match=match):
        check_plan(format, run.source, run.plan.entries)


@pytest.mark.parametrize(
    ("codebook", "match"),
    [
        (Codebook.integer(2, 32), "holds codebook jangtq only; .*; formats that hold this plan: humming, compressed"),
        (lambda width: Codebook.tq(3, 32, width), "holds codebook jangtq only; .*; formats that hold this plan: tq$"),
        (Codebook.lloyd(3, 32), "holds codebook jangtq only; .*; no format holds this plan$"),
        (jangtq(3), "10 codes of 3 bits in a word, which does not divide in_features 64; use 2 or 4 bits, or"),
    ],
)
def test_other_codebooks_are_refused_with_their_home(codebook, match: str, tmp_path: Path):
    refused(models.tiny_qwen3_5_moe(tmp_path / "source", layers=2), {EXPERTS: codebook}, match)


def test_other_formats_name_this_one(tmp_path: Path):
    source = models.tiny_qwen3_5_moe(tmp_path / "source", layers=2)
    for other in ("humming", "tq"):
        refused(source, {EXPERTS: jangtq(2)}, "; formats that hold this plan: jangtq$", other)


def test_only_routed_experts_are_packed_and_all_of_them(tmp_path: Path):
    source = models.tiny_qwen3_5_moe(tmp_path / "source", layers=2)
    rules = {EXPERTS: jangtq(2), r"self_attn\.q_proj": jangtq(2)}
    refused(source, rules, r"q_proj\.weight: format jangtq packs routed experts only.*keep this tensor")
    refused(source, {EXPERTS + "down": jangtq(2)}, r"gate_up_proj: format jangtq packs all routed experts")
    refused(source, {}, "quantizes nothing")


def test_other_models_are_refused(tmp_path: Path):
    source = models.tiny_qwen3_moe(tmp_path / "other")
    refused(source, {r"mlp\.experts\.": jangtq(2)}, r"no place for model\.layers\.0.*use codebook and format tq")
    source = models.tiny_qwen3_5_moe(tmp_path / "source", layers=2)
    config = read_json(source, "config.json")
    config["text_config"]["model_type"] = config["model_type"] = "unheard_of"
    (source / "config.json").write_text(json.dumps(config))
    refused(source, {EXPERTS: jangtq(2)}, "is read for qwen3_5_moe.*not for unheard_of; use codebook and format tq")


@pytest.mark.parametrize("name", ["layers.0.mlp.gate.weight", "embed_tokens.weight"])
def test_what_float16_cannot_hold_is_refused(name: str, tmp_path: Path):
    source = models.tiny_qwen3_5_moe(tmp_path / "source", layers=2)
    shard = source / "model.safetensors"
    tensors = load_file(shard)
    tensors["model.language_model." + name][3] = 1e5
    save_file(tensors, shard, metadata={"format": "pt"})
    run = MemoryRun(source, {EXPERTS: jangtq(2)})
    with pytest.raises(UserError, match=rf"{name} holds .* format jangtq stores it in float16"):
        export_run(run, "jangtq", tmp_path / "export")
