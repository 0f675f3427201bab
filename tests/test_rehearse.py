"""`bench/rehearse.py` and `bench/watch.py`: models with the tensors that were published, run and watched as a whole."""

from __future__ import annotations

import gc
import json
import math
import mmap
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from safetensors.torch import save_file

from gsq.config import load_config
from gsq.errors import UserError
from gsq.model.checkpoint import Checkpoint
from gsq.model.resolve import load_tokenizer
from gsq.model.skeleton import Skeleton

BENCH = Path(__file__).parent.parent / "bench"
SMALL = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
}  # fmt: skip


def program(name: str) -> ModuleType:
    """A program of `bench/`, whose folder is where modules are looked for only meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        return import_module(name)


synthetic, rehearse, watch = map(program, ("synthetic", "rehearse", "watch"))
MODELS = synthetic.MODELS


# The models


@pytest.mark.parametrize(
    ("name", "nbytes", "tensors"),
    [("Qwen3.6-35B-A3B", 71.90e9, 1045), ("Qwen3.6-27B", 55.56e9, 1199), ("Qwen3-8B", 16.38e9, 399)],
)
def test_whole_models_have_the_published_bytes_and_tensors(name: str, nbytes: float, tensors: int):
    """Of their indices on the hub, without a weight being drawn."""
    found = synthetic.layout(MODELS[name], MODELS[name].config())
    assert 2 * sum(map(math.prod, found.values())) == pytest.approx(nbytes, abs=0.005e9)
    assert len(found) == tensors


def test_names_and_shapes_are_those_of_the_hub():
    found = synthetic.layout(MODELS["Qwen3.6-35B-A3B"], MODELS["Qwen3.6-35B-A3B"].config(4))
    layer = "model.language_model.layers.{}."
    assert found[layer.format(0) + "mlp.experts.gate_up_proj"] == (256, 1024, 2048)
    assert found[layer.format(0) + "mlp.experts.down_proj"] == (256, 2048, 512)
    assert found[layer.format(2) + "linear_attn.in_proj_qkv.weight"] == (8192, 2048)
    assert found[layer.format(3) + "self_attn.q_proj.weight"] == (8192, 2048)  # queries and their gates
    assert found["mtp.layers.0.mlp.experts.down_proj"] == (256, 2048, 512)
    assert found["mtp.layers.0.self_attn.k_proj.weight"] == (512, 2048)
    assert found["mtp.fc.weight"] == (2048, 4096)
    assert found["model.language_model.embed_tokens.weight"] == found["lm_head.weight"] == (248_320, 2048)
    assert layer.format(4) + "mlp.gate.weight" not in found
    assert sum(name.startswith("model.visual.blocks.") for name in found) == 27 * 12


@pytest.mark.parametrize("layers", [1, 4])
def test_layers_have_the_kinds_of_the_published_model(layers: int):
    for name in ("Qwen3.6-35B-A3B", "Qwen3.6-27B"):
        kinds = MODELS[name].config(layers)["text_config"]["layer_types"]
        assert kinds == MODELS[name].config()["text_config"]["layer_types"][:layers]
    assert set(kinds) == {"linear_attention", "full_attention"} or layers < 4


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts of two layers and two vision blocks."""
    published = MODELS["Qwen3.6-35B-A3B"]
    config = published.config(2, vision=1, **SMALL, **EXPERTS)
    return synthetic.write_checkpoint(published, config, tmp_path_factory.mktemp("small") / "model")


def test_a_checkpoint_holds_the_layout_and_weights_that_work(small: Path):
    checkpoint = Checkpoint.open(small)
    published = MODELS["Qwen3.6-35B-A3B"]
    expected = synthetic.layout(published, published.config(2, vision=1, **SMALL, **EXPERTS))
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == expected
    assert {info.dtype for info in checkpoint.tensors.values()} == {torch.bfloat16}
    model = Skeleton(checkpoint, torch.device("cpu"), torch.float32).whole()
    tokens = torch.tensor([load_tokenizer(small)("Grüße, bytes\n")["input_ids"]])
    logits = model(input_ids=tokens, use_cache=False).logits
    assert logits.shape == (1, 15, 300)
    assert 0.01 < logits.std() < 10
    deviation = checkpoint.read("model.language_model.layers.0.mlp.experts.gate_up_proj").float().std()
    assert deviation == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(*(checkpoint.read(f"model.language_model.layers.{i}.mlp.gate.weight") for i in (0, 1)))


