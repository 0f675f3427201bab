"""TQ native exports: what their reader unpacks and computes, and what its own writer would have written."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import models
import numpy as np
import pytest
import torch
from runs import MemoryRun
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from turboquant_vllm.checkpoint import load_tq3_model as load_with_torch
from turboquant_vllm.checkpoint import save_tq3_checkpoint
from turboquant_vllm.mlx_loader import load_tq3_model
from turboquant_vllm.weight_quant import Compressed3D, select_bits

from gsq.codebook import Codebook
from gsq.config import parse_config
from gsq.convert import convert
from gsq.errors import UserError
from gsq.export.base import check_plan, export_run, open_model
from gsq.export.dequantize import dequantize
from gsq.export.verify import verify
from gsq.model.checkpoint import SINGLE, Checkpoint

LAYERS = r"^model\.(language_model\.)?layers\.\d+\.(mlp|self_attn|linear_attn)\..*"
PROJECTIONS = LAYERS + r"(_proj|in_proj_\w+)(\.weight)?$"


def tq(bits: int, size: int = 32):
    return lambda width: Codebook.tq(bits, size, width)


CASES = {  # model, rules
    "llama": (models.tiny_llama, {PROJECTIONS: tq(3)}),
    "two widths": (models.tiny_qwen3, {LAYERS + "(o|down)_proj": tq(4), PROJECTIONS: tq(3)}),
    "padded": (models.tiny_qwen3, {PROJECTIONS: tq(2, 128)}),
    "experts one by one": (models.tiny_qwen3_moe, {PROJECTIONS: tq(3)}),
    "fused experts": (models.tiny_qwen3_5_moe, {LAYERS + "down_proj": tq(4), PROJECTIONS: tq(3)}),
}


@pytest.fixture(scope="module", params=CASES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryRun, Path]:
    folder = tmp_path_factory.mktemp("tq")
    make, rules = CASES[request.param]
    run = MemoryRun(make(folder / "source"), rules)
    return run, export_run(run, "tq", folder / "export")


def read_as_published(folder: Path, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A packed weight, float32, by the reader's code and what `tq_config.json` tells it."""
    config = json.loads((folder / "tq_config.json").read_text())
    bits = select_bits(name, config["bits"], config.get("sensitive_bits"), tuple(config.get("sensitive_patterns", ())))
    stored = open_model(folder).stored
    packed, norms = stored.read(name + ".tq_packed"), stored.read(name + ".tq_norms")
    whole = shape if len(shape) == 3 else (1, *shape)
    weight = Compressed3D.from_packed(packed, norms, whole, torch.float32, bits, config["group_size"])
    return weight.decompress().view(shape)


