"""Whole runs of tiny models: quantized, exported, verified, decoded again, and loaded by plain transformers."""

from __future__ import annotations

import random
import re
import shutil
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from gsq import memory, quantize
from gsq.calib import hessian
from gsq.calib.stream import Stream
from gsq.config import Config, parse_config
from gsq.estimate.fit import with_batch
from gsq.export.base import open_model
from gsq.export.dequantize import dequantize
from gsq.export.verify import verify
from gsq.kernels import relaxation
from gsq.memory import Batch, Memory
from gsq.model.checkpoint import SINGLE, Checkpoint
from gsq.model.skeleton import Skeleton
from gsq.quantize import quantized_layer
from gsq.ranks import Ranks
from gsq.refine.objective import token_sizes, token_weights
from gsq.run import Run
from gsq.tracking import read_metrics
from gsq.train import settled, train

WINDOWS, LENGTH, HELD_OUT = 6, 20, 2
EVERYTHING = [{"match": r"layers\.\d+\..*(_proj|experts|in_proj_\w+)", "bits": 2, "group_size": 32}]
PROJECTION = "model.layers.0.mlp.up_proj.weight"
RUNS = [  # model, objective, stage, target
    ("flagship", "output", "layer", "stream"),
    ("flagship", "output", "module", "layer"),
    ("flagship", "hessian", "layer", "layer"),
    ("flagship", "both", "module", "stream"),
    ("llama", "output", "layer", "stream"),
]


def write_text(folder: Path) -> Path:
    """Random printable text: all tokens of the tiny tokenizer, and so all experts, get their share."""
    letters = random.Random(0).choices(string.ascii_letters + string.digits + string.punctuation + " ", k=2000)
    path = folder / "text.txt"
    path.write_text("".join(letters))
    return path


def config_of(source: Path, text: Path | str, **sections: dict) -> Config:
    content = {
        "model": {"name": str(source)},
        "plan": {"rules": EVERYTHING},
        "calib": {"source": str(text), "windows": WINDOWS, "length": LENGTH, "validation": HELD_OUT, "batch": 3},
        "refine": {"steps": 8, "windows": 2, "lr": 0.004},  # enough to move a little
        "dtype": "float32",
    }
    for name, section in sections.items():
        content[name] = content.get(name, {}) | section if isinstance(section, dict) else section
    return parse_config(content)


@dataclass
class Finished:
    """A run with its export, and the dense checkpoint decoded from that."""

    run: Run
    export: Path
    dense: Path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        "flagship": models.tiny_qwen3_5_moe(folder / "flagship", layers=2),
        "llama": models.tiny_llama(folder / "llama"),
    }


def finish(config: Config, folder: Path) -> Finished:
    run = train(config, folder)
    return Finished(run, folder / "export", dequantize(folder / "export", folder / "dense"))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory, sources, text: Path) -> Callable[[tuple], Finished]:
    """Runs by model, objective, stage and target, each done once."""
    folder = tmp_path_factory.mktemp("runs")

    @cache
    def run(which: tuple[str, str, str, str]) -> Finished:
        source, *refine = which
        settings = dict(zip(("objective", "stage", "target"), refine, strict=True))
        return finish(config_of(sources[source], text, refine=settings), folder / "-".join(which))

    return run


@pytest.fixture(params=RUNS, ids="-".join)
def finished(request: pytest.FixtureRequest, finished_run) -> Finished:
    return finished_run(request.param)


def auto_class(run: Run) -> type:
    return AutoModelForImageTextToText if "vision_config" in run.source.config else AutoModelForCausalLM


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=models.random_tokens()).logits


