"""MLX exports: what stock mlx_lm makes of them, and of the models that it can read."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import models
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, load_model
from runs import Entry, MemoryRun
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from gsq.codebook import Codebook, QuantizedTensor
from gsq.errors import UserError
from gsq.eval.quality import evaluate
from gsq.export.base import check_plan, export_run, format_of, open_model
from gsq.export.dequantize import dequantize
from gsq.export.inspect import inspect
from gsq.export.mlx import kept_as
from gsq.export.mlx_layout import LAYOUTS, source_layout
from gsq.export.verify import verify
from gsq.kernels.affine import quantize_affine
from gsq.model.checkpoint import Checkpoint

LAYERS = r"^model\.(language_model\.)?layers\..*"
EMBEDDING, HEAD = r"embed_tokens\.weight$", r"^lm_head\.weight$"
ALL = LAYERS + r"(proj\w*|experts\.\w+)(\.weight)?$"
EXACT = Codebook.integer(2, 32)  # its weights are numbers of bfloat16


def affine(bits: int, group_size: int = 32, dtype: torch.dtype = torch.bfloat16) -> Codebook:
    return Codebook.affine(bits, group_size, dtype)


class AffineRun(MemoryRun):
    """Codes with offsets are those of MLX's own quantization."""

    def _quantize(self, entry: Entry, generator: torch.Generator) -> QuantizedTensor:
        codebook = entry.codebook
        if not codebook.offset:
            return super()._quantize(entry, generator)
        weight = torch.cat([self.source.read(name) for name in entry.sources]).reshape(entry.shape)
        codes, scales, biases = quantize_affine(weight.to(codebook.scale_dtype), codebook.bits, codebook.group_size)
        return QuantizedTensor(codes, scales, codebook, biases)


MIXED = {
    EMBEDDING: affine(8, 64),
    HEAD: affine(6, 64),
    "gate": affine(2),
    "up_proj": affine(3),
    "down_proj": affine(4, 64),
    "q_proj": affine(5),
    "k_proj": affine(3, dtype=torch.float16),
    "o_proj": Codebook.integer(8, 32),
    LAYERS + "(in|out)_proj": Codebook.ternary(64),
}
MOE = {
    LAYERS + r"experts\.gate_up": affine(2),
    LAYERS + r"experts\.down": affine(3),
    EMBEDDING: affine(8),
    HEAD: affine(8),
}
CASES = {  # model, rules
    "llama": (models.tiny_llama, {ALL: affine(4)}),
    "llama of many widths": (models.tiny_llama, MIXED),
    "qwen3 with a head": (models.tiny_qwen3, MIXED),
    "experts one by one": (models.tiny_qwen3_moe, MOE),
    "some experts kept one by one": (models.tiny_qwen3_moe, {LAYERS + r"experts\.down": affine(4, 64)}),
    "hybrid": (models.tiny_qwen3_5, MIXED),
    "hybrid with experts": (models.tiny_qwen3_5_moe, MOE | {ALL: Codebook.integer(4, 64)}),
    "hybrid with kept experts": (models.tiny_qwen3_5_moe, {LAYERS + "self_attn": affine(4)}),
}


@pytest.fixture(scope="module", params=CASES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryRun, Path]:
    folder = tmp_path_factory.mktemp("mlx")
    model, rules = CASES[request.param]
    run = AffineRun(model(folder / "source"), rules)
    return run, export_run(run, "mlx", folder / "export")


def simple(folder: Path) -> tuple[MemoryRun, Path]:
    run = AffineRun(models.tiny_llama(folder / "source", tied=False), {"mlp": affine(3), "self_attn": affine(4)})
    return run, export_run(run, "mlx", folder / "export")


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def change_config(folder: Path, change: dict) -> None:
    (folder / "config.json").write_text(json.dumps(read_config(folder) | change))


def to_mlx(tensor: Tensor) -> mx.array:
    return mx.array(tensor.view(torch.uint16).numpy()).view(mx.bfloat16)


def same(ours: Tensor, theirs: mx.array) -> bool:
    return np.array_equal(ours.reshape(-1).view(torch.uint8).numpy(), np.array(theirs.flatten().view(mx.uint8)))


def logits_of(model, tokens: Tensor) -> np.ndarray:
    return np.array(model(mx.array(tokens.numpy())).astype(mx.float32))


