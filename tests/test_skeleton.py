"""One layer at a time gives what transformers gives with the whole model in memory."""

from __future__ import annotations

import json
import re
import threading
import weakref
from pathlib import Path

import models
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gsq.errors import UserError
from gsq.model.checkpoint import SINGLE, Checkpoint
from gsq.model.skeleton import Skeleton

CPU = torch.device("cpu")
BUILDERS = [models.tiny_llama, models.tiny_qwen3, models.tiny_qwen3_moe, models.tiny_qwen3_5, models.tiny_qwen3_5_moe]
TOKENS = models.random_tokens(3, 20)


def skeleton_of(folder: Path, dtype: torch.dtype = torch.float32, max_layers: int | None = None) -> Skeleton:
    return Skeleton(Checkpoint.open(folder), CPU, dtype, max_layers)


def walk(skeleton: Skeleton, tokens: Tensor = TOKENS) -> Tensor:
    """Logits by the road that a run takes."""
    hidden, kwargs = skeleton.embed(tokens)
    for index in range(skeleton.num_layers):
        hidden = skeleton.run_layer(skeleton.load_layer(index), hidden, kwargs[index])
    return skeleton.head(hidden)


def whole_model(folder: Path) -> nn.Module:
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def expected(folder: Path, tokens: Tensor = TOKENS) -> Tensor:
    return whole_model(folder)(input_ids=tokens).logits


def rewrite(folder: Path, change) -> None:
    """Let `change` alter the tensors of a checkpoint of one file."""
    tensors = load_file(folder / SINGLE)
    save_file(change(tensors) or tensors, folder / SINGLE)


@torch.no_grad()
def test_a_checkpoint_without_its_vision_tower_generates(tmp_path: Path):
    """As MLX exports are, whose config.json still speaks of one."""
    folder = models.tiny_qwen3_5_moe(tmp_path / "model")
    before = expected(folder)
    rewrite(folder, lambda tensors: {name: t for name, t in tensors.items() if "visual" not in name})
    model = skeleton_of(folder).whole()
    torch.testing.assert_close(model(input_ids=TOKENS).logits, before)
    assert model.device == CPU
    assert model.generate(TOKENS, max_new_tokens=2).shape[1] == TOKENS.shape[1] + 2


@pytest.mark.parametrize("ahead", [False, True])
def test_layers_in_order_read_ahead_or_not(tmp_path: Path, ahead: bool):
    skeleton = skeleton_of(models.tiny_qwen3_5(tmp_path / "model"), max_layers=3)
    for index, layer in enumerate(skeleton.layers(ahead)):
        skeleton.embed(TOKENS)  # others stand in for the layers while one is read
        expected = skeleton.load_layer(index).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in layer.state_dict().items())
    assert index == 2


def test_a_walk_that_ends_early_leaves_no_reader(tmp_path: Path):
    threads = threading.active_count()
    layers = skeleton_of(models.tiny_llama(tmp_path / "model")).layers(ahead=True)
    next(layers)
    layers.close()
    assert threading.active_count() == threads