def test_transformers_computes_what_the_run_found(finished: Finished):
    run = finished.run
    loaded, info = auto_class(run).from_pretrained(finished.dense, output_loading_info=True)
    assert not any(info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = auto_class(run).from_pretrained(run.source.folder)
    before = logits(expected)
    parameters = dict(expected.named_parameters())
    targets = run.plan.targets()
    linears = 2 * 7 if "vision_config" not in run.source.config else 5 + 4 + 2 * (2 + 3)
    assert len(targets) == linears
    for entry in targets:
        value = run.load(entry.name).dequantize(torch.bfloat16)
        assert 0 < (value - parameters[entry.name]).norm() < parameters[entry.name].norm()
        parameters[entry.name].data.copy_(value)
    assert torch.equal(logits(loaded), logits(expected))
    assert not torch.allclose(before, logits(expected), atol=0.1)


def test_the_export_is_verified_and_as_small_as_planned(finished: Finished):
    report = verify(finished.export, finished.run)
    weights = sum(entry.numel for entry in finished.run.plan.targets())
    assert report.quantized_weights == weights
    assert report.quantized_bytes == weights * 2.5 / 8  # 2 bits, and a scale of 16 for 32 weights
    assert report.quantized_bytes + report.kept_bytes == finished.run.plan.summary()["bytes_after"]
    assert read_metrics(finished.run.folder)[-1]["kind"] == "done"


def test_everything_else_is_copied_byte_by_byte(finished: Finished):
    run = finished.run
    replaced = {source for entry in run.plan.targets() for source in entry.sources}
    kept = run.source.tensors.keys() - replaced
    parts = ["embed_tokens", "layernorm", "model.norm", "model.visual.", "mtp.", "mlp.gate."]
    found = [part for part in parts if any(part in name for name in kept)]
    assert len(found) == (6 if "vision_config" in run.source.config else 3)
    for folder in (finished.export, finished.dense):
        copied = Checkpoint.open(folder)
        for name in kept:
            before, after = run.source.read(name), copied.read(name)
            assert (before.dtype, before.shape) == (after.dtype, after.shape)
            assert torch.equal(before.view(torch.uint8), after.view(torch.uint8)), name


def test_no_stage_ends_worse_than_it_began(finished: Finished):
    events = read_metrics(finished.run.folder)
    stages = [event for event in events if event["kind"] == "stage"]
    refine = finished.run.config.refine
    objectives = 2 if refine.objective == "both" else 1
    assert len(stages) == 2 * objectives * (2 if refine.stage == "module" else 1)
    for stage in stages:
        assert 0 < stage["error_final"] <= stage["error_init"]
        assert stage["accepted"] == (stage["error_final"] < stage["error_init"]) == (stage["best_step"] > 0)
    if refine.objective == "output":
        assert any(stage["accepted"] for stage in stages)
    assert sum(event["kind"] == "step" for event in events) == len(stages) * refine.steps
    assert [line["layer"] for line in finished.run.finished()] == [0, 1]


def layer_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "layers").iterdir())}


@pytest.mark.parametrize("which", [RUNS[0], RUNS[3]], ids="-".join)
def test_no_byte_depends_on_where_tensors_live_or_how_many_experts_go_together(
    tmp_path: Path, text: Path, sources, finished_run, which: tuple[str, str, str, str], monkeypatch
):
    given = finished_run(which).run
    places = Memory._place
    seen = []
    monkeypatch.setattr(memory, "SMALL", 64)
    monkeypatch.setattr(Memory, "_place", lambda self, size, near: seen.append(places(self, size, near)) or "file")
    monkeypatch.setattr(quantize, "TOGETHER", {"cpu": 3 * 64**2})
    monkeypatch.setattr(hessian, "OBSERVED", {"cpu": 2 * 64**2})
    monkeypatch.setattr(relaxation, "KEPT", 100)
    train(
        given.config.model_copy(update={"export": given.config.export.model_copy(update={"format": None})}),
        tmp_path / "run",
    )
    assert len(seen) > 100
    assert layer_bytes(tmp_path / "run") == layer_bytes(given.folder)


def test_a_resumed_run_keeps_the_micro_batch_that_was_found(finished_run, monkeypatch: pytest.MonkeyPatch):
    """Whatever would fit now: another accelerator, another number of processes."""
    run = finished_run(RUNS[0]).run
    given = with_batch(run.config, "auto")
    skeleton = Skeleton(run.source, torch.device("cpu"), torch.float32)
    monkeypatch.setattr("gsq.train.micro_batch", lambda *_: 64)
    assert settled(given, skeleton, run.folder, True, Ranks()).fixed() == run.config.fixed()
    assert settled(given, skeleton, run.folder, False, Ranks()).calib.batch == 64
    assert settled(run.config, skeleton, run.folder, False, Ranks()) == run.config


