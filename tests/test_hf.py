"""Exports in transformers: decoded on a CPU, and packed, which computes the same."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import MemoryRun
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, LlamaForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import gsq.hf
from gsq.codebook import Codebook, QuantizedTensor
from gsq.errors import UserError
from gsq.export.base import export_run
from gsq.export.dequantize import dequantize
from gsq.kernels.packing import pack_bytes, pack_dense
from gsq.model.checkpoint import SINGLE
from gsq.serve.modules import PLAIN_EXPERTS, PackedLinear, PackedMatrix, pack_modules
from gsq.serve.parameters import PackedParameter

TWO, THREE, FOUR = (Codebook.integer(bits, 32) for bits in (2, 3, 4))
LAYERS = r"^model\.(language_model\.)?layers\."
PROJECTIONS = LAYERS + r"\d+\.(mlp|self_attn|linear_attn)\..*(_proj|in_proj_\w+)(\.weight)?$"


def tq(bits: int, size: int = 32) -> Callable[[int], Codebook]:
    return lambda width: Codebook.tq(bits, size, width)


CASES = {  # model, rules, format, packed weights
    "llama": (models.tiny_llama, {PROJECTIONS: TWO}, "humming", 14),
    "mixed": (models.tiny_qwen3, {LAYERS + ".*down_proj": Codebook.integer(4, 64), PROJECTIONS: THREE}, "humming", 14),
    "some experts": (
        models.tiny_qwen3_moe,
        {LAYERS + r"0.*mlp\.experts": TWO, LAYERS + "1.*self_attn.*_proj": FOUR},
        "humming",
        6,
    ),
    "flagship": (models.tiny_qwen3_5_moe, {LAYERS + r".*mlp\.experts\.": TWO}, "humming", 8),
    "tq, padded": (models.tiny_llama, {"embed_tokens": tq(4, 128), PROJECTIONS: tq(2, 128)}, "tq", 14),
    "tq, head": (models.tiny_qwen3, {"lm_head": tq(4), PROJECTIONS: tq(3)}, "tq", 15),
    "tq, experts one by one": (models.tiny_qwen3_moe, {PROJECTIONS: tq(3)}, "tq", 12),
    "tq, fused experts": (models.tiny_qwen3_5_moe, {LAYERS + r".*experts\.down": tq(4), PROJECTIONS: tq(3)}, "tq", 39),
}


@dataclass(frozen=True)
class Exported:
    run: MemoryRun
    folder: Path
    format: str
    packed: int


@pytest.fixture(scope="module", params=CASES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(request.param, tmp_path_factory.mktemp("hf"))


def export(case: str, folder: Path, **options: int) -> Exported:
    make, rules, format, packed = CASES[case]
    run = MemoryRun(make(folder / "source"), rules)
    return Exported(run, export_run(run, format, folder / "export", **options), format, packed)


def load(exported: Exported, dtype: torch.dtype, decode: bool | None = None, auto=AutoModelForCausalLM) -> nn.Module:
    """The model as users load it; all of the export must have found its place."""
    options = {}
    if exported.format == "tq":
        options["quantization_config"] = gsq.hf.TQConfig(dequantize=decode)
    elif decode is not None:
        options["config"] = AutoConfig.from_pretrained(exported.folder)
        options["config"].quantization_config["dequantize"] = decode
    model, info = auto.from_pretrained(exported.folder, dtype=dtype, output_loading_info=True, **options)
    assert not any(info.values())
    return model


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor | None = None) -> Tensor:
    return model(models.random_tokens() if tokens is None else tokens).logits


def packed_weights(model: nn.Module) -> dict[str, PackedMatrix]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedMatrix)}


def stored_words(exported: Exported, parameter: str) -> Tensor:
    """Codes of a parameter as dense words, packed again from the run."""
    codes = exported.run.load(parameter).codes
    return pack_dense(codes, exported.run.load(parameter).codebook.bits)


def test_on_a_cpu_it_is_the_dequantized_model(exported: Exported, tmp_path: Path):
    model = load(exported, torch.bfloat16)
    dense = AutoModelForCausalLM.from_pretrained(dequantize(exported.folder, tmp_path / "dense"), dtype=torch.bfloat16)
    assert torch.equal(logits(model), logits(dense))
    assert not packed_weights(model)
    assert not hasattr(model.config, "quantization_config")


def test_weights_are_decoded_to_the_wanted_dtype_in_one_step(exported: Exported):
    parameters = dict(load(exported, torch.float32).named_parameters())
    for name in exported.run.quantized:
        parameter = parameters[name if name in parameters else name.replace("model.language_model.", "model.")]
        assert torch.equal(parameter, exported.run.load(name).dequantize())


def test_packed_it_computes_the_same(exported: Exported):
    packed, decoded = (load(exported, torch.float32, decode) for decode in (False, True))
    weights = packed_weights(packed)
    assert len(weights) == exported.packed
    for name, matrix in weights.items():
        target = name if name in exported.run.quantized else name.replace("model.", "model.language_model.", 1)
        assert torch.equal(matrix.words, stored_words(exported, target))
        assert torch.equal(matrix.scales, exported.run.load(target).scales)
    torch.testing.assert_close(logits(packed), logits(decoded), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["some experts", "tq, experts one by one"])
def test_packed_on_the_kernels(case: str, tmp_path: Path, kernels: torch.device):
    own = export(case, tmp_path)
    packed, decoded = (load(own, torch.float32, decode).to(kernels) for decode in (False, True))
    tokens = models.random_tokens(1, 3).to(kernels)
    torch.testing.assert_close(logits(packed, tokens), logits(decoded, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["mixed", "tq, fused experts"])
def test_packed_in_bfloat16(case: str, tmp_path: Path):
    """What the kernels add to the rounding of the model itself: inputs rounded once more, where they are rotated."""
    own = export(case, tmp_path)
    packed, decoded, exact = (
        load(own, *how) for how in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True))
    )
    wanted = logits(exact)
    rounding, error = ((logits(model).float() - wanted).abs().median() for model in (decoded, packed))
    assert error <= (2 * rounding if own.format == "tq" else rounding)


def test_the_multimodal_model_loads_too(tmp_path: Path):
    own = export("flagship", tmp_path)
    packed, decoded = (load(own, torch.float32, decode, AutoModelForImageTextToText) for decode in (False, True))
    assert len(packed_weights(packed)) == own.packed
    torch.testing.assert_close(logits(packed), logits(decoded), rtol=1e-4, atol=1e-4)


def test_several_shards_and_generation(tmp_path: Path):
    own = export("some experts", tmp_path, shard_bytes=20_000)
    assert len(list(own.folder.glob("*.safetensors"))) > 3
    packed, decoded = (load(own, torch.float32, decode) for decode in (False, True))
    prompt = models.random_tokens(2, 8)
    texts = [model.generate(prompt, max_new_tokens=6, do_sample=False) for model in (packed, decoded)]
    assert torch.equal(*texts)


def test_a_decoded_model_is_saved_as_a_dense_one(tmp_path: Path):
    model = load(export("some experts", tmp_path), torch.float32)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))


def test_a_packed_model_is_not_saved(tmp_path: Path):
    model = load(export("llama", tmp_path), torch.float32, decode=False)
    assert not model.hf_quantizer.is_trainable
    with pytest.raises(ValueError, match="humming and is not serializable"):
        model.save_pretrained(tmp_path / "saved")


def test_packed_models_move_and_are_copied(tmp_path: Path):
    model = load(export("llama", tmp_path), torch.float32, decode=False)
    before, other = logits(model), copy.deepcopy(model)
    for matrix in packed_weights(other).values():
        matrix.scales = matrix.scales.neg()
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(other), before)  # what is kept between calls follows the buffers


@pytest.mark.parametrize("rows", [(), (3,), (2, 5)])
def test_a_bias_is_added(rows: tuple[int, ...]):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 4, (6, 64), generator=generator, dtype=torch.uint8)
    scales = torch.randn(6, 2, generator=generator).bfloat16()
    linear = PackedLinear(PackedParameter((6, 64), TWO, ("codes",), ("scales",)), nn.Parameter(torch.randn(6)))
    linear.weight.words, linear.weight.scales = pack_dense(codes, 2), scales
    x = torch.randn(*rows, 64, generator=generator)
    weight = QuantizedTensor(codes, scales, TWO).dequantize().double()
    torch.testing.assert_close(linear(x), (x.double() @ weight.T + linear.bias.double()).float())


def test_what_has_no_kernel_is_left_to_be_decoded():
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Experts(nn.Module):
        def __init__(self, **built: bool):
            super().__init__()
            self.gate_up_proj, self.down_proj = (
                nn.Parameter(torch.zeros(2, 64, 32)),
                nn.Parameter(torch.zeros(2, 32, 32)),
            )
            self.__dict__.update(PLAIN_EXPERTS | built)

    model = nn.ModuleDict({
        "linear": nn.Linear(64, 4), "scaled": Scaled(64, 4), "embedding": nn.Embedding(4, 64), "odd": nn.Linear(8, 4),
        "experts": Experts(), "biased": Experts(has_bias=True), "one_of_two": Experts(),
    })  # fmt: skip
    model.config = SimpleNamespace()
    parameters = {
        name: PackedParameter(tuple(parameter.shape), Codebook.integer(3, 8), ("codes",), ("scales",))
        for name, parameter in model.named_parameters()
        if not name.endswith("bias") and name != "one_of_two.gate_up_proj"
    }
    assert not parameters["odd.weight"].whole_words
    assert pack_modules(model, parameters) == {"linear.weight", "experts.gate_up_proj", "experts.down_proj"}
    assert type(model["scaled"]) is Scaled
    assert isinstance(model["one_of_two"].down_proj, nn.Parameter)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_pieces_are_put_together(data: st.DataObject):
    """However rows are divided into tensors, and whatever the shape of these, the weights are the same."""
    bits, group = data.draw(st.sampled_from([2, 3, 4])), data.draw(st.sampled_from([8, 32, 64]))
    experts, parts, out = (data.draw(st.integers(1, 3)) for _ in range(3))
    book = Codebook.integer(bits, group)
    columns = 64 * data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    shape = (experts, parts * out, columns)
    codes = torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)
    quantized = QuantizedTensor(codes, torch.randn(*shape[:2], columns // group, generator=generator).bfloat16(), book)
    pieces = codes.view(experts * parts, out, columns)
    as_words = [pack_dense(piece, bits) for piece in pieces]
    as_groups = [pack_bytes(piece.reshape(-1, group), bits) for piece in pieces]
    scales = list(quantized.scales.view(experts * parts, out, -1))
    parameter = PackedParameter(shape, book, ("",) * len(pieces), ("",) * len(pieces))
    for stored in (as_words, as_groups):
        words, joined = parameter.joined(stored, scales)
        assert torch.equal(words, pack_dense(codes, bits))
        assert torch.equal(joined, quantized.scales)
        assert torch.equal(parameter.decoded(stored, scales, torch.float32), quantized.dequantize())


@pytest.mark.parametrize(
    ("device_map", "gpus", "packed"),
    [
        (None, True, False),
        ("auto", True, True),
        ("auto", False, False),
        ({"": torch.device("cpu")}, True, False),
        ({"": torch.device("cuda", 0)}, True, True),
        ({"": 0}, True, True),
        ({"model.layers.0": "cpu", "model.layers.1": "cuda:1", "lm_head": "disk"}, True, True),
        ({"model": "cpu", "lm_head": "disk"}, True, False),
        ({"": "mps"}, False, False),
    ],
)
def test_weights_stay_packed_on_gpus(device_map: object, gpus: bool, packed: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    assert gsq.hf.uses_kernels(device_map) == packed


def test_formats_that_transformers_knows_are_left_to_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "humming", object)
    gsq.hf.register()
    assert AUTO_QUANTIZER_MAPPING["humming"] is object


def test_the_package_itself_imports_nothing():
    """The command line starts with it."""
    check = "import gsq, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


# What does not load


def test_a_dense_model_is_no_export(tmp_path: Path):
    folder = models.tiny_llama(tmp_path / "dense")
    with pytest.raises(UserError, match="holds no weights that packed kernels read; they read humming"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=gsq.hf.TQConfig())


def test_other_shapes_than_the_model_has(tmp_path: Path):
    own = export("llama", tmp_path)
    config = AutoConfig.from_pretrained(own.folder)
    config.intermediate_size *= 2
    with pytest.raises(UserError, match=r"mlp\.gate_proj\.weight is \(256, 64\) in the model, but .* is \(128, 64\)"):
        AutoModelForCausalLM.from_pretrained(own.folder, config=config)


def test_experts_that_are_not_stored_alike(tmp_path: Path):
    own = export("flagship", tmp_path)
    tensors = load_file(own.folder / SINGLE)
    name = "model.language_model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[name] = torch.zeros(64, 64)
    del tensors[name + "_scale"]
    save_file(tensors, own.folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"experts\.gate_up_proj consists of .*2\.up_proj.*not stored alike"):
        AutoModelForCausalLM.from_pretrained(own.folder)


def test_a_state_dict_is_no_folder(tmp_path: Path):
    own = export("llama", tmp_path)
    config = AutoConfig.from_pretrained(own.folder)
    with pytest.raises(ValueError, match="from the folder of an export"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=load_file(own.folder / SINGLE))


def test_parts_must_come_in_the_order_of_their_names():
    parameter = PackedParameter((2, 64), TWO, ("b.weight", "a.weight"), ("b.weight_scale", "a.weight_scale"))
    with pytest.raises(UserError, match=r"parts of x\.weight together in another order"):
        gsq.hf.LoadPacked({"x.weight": parameter}, set())