def differences(folder: Path, dense: Path) -> tuple[float, float]:
    """Median and largest difference between the logits of mlx_lm in float32, and of transformers, relative."""
    served = load_model(folder)[0]
    served.set_dtype(mx.float32)
    tokens = models.random_tokens()
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(tokens).logits.numpy()
    error = np.abs(logits_of(served, tokens) - expected).max(-1) / np.abs(expected).max()
    return float(np.median(error)), float(error.max())


# What mlx_lm makes of an export


def test_mlx_lm_loads_exactly_what_is_stored(exported: tuple[MemoryRun, Path]):
    """Its `sanitize` leaves all tensors alone, and its module tree has a place for each."""
    _, folder = exported
    model, _ = load_model(folder, strict=True)
    stored, loaded = all_tensors(folder), dict(tree_flatten(model.parameters()))
    assert stored.keys() == loaded.keys()
    for name, tensor in stored.items():
        assert tuple(tensor.shape) == loaded[name].shape
        assert same(tensor, loaded[name]), name


def test_mlx_lm_computes_what_the_dense_model_does(exported: tuple[MemoryRun, Path], tmp_path: Path):
    """Up to the rounding of dense weights to bfloat16, with which an almost undecided router may choose otherwise."""
    _, folder = exported
    median, _ = differences(folder, dequantize(folder, tmp_path / "dense"))
    assert median < 0.03


def test_mlx_lm_generates_what_transformers_does(tmp_path: Path):
    run = MemoryRun(models.tiny_llama(tmp_path / "source"), {ALL: EXACT})
    folder = export_run(run, "mlx", tmp_path / "export")
    model, tokenizer = mlx_lm.load(str(folder))
    model.set_dtype(mx.float32)
    dense = AutoModelForCausalLM.from_pretrained(dequantize(folder, tmp_path / "dense"), dtype=torch.float32)
    prompt = torch.tensor([tokenizer.encode("Once")])
    expected = dense.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
    text = mlx_lm.generate(model, tokenizer, "Once", max_tokens=8)
    assert len(text) > 4
    assert text == tokenizer.decode(expected, skip_special_tokens=True)


# Every type of model that is listed

DENSE = models.TEXT | models.DENSE | {"num_hidden_layers": 2}
EXPERTS = DENSE | models.MOE
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
TYPES = {  # config
    "llama": DENSE | {"tie_word_embeddings": False, "rope_parameters": LLAMA3},
    "mistral": DENSE | {"tie_word_embeddings": False},
    "qwen2": DENSE | {"tie_word_embeddings": True},
    "qwen3": DENSE | {"tie_word_embeddings": True},
    "smollm3": DENSE | {"tie_word_embeddings": True},
    "olmo2": DENSE | {"tie_word_embeddings": False},
    "phi3": DENSE | {"tie_word_embeddings": False},
    "granite": DENSE | {"tie_word_embeddings": True},
    "ernie4_5": DENSE | {"tie_word_embeddings": True},
    "hunyuan_v1_dense": DENSE | {"tie_word_embeddings": True},
    "seed_oss": DENSE | {"tie_word_embeddings": False},
    "qwen3_moe": EXPERTS | {"tie_word_embeddings": False},
    "olmoe": EXPERTS | {"tie_word_embeddings": False, "intermediate_size": 64},
    "qwen3_next": EXPERTS | models.HYBRID | {"shared_expert_intermediate_size": 64, "num_hidden_layers": 4},
    "qwen3_5": None,
    "qwen3_5_moe": None,
}


def build(model_type: str, folder: Path) -> Path:
    """A tiny model as transformers stores it, with vectors that are not all alike."""
    if TYPES[model_type] is None:
        return getattr(models, f"tiny_{model_type}")(folder)
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**rope | TYPES[model_type]))
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += torch.randn_like(parameter) * 0.1
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_every_layout_is_compared_with_mlx_lm():
    assert TYPES.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_a_layout_is_what_mlx_lm_makes_of_the_source(model_type: str, tmp_path: Path):
    source = Checkpoint.open(build(model_type, tmp_path / "source"))
    layout, ours = source_layout(source), {}
    for name in source.tensors:
        ours |= kept_as(layout, source, name)
    run = MemoryRun(source.folder, {ALL: EXACT})
    folder = export_run(run, "mlx", tmp_path / "export")
    config = read_config(folder)
    model_class, args_class = _get_classes(config)
    theirs = {name: to_mlx(source.read(name)) for name in source.tensors}
    if hasattr(model := model_class(args_class.from_dict(config)), "sanitize"):
        theirs = model.sanitize(theirs)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert same(tensor, theirs[name]), name
    _, largest = differences(folder, dequantize(folder, tmp_path / "dense"))
    assert largest < 1e-4
    assert verify(folder, run).quantized_weights > 0


