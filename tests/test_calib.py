"""What calibration sees: hidden states window by window, what each Linear reads, and the tokens themselves."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations import moe

from gsq.calib import tokens as calib_tokens
from gsq.calib.observe import ObserveLinears, shared_inputs
from gsq.calib.stream import Calls, Stream
from gsq.calib.tokens import calibration_tokens, stored_tokens
from gsq.errors import UserError
from gsq.memory import Batch
from gsq.model.checkpoint import Checkpoint
from gsq.model.skeleton import Skeleton
from gsq.model.targets import EXPERT_PARTS

CPU = torch.device("cpu")
WINDOWS, LENGTH = 5, 12


@pytest.fixture(scope="module")
def skeletons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Skeleton]:
    folder = tmp_path_factory.mktemp("models")
    builders = {
        "llama": models.tiny_llama,
        "moe": models.tiny_qwen3_moe,
        "hybrid": models.tiny_qwen3_5,
        "flagship": models.tiny_qwen3_5_moe,
    }
    built = {name: Checkpoint.open(build(folder / name, layers=2)) for name, build in builders.items()}
    return {name: Skeleton(checkpoint, CPU, torch.float32) for name, checkpoint in built.items()}


def stream_of(skeleton: Skeleton, batch: int = 2, tokens: Tensor | None = None) -> Stream:
    return Stream(skeleton, models.random_tokens(WINDOWS, LENGTH) if tokens is None else tokens, Batch(batch))


def record(stream: Stream, layer: nn.Module, index: int, path: str) -> tuple[Calls, list[Tensor]]:
    """The calls of a module of the layer, and its outputs, `[windows, length, H]`, as a plain hook sees them."""
    calls, seen, size = Calls(stream.tokens.shape[1], len(stream.tokens), stream.memory), [], 0

    def plain(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        seen.extend(hidden.reshape(size, LENGTH, -1).clone())

    module = layer.get_submodule(path)
    handles = [
        module.register_forward_hook(calls.hook(lambda: size), with_kwargs=True),
        module.register_forward_hook(plain),
    ]
    for part in stream.parts():
        size = part.stop - part.start
        stream.run(layer, index, part)
    for handle in handles:
        handle.remove()
    return calls, seen


MODULES = [
    ("llama", 0, ""), ("llama", 1, "self_attn"), ("llama", 1, "mlp"), ("moe", 1, "mlp"), ("moe", 1, "mlp.experts"),
    ("hybrid", 0, "linear_attn"), ("hybrid", 1, "self_attn"), ("hybrid", 1, ""),
    ("flagship", 0, ""), ("flagship", 0, "linear_attn"), ("flagship", 1, "self_attn"), ("flagship", 1, "mlp.experts"),
    ("flagship", 1, "mlp"), ("flagship", 1, "mlp.shared_expert"),
]  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize(("model", "index", "path"), MODULES)
def test_any_windows_can_be_run_again(skeletons, model: str, index: int, path: str, batch: int):
    stream = stream_of(skeletons[model], batch)
    layer = stream.skeleton.load_layer(index)
    calls, seen = record(stream, layer, index, path)
    assert torch.equal(calls.outputs, torch.stack(seen))
    module = layer.get_submodule(path)
    for subset in ([3], [4, 0], [2, 2, 1], [0, 1, 2, 3, 4]):
        again = calls(module, torch.tensor(subset))
        torch.testing.assert_close(again, calls.outputs[subset], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(again[0], calls.outputs[subset[0] - 1], atol=1e-2)


@pytest.mark.parametrize("path", ["", "self_attn", "mlp", "mlp.experts"])
@pytest.mark.parametrize("same", [2, 3, WINDOWS])
def test_windows_that_are_alike(skeletons, same: int, path: str):
    """Repeated text gives equal windows; they are still calls of their own."""
    tokens = models.random_tokens(WINDOWS, LENGTH)
    tokens[:same] = tokens[0]
    stream = stream_of(skeletons["moe"], 2, tokens)
    layer = stream.skeleton.load_layer(0)
    calls, seen = record(stream, layer, 0, path)
    for subset in ([4], [1, 3, 4], [0, 1]):
        again = calls(layer.get_submodule(path), torch.tensor(subset))
        torch.testing.assert_close(again, torch.stack(seen)[subset], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize("model", ["llama", "flagship"])
def test_streams_flow_alike_in_any_batches(skeletons, model: str, batch: int):
    skeleton = skeletons[model]
    stream = stream_of(skeleton, batch)
    assert [part.stop - part.start for part in stream.parts()] == {
        1: [1] * 5, 2: [2, 2, 1], 3: [3, 2], 8: [5],
    }[batch]  # fmt: skip
    hidden, kwargs = skeleton.embed(stream.tokens)
    assert torch.equal(stream.hidden, hidden)
    for index in range(2):
        layer = skeleton.load_layer(index)
        hidden = skeleton.run_layer(layer, hidden, kwargs[index])
        torch.testing.assert_close(stream.outputs(layer, index), hidden, rtol=1e-5, atol=1e-5)
        one = stream.run(layer, index, slice(1, 4))  # a size that no micro-batch has had
        torch.testing.assert_close(one, hidden[1:4], rtol=1e-5, atol=1e-5)
        stream.advance(layer, index)
        torch.testing.assert_close(stream.hidden, hidden, rtol=1e-5, atol=1e-5)


def test_a_copy_goes_its_own_way(skeletons):
    stream = stream_of(skeletons["llama"])
    before, other = stream.hidden.clone(), stream.copy()
    other.advance(stream.skeleton.load_layer(0), 0)
    assert torch.equal(stream.hidden, before)
    assert not torch.equal(other.hidden, before)


def linears_of(layer: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


def targets_of(layer: nn.Module) -> dict[str, Tensor]:
    """Weights of Linears and fused experts."""
    found = {name + ".weight": module.weight for name, module in linears_of(layer).items()}
    parameters = layer.named_parameters()
    return found | {n: p for n, p in parameters if p.ndim == 3 and n.rpartition(".")[2] in EXPERT_PARTS}


@pytest.mark.parametrize("model", ["llama", "hybrid", "flagship"])
@pytest.mark.parametrize("index", [0, 1])
def test_linears_are_seen_as_hooks_see_them(skeletons, model: str, index: int):
    stream = stream_of(skeletons[model])
    layer = stream.skeleton.load_layer(index)
    linears = linears_of(layer)
    hooked: dict[str, list[Tensor]] = {name + ".weight": [] for name in linears}
    for name, module in linears.items():
        module.register_forward_hook(lambda _, args, __, n=name: hooked[n + ".weight"].append(args[0].clone()))
    plain = stream.outputs(layer, index)
    expected = {name: torch.cat([x.flatten(0, -2) for x in xs]) for name, xs in hooked.items()}
    seen: dict[str, list[Tensor]] = {name: [] for name in expected}

    def see(name: str, expert: int, x: Tensor) -> None:
        assert expert == 0
        seen[name].append(x.clone())

    with ObserveLinears({name: layer.get_parameter(name) for name in expected}, see):
        observed = stream.outputs(layer, index)
    assert torch.equal(observed, plain)
    assert len(expected) >= 5
    for name, x in expected.items():
        assert torch.equal(torch.cat(seen[name]), x), name
        assert len(x) == WINDOWS * LENGTH


def routed_by_a_loop(stream: Stream, layer: nn.Module, index: int) -> dict[str, list[Tensor]]:
    """What each expert's two products read, token by token, from the router's choices and the SwiGLU formula."""
    experts = layer.mlp.experts
    caught = []
    handle = experts.register_forward_hook(lambda _, args, kwargs, __: caught.append(args), with_kwargs=True)
    for part in stream.parts():
        stream.run(layer, index, part)
    handle.remove()
    gate_up, down = ([[] for _ in experts.gate_up_proj] for _ in range(2))
    for hidden, chosen, _ in caught:
        for token, choices in zip(hidden, chosen.tolist(), strict=True):
            for expert in choices:
                gate, up = (experts.gate_up_proj[expert] @ token).chunk(2)
                gate_up[expert].append(token)
                down[expert].append(F.silu(gate) * up)
    return {"mlp.experts.gate_up_proj": gate_up, "mlp.experts.down_proj": down}


@pytest.mark.parametrize("product", ["loop", "grouped", "grouped without a kernel"])
@pytest.mark.parametrize("model", ["moe", "flagship"])
def test_experts_see_the_tokens_routed_to_them(skeletons, model: str, product: str, monkeypatch):
    stream = stream_of(skeletons[model], batch=3)
    layer = stream.skeleton.load_layer(1)
    config = layer.mlp.experts.config
    assert config._experts_implementation == "grouped_mm"
    if product == "loop":
        monkeypatch.setattr(config, "_experts_implementation_internal", "eager")
    if product == "grouped without a kernel":
        monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *args, **kwargs: False)
    expected = routed_by_a_loop(stream, layer, 1)
    seen = {name: [[] for _ in range(models.EXPERTS)] for name in expected}
    with ObserveLinears({n: layer.get_parameter(n) for n in expected}, lambda n, e, x: seen[n][e].append(x.clone())):
        stream.outputs(layer, 1)
    counts = set()
    for name, experts in expected.items():
        for wanted, got in zip(experts, map(torch.cat, seen[name]), strict=True):
            assert got.shape == (len(wanted), layer.get_parameter(name).shape[-1])
            ordered = [rows[rows[:, 0].argsort()] for rows in (torch.stack(wanted), got)]
            torch.testing.assert_close(*ordered, rtol=1e-4, atol=1e-5)
            counts.add(len(wanted))
        assert sum(map(len, experts)) == WINDOWS * LENGTH * 2  # two experts a token
    assert len(counts) > 1


def test_linear_called_by_keywords():
    weight, x, seen = torch.randn(3, 4), torch.randn(2, 5, 4), []
    with ObserveLinears({"w": weight}, lambda name, expert, x: seen.append((name, x))):
        F.linear(input=x, weight=weight)
        F.linear(x, weight=weight, bias=None)
        F.linear(x, torch.randn(3, 4))
    assert [name for name, _ in seen] == ["w", "w"]
    assert all(torch.equal(found, x.flatten(0, 1)) for _, found in seen)


@pytest.mark.parametrize(
    ("model", "index", "groups"),
    [
        (
            "llama",
            0,
            ["self_attn: q_proj k_proj v_proj", "self_attn: o_proj", "mlp: gate_proj up_proj", "mlp: down_proj"],
        ),
        (
            "hybrid",
            0,
            ["linear_attn: in_proj_qkv in_proj_z in_proj_b in_proj_a", "linear_attn: out_proj",
             "mlp: gate_proj up_proj", "mlp: down_proj"],
        ),
        ("moe", 1, ["self_attn: q_proj k_proj v_proj", "self_attn: o_proj", "mlp: experts.gate_up_proj",
                    "mlp: experts.down_proj"]),
        (
            "flagship",
            1,
            ["self_attn: q_proj k_proj v_proj", "self_attn: o_proj", "mlp: experts.gate_up_proj",
             "mlp: experts.down_proj", "mlp: shared_expert.gate_proj shared_expert.up_proj shared_expert_gate",
             "mlp: shared_expert.down_proj"],
        ),
    ],
)  # fmt: skip
def test_targets_that_read_one_input(skeletons, model: str, index: int, groups: list[str]):
    stream = stream_of(skeletons[model])
    layer = stream.skeleton.load_layer(index)
    found = shared_inputs(layer, targets_of(layer), lambda: stream.run(layer, index, slice(0, 2)))
    expected = []
    for group in groups:
        prefix, _, names = group.partition(": ")
        expected.append({f"{prefix}.{name}".removesuffix(".weight") for name in names.split()})
    assert sorted(map(sorted, expected)) == sorted(sorted(n.removesuffix(".weight") for n in group) for group in found)
    firsts = [group[0].partition(".")[0] for group in found]
    assert firsts == sorted(firsts, key=["input", "linear_attn", "self_attn", "mlp"].index)  # in the order of use
    flat = [name for group in found for name in group]
    for earlier, later in (("q_proj", "o_proj"), ("gate_proj", "down_proj"), ("gate_up_proj", "experts.down_proj")):
        places = [[place for place, name in enumerate(flat) if part in name] for part in (earlier, later)]
        assert not all(places) or places[0][0] < places[1][0]


def test_targets_that_nothing_reads_come_last():
    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.first, self.second = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(x) + self.first(x.clone())

    module, x = Forgetful(), torch.randn(2, 4)
    groups = shared_inputs(module, ["unused.weight", "first.weight", "second.weight"], lambda: module(x))
    assert groups == [["second.weight"], ["first.weight"], ["unused.weight"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer of one token per character."""
    return models.tiny_llama(tmp_path_factory.mktemp("tokens") / "model")