def test_what_reading_ahead_cannot_find_is_told(tmp_path: Path):
    folder = models.tiny_llama(tmp_path / "model")
    missing = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: {name: t for name, t in tensors.items() if name != missing})
    layers = skeleton_of(folder).layers(ahead=True)
    next(layers)
    with pytest.raises(UserError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        next(layers)


@pytest.mark.parametrize("build", BUILDERS)
@torch.no_grad()
def test_the_whole_model_is_that_of_transformers(tmp_path: Path, build):
    folder = build(tmp_path / "model")
    model = skeleton_of(folder).whole()
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    torch.testing.assert_close(model(input_ids=TOKENS).logits, expected(folder))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("build", BUILDERS)
def test_logits_are_those_of_transformers(tmp_path: Path, build, shards: int):
    folder = build(tmp_path / "model", shards=shards)
    assert len(list(folder.glob("*.safetensors"))) >= shards
    logits = expected(folder)
    assert torch.equal(walk(skeleton_of(folder)), logits)
    assert logits.std() > 0.1  # else equality says little


def test_head_of_its_own_and_tied_head(tmp_path: Path):
    tied, own = (models.tiny_llama(tmp_path / str(tied), tied=tied) for tied in (True, False))
    assert "lm_head.weight" not in Checkpoint.open(tied).tensors
    assert torch.equal(walk(skeleton_of(own)), expected(own))
    rewrite(own, lambda tensors: {**tensors, "lm_head.weight": tensors["lm_head.weight"] * 2})
    assert torch.equal(walk(skeleton_of(own)), expected(own))


def test_windows_of_another_shape(tmp_path: Path):
    """Arguments of layers belong to one shape of tokens; the next call makes its own."""
    folder = models.tiny_qwen3_5(tmp_path / "model", layers=2)
    skeleton = skeleton_of(folder)
    walk(skeleton)
    for tokens in (models.random_tokens(1, 7), models.random_tokens(5, 33)):
        assert torch.equal(walk(skeleton, tokens), expected(folder, tokens))


@pytest.mark.parametrize("build", [models.tiny_qwen3_moe, models.tiny_qwen3_5_moe])
def test_fused_experts_and_experts_one_by_one(tmp_path: Path, build):
    fused, single = (build(tmp_path / str(fused), layers=2, fused=fused) for fused in (True, False))
    names = [Checkpoint.open(folder).tensors for folder in (fused, single)]
    assert any(name.endswith(".experts.gate_up_proj") for name in names[0])
    assert any(name.endswith(".experts.3.gate_proj.weight") for name in names[1])
    assert torch.equal(walk(skeleton_of(fused)), walk(skeleton_of(single)))
    for index in range(2):
        layers = [skeleton_of(folder).load_layer(index).state_dict() for folder in (fused, single)]
        assert layers[0].keys() == layers[1].keys()
        assert all(torch.equal(layers[0][name], layers[1][name]) for name in layers[0])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("prefix", ["model.", "language_model.model."])
def test_other_names_for_the_language_model(tmp_path: Path, prefix: str, fused: bool):
    """Checkpoints name the text part of a multimodal model in three ways."""
    folder = models.tiny_qwen3_5_moe(tmp_path / "model", layers=2, fused=fused)
    logits = walk(skeleton_of(folder))
    rewrite(folder, lambda tensors: {re.sub("^model.language_model.", prefix, n): t for n, t in tensors.items()})
    assert not any(name.startswith("model.language_model.") for name in Checkpoint.open(folder).tensors)
    assert torch.equal(walk(skeleton_of(folder)), logits)


def test_layers_have_the_weights_of_the_checkpoint(tmp_path: Path):
    folder = models.tiny_qwen3_5_moe(tmp_path / "model")
    skeleton = skeleton_of(folder)
    parameters = dict(whole_model(folder).named_parameters())
    for index, prefix in enumerate(skeleton.layer_names):
        for name, parameter in skeleton.load_layer(index).named_parameters():
            assert torch.equal(parameter, parameters[f"{prefix}.{name}"]), name
            assert not parameter.requires_grad


@pytest.mark.parametrize("max_layers", [1, 3])
def test_max_layers(tmp_path: Path, max_layers: int):
    folder = models.tiny_qwen3_5_moe(tmp_path / "model")
    skeleton = skeleton_of(folder, max_layers=max_layers)
    assert skeleton.num_layers == max_layers
    assert len(skeleton.embed(TOKENS)[1]) == max_layers
    assert len(skeleton.layer_names) == 4  # the plan names the others, which stay as they are
    short = whole_model(folder)
    decoder = short.get_decoder()
    decoder.layers = decoder.layers[:max_layers]
    decoder.config.num_hidden_layers = max_layers
    with torch.no_grad():
        assert torch.equal(walk(skeleton), short(input_ids=TOKENS, use_cache=False).logits)


def test_no_more_layers_than_there_are(tmp_path: Path):
    assert skeleton_of(models.tiny_llama(tmp_path / "model", layers=2), max_layers=9).num_layers == 2


def test_only_what_a_walk_needs_becomes_real(tmp_path: Path):
    """Neither decoder layers nor the vision tower stay in memory; a loaded layer is the caller's alone."""
    skeleton = skeleton_of(models.tiny_qwen3_5_moe(tmp_path / "model", layers=2))
    walk(skeleton)
    real = {name for name, parameter in skeleton.model.named_parameters() if not parameter.is_meta}
    assert real == {"model.language_model.embed_tokens.weight", "model.language_model.norm.weight", "lm_head.weight"}


def test_a_layer_belongs_to_the_caller(tmp_path: Path):
    """Nothing that is done to a layer reaches the file, or the next one who loads it."""
    folder = models.tiny_qwen3_5_moe(tmp_path / "model", layers=2)
    before = (folder / SINGLE).read_bytes()
    skeleton = skeleton_of(folder, torch.bfloat16)
    first = skeleton.load_layer(0)
    values = {name: parameter.clone() for name, parameter in first.named_parameters()}
    for parameter in first.parameters():
        parameter.data.zero_()
    again = dict(skeleton.load_layer(0).named_parameters())
    assert all(torch.equal(again[name], value) for name, value in values.items())
    assert (folder / SINGLE).read_bytes() == before


class Allocations(TorchDispatchMode):
    """Bytes that torch allocates, and the most that were alive at once. Views of a mapped file cost no memory."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.set_.source_Storage:
            self.alive.setdefault(self._key(output), 0)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and not tensor.is_meta and self._key(tensor) not in self.alive:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return output

    def _key(self, tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fused", [True, False])
def test_experts_are_never_held_twice(tmp_path: Path, monkeypatch, fused: bool, dtype: torch.dtype):
    """Each is read once, alone, into the tensor that the layer keeps."""
    skeleton = skeleton_of(models.tiny_qwen3_5_moe(tmp_path / "model", layers=2, fused=fused), dtype)
    reads = []
    read = Checkpoint.read

    def logged(self, name, part=None):
        reads.append((name, part))
        tensor = read(self, name, part)
        assert "experts." not in name or tensor.ndim == 2
        return tensor

    monkeypatch.setattr(Checkpoint, "read", logged)
    for name, parameter in skeleton.decoder.layers[0].mlp.experts.named_parameters():
        with Allocations() as allocations:
            experts = skeleton.read(f"{skeleton.layer_names[0]}.mlp.experts.{name}", tuple(parameter.shape), dtype)
        size = experts.untyped_storage().nbytes()
        assert size == parameter.numel() * dtype.itemsize
        assert size <= allocations.peak <= size * 1.25  # and one of four experts as the file has it
    reads.clear()
    skeleton.load_layer(0)
    assert len(reads) == len(set(reads))
    assert all(name.startswith("model.language_model.layers.0.") for name, _ in reads)


def test_one_expert(tmp_path: Path):
    """A fused parameter of one expert has one tensor on disk as well, of two dimensions."""
    folder = models.tiny_qwen3_moe(tmp_path / "model", layers=1, fused=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 1, "num_experts_per_tok": 1}))
    rewrite(
        folder,
        lambda tensors: {
            name: tensor[:1].clone() if name.endswith("mlp.gate.weight") else tensor
            for name, tensor in tensors.items()
            if not re.search(r"experts\.[1-9]", name)
        },
    )
    assert torch.equal(walk(skeleton_of(folder)), expected(folder))


def not_a_number(tensor: Tensor) -> Tensor:
    tensor.view(-1)[-1] = torch.nan
    return tensor


def infinite(tensor: Tensor) -> Tensor:
    tensor.view(-1)[0] = -torch.inf
    return tensor


def widened(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor], dim=-1)


@pytest.mark.parametrize(
    ("fused", "name", "damage", "message"),
    [
        (True, "self_attn.q_proj.weight", infinite, r"self_attn\.q_proj\.weight holds NaN or Inf"),
        (True, "mlp.experts.down_proj", not_a_number, r"mlp\.experts\.down_proj holds NaN or Inf"),
        (False, "mlp.experts.2.up_proj.weight", not_a_number, r"mlp\.experts\.gate_up_proj holds NaN or Inf"),
        (True, "self_attn.q_proj.weight", widened, r"q_proj\.weight has shape \(64, 128\), .* asks for \(64, 64\)"),
        (True, "mlp.experts.down_proj", widened, r"experts\.down_proj has shape \(4, 64, 128\), .* \(4, 64, 64\)"),
        (False, "mlp.experts.3.down_proj.weight", widened, r"experts\.3\.down_proj\.weight has shape \(64, 128\)"),
    ],
)
def test_damaged_weights_are_named(tmp_path: Path, fused: bool, name: str, damage, message: str):
    folder = models.tiny_qwen3_moe(tmp_path / "model", layers=1, fused=fused)
    full = f"model.layers.0.{name}"
    rewrite(folder, lambda tensors: tensors | {full: damage(tensors[full])})
    with pytest.raises(UserError, match=rf"model\.layers\.0\.{message}" if "holds" in message else message):
        skeleton_of(folder).load_layer(0)


def test_a_missing_tensor_is_named(tmp_path: Path):
    folder = models.tiny_qwen3_moe(tmp_path / "model", layers=2, fused=False)
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if "layers.1.mlp.experts.2.up_proj" not in n})
    skeleton = skeleton_of(folder)
    skeleton.load_layer(0)
    with pytest.raises(UserError, match=r"lacks model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        skeleton.load_layer(1)


@pytest.mark.parametrize("change", [{"architectures": ["NoSuchModel"]}, {"architectures": None}, {"model_type": "no"}])
def test_unknown_architectures(tmp_path: Path, change: dict):
    folder = models.tiny_llama(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match="does not know architecture"):
        skeleton_of(folder)