def test_a_tied_head_is_not_stored_twice(tmp_path: Path):
    source = models.tiny_llama(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, source / "model.safetensors")
    run = AffineRun(source, {EMBEDDING: affine(8)})
    folder = export_run(run, "mlx", tmp_path / "export")
    assert "lm_head.weight" not in all_tensors(folder)
    load_model(folder)
    verify(folder, run)


# What GSQ reads


def test_an_export_is_verified_and_decoded(exported: tuple[MemoryRun, Path], tmp_path: Path):
    run, folder = exported
    report = verify(folder, run)
    quantized = [entry for entry in run.plan.entries.values() if entry.codebook]
    assert report.quantized_weights == sum(torch.Size(entry.shape).numel() for entry in quantized)
    model = open_model(folder)
    dense = Checkpoint.open(dequantize(folder, tmp_path / "dense"))
    assert model.tensors.keys() == dense.tensors.keys()
    assert dense.tensors.keys() == {n for n in run.source.tensors if not n.startswith(("mtp.", "model.visual."))}
    for entry in quantized:
        ours = run.load(entry.name).dequantize(torch.bfloat16)
        read = torch.cat([model.read(name) for name in entry.sources]).reshape(entry.shape)
        assert torch.equal(read, ours)
        assert torch.equal(model.read(entry.sources[0], 2), model.read(entry.sources[0])[2])
    kept = dense.tensors.keys() - {name for entry in quantized for name in entry.sources}
    for name in kept:
        source, stored = run.source.read(name), dense.read(name)
        exact = stored.dtype == source.dtype and torch.equal(stored, source)
        assert exact or torch.equal(stored + 1, source + 1), name
        assert torch.equal(model.read(name, len(stored) - 1), stored[-1])
    total = inspect(folder)[-1]
    assert total["bytes"] == sum(tensor.nbytes for tensor in all_tensors(folder).values())


def test_an_export_is_measured_against_its_original(tmp_path: Path):
    run, folder = simple(tmp_path)
    tokens = models.random_tokens()
    result = evaluate(open_model(folder), open_model(run.source.folder), tokens)
    again = evaluate(open_model(dequantize(folder, tmp_path / "dense")), open_model(run.source.folder), tokens)
    assert result["kl"] == again["kl"] > 0


def test_norms_are_decoded_to_what_mlx_computes_with():
    """Every number of bfloat16 up to 256: taking one off what one was added to is exact."""
    numbers = torch.arange(1 << 16).to(torch.uint16).view(torch.bfloat16)
    raised = numbers[numbers.abs() < 256] + 1
    assert torch.equal((raised - 1).float() + 1, raised.float())


def test_what_mlx_lm_quantized_is_read_too(tmp_path: Path):
    source = models.tiny_qwen3_5_moe(tmp_path / "source")
    mlx_lm.convert(str(source), str(tmp_path / "theirs"), quantize=True, q_bits=4, q_group_size=32)
    model = open_model(tmp_path / "theirs")
    assert format_of(model.stored) == "mlx"
    for name, bits, size in (("layers.0.mlp.experts.down_proj", 4, 32), ("layers.0.mlp.gate.weight", 8, 64)):
        weight = Checkpoint.open(source).read(name := f"model.language_model.{name}")
        codes, scales, biases = quantize_affine(weight, bits, size)
        ours = QuantizedTensor(codes, scales, affine(bits, size), biases)
        assert torch.equal(model.read(name), ours.dequantize(torch.bfloat16))
    median, _ = differences(tmp_path / "theirs", dequantize(tmp_path / "theirs", tmp_path / "dense"))
    assert median < 0.03


