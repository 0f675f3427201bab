"""`bench/chaos.py`: broken runs of a tiny mixture of experts pass, and whatever goes wrong with one is seen."""

from __future__ import annotations

import json
import random
from importlib import import_module
from pathlib import Path
from types import ModuleType

import models
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

BENCH = Path(__file__).parent.parent / "bench"
LAYERS = 3


@pytest.fixture(scope="module")
def chaos():
    """The program, which its processes find as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield import_module("chaos")


@pytest.fixture
def quick(chaos: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is waited for long."""
    monkeypatch.setattr(chaos, "PATIENCE", 0.05)
    monkeypatch.setattr(chaos, "ORPHANS", 0.05)


# With real processes


def test_broken_runs_end_with_the_bytes_of_unbroken_ones(chaos: ModuleType, tmp_path: Path):
    """A rank is killed, a damaged layer is done again, damaged tokens are refused or do no harm."""
    model = models.tiny_qwen3_5_moe(tmp_path / "model", layers=2)
    save_file({"tokens": models.random_tokens(9, 16)}, tmp_path / "tokens.safetensors")
    recipe = {
        "model": {"name": str(model)},
        "plan": {"rules": [{"match": r"mlp\.experts\.", "bits": 2, "group_size": 32}]},
        "calib": {"source": str(tmp_path / "tokens.safetensors"), "windows": 9, "length": 16, "validation": 1},
        "init": {"polish": 0},
        "refine": {"steps": 2, "windows": 8},
        "dtype": "float32",
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    arena = chaos.Arena([str(tmp_path / "recipe.yaml")], "fork", tmp_path, mount=False)
    expected = arena.unbroken([1])
    expected.seconds[2] = expected.seconds[1]
    assert expected.layers == 2
    assert len(expected.files) > 4
    killed = chaos.Episode(2, chaos.Strike("kill a rank", 0.5, 0.9))
    damaged = chaos.Episode(1, damage="a layer is cut off")
    trial = arena.trial("run", [killed, chaos.Episode(1), damaged], expected, random.Random(0))
    assert trial.wrong == []
    assert killed.phase not in (None, chaos.STARTUP)
    assert killed.code != 0
    assert damaged.answer == "layers done again"
    assert "layer 2/2" in (tmp_path / "run.log").read_text()


# With processes that are made up, so that they can fail in any way


class Scripted:
    """In place of a launcher: each start does `work` to the run folder at once, and ends at the third look."""

    launcher = None
    work = staticmethod(lambda run, start: None)
    codes = (0,)
    starts = 0

    def __init__(self, processes: int, arguments: list[str], log: Path):
        kind, run = type(self), Path(arguments[arguments.index("--out") + 1])
        log.touch()
        write_run(run)
        kind.work(run, kind.starts)
        self._code = kind.codes[min(kind.starts, len(kind.codes) - 1)]
        kind.starts += 1
        self._looks = 0

    def ranks(self) -> list[int]:
        return []

    def code(self) -> int | None:
        self._looks += 1
        return self._code if self._looks > 2 else None


def write_run(run: Path, layers: int = LAYERS) -> None:
    """A run folder with so many finished layers, and an export."""
    for folder in ("layers", "export"):
        (run / folder).mkdir(parents=True, exist_ok=True)
    lines = [{"layer": layer, "sha256": "", "seconds": layer} for layer in range(layers)]
    (run / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for layer in range(layers):
        (run / "layers" / f"{layer:05d}.safetensors").write_bytes(b"codes" * 10)
    (run / "export" / "model.safetensors").write_bytes(b"packed" * 10)
    with open(run / "metrics.jsonl", "a") as metrics:
        metrics.write(json.dumps({"kind": "start"}) + "\n")


def flip_export(run: Path, start: int) -> None:
    if start > 1:
        (run / "export" / "model.safetensors").write_bytes(b"Packed" * 10)


def forget_layer(run: Path, start: int) -> None:
    if start > 1:
        (run / "layers" / "00001.safetensors").unlink()


def add_file(run: Path, start: int) -> None:
    if start > 1:
        (run / "export" / "model.safetensors.partial").touch()


def work_again(run: Path, start: int) -> None:
    if start > 1:
        text = (run / "journal.jsonl").read_text()
        (run / "journal.jsonl").write_text(text.replace('"seconds": 1', '"seconds": 9'))


def jump_ahead(run: Path, start: int) -> None:
    with open(run / "metrics.jsonl", "a") as metrics:
        metrics.writelines(json.dumps({"kind": "step", "layer": LAYERS + ahead}) + "\n" for ahead in (0, 1))


FAULTS = {  # what a start does, exit codes by start, what is told of it
    "nothing": (Scripted.work, (0,), None),
    "export": (flip_export, (0,), "export/model.safetensors differs"),
    "layer": (forget_layer, (0,), "layers/00001.safetensors is missing"),
    "leftover": (add_file, (0,), "export/model.safetensors.partial is new"),
    "again": (work_again, (0,), "finished layers were done again after no damage"),
    "jump": (jump_ahead, (0,), "2 layers were at work at once"),
    "code": (Scripted.work, (0, 0, 3), "resumed for good, it ended with 3"),
    "stuck": (Scripted.work, (0, 0, None), "processes did not end after None"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.usefixtures("quick")
def test_faults_are_told_and_fail_the_program(fault: str, chaos: ModuleType, tmp_path: Path, monkeypatch):
    work, codes, message = FAULTS[fault]
    scripted = type("Fault", (Scripted,), {"work": staticmethod(work), "codes": codes})
    monkeypatch.setitem(chaos.LAUNCHERS, "scripted", scripted)
    monkeypatch.setattr(chaos, "drawn", lambda rng, counts, first: [struck(chaos), chaos.Episode(1)])
    arena = chaos.Arena(["recipe"], "scripted", tmp_path, mount=False)
    expected = arena.unbroken([1])
    trial = arena.trial("run", [struck(chaos), chaos.Episode(1)], expected, random.Random(0))
    assert trial.wrong == ([message] if message else [])
    assert (tmp_path / "failed" / "run").exists() == bool(message)
    told = chaos.report([trial], expected)
    assert (f"**run**: {message}" in told) == bool(message)
    assert f"1 runs, {0 if message else 1} with the bytes" in told


def struck(chaos: ModuleType):
    return chaos.Episode(1, chaos.Strike("kill a rank", 0.0, 0.0))


@pytest.mark.parametrize(("differ", "code"), [(False, 0), (True, 1)])
@pytest.mark.usefixtures("quick")
def test_exit_code(differ: bool, code: int, chaos: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Four unbroken runs come first, none of which is altered."""
    alter = lambda run, start: differ and start > 3 and flip_export(run, start)  # noqa: E731
    monkeypatch.setitem(chaos.LAUNCHERS, "scripted", type("Run", (Scripted,), {"work": staticmethod(alter)}))
    with pytest.raises(SystemExit) as ended:
        chaos.main(Path("recipe"), tmp_path, runs=2, launcher="scripted", tmpfs=False)
    assert int(ended.value.code) == code
    assert len(json.loads((tmp_path / "chaos.json").read_text())) == 2
    assert f"2 runs, {0 if differ else 2} with the bytes" in (tmp_path / "chaos.md").read_text()


@pytest.mark.usefixtures("quick")
def test_unbroken_runs_must_agree(chaos: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(chaos.LAUNCHERS, "scripted", type("Run", (Scripted,), {"work": staticmethod(flip_export)}))
    with pytest.raises(SystemExit, match="unbroken runs of 1, 2, 4 processes differ"):
        chaos.Arena(["recipe"], "scripted", tmp_path, mount=False).unbroken([1, 2, 4])


# Draws and damages


@given(st.integers(), st.integers(1, 4))
def test_draws_follow_the_seed(chaos: ModuleType, seed: int, first: int):
    episodes = chaos.drawn(random.Random(seed), [1, 2, 4], first)
    assert episodes == chaos.drawn(random.Random(seed), [1, 2, 4], first)
    *struck, last = episodes
    assert 1 <= len(struck) <= 3
    assert last.strike is None
    assert episodes[0].processes == first
    assert episodes[0].damage is None
    for episode in struck:
        assert -1 <= episode.strike.at <= chaos.LATE
        assert 0 <= episode.strike.luck < 1


def test_every_strike_and_damage_is_drawn(chaos: ModuleType):
    episodes = [episode for seed in range(200) for episode in chaos.drawn(random.Random(seed), [1, 2, 4], 2)]
    assert {episode.strike.kind for episode in episodes if episode.strike} == set(chaos.STRIKES)
    assert {episode.damage for episode in episodes} == {None, *chaos.DAMAGES}
    assert {episode.processes for episode in episodes} == {1, 2, 4}


@pytest.mark.parametrize("seed", range(5))
def test_damages_do_what_they_say(seed: int, chaos: ModuleType, tmp_path: Path):
    for name in chaos.DAMAGES:
        run = tmp_path / name
        write_run(run)
        (run / "tokens.safetensors").write_bytes(b"tokens")
        (run / "plan.json").write_bytes(b"{}")
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        episode = chaos.Episode(1, damage=name)
        kept = chaos.damage(run, episode, random.Random(seed))
        after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        assert [path for path in before if before[path] != after.get(path)] == [run / episode.damaged]
        assert kept == before[run / episode.damaged]
        left = after.get(run / episode.damaged)
        if "cut off" in name:
            assert kept.startswith(left)
        elif "flips" in name:
            assert sum((a ^ b).bit_count() for a, b in zip(kept, left, strict=True)) == 1
        else:
            assert left is None


def test_what_a_damage_leaves_untouched(chaos: ModuleType):
    lines = [{"layer": layer} for layer in (None, 0, 1)]
    assert chaos.untouched(lines, None) == lines
    assert chaos.untouched(lines, "layers/outside.safetensors") == []
    assert chaos.untouched(lines, "layers/00000.safetensors") == lines[:1]
    assert chaos.untouched(lines, "layers/00002.safetensors") == lines  # written, and not yet in the journal
    assert chaos.untouched(lines, "tokens.safetensors") == lines


def test_phases(chaos: ModuleType, tmp_path: Path):
    write_run(tmp_path, layers=1)
    assert chaos.phase(tmp_path, LAYERS, begun=False) == chaos.STARTUP
    for kind, phase in [("plan", "reading"), ("coverage", "init"), ("step", "refinement"), ("news", "another phase")]:
        with open(tmp_path / "metrics.jsonl", "a") as metrics:
            metrics.write(json.dumps({"kind": kind}) + "\n")
        assert chaos.phase(tmp_path, LAYERS, begun=True) == phase
    assert chaos.phase(tmp_path, 1, begun=True) == "export"