def read_tokens(source: object, folder: Path, windows: int = 2, length: int = 4, seed: int = 0) -> list[str]:
    """The windows that `source` gives, as text, `|` between documents."""
    tokens = calibration_tokens(str(source), folder, windows, length, seed, CPU, torch.float32)
    assert tokens.shape == (windows, length)
    assert tokens.dtype == torch.int64
    return [models.tiny_tokenizer().decode(row).replace("</s>", "|") for row in tokens]


def test_a_local_text(tmp_path: Path, folder: Path):
    (tmp_path / "a.txt").write_text("abcdefghij")
    assert read_tokens(tmp_path / "a.txt", folder) == ["abcd", "efgh"]


def test_a_glob_reads_files_in_order(tmp_path: Path, folder: Path, monkeypatch):
    for name in "bac":
        (tmp_path / f"{name}.txt").write_text(name * 3)
    (tmp_path / "no.md").write_text("never")
    (tmp_path / "folder.txt").mkdir()
    assert read_tokens(tmp_path / "*.txt", folder) == ["aaa|", "bbb|"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_tokens("~/*.txt", folder) == ["aaa|", "bbb|"]
    assert read_tokens("~/no.md", folder, windows=1) == ["neve"]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"text": "abc"}, {"text": "defgh"}], ["abc|", "defg"]),
        ([{"content": "abc", "id": 7}, {"other": None, "text": "defgh"}], ["abc|", "defg"]),
        ([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bcdefg"}]}],
         ["a\n\nb", "cdef"]),
        ([{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "bcdefg"}]}],
         ["a\n\nb", "cdef"]),
        ([{"messages": [{"role": "assistant", "content": None}, {"role": "tool", "content": "abcdefgh"}]}],
         ["\n\nab", "cdef"]),
        ([{"text": "abcdefgh", "response": None}], ["abcd", "efgh"]),
        ([{"question": "abc", "answer": "defgh"}], ["abc\n", "\ndef"]),
    ],
)  # fmt: skip
def test_jsonl(tmp_path: Path, folder: Path, rows: list[dict], expected: list[str]):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_tokens(tmp_path / "a.jsonl", folder) == expected