def test_a_hollow_checkpoint_has_the_layout_and_takes_no_room(tmp_path: Path):
    published = MODELS["Qwen3.6-35B-A3B"]
    config = published.config(2, vision=1, **SMALL, **EXPERTS)
    folder = synthetic.write_hollow(published, config, tmp_path / "hollow")
    checkpoint = Checkpoint.open(folder)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    assert shapes == synthetic.layout(published, config)
    assert not any(checkpoint.read(name).any() for name in shapes)
    files = [path.stat() for path in folder.glob("*.safetensors")]
    assert sum(file.st_size for file in files) > checkpoint.nbytes
    assert load_tokenizer(folder)("text")["input_ids"]
    wide = synthetic.write_hollow(MODELS["Qwen3-8B"], MODELS["Qwen3-8B"].config(1), tmp_path / "wide")
    assert sum(path.stat().st_blocks * 512 for path in wide.glob("*.safetensors")) < Checkpoint.open(wide).nbytes / 1000


def test_text_survives_the_tokenizer(small: Path):
    tokenizer = load_tokenizer(small)
    text = "Ein Satz, 字 und\n\t🏖 " + "".join(map(chr, range(32, 127)))
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert max(ids) < tokenizer.eos_token_id == 256
    assert tokenizer.decode(ids) == text
    with pytest.raises(ValueError, match="a vocabulary of 256 has no room"):
        synthetic.byte_tokenizer(256)


def test_weights_that_an_architecture_does_not_initialize_are_refused(small: Path):
    model = Skeleton(Checkpoint.open(small), torch.device("cpu"), torch.bfloat16).model
    block = torch.nn.Module()
    block.forgotten = torch.nn.Parameter(torch.empty(3, device="meta"))
    with pytest.raises(ValueError, match="does not initialize forgotten"):
        synthetic.drawn(block, model)


# The rehearsal


def test_a_rehearsal_tells_time_memory_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = MODELS["Qwen3.6-35B-A3B"]
    tiny = synthetic.Published(small.architecture, small.model_type, SMALL | EXPERTS, recipe=small.recipe)
    monkeypatch.setitem(MODELS, "tiny", tiny)
    settings = ["plan.preset=null", r"plan.rules=[{match: mlp\.experts\., bits: 2, group_size: 32}]"]
    rehearse.main(tmp_path, "tiny", layers=2, budget="small", vision=0, vocab=260, overrides=settings)
    found = json.loads((tmp_path / "rehearsal.json").read_text())
    assert [layer["kind"] for layer in found["by_layer"]] == ["linear_attention"] * 2
    assert all(layer["seconds"]["total"] >= layer["seconds"]["refine"] > 0 for layer in found["by_layer"])
    assert found["bytes"]["checkpoint"] == Checkpoint.open(tmp_path / "tiny-2").nbytes
    assert found["bytes"]["layers of the run"] < found["bytes"]["export"] < found["bytes"]["checkpoint"] * 1.2
    assert found["bytes"]["one stream of hidden states"] in (4 * 64 * 64 * 2, 4 * 64 * 64 * 4)
    memory = found["memory"]
    assert 50e6 < memory["peak"]["anon"] <= memory["peak"]["resident"]
    assert memory["peak"]["anon"] >= max(seen["anon"] for seen in memory["places"].values()) / watch.GROWTH
    assert any("LayerWork" in place for place in memory["places"])
    text = (tmp_path / "rehearsal.md").read_text()
    assert "2 layers, but not as published: vocab_size 260, vision 0" in text
    assert text.count("linear_attention") == 2


def test_another_model_in_the_folder_is_refused(small: Path):
    published = MODELS["Qwen3.6-35B-A3B"]
    config = published.config(2, vision=1, **SMALL, **EXPERTS)
    assert rehearse.checkpoint(published, config, small) == small
    with pytest.raises(UserError, match="holds another model; remove it"):
        rehearse.checkpoint(published, config | {"dtype": "float16"}, small)


