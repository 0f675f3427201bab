"""`gsq verify --kernels`: packed products against float64 ones, and the packed model against the decoded one."""

from __future__ import annotations

import math
import random
import shutil
import string
import weakref
from collections.abc import Callable
from pathlib import Path

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from gsq import cli
from gsq.codebook import Codebook, QuantizedTensor
from gsq.config import parse_config
from gsq.errors import UserError
from gsq.export.base import export_run
from gsq.export.dequantize import dequantize
from gsq.kernels.packed import PackedWeight, packed_matmul
from gsq.kernels.packing import pack_dense
from gsq.model.checkpoint import SINGLE
from gsq.model.skeleton import Skeleton, aliases
from gsq.run import EXPORT, Run
from gsq.serve import modules
from gsq.serve.verify import KernelReport, product_error, rounding_limit, verify_kernels
from gsq.train import train

CPU, WINDOWS, LENGTH = torch.device("cpu"), 5, 16
PROJECTIONS = r"layers\.\d+\..*(_proj|experts|in_proj_\w+)"
INTEGERS = [{"match": PROJECTIONS, "bits": 2, "group_size": 32}]
TQ = [{"match": PROJECTIONS, "codebook": "tq", "bits": 3, "group_size": 32}]
EMBEDDING = {"match": "embed_tokens", "role": "embedding", "codebook": "tq", "bits": 4, "group_size": 32}
HEAD = {"match": "lm_head", "role": "head", "codebook": "tq", "bits": 4, "group_size": 32}
CASES = {  # model, rules, format, weights with packed products
    "humming": (models.tiny_llama, INTEGERS, "humming", 14),
    "humming, experts": (models.tiny_qwen3_moe, INTEGERS, "humming", 12),
    "tq, tied": (models.tiny_llama, [*TQ, EMBEDDING], "tq", 14),
    "tq, head": (models.tiny_qwen3, [*TQ, HEAD], "tq", 15),
    "tq, fused experts": (lambda folder: models.tiny_qwen3_5_moe(folder, layers=2), TQ, "tq", 19),
    "compressed-tensors": (models.tiny_llama, INTEGERS, "compressed-tensors", 14),
}
Finished = Callable[[str], Run]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Runs with their exports, rounded to nearest, each done once."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "text.txt"
    text.write_text("".join(random.Random(0).choices(string.ascii_letters + string.punctuation, k=500)))
    runs: dict[str, Run] = {}

    def finish(case: str) -> Run:
        if case not in runs:
            runs[case] = quantized(folder / case, text, case)
        return runs[case]

    return finish


def quantized(folder: Path, text: Path, case: str) -> Run:
    make, rules, format, _ = CASES[case]
    config = {
        "model": {"name": str(make(folder / "source"))},
        "plan": {"rules": rules},
        "calib": {"source": str(text), "windows": WINDOWS, "length": LENGTH, "validation": 1, "batch": 2},
        "init": {"method": "rtn", "polish": 0},
        "refine": {"enabled": False},
        "export": {"format": format},
        "dtype": "float32",
    }
    return train(parse_config(config), folder / "run")


def check(run: Run, folder: Path | None = None, dtype: torch.dtype = torch.float32) -> KernelReport:
    return verify_kernels(folder or run.folder / EXPORT, run, CPU, dtype)