@pytest.mark.parametrize(
    "line", ['{"text": "cut', '{"title": "abc"}', '["text"]', "7", '{"text": null}', '{"text": [3]}']
)
def test_broken_jsonl_is_named(tmp_path: Path, folder: Path, line: str):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line)
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: .*text"):
        read_tokens(tmp_path / "a.jsonl", folder)


def test_too_little_text(tmp_path: Path, folder: Path):
    (tmp_path / "a.txt").write_text("a" * 23)
    assert read_tokens(tmp_path / "a.txt", folder, windows=1, length=23) == ["a" * 23]
    with pytest.raises(UserError, match=r"a\.txt holds 23 tokens, enough for 2 windows of 8, not 3"):
        read_tokens(tmp_path / "a.txt", folder, windows=3, length=8)


def test_sources_that_are_no_text(tmp_path: Path, folder: Path):
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match=r"image\.txt.*UTF-8"):
        read_tokens(tmp_path / "image.txt", folder)
    with pytest.raises(UserError, match="is a folder; give its files"):
        read_tokens(tmp_path, folder)
    for source in (tmp_path / "none.txt", "none.jsonl", tmp_path / "*.none", "~/nowhere/none"):
        with pytest.raises(UserError, match="does not exist"):
            read_tokens(source, folder)