@pytest.mark.parametrize("stage", ["layer", "module"])
def test_a_batch_that_does_not_fit_is_halved_and_the_step_done_again(
    tmp_path: Path, text: Path, sources, stage: str, monkeypatch
):
    """The device runs out of memory, or at once has to do with the half, by config: the same bytes."""
    refine, export = {"stage": stage, "windows": 6, "steps": 3}, {"format": None}
    config = lambda batch: config_of(  # noqa: E731
        sources["flagship"], text, refine=refine, export=export,
        calib={"windows": 24, "length": LENGTH, "validation": 8, "batch": batch},
    )  # fmt: skip
    train(config(1), tmp_path / "small")
    failures, whole = [], Skeleton.run_layer

    def run_layer(self: Skeleton, layer: Callable, hidden: Tensor, kwargs: dict) -> Tensor:
        output = whole(self, layer, hidden, kwargs)
        if len(hidden) > 1:
            failures.append(len(hidden))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return output

    monkeypatch.setattr(Skeleton, "run_layer", run_layer)
    train(config(3), tmp_path / "large")
    assert failures == [3, 2]
    assert layer_bytes(tmp_path / "large") == layer_bytes(tmp_path / "small")


def held_out_error(run: Run) -> float:
    """Error of layer 0 as it is stored, on the windows that nothing was fitted to; layer 0 reads plain embeddings."""
    skeleton = Skeleton(run.source, torch.device("cpu"), torch.float32)
    stream = Stream(skeleton, run.tokens(), Batch(WINDOWS))
    wanted = stream.outputs(skeleton.load_layer(0), 0)
    stored = {name.removeprefix(skeleton.layer_names[0] + "."): q for name, q in run.load_layer(0).items()}
    difference = stream.outputs(quantized_layer(skeleton.load_layer(0), stored), 0) - wanted
    weights = token_weights(token_sizes(wanted), Ranks())[..., None]
    parts = [(weights * x.square())[-HELD_OUT:].sum() for x in (difference, wanted)]
    return float(parts[0] / parts[1])


@pytest.mark.parametrize("source", ["flagship", "llama"])
def test_reported_errors_are_of_what_is_stored(tmp_path: Path, text: Path, source: str, sources, finished_run):
    """Measured again from the files; the init is what a run without refinement stores."""
    refined = finished_run((source, "output", "layer", "stream")).run
    config = config_of(sources[source], text, refine={"enabled": False}, export={"format": None})
    init = train(config, tmp_path / "init")
    stage = next(event for event in read_metrics(refined.folder) if event["kind"] == "stage")
    assert held_out_error(init) == pytest.approx(stage["error_init"], rel=1e-4)
    assert held_out_error(refined) == pytest.approx(stage["error_final"], rel=1e-4)
    assert (held_out_error(refined) < held_out_error(init)) == stage["accepted"]


@torch.no_grad()
def test_the_run_walked_the_model_that_it_exports(finished: Finished):
    """The distance from the original's hidden states, told of the last layer, is that of the exported model."""
    behind = []
    for folder in (finished.run.source.folder, finished.dense):
        model = auto_class(finished.run).from_pretrained(folder, dtype=torch.float32).eval()
        model.get_decoder().norm.register_forward_pre_hook(lambda _, args: behind.append(args[0]))
        model(input_ids=finished.run.tokens())
    original, quantized = behind
    distance = ((quantized - original).square().sum(-1) / original.square().sum(-1)).mean()
    layers = [event for event in read_metrics(finished.run.folder) if event["kind"] == "layer"]
    assert layers[-1]["output_error"] == pytest.approx(float(distance), rel=1e-3)


def content(folder: Path) -> dict[str, bytes]:
    """Bytes of every file of a run that a clock has no part in."""
    files = [path for part in ("layers", "export") for path in sorted((folder / part).iterdir())]
    return {str(path.relative_to(folder)): path.read_bytes() for path in [*files, folder / "tokens.safetensors"]}


@pytest.mark.parametrize("source", ["flagship", "llama"])
def test_a_seed_gives_the_same_bytes_again(tmp_path: Path, source: str, sources):
    """With text from the model itself, so that nothing but model, configuration and seed goes in."""
    config = config_of(sources[source], "self", refine={"steps": 2})
    first, again = (content(train(config, tmp_path / name).folder) for name in ("first", "again"))
    assert first.keys() == again.keys()
    assert f"export/{SINGLE}" in first
    assert [name for name in first if first[name] != again[name]] == []


