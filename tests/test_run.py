"""A run may be killed at any moment: continued, it ends with the same bytes. And it is continued only as it was begun.

Runs happen in children of a server that has imported everything once; each child has one thread, so that
all of them compute the same.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from models import tiny_llama
from safetensors.torch import load_file, save_file

import gsq.train
from gsq.codebook import Codebook
from gsq.config import Config, load_config
from gsq.errors import UserError
from gsq.init.rtn import round_to_nearest
from gsq.model.checkpoint import SINGLE, Checkpoint
from gsq.plan.rules import Plan, PlanEntry
from gsq.run import JOURNAL, LAYERS, TOKENS, Run

ROOT = Path(__file__).parent.parent
RECIPE = """
model: {{name: {model}}}
plan: {{rules: [{{match: _proj, bits: 2, group_size: 32}}]}}
calib: {{source: {text}, windows: 4, length: 16, validation: 1, batch: 2}}
init: {{polish: 0}}
refine: {{steps: 2, windows: 2}}
"""
PATIENCE = 600  # seconds until a child is given up
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload([__name__])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    text = folder / "text.txt"
    text.write_text("".join(random.Random(0).choices("abcdefgh ijkl\n", k=400)))
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny_llama(folder / "model"), text=text))
    return path


@pytest.fixture(scope="module")
def config(recipe: Path) -> Config:
    return load_config(recipe)


@pytest.fixture(scope="module")
def finished(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run; its child is the first one, which starts the server."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # so that it finds this file
        assert end(child(config, folder)) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the uninterrupted run, to be damaged; without its export."""
    folder = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(folder / "export")
    return folder


def work(config: Config, folder: Path, resume: bool, fatal_sync: int) -> None:
    """What a child does; it dies when it flushes its `fatal_sync`-th file to the disk."""
    torch.set_num_threads(1)
    flush, syncs = os.fsync, itertools.count(1)

    def fsync(file: int) -> None:
        if next(syncs) == fatal_sync:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(file)

    os.fsync = fsync
    gsq.train.write_report = lambda *_: None  # slow, and tested elsewhere
    gsq.train.train(config, folder, resume)


def child(config: Config, folder: Path, resume: bool = False, fatal_sync: int = 0) -> BaseProcess:
    process = CHILDREN.Process(target=work, args=(config, folder, resume, fatal_sync))
    process.start()
    return process


def end(process: BaseProcess) -> int:
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
    return process.exitcode


def content(run: Path) -> dict[str, bytes]:
    """What a run is for: layers and export."""
    files = [*(run / LAYERS).iterdir(), *(run / "export").iterdir()]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def journal(run: Path) -> list[dict]:
    path = run / JOURNAL
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_a_killed_run_ends_with_the_same_bytes(layers: int, config: Config, finished: Path, tmp_path: Path):
    """Killed at some moment after so many layers; the last time while it exports."""
    run, deadline = tmp_path / "run", time.time() + PATIENCE
    process = child(config, run)
    while len(journal(run)) < layers or not run.exists():
        assert time.time() < deadline
        time.sleep(0.002)
    time.sleep(random.random() * journal(finished)[0]["seconds"]["total"])
    process.kill()
    assert end(process) in (-signal.SIGKILL, 0)
    before = journal(run)
    assert end(child(config, run, resume=True)) == 0
    assert content(run) == content(finished)
    assert journal(run)[: len(before)] == before  # finished layers were not done again


def test_killed_at_every_write(config: Config, finished: Path, tmp_path: Path):
    """Killed when it is about to flush a file: the first one, then, continued, the second one, and so on."""
    run = tmp_path / "run"
    for fatal_sync in range(1, 50):
        code = end(child(config, run, resume=True, fatal_sync=fatal_sync))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert fatal_sync > 5
    assert content(run) == content(finished)


def truncate(run: Path) -> None:
    path = run / LAYERS / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip(run: Path) -> None:
    path = run / LAYERS / "00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def remove(run: Path) -> None:
    (run / LAYERS / "00001.safetensors").unlink()


def cut_journal(run: Path) -> None:
    lines = (run / JOURNAL).read_text().splitlines(keepends=True)
    (run / JOURNAL).write_text(lines[0] + lines[1][:30])


@pytest.mark.parametrize("damage", [truncate, flip, remove, cut_journal])
def test_damaged_layers_are_done_again(damage, run: Path, config: Config, finished: Path, tmp_path: Path):
    damage(run)
    before = journal(finished)
    with pytest.raises(UserError, match=r"layer 1 of .* is not finished, or its file is damaged.*--resume"):
        Run.open(run).completed()
    assert end(child(config, run, resume=True)) == 0
    assert content(run) == content(finished)
    assert journal(run)[0] == before[0]
    assert [line["layer"] for line in journal(run)] == [0, 1]


def test_damaged_tokens_are_refused(run: Path, config: Config):
    content = bytearray((run / TOKENS).read_bytes())
    content[-1] ^= 1
    (run / TOKENS).write_bytes(content)
    with pytest.raises(UserError, match=r"tokens\.safetensors is damaged"):
        gsq.train.train(config, run, resume=True)


def test_one_program_at_a_time(run: Path, config: Config):
    working = Run.resume(run, Run.open(run).config, Checkpoint.open(config.model.name))
    with pytest.raises(UserError, match="another program is at work"):
        gsq.train.train(config, run, resume=True)
    working.close()
    gsq.train.train(config, run, resume=True)