def test_the_reader_computes_our_weights_exactly(exported: tuple[MemoryRun, Path]):
    run, folder = exported
    for entry in (entry for entry in run.plan.entries.values() if entry.codebook):
        ours = run.load(entry.name).dequantize()
        if len(entry.sources) == 1:
            theirs = read_as_published(folder, entry.sources[0], entry.shape)
        else:
            shape = (ours.numel() // len(entry.sources) // ours.shape[-1], ours.shape[-1])
            theirs = torch.cat([read_as_published(folder, name, shape) for name in entry.sources])
        assert torch.equal(theirs.reshape(ours.shape), ours)


def test_an_export_is_verified_and_decoded(exported: tuple[MemoryRun, Path], tmp_path: Path):
    run, folder = exported
    report = verify(folder, run)
    quantized = [entry for entry in run.plan.entries.values() if entry.codebook]
    assert report.quantized_weights == sum(torch.Size(entry.shape).numel() for entry in quantized)
    assert report.quantized_bytes == sum(entry.codebook.nbytes(entry.shape) for entry in quantized)
    dense = Checkpoint.open(dequantize(folder, tmp_path / "dense"))
    assert not (dense.folder / "tq_config.json").exists()
    for entry in quantized:
        ours = run.load(entry.name).dequantize(torch.bfloat16)
        assert torch.equal(torch.cat([dense.read(name) for name in entry.sources]).reshape(ours.shape), ours)
        assert torch.equal(open_model(folder).read(entry.sources[0], 1), dense.read(entry.sources[0])[1])
    for name, info in run.source.tensors.items():
        if not any(name in entry.sources for entry in quantized):
            assert torch.equal(dense.read(name), run.source.read(name).half()), name
            assert dense.tensors[name].shape == info.shape


@pytest.mark.parametrize("which", ["llama", "experts one by one", "fused experts"])
def test_the_mlx_loader_computes_what_the_dense_model_does(which: str, tmp_path: Path):
    make, rules = CASES[which]
    run = MemoryRun(make(tmp_path / "source"), rules)
    folder = export_run(run, "tq", tmp_path / "export")
    tokens = models.random_tokens()
    served, _ = load_tq3_model(str(folder))
    served.set_dtype(mx.float32)  # its float16 kernels need Metal
    logits = np.array(served(mx.array(tokens.numpy())).astype(mx.float32))
    dense = AutoModelForCausalLM.from_pretrained(dequantize(folder, tmp_path / "dense"), dtype=torch.float32)
    with torch.no_grad():
        expected = dense(tokens).logits.numpy()
    differences = np.abs(logits - expected).max(-1)  # of each token; a router that is almost undecided may flip
    assert np.median(differences) < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("tied", [True, False])
def test_the_torch_loader_computes_what_the_dense_model_does(tied: bool, tmp_path: Path):
    """Under transformers 5 it leaves the rotary frequencies at zero, whoever wrote the folder; here they are set."""
    source = models.tiny_llama(tmp_path / "source", tied=tied)
    folder = convert(parse_config(config_of(source)), tmp_path / "export")
    dense = AutoModelForCausalLM.from_pretrained(dequantize(folder, tmp_path / "dense"), dtype=torch.float32)
    served, tokens = load_with_torch(str(folder), device="cpu")[0].float(), models.random_tokens()
    served.model.rotary_emb.inv_freq = dense.model.rotary_emb.inv_freq
    with torch.no_grad():
        logits, expected = served(tokens).logits, dense(tokens).logits
    assert (logits - expected).abs().max() < 0.02 * expected.abs().max()  # it computes in float16
    written = [model.generate(tokens[:1], max_new_tokens=5, do_sample=False) for model in (served, dense)]
    assert torch.equal(*written)


def config_of(source: Path, bits: int = 3, size: int = 32) -> dict:
    rule = {"match": PROJECTIONS, "codebook": "tq", "bits": bits, "group_size": size}
    return {"model": {"name": str(source)}, "plan": {"rules": [rule]}, "export": {"format": "tq"}}


@pytest.mark.parametrize(("bits", "size"), [(2, 32), (3, 64), (4, 128)])
@pytest.mark.parametrize("make", [models.tiny_llama, models.tiny_qwen3_5_moe])
def test_conversion_writes_what_the_readers_own_writer_writes(make, bits: int, size: int, tmp_path: Path):
    source = make(tmp_path / "source")
    ours = load_file(convert(parse_config(config_of(source, bits, size)), tmp_path / "ours") / SINGLE)
    save_tq3_checkpoint(str(source), str(tmp_path / "theirs"), bits=bits, group_size=size)
    theirs = load_file(tmp_path / "theirs" / SINGLE)
    common = ours.keys() & theirs.keys()  # it leaves what has less than 128 rows and columns as it is
    assert sum(name.endswith(".tq_packed") for name in common) >= 4
    assert make is models.tiny_llama or any(name.endswith("experts.gate_up_proj.tq_packed") for name in common)
    for name in common:
        assert ours[name].dtype == theirs[name].dtype
        exact = not name.endswith(".tq_norms")
        torch.testing.assert_close(ours[name], theirs[name], rtol=0 if exact else 1e-6, atol=0)
    ours, theirs = (json.loads((tmp_path / who / "tq_config.json").read_text()) for who in ("ours", "theirs"))
    alike = ("format", "bits", "group_size", "quantizer_seed")
    assert [ours[key] for key in alike] == [theirs[key] for key in alike]
    padded = ours.get("orig_in_dims", {})
    assert theirs.get("orig_in_dims", {}).items() <= padded.items()


def test_a_conversion_can_start_again_and_writes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = parse_config(config_of(models.tiny_llama(tmp_path / "source")))
    whole = convert(config, tmp_path / "whole")
    (tmp_path / "killed.partial").mkdir()
    (tmp_path / "killed.partial" / "model-00001.safetensors").write_bytes(b"cut off")
    again = convert(config, tmp_path / "killed")
    assert (again / SINGLE).read_bytes() == (whole / SINGLE).read_bytes()
    assert sorted(path.name for path in again.iterdir()) == sorted(path.name for path in whole.iterdir())


# What the format cannot hold


def refused(folder: Path, rules: dict, match: str, format: str = "tq") -> None:
    run = MemoryRun(models.tiny_qwen3(folder / "source"), rules)
    with pytest.raises(UserError, match=match):
        check_plan(format, run.source, run.plan.entries)


def test_other_codebooks_are_refused_with_their_home(tmp_path: Path):
    refused(tmp_path, {PROJECTIONS: Codebook.integer(2, 32)}, "holds codebook tq only.*hold this plan: humming")


def test_another_format_names_this_one(tmp_path: Path):
    refused(tmp_path, {PROJECTIONS: tq(3)}, "holds no rotated weights.*hold this plan: tq$", "humming")


def test_two_group_sizes_are_refused(tmp_path: Path):
    refused(tmp_path, {LAYERS + "o_proj": tq(3, 64), PROJECTIONS: tq(3)}, "one group size")


def test_three_widths_are_refused(tmp_path: Path):
    rules = {LAYERS + "o_proj": tq(4), LAYERS + "q_proj": tq(2), PROJECTIONS: tq(3)}
    refused(tmp_path, rules, r"two widths at most, the plan has \[2, 3, 4\]")


def test_what_float16_cannot_hold_is_refused(tmp_path: Path):
    source = models.tiny_llama(tmp_path / "source")
    tensors = load_file(source / SINGLE)
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, source / SINGLE, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight holds .* float16"):
        export_run(MemoryRun(source, {PROJECTIONS: tq(3)}), "tq", tmp_path / "export")


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("layers.1.mlp.up_proj.weight.tq_packed", lambda t: t.index_put_((torch.tensor(5),), t[5] ^ 4)),
        ("layers.0.mlp.up_proj.weight.tq_norms", lambda t: t.mul_(1.0001)),
        ("layers.0.input_layernorm.weight", lambda t: t.add_(0.01)),
    ],
)
def test_a_changed_export_does_not_pass(tensor: str, change, tmp_path: Path):
    run = MemoryRun(models.tiny_llama(tmp_path / "source"), {PROJECTIONS: tq(3)})
    folder = export_run(run, "tq", tmp_path / "export")
    tensors = load_file(folder / SINGLE)
    change(tensors["model." + tensor])
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(UserError, match=tensor.removesuffix(".tq_packed").removesuffix(".tq_norms")):
        verify(folder, run)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 4}, {"bits": None}, {"group_size": 64}, {"group_size": 48}, {"group_size": "32"}, {"group_size": None},
        {"quantizer_seed": 7}, {"format": "other"}, {"sensitive_patterns": ["o_proj"]},
        {"sensitive_patterns": ["o_proj"], "sensitive_bits": 4},
        {"orig_in_dims": {"model.layers.0.mlp.up_proj.weight": 7}},
        {"orig_in_dims": {"model.layers.0.mlp.up_proj.weight": 63}},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_says_something_else_does_not_pass(change: dict, tmp_path: Path):
    run = MemoryRun(models.tiny_llama(tmp_path / "source"), {PROJECTIONS: tq(3)})
    folder = export_run(run, "tq", tmp_path / "export")
    config = json.loads((folder / "tq_config.json").read_text())
    (folder / "tq_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=r"tq_config\.json"):
        verify(folder, run)
    if change.get("orig_in_dims", {}).get("model.layers.0.mlp.up_proj.weight") != 63:  # within the last group
        with pytest.raises(UserError, match=r"tq_config\.json"):
            open_model(folder)


def test_a_verification_does_not_see_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = MemoryRun(models.tiny_qwen3_5_moe(tmp_path / "source"), {PROJECTIONS: tq(3)})
    folder = export_run(run, "tq", tmp_path / "export")
    whole = str(verify(folder, run))
    monkeypatch.setattr("gsq.export.verify.SLICE", 100)
    assert str(verify(folder, run)) == whole


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_a_damaged_weight_is_not_converted(name: str, value: float, tmp_path: Path):
    source = models.tiny_llama(tmp_path / "source")
    tensors = load_file(source / SINGLE)
    tensors[name].view(-1)[3] = value
    save_file(tensors, source / SINGLE, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{name} holds NaN or Inf"):
        convert(parse_config(config_of(source)), tmp_path / "out")


def test_an_export_is_no_source(tmp_path: Path):
    export = convert(parse_config(config_of(models.tiny_llama(tmp_path / "source"))), tmp_path / "export")
    with pytest.raises(UserError, match=r"export is quantized already \(tq\)"):
        convert(parse_config(config_of(export)), tmp_path / "out")