# What does not pass


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("layers.1.mlp.up_proj.weight", lambda t: t.view(torch.int32).bitwise_xor_(4)),
        ("layers.0.mlp.down_proj.scales", lambda t: t.mul_(1.01)),
        ("layers.0.self_attn.q_proj.biases", lambda t: t.mul_(1.01)),
        ("layers.0.input_layernorm.weight", lambda t: t.add_(0.01)),
        ("embed_tokens.weight", lambda t: t.mul_(1.01)),
    ],
)
def test_a_changed_export_does_not_pass(tensor: str, change, tmp_path: Path):
    run, folder = simple(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    change(tensors["model." + tensor])
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=tensor.rpartition(".")[0]):
        verify(folder, run)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rope_theta": 5.0}, "another rope_theta"),
        ({"hidden_size": 32}, "another hidden_size"),
        ({"tie_word_embeddings": True}, "a tied head"),
        ({"quantization_config": {"group_size": 32, "bits": 4}}, "quantization and quantization_config"),
        ({"quantization": {"group_size": 32, "bits": 4, "mode": "affine"}}, "config.json says .* the run has 3 bits"),
        ({"quantization": {"group_size": 32, "bits": 4, "other": {"bits": 3}}}, "a setting of other"),
    ],
)
def test_a_changed_config_does_not_pass(change: dict, match: str, tmp_path: Path):
    run, folder = simple(tmp_path)
    change_config(folder, change)
    with pytest.raises(UserError, match=match):
        verify(folder, run)


@pytest.mark.parametrize("part", ["scales", "biases"])
def test_a_missing_part_is_told(part: str, tmp_path: Path):
    run = AffineRun(models.tiny_qwen3_5_moe(tmp_path / "source", layers=2), MOE)
    folder = export_run(run, "mlx", tmp_path / "export")
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"language_model.model.embed_tokens.{part}"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=rf"embed_tokens\.{part} is missing; export again"):
        open_model(folder)


# What the format cannot hold


def refused(source: Path, rules: dict, match: str) -> None:
    run = AffineRun.__new__(AffineRun)
    run.source = Checkpoint.open(source)
    entries = {entry.name: entry for entry in run._plan(rules)}
    with pytest.raises(UserError, match=match):
        check_plan("mlx", run.source, entries)


@pytest.mark.parametrize(
    ("codebook", "match"),
    [
        (affine(7), r"k_proj\.weight: format mlx has 2, 3, 4, 5, 6 or 8 bits, not 7"),
        (Codebook.integer(7, 32), "bits, not 7.*formats that hold this plan: humming"),
        (affine(4, 16), "has groups of 32, 64 or 128, not 16"),
        (affine(4, 128), "group size 128 does not divide in_features 64; use 64 or 32"),
        (affine(4, dtype=torch.float32), "set the scale dtype to bfloat16"),
        (Codebook.lloyd(3, 32), "integers only.*no format holds this plan"),
        (lambda width: Codebook.tq(3, 32, width), "holds no rotated weights.*formats that hold this plan: tq$"),
    ],
)
def test_other_codebooks_are_refused_with_their_home(codebook, match: str, tmp_path: Path):
    refused(models.tiny_llama(tmp_path / "source"), {"self_attn": codebook}, match)


def test_other_models_are_refused(tmp_path: Path):
    source = models.tiny_llama(tmp_path / "source")
    change_config(source, {"model_type": "unheard_of"})
    refused(source, {"q_proj": affine(4)}, "format mlx knows .*llama.*qwen3_5_moe, and not unheard_of")
    source = models.tiny_qwen3_5(tmp_path / "hybrid", layers=2)
    refused(
        source,
        {r"visual.*linear_fc1\.weight": affine(4)},
        r"linear_fc1\.weight: format mlx leaves this tensor out.*; keep it",
    )
    change_config(source, {"model_type": "qwen3_5_moe"})
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"model.other": torch.zeros(2)}, source / "model.safetensors")
    refused(source, {"q_proj": affine(4)}, r"no place for model\.other")


def test_scales_that_overflow_are_refused(tmp_path: Path):
    run = MemoryRun(models.tiny_llama(tmp_path / "source"), {"q_proj": Codebook.integer(8, 32, torch.float16)})
    for quantized in run.quantized.values():
        quantized.scales.fill_(1000)
    with pytest.raises(UserError, match=r"q_proj has a scale or bias that torch\.float16 cannot hold"):
        export_run(run, "mlx", tmp_path / "export")