def sampled(folder: Path, seed: int, windows: int = 5, length: int = 9) -> Tensor:
    return calibration_tokens("self", folder, windows, length, seed, CPU, torch.float32)


def test_text_from_the_model_itself(folder: Path, monkeypatch):
    state = torch.random.get_rng_state()
    first = sampled(folder, seed=1)
    assert first.shape == (5, 9)
    assert first.dtype == torch.int64
    assert 0 <= first.min() <= first.max() < models.VOCAB
    assert len(first.unique(dim=0)) == 5
    assert torch.equal(first, sampled(folder, seed=1))
    assert not torch.equal(first, sampled(folder, seed=2))
    assert torch.equal(torch.random.get_rng_state(), state)
    monkeypatch.setattr(calib_tokens, "SELF_BATCH", 2)  # 2 + 2 + 1
    parts = sampled(folder, seed=1)
    assert parts.shape == (5, 9)
    assert len(parts.unique(dim=0)) == 5


def test_the_model_writes_what_it_finds_likely(tmp_path: Path):
    """With a head that always says the same, it says the same: sampling goes through the model."""
    folder = models.tiny_llama(tmp_path / "model", tied=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][:] = 0
    tensors["lm_head.weight"][:] = 0
    save_file(tensors, folder / "model.safetensors")
    tokens = sampled(folder, seed=0, windows=40, length=9)
    assert len(tokens.unique()) > 0.9 * models.VOCAB  # all are equally likely, end of text included
    tensors["model.embed_tokens.weight"][:] = tensors["model.embed_tokens.weight"].abs() + 1
    tensors["model.norm.weight"][:] = 1
    tensors["lm_head.weight"][17] = 100
    for name in tensors:
        if "o_proj" in name or "down_proj" in name:
            tensors[name][:] = 0
    save_file(tensors, folder / "model.safetensors")
    assert (sampled(folder, seed=0)[:, 1:] == 17).all()