def test_another_seed_gives_other_codes(tmp_path: Path, sources):
    config = config_of(sources["llama"], "self", refine={"steps": 2}, export={"format": None})
    runs = [train(config.model_copy(update={"seed": seed}), tmp_path / str(seed)) for seed in (0, 1)]
    tokens, codes = ([read(run) for run in runs] for read in (Run.tokens, lambda run: run.load(PROJECTION).codes))
    assert not torch.equal(*tokens)
    assert not torch.equal(*codes)


def shun_expert(folder: Path, expert: int) -> None:
    """A direction that all tokens share and no layer changes, against which the router holds `expert`."""
    tensors = load_file(folder / SINGLE)
    tensors["model.language_model.embed_tokens.weight"][:, 0] = 2
    for name, tensor in tensors.items():
        if name.startswith("model.language_model.layers.") and re.search(r"(\.o_proj|out_proj|down_proj)", name):
            tensor[..., 0, :] = 0
        if name.startswith("model.language_model.layers.") and name.endswith("mlp.gate.weight"):
            tensor[:, 0] = 0
            tensor[expert, 0] = -10
    save_file(tensors, folder / SINGLE)


@pytest.mark.parametrize("prior", [0.0, 64.0])
def test_experts_that_no_token_reached(tmp_path: Path, text: Path, prior: float, capfd):
    """They are quantized all the same, by what the others saw; log and metrics tell of them."""
    source = models.tiny_qwen3_5_moe(tmp_path / "source", layers=2)
    shun_expert(source, 3)
    done = finish(config_of(source, text, init={"expert_prior": prior}), tmp_path / "run")
    coverage = [event for event in read_metrics(done.run.folder) if event["kind"] == "coverage"]
    assert [(event["layer"], event["target"]) for event in coverage] == [
        (layer, f"mlp.experts.{name}") for layer in (0, 1) for name in ("gate_up_proj", "down_proj")
    ]
    for event in coverage:
        assert event["tokens"][3] == 0 < min(event["tokens"][:3])
        assert sum(event["tokens"]) == 2 * (WINDOWS - HELD_OUT) * LENGTH
    assert capfd.readouterr().err.count("1 of 4 experts saw no token") == 2
    original = dict(AutoModelForImageTextToText.from_pretrained(source).named_parameters())
    experts = [entry.name for entry in done.run.plan.targets() if ".experts." in entry.name]
    assert len(experts) == 4
    for name in experts:
        weight, value = original[name][3].float(), done.run.load(name).dequantize()[3]
        assert (value - weight).square().sum() < 0.3 * weight.square().sum()
    assert logits(AutoModelForImageTextToText.from_pretrained(done.dense)).isfinite().all()


def test_layers_beyond_max_layers_stay(tmp_path: Path, text: Path):
    source = models.tiny_qwen3_moe(tmp_path / "source", layers=3)
    config = config_of(source, text, model={"name": str(source), "max_layers": 1}, refine={"steps": 2})
    done = finish(config, tmp_path / "run")
    dense = Checkpoint.open(done.dense)
    changed = {n for n in done.run.source.tensors if not torch.equal(dense.read(n), done.run.source.read(n))}
    assert {name.split(".")[2] for name in changed} == {"0"}
    assert len(changed) == 4 + 3 * models.EXPERTS
    assert not torch.equal(logits(AutoModelForCausalLM.from_pretrained(done.dense)),
                           logits(AutoModelForCausalLM.from_pretrained(source)))  # fmt: skip


def test_ternary_four_bits_and_kept_targets(tmp_path: Path, text: Path, sources):
    """Rules of several codebooks in one stage; a group that reads one input may be split between them."""
    rules = [
        {"match": r"o_proj", "keep": True},
        {"match": r"down_proj", "bits": 4, "group_size": 64},
        {"match": r"mlp\..*_proj", "ternary": True, "group_size": 32},
        {"match": r"_proj", "bits": 3, "group_size": 16},
    ]
    done = finish(config_of(sources["llama"], text, plan={"rules": rules}), tmp_path / "run")
    levels = {entry.name.split(".")[-2]: len(entry.codebook.levels) for entry in done.run.plan.targets(0)}
    assert levels == {"q_proj": 8, "k_proj": 8, "v_proj": 8, "gate_proj": 3, "up_proj": 3, "down_proj": 16}
    for name, count in levels.items():
        full = next(n for n in done.run.plan.entries if f"layers.0.{'mlp' if count != 8 else 'self_attn'}.{name}" in n)
        dense = Checkpoint.open(done.dense).read(full)
        assert torch.equal(dense, done.run.load(full).dequantize(torch.bfloat16))
        assert done.run.load(full).codes.max() < count
    errors = {e["target"]: e for e in read_metrics(done.run.folder) if e["kind"] == "target" and e["layer"] == 0}
    assert errors["mlp.down_proj.weight"]["polish"] < errors["mlp.gate_proj.weight"]["polish"]  # 4 bits, and ternary


