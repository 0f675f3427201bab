"""Runs of several processes: the same bytes as of one, whoever is killed, stopped or missing on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import models
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from gsq.config import load_config, parse_config
from gsq.errors import UserError
from gsq.ranks import LANES, Ranks, Share, tree_sum
from gsq.train import check_shares, train

ROOT = Path(__file__).parent.parent
TRAIN, LAUNCHES = ROOT / "gsq" / "train.py", ROOT / "configs" / "accelerate"
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file: experts and dense targets, both objectives, windows that no number of processes divides."""
    folder = tmp_path_factory.mktemp("ranks")
    model = models.tiny_qwen3_5_moe(folder / "model", layers=4)
    save_file({"tokens": models.random_tokens(19, 24)}, folder / "tokens.safetensors")
    settings = {
        "model": {"name": str(model)},
        "plan": {
            "rules": [
                {"match": r"mlp\.experts\.", "bits": 2, "group_size": 32},
                {"match": "self_attn", "codebook": "affine", "bits": 3, "group_size": 32},
            ]
        },
        "calib": {
            "source": str(folder / "tokens.safetensors"),
            "windows": 19,
            "length": 24,
            "validation": 3,
            "batch": 2,
        },
        "refine": {"objective": "both", "steps": 4, "windows": 8, "lr": 0.004, "noise": 0.5},
        "export": {"format": "mlx"},
        "processes": {"patience": 5},
        "dtype": "float32",
    }
    (folder / "recipe.yaml").write_text(json.dumps(settings))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def alone(recipe: Path) -> dict[str, bytes]:
    """What one process makes of the recipe."""
    train(load_config(recipe), recipe.parent / "alone")
    return written(recipe.parent / "alone")


def written(run: Path) -> dict[str, bytes]:
    """All tensors of a run and of its export."""
    files = [*(run / "layers").glob("*.safetensors"), *(run / "export").glob("*.safetensors")]
    assert len(files) > 4
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def start(processes: int, recipe: Path, run: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    arguments = [str(TRAIN), str(recipe), "--out", str(run), *more]
    return subprocess.Popen(
        [*command, *arguments], env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def finished_layers(run: Path) -> int:
    journal = run / "journal.jsonl"
    return len(journal.read_text().splitlines()) if journal.exists() else 0


def wait_for_layer(process: subprocess.Popen, run: Path) -> None:
    while finished_layers(run) < 1:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def workers(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return sorted(map(int, children.read_text().split()))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_write_the_bytes_of_one(recipe: Path, alone, processes: int, tmp_path: Path):
    finish(start(processes, recipe, tmp_path / "run"))
    assert written(tmp_path / "run") == alone


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_process_ends_all_and_the_run_goes_on_with_another_number(recipe: Path, alone, victim, tmp_path: Path):
    run = tmp_path / "run"
    process = start(2, recipe, run)
    wait_for_layer(process, run)
    os.kill(workers(process)[victim], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert 1 <= finished_layers(run) <= 4
    train(load_config(recipe), run, resume=True)
    assert written(run) == alone


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_stopped_process_is_named(recipe: Path, tmp_path: Path):
    run = tmp_path / "run"
    process = start(2, recipe, run, "--set", "processes.patience=0.4", "--set", "refine.steps=4000")
    while not (run / "metrics.jsonl").exists() or '"step"' not in (run / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    stopped = workers(process)[1]
    os.kill(stopped, signal.SIGSTOP)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "process 1 of 2 failed or stopped answering" in output
    assert "--resume" in output


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_ends_in_good_order_and_the_run_goes_on(recipe: Path, alone, processes: int, tmp_path: Path):
    run = tmp_path / "run"
    process = start(processes, recipe, run)
    wait_for_layer(process, run)
    for worker in workers(process):
        os.kill(worker, signal.SIGTERM)
    output = finish(process)
    assert output.count("stopped by SIGTERM") == processes
    assert not (run / "export").exists()
    train(load_config(recipe), run, resume=True)
    assert written(run) == alone


@pytest.mark.parametrize("path", sorted(LAUNCHES.glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_configs_are_accelerates(path: Path):
    launch = load_config_from_file(str(path))
    assert launch.num_processes in (1, 2, 4, 8)
    assert launch.mixed_precision == "no"
    assert str(path.relative_to(ROOT)) in path.read_text()


def test_more_processes_than_lanes_or_windows_are_refused(recipe: Path):
    config = load_config(recipe)
    check_shares(config, Ranks(0, 8))
    with pytest.raises(UserError, match="start at most 8"):
        check_shares(config, Ranks(0, 9))
    with pytest.raises(UserError, match="start at most 2"):
        check_shares(load_config(recipe, ["calib.windows=5"]), Ranks(0, 3))


@given(st.integers(4, 40), st.integers(1, LANES))
def test_processes_that_are_let_in_have_windows(windows: int, processes: int):
    config = parse_config(
        {"model": {"name": "m"}, "plan": {"preset": "gsq2"}, "calib": {"windows": windows, "validation": 1}}
    )
    counts = [len(Ranks(index, processes).share(windows).numbers) for index in range(processes)]
    try:
        check_shares(config, Ranks(0, processes))
    except UserError:
        assert not all(counts)
    else:
        assert all(counts)


@given(st.integers(1, 40), st.integers(1, LANES))
def test_every_window_belongs_to_one_process(windows: int, processes: int):
    shares = [Ranks(index, processes).share(windows) for index in range(processes)]
    assert sorted(number for share in shares for number in share.numbers) == list(range(windows))
    for share in shares:
        assert [place for lane in share.lanes for place in lane] == list(range(len(share.numbers)))
        assert all(len({share.numbers[place] % LANES for place in lane}) <= 1 for lane in share.lanes)
        limit = windows // 2
        below = [share.numbers[place] for lane in share.below(limit) for place in lane]
        assert sorted(below) == [number for number in sorted(share.numbers) if number < limit]
        assert [place for lane in share.places(share.numbers) for place in lane] == list(range(len(share.numbers)))


def test_whole_share_keeps_the_order():
    assert Share.whole(3) == Share((0, 1, 2), (range(3),), 3)


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_tree_of_all_lanes_is_the_tree_of_the_processes_trees(processes: int):
    lanes = list(torch.randn(LANES, 1000) * torch.logspace(-6, 6, 1000))
    whole = tree_sum([lane.clone() for lane in lanes])
    spans = [Ranks(index, processes).span(LANES) for index in range(processes)]
    assert torch.equal(tree_sum([tree_sum([lane.clone() for lane in lanes[span]]) for span in spans]), whole)
    torch.testing.assert_close(whole.double(), torch.stack(lanes).double().sum(0), rtol=1e-4, atol=1e-5)


def test_tree_leaves_out_what_is_not_there():
    assert tree_sum([None, None]) is None
    assert tree_sum([None, lambda: torch.ones(1), None, lambda: torch.ones(1)]).tolist() == [2.0]