class FakeStream(list):
    """A streamed dataset: rows, and what was asked of them."""

    def shuffle(self, **options) -> FakeStream:
        self.shuffled = options
        return self


@pytest.fixture
def hub(monkeypatch) -> SimpleNamespace:
    """A hub with one dataset; `calls` are the arguments of `load_dataset`."""
    fake = SimpleNamespace(rows=FakeStream([{"text": "abc"}, {"text": "defgh"}]), calls=[])

    def load_dataset(*args, **kwargs) -> FakeStream:
        fake.calls.append((args, kwargs))
        return fake.rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return fake


@pytest.mark.parametrize(
    ("source", "repository", "name"),
    [
        ("fineweb-edu", "HuggingFaceFW/fineweb-edu", "sample-10BT"),
        ("open-thoughts", "open-thoughts/OpenThoughts-114k", "default"),
        ("someone/texts", "someone/texts", None),
    ],
)
def test_hub_datasets_are_streamed(hub: SimpleNamespace, folder: Path, source: str, repository: str, name: str):
    assert read_tokens(source, folder, seed=5) == ["abc|", "defg"]
    assert hub.calls == [((repository, name), {"split": "train", "streaming": True})]
    assert hub.rows.shuffled["seed"] == 5


def test_hub_datasets_are_read_no_further_than_needed(hub: SimpleNamespace, folder: Path, monkeypatch):
    def endless():
        yield {"text": "abcdefgh"}
        pytest.fail("8 tokens were enough")

    monkeypatch.setattr(FakeStream, "__iter__", lambda self: endless())
    assert read_tokens("someone/texts", folder) == ["abcd", "efgh"]


def test_hub_datasets_that_are_too_small(hub: SimpleNamespace, folder: Path):
    with pytest.raises(UserError, match="someone/texts holds 9 tokens, enough for 2 windows of 4, not 3"):
        read_tokens("someone/texts", folder, windows=3)


@pytest.mark.parametrize("error", [OSError("no network\nat all"), ValueError("no such split"), RuntimeError("scripts")])
def test_hub_datasets_that_cannot_be_had(folder: Path, monkeypatch, error: Exception):
    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    reason = str(error).splitlines()[0]
    with pytest.raises(UserError, match=rf"'someone/texts'.*\({reason}\).*fineweb-edu, c4, open-thoughts.*`self`"):
        read_tokens("someone/texts", folder)


def test_hub_datasets_without_text(hub: SimpleNamespace, folder: Path):
    hub.rows[:] = [{"label": 3}]
    with pytest.raises(UserError, match=r"'someone/texts'.*its rows have none of text, content"):
        read_tokens("someone/texts", folder)


def test_another_runs_tokens_serve_if_they_are_enough(tmp_path: Path):
    tokens = torch.arange(60).view(6, 10)
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    found = stored_tokens(tmp_path / "tokens.safetensors", 2, 4)
    assert torch.equal(found, tokens[:2, :4])
    with pytest.raises(UserError, match=r"holds 6 windows of 10 tokens, not 7 of 10; lower calib\.windows"):
        stored_tokens(tmp_path / "tokens.safetensors", 7, 10)