def test_a_finished_run_is_only_exported_again(run: Path, config: Config, finished: Path):
    before = journal(run)
    assert end(child(config, run, resume=True)) == 0
    assert content(run) == content(finished)
    assert journal(run) == before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("refine.steps=3", "refine.steps was 2, is 3"),
        ("calib.windows=5", "calib.windows was 4, is 5"),
        ("seed=1", "seed was 0, is 1"),
        ("plan.rules=[{match: _proj, bits: 3, group_size: 32}]", "plan.rules was .*bits=2.*, is .*bits=3"),
    ],
)
def test_a_changed_setting_is_refused(setting: str, message: str, recipe: Path, finished: Path):
    with pytest.raises(UserError, match=f"cannot resume .*: {message}.* Restore the setting, or start another run"):
        gsq.train.train(load_config(recipe, [setting]), finished, resume=True)


def test_settings_of_what_comes_after_may_change(recipe: Path, run: Path):
    config = load_config(recipe, ["eval.windows=3", f"export.out={run}/elsewhere"])
    assert end(child(config, run, resume=True)) == 0
    assert (run / "elsewhere" / "config.json").exists()


def test_layers_may_be_kept(recipe: Path, tmp_path: Path):
    rule = r"{match: layers\.1\..*_proj, bits: 2, group_size: 32}"
    assert end(child(load_config(recipe, [f"plan.rules=[{rule}]"]), tmp_path / "run")) == 0
    assert [len(line["targets"]) for line in journal(tmp_path / "run")] == [0, 7]


def test_a_damaged_head_is_refused(recipe: Path, tmp_path: Path):
    """Which the walk itself does not read."""
    file = tiny_llama(tmp_path / "model", tied=False) / SINGLE
    tensors = load_file(file)
    tensors["lm_head.weight"][3, 5] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    rules = "plan.rules=[{role: head, bits: 8, codebook: affine, group_size: 32}]"
    config = load_config(recipe, [rules, f"model.name={file.parent}", "export.format=mlx"])
    with pytest.raises(UserError, match=r"lm_head\.weight holds NaN or Inf"):
        gsq.train.train(config, tmp_path / "run")


def test_an_existing_folder_is_refused(config: Config, run: Path, tmp_path: Path):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="exists already; continue it with --resume, or choose another with --out"):
        gsq.train.train(config, run)
    with pytest.raises(UserError, match="is no run folder"):
        gsq.train.train(config, tmp_path, resume=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_another_model_is_refused(recipe: Path, config: Config, finished: Path, tmp_path: Path):
    other = tiny_llama(tmp_path / "other", seed=1)  # alike in all names and shapes
    with pytest.raises(UserError, match=r"model\.name was .*model', is .*other'"):
        gsq.train.train(load_config(recipe, [f"model.name={other}"]), finished, resume=True)
    with pytest.raises(UserError, match=r"the checkpoint .*other has changed since the run began"):
        Run.resume(finished, Run.open(finished).config, Checkpoint.open(other))


@pytest.mark.parametrize(
    "codebook",
    [Codebook.tq(3, 8, 70), Codebook.jangtq(2, 40), Codebook.integer(5, 8), Codebook.affine(3, 8)],
    ids=["tq", "jangtq", "integer", "affine"],
)
def test_a_layer_of_any_width_comes_back(codebook: Codebook, config: Config, tmp_path: Path):
    width = codebook.rotation.width if codebook.rotation else 40
    quantized = round_to_nearest(codebook.rotate(torch.randn(3, 6, width)), codebook)
    entry = PlanEntry("experts", (3, 6, width), "bfloat16", codebook, ["experts"], "", "", 0, 1, 1)
    (tmp_path / "layers").mkdir()
    run = Run(tmp_path, config, Plan({"experts": entry}))
    run.save_layer(0, {"experts": quantized})
    back = run.load("experts")
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(back.scales, quantized.scales)
    assert (back.offsets is not None) == codebook.offset
    if codebook.offset:
        assert torch.equal(back.offsets, quantized.offsets)
        assert back.offsets.dtype == back.scales.dtype == codebook.scale_dtype
    assert torch.equal(back.dequantize(), quantized.dequantize())


def test_the_run_remembers_what_its_dtype_was_on_this_processor(recipe: Path, config: Config, finished: Path):
    assert config.dtype == "auto"
    was = Run.open(finished).config.dtype
    assert was in ("bfloat16", "float32")
    other = "float32" if was == "bfloat16" else "bfloat16"
    with pytest.raises(UserError, match=f"dtype was '{was}', is '{other}'"):
        gsq.train.train(load_config(recipe, [f"dtype={other}"]), finished, resume=True)


def test_accelerate_launches_the_program(recipe: Path, tmp_path: Path):
    """By its path from the repository's root, whence `import kernels` of transformers must not find ours."""
    text = ["--set", f"eval.text={load_config(recipe).calib.source}"]
    hook = tmp_path / "sitecustomize.py"  # run by every Python that starts
    hook.write_text("import atexit, importlib.util as u; atexit.register(lambda: print(u.find_spec('kernels')))")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tmp_path)}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "gsq/train.py"]
    done = subprocess.run(
        [*launch, recipe, "--out", tmp_path / "run", *text, "--set", "eval.windows=2", "--set", "eval.length=16"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "gsq/kernels" not in done.stdout
    export = tmp_path / "run" / "export"
    assert "14 tensors quantized at 2.50 bits per weight" in done.stdout
    assert f"wrote {export} · 40.06 kB · 3.90 bits per weight" in done.stdout
    assert f"serve it: gsq serve {export}" in done.stdout
    assert "GSQ: perplexity" in done.stderr
    assert (tmp_path / "run" / "report.html").exists()