@torch.no_grad()
def perplexity(folder: Path, run: Run) -> float:
    """Of plain transformers, in float32, with weights that are not rounded to the bfloat16 of a dense checkpoint.

    That rounding sends some tokens to other experts.
    """
    model, tokens = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), run.tokens()
    parameters = dict(model.named_parameters())
    for entry in run.plan.targets():
        parameter = next(parameters[alias] for alias in aliases(entry.name) if alias in parameters)
        exact = run.load(entry.name).dequantize().view_as(parameter)
        assert torch.equal(parameter, exact.bfloat16().float())
        parameter.copy_(exact)
    log_probs = model(tokens).logits[:, :-1].double().log_softmax(-1)
    return math.exp(-float(log_probs.gather(-1, tokens[:, 1:, None]).mean()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_good_export_passes(case: str, dtype: torch.dtype, finished: Finished, tmp_path: Path):
    run = finished(case)
    report = check(run, dtype=dtype)
    products = [name for layer in report.layers for name in layer.errors]
    assert len(products) == CASES[case][3]
    assert len(products) + len(report.decoded) == len(run.plan.targets())
    for layer in report.layers:
        assert all(0 < error <= layer.limits[name] for name, error in layer.errors.items())
    assert report.quality["kl"] < (1e-7 if dtype == torch.float32 else 1e-2)
    assert (report.format, report.device) == (CASES[case][2], "cpu")
    assert f"{len(products)} packed weights" in str(report)
    if dtype == torch.float32:
        dense = perplexity(dequantize(run.folder / EXPORT, tmp_path / "dense"), run)
        assert report.quality["base_perplexity"] == pytest.approx(dense, rel=1e-6)


def test_on_the_kernels(kernels: torch.device, finished: Finished, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gsq.serve.verify.TOKENS", 1)  # a single window
    run = finished("humming")
    report = verify_kernels(run.folder / EXPORT, run, kernels, torch.float32)
    assert report.quality["tokens"] == LENGTH - 1
    assert sum(len(layer.errors) for layer in report.layers) == 14


# What does not pass


def flip_a_word(words: Tensor) -> None:
    words.view(-1).view(torch.int32)[3] ^= -1


def change_a_scale(scales: Tensor) -> None:
    scales.view(-1)[5] = scales.view(-1)[5] * 1.5 + 0.01


DAMAGES = [  # run, tensor of its export, damage, weight of the model
    ("humming", "model.layers.1.mlp.up_proj.weight", flip_a_word, "model.layers.1.mlp.up_proj.weight"),
    ("humming", "model.layers.0.self_attn.k_proj.weight_scale", change_a_scale, "layers.0.self_attn.k_proj.weight"),
    ("humming, experts", "model.layers.1.mlp.experts.2.up_proj.weight", flip_a_word, "layers.1.mlp.experts.gate_up"),
    ("humming, experts", "model.layers.1.mlp.experts.0.down_proj.weight_scale", change_a_scale, "1.mlp.experts.down"),
    ("tq, head", "model.layers.0.mlp.down_proj.weight.tq_packed", flip_a_word, "layers.0.mlp.down_proj.weight"),
    ("tq, head", "lm_head.weight.tq_norms", change_a_scale, "lm_head.weight"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("case", "tensor", "damage", "weight"), DAMAGES)
def test_a_changed_export_does_not_pass(
    case: str, tensor: str, damage: Callable, weight: str, dtype: torch.dtype, finished: Finished, tmp_path: Path
):
    folder = shutil.copytree(finished(case).folder / EXPORT, tmp_path / "export")
    tensors = load_file(folder / SINGLE)
    damage(tensors[tensor])
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{weight}.*: its packed product on cpu is off by .* to {str(dtype)[6:]}"):
        check(finished(case), folder, dtype)


def test_wrong_modules_around_right_products(finished: Finished, monkeypatch: pytest.MonkeyPatch):
    """Such as a bias that is forgotten, or, here, a sign that is lost."""
    load = Skeleton.load_layer

    def load_layer(self: Skeleton, index: int) -> torch.nn.Module:
        layer = load(self, index)
        if index == 1 and isinstance(layer.mlp.down_proj, modules.PackedLinear):
            layer.mlp.down_proj.register_forward_hook(lambda module, args, y: -y)
        return layer

    monkeypatch.setattr(Skeleton, "load_layer", load_layer)
    with pytest.raises(UserError, match=r"nats per token from the run's, though each product is right; .* in layer 1,"):
        check(finished("humming"))


def test_a_weight_that_the_run_kept(finished: Finished):
    run = Run.open(finished("humming").folder)
    del run.plan.entries["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(UserError, match=r"has model\.layers\.0\.mlp\.up_proj\.weight packed, which the run .* kept"):
        check(run)


def test_formats_without_kernels(finished: Finished, tmp_path: Path):
    run = finished("humming")
    folder = export_run(run, "mlx", tmp_path / "mlx")
    with pytest.raises(UserError, match=r"no weights that packed kernels read; they read humming, .*, tq"):
        check(run, folder)


# The command


def test_the_command_shows_a_row_for_each_layer(finished: Finished, capsys: pytest.CaptureFixture):
    run = finished("tq, head")
    with pytest.raises(SystemExit) as end:
        cli.main(["verify", str(run.folder / EXPORT), "--run", str(run.folder), "--kernels"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert "agree bit for bit" in shown
    assert "15 packed weights multiply as the run's do" in shown
    assert [line.split()[0] for line in shown.splitlines() if line.strip()][3:6] == ["0", "1", "head"]


def test_the_command_ends_with_2(finished: Finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """The bits are right, and a kernel is wrong."""
    right = modules.packed_matmul
    monkeypatch.setattr(modules, "packed_matmul", lambda x, weight: right(x, weight) * 1.1)
    run = finished("humming")
    with pytest.raises(SystemExit) as end:
        cli.main(["verify", str(run.folder / EXPORT), "--run", str(run.folder), "--kernels"])
    printed = capsys.readouterr()
    assert end.value.code == 2
    assert "agree bit for bit" in printed.out
    assert "model.layers.0." in printed.err


# How it is done


def test_memory_holds_one_layer_of_each_model(finished: Finished, monkeypatch: pytest.MonkeyPatch):
    load, loaded, alive = Skeleton.load_layer, [], []

    def load_layer(self: Skeleton, index: int) -> torch.nn.Module:
        alive.append(sum(layer() is not None for layer in loaded))
        layer = load(self, index)
        loaded.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(Skeleton, "load_layer", load_layer)
    check(finished("humming"))
    assert len(alive) == 4
    assert max(alive) <= 1


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_one_wrong_code_shows(data: st.DataObject):
    """Among up to four thousand in its row, in bfloat16; and right ones pass."""
    columns, out, bits = 64 * data.draw(st.integers(1, 64)), data.draw(st.integers(1, 9)), data.draw(st.integers(2, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    book = Codebook.integer(bits, 64)
    codes = torch.randint(0, 1 << bits, (out, columns), generator=generator, dtype=torch.uint8)
    scales = torch.rand(out, columns // 64, generator=generator).add(0.5).bfloat16()
    quantized = QuantizedTensor(codes, scales, book)
    x = torch.randn(256, columns, generator=generator).bfloat16()
    y = packed_matmul(x, PackedWeight(pack_dense(codes, bits), scales, book.levels))
    limit = rounding_limit(columns, x.dtype)
    assert product_error(x, y, quantized) <= limit
    row, column = data.draw(st.integers(0, out - 1)), data.draw(st.integers(0, columns - 1))
    wrong = codes.clone()
    wrong[row, column] ^= 1 << (bits - 1)
    assert product_error(x, y, QuantizedTensor(wrong, scales, book)) > limit


def test_errors_of_nothing_and_of_no_number():
    codes, scales = torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 1).bfloat16()
    quantized = QuantizedTensor(codes, scales, Codebook.integer(2, 32))
    x = torch.zeros(3, 32)
    assert product_error(x, torch.zeros(3, 2), quantized) == 0
    assert product_error(x, torch.full((3, 2), math.nan), quantized) == math.inf
    assert product_error(x, torch.full((3, 2), 1e-20), quantized) > 1