def test_options_make_a_model_smaller():
    assert rehearse.smaller(MODELS["Qwen3.6-27B"]) == {}
    assert rehearse.smaller(MODELS["Qwen3.6-35B-A3B"], experts=16, vocab=500) == {
        "vocab_size": 500, "num_experts": 16, "num_experts_per_tok": 8,
    }  # fmt: skip
    assert rehearse.smaller(MODELS["Qwen3.6-35B-A3B"], experts=4)["num_experts_per_tok"] == 4
    with pytest.raises(typer.BadParameter, match="has no experts"):
        rehearse.smaller(MODELS["Qwen3.6-27B"], experts=4)


@pytest.mark.parametrize("budget", rehearse.BUDGETS)
@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].recipe])
def test_budgets_fit_the_recipes(name: str, budget: str):
    recipe = BENCH.parent / "configs" / MODELS[name].recipe
    config = load_config(recipe, [f"{key}={value}" for key, value in rehearse.BUDGETS[budget].items()])
    assert config.model.name.endswith(name)
    training = config.calib.windows - config.calib.validation
    assert budget != "reference" or (training, config.refine.steps, training / config.refine.windows) == (4096, 640, 64)


# The watch


PROGRAM = """
def train():
    return [place for place in walk()][0]

def walk():
    yield (lambda: Layer().run(9))()

class Layer:
    def run(self, depth):
        return self.run(depth - 1) if depth else look()
"""


def test_places_are_paths_of_functions_below_train():
    scope = {"look": lambda: watch.place_of(sys._getframe())}
    exec(compile(PROGRAM, f"{watch.PACKAGE}/made_up.py", "exec"), scope)
    assert scope["train"]() == "walk > Layer.run > Layer.run > Layer.run"
    assert scope["Layer"]().run(0) == watch.START  # nobody trains


def test_tensors_are_listed_once_by_storage_and_not_if_a_file_backs_them(tmp_path: Path):
    save_file({"stored": torch.zeros(1000, 333)}, tmp_path / "file.safetensors")
    mapped = torch.from_file(str(tmp_path / "file.safetensors"), size=1000 * 77, dtype=torch.float32)
    held = [torch.zeros(1000, 777) for _ in range(2)]
    held.append(torch.frombuffer(mmap.mmap(-1, 4 * 777_000), dtype=torch.float32).view(1000, 777))
    views = [tensor[1:] for tensor in held]
    kinds = {(kind["dtype"], tuple(kind["shape"])): kind for kind in watch.tensors()}
    kind = kinds["float32", (1000, 777)]
    assert (kind["count"], kind["bytes"]) == (3, 3 * 4 * 777_000)
    assert ("float32", (999, 777)) not in kinds
    assert ("float32", (77_000,)) not in kinds
    assert len(mapped) == 77_000
    assert len(views) == 3


def test_the_watch_sees_a_peak_and_where(tmp_path: Path):
    """A tensor of 200 MB, while the main thread is outside the package."""
    gc.collect()  # of what other tests left, which would otherwise be freed meanwhile
    look = watch.Watch(tmp_path / "memory.json")
    look.look()
    before = look.peak["anon"]
    big = torch.frombuffer(mmap.mmap(-1, 200_000_000, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.float32)
    big.fill_(1)  # fresh pages: freed ones are kept
    look.look()
    del big
    look.look()
    look._over.set()
    look.write()
    found = json.loads((tmp_path / "memory.json").read_text())
    assert 0.15e9 < found["peak"]["anon"] - before < 0.3e9
    assert found["peak"]["tensors"][0] == {"dtype": "float32", "shape": [50_000_000], "count": 1, "bytes": 200_000_000}
    assert list(found["places"]) == [watch.START]


def test_a_failed_run_is_reported_with_what_it_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "watch.py").write_text("import sys; open(sys.argv[1], 'w').write(sys.argv[-1]); sys.exit(3)")
    monkeypatch.setattr(rehearse, "ROOT", tmp_path)
    with pytest.raises(UserError, match=r"gsq quantize ended with 3; what it held at its peak is in .*memory\.json"):
        rehearse.watched(tmp_path / "recipe.yaml", ["seed=1"], tmp_path)
    assert (tmp_path / "memory.json").read_text() == "seed=1"