def test_embedding_and_offsets_go_all_the_way(text: Path, tmp_path: Path):
    """To an MLX export; and a run that loses everything but its first layer comes to the same bits."""
    source = models.tiny_llama(tmp_path / "model", layers=2)
    affine = {"codebook": "affine", "group_size": 32}
    rules = [{"role": "embedding", "bits": 8, **affine}, {"role": ["attention", "mlp"], "bits": 3, **affine}]
    config = config_of(source, text, plan={"rules": rules}, export={"format": "mlx"})
    run = train(config, tmp_path / "run")
    embedding = run.load("model.embed_tokens.weight")
    assert embedding.codebook.bits == 8
    dense = open_model(tmp_path / "run/export")
    assert torch.equal(dense.read("model.embed_tokens.weight"), embedding.dequantize(torch.bfloat16))
    error = (embedding.dequantize() - run.source.read("model.embed_tokens.weight").float()).abs()
    assert error.max() < 0.03 * run.source.read("model.embed_tokens.weight").abs().max()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run/layers").iterdir()}
    assert set(before) == {"outside.safetensors", "00000.safetensors", "00001.safetensors"}
    for lost, kept in (("00001", 1), ("outside", 0)):
        (tmp_path / f"run/layers/{lost}.safetensors").unlink()
        assert len(run.finished()) == kept
        train(config, tmp_path / "run", resume=True)
        assert {path.name: path.read_bytes() for path in (tmp_path / "run/layers").iterdir()} == before


def test_the_stream_starts_from_the_quantized_embedding(text: Path, tmp_path: Path):
    source = models.tiny_llama(tmp_path / "model", layers=1)
    coarse = {"role": "embedding", "bits": 2, "group_size": 32, "codebook": "affine"}
    fine = [{"role": "attention", "bits": 8, "group_size": 32, "codebook": "affine"}]
    errors = []
    for name, rules in (("fine", fine), ("coarse", [coarse, *fine])):
        train(config_of(source, text, plan={"rules": rules}, export={"format": None}), tmp_path / name)
        [layer] = [event for event in read_metrics(tmp_path / name) if event["kind"] == "layer"]
        errors.append(layer["output_error"])
    assert errors[1] > 10 * errors[0]


@pytest.mark.parametrize(
    ("format", "source", "rule"),
    [
        ("tq", "llama", {"role": ["attention", "mlp"], "codebook": "tq", "bits": 3}),
        ("jangtq", "flagship", {"role": "expert", "codebook": "jangtq", "bits": 2}),
        ("compressed-tensors", "flagship", {"role": ["attention", "expert"], "bits": 4, "group_size": 32}),
        ("mlx", "flagship", {"role": ["attention", "expert"], "codebook": "affine", "bits": 2, "group_size": 32}),
    ],
)
def test_a_calibrated_run_of_any_format_resumes_to_the_same_bytes(
    format: str, source: str, rule: dict, text: Path, sources: dict[str, Path], tmp_path: Path
):
    rule = rule | ({"group_size": 32} if format == "tq" else {})
    plan, run = {"rules": [rule]}, tmp_path / "run"
    config = config_of(sources[source], text, plan=plan, model={"max_layers": None}, export={"format": format})
    train(config, run)  # which verifies its export
    files = {path.name: path.read_bytes() for path in (run / "export").iterdir()}
    shutil.rmtree(run / "export")
    sorted((run / "layers").iterdir())[-1].unlink()
    train(config, run, resume=True)
    assert {path.name: path.read_bytes() for path in (run / "export").iterdir()} == files
    stages = [event for event in read_metrics(run) if event["kind"] == "stage"]
    assert stages
    assert all(stage["error_final"] <= stage["error_init"] for stage in stages)
