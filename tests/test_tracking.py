"""Events of a run: in the file exactly once, shown on the console, and never a reason to fail."""

import io
import json
import sys
import types

import pytest
import torch
from rich.console import Console

from gsq.tracking import METRICS, WANDB_ID, Tracker, read_metrics, short_name

PLAN = {"bits_per_weight": 2.25, "bytes_before": 2_000_000_000, "bytes_after": 400_000_000, "targets": 14, "layers": 2}
SECONDS = {"hessian": 1.0, "init": 2.0, "refine": 3.0, "push": 0.5, "teacher": 0.5, "total": 7.0}


def console(terminal=False):
    return Console(file=io.StringIO(), force_terminal=terminal, width=160)


def tracker(run, **options):
    return Tracker(run, **{"console": console(), **options})


def play_layer(tracked, layer):
    name = f"model.layers.{layer}.mlp.up_proj.weight"
    tracked.event("target", layer=layer, target=name, rtn=0.1, gptq=0.05, polish=0.04, gsq=None)
    tracked.event("coverage", layer=layer, target=name, tokens=[0, 5, 9])
    for step in range(3):
        tracked.event("step", layer=layer, stage="mlp", objective="output", step=step, steps=3, loss=1 / (step + 1),
                      lr=0.004, tau=1.0, kappa=100.0)  # fmt: skip
    tracked.event(
        "stage", layer=layer, stage="mlp", error_init=0.5, error_final=0.4, accepted=True, best_step=2, steps=3
    )
    tracked.event("layer", layer=layer, layers=2, seconds=SECONDS, peak_rss_gb=1.5, device_gb=0, output_error=0.01)


def play(tracked):
    tracked.event("plan", **PLAN)
    for layer in range(2):
        play_layer(tracked, layer)
    tracked.event("eval", label="export", perplexity=20.0, base_perplexity=17.0, kl=0.2, top1=0.8, tokens=100)
    tracked.event("done", seconds=14.0, bytes=400_000_000)


def kinds(run):
    return [event["kind"] for event in read_metrics(run)]


def test_file_holds_every_event(tmp_path):
    with tracker(tmp_path) as tracked:
        play(tracked)
        assert len(kinds(tmp_path)) == 18  # flushed while the run is on
    assert kinds(tmp_path)[:4] == ["start", "plan", "target", "coverage"]
    start = read_metrics(tmp_path)[0]
    assert start["versions"]["torch"] == torch.__version__
    assert start["time"] > 1e9


def test_values_become_plain_json(tmp_path):
    with tracker(tmp_path) as tracked:
        tracked.event("step", loss=torch.tensor(0.5), lr=float("nan"), counts=torch.tensor([1, 2]), path=tmp_path)
    event = json.loads((tmp_path / METRICS).read_text().splitlines()[-1], parse_constant=pytest.fail)
    assert (event["loss"], event["lr"], event["counts"], event["path"]) == (0.5, None, [1, 2], str(tmp_path))


def test_resume_has_no_duplicates(tmp_path):
    with tracker(tmp_path) as tracked:
        play(tracked)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"kind": "step", "lay')  # cut by a crash
    with tracker(tmp_path, keep_layers={0}) as tracked:
        assert kinds(tmp_path).count("eval") == kinds(tmp_path).count("done") == 0
        play_layer(tracked, 1)
    events = read_metrics(tmp_path)
    assert [event["layer"] for event in events if event["kind"] == "layer"] == [0, 1]
    assert sum(event["kind"] == "step" for event in events) == 6
    assert [event["resumed"] for event in events if event["kind"] == "start"] == [False, True]
    assert kinds(tmp_path).count("plan") == 1
    assert not list(tmp_path.glob("*.partial"))


def test_nothing_finished_begins_anew(tmp_path):
    with tracker(tmp_path) as tracked:
        tracked.event("plan", **PLAN)
    with tracker(tmp_path, keep_layers=set()) as tracked:
        tracked.event("plan", **PLAN)
    assert kinds(tmp_path) == ["start", "plan"]


def test_resume_of_a_finished_run_keeps_its_evaluation(tmp_path):
    with tracker(tmp_path) as tracked:
        play(tracked)
    with tracker(tmp_path, keep_layers={0, 1}):
        pass
    assert kinds(tmp_path).count("eval") == 1


def test_disabled_does_nothing(tmp_path):
    with Tracker(tmp_path / "run", enabled=False, wandb="online") as tracked:
        tracked.event("plan", **PLAN)
    assert not (tmp_path / "run").exists()


def test_events_outside_the_context_are_a_mistake(tmp_path):
    with pytest.raises(RuntimeError, match="inside"):
        tracker(tmp_path).event("plan", **PLAN)


def test_log_is_one_line_per_layer(tmp_path):
    out = console()
    with tracker(tmp_path, console=out) as tracked:
        play(tracked)
    lines = out.file.getvalue().splitlines()
    assert lines[0] == (
        "layer 1/2 · mlp 0.5 → 0.4 · 1 of 3 experts saw no token · output error 0.01 · 7.0 s · RAM 1.5 GB · 7.0 s left"
    )
    assert lines[2] == "export: perplexity 20 (base 17) · KL 0.2 · top-1 80.0%"
    assert lines[3] == "done in 14 s · 400.00 MB"
    assert len(lines) == 4


def test_terminal_shows_bars(tmp_path):
    out = console(terminal=True)
    with tracker(tmp_path, console=out) as tracked:
        tracked.event("plan", **PLAN)
        play_layer(tracked, 0)
        tracked._sinks[-1].progress.refresh()
    text = out.file.getvalue()
    assert "1/2" in text
    assert "7.0 s left" in text
    assert tracked._sinks == []


def test_resumed_bars_go_on(tmp_path):
    with tracker(tmp_path) as tracked:
        tracked.event("plan", **PLAN)
        play_layer(tracked, 0)
    out = console(terminal=True)
    with tracker(tmp_path, console=out, keep_layers={0}):
        pass
    assert "1/2" in out.file.getvalue()


class FakeWandb(types.ModuleType):
    """Notes what it is given; `broken` modes do not start."""

    def __init__(self, broken=()):
        super().__init__("wandb")
        self.broken, self.inits, self.logged, self.summary = broken, [], [], {}
        self.exit_code = None

    def Settings(self, **options):
        return options

    def init(self, **options):
        if options["mode"] in self.broken:
            raise ConnectionError("no network")
        self.inits.append(options)
        return self

    def define_metric(self, name, **options):
        pass

    def log(self, values):
        self.logged.append(values)

    def finish(self, exit_code):
        self.exit_code = exit_code


def test_wandb_gets_steps_and_layers(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with tracker(tmp_path, wandb="online", project="p", config={"a": 1}) as tracked:
        play(tracked)
    assert [values["step/global"] for values in fake.logged if "step/global" in values] == list(range(6))
    assert {"layer/index": 1, "layer/target/mlp.up_proj/rtn": 0.1, "layer/target/mlp.up_proj/gptq": 0.05,
            "layer/target/mlp.up_proj/polish": 0.04} in fake.logged  # fmt: skip
    assert any(values.get("layer/coverage/mlp.up_proj/unseen") == 1 for values in fake.logged)
    assert any(values.get("layer/seconds/total") == 7.0 for values in fake.logged)
    assert fake.summary["eval/export/kl"] == 0.2
    assert fake.exit_code == 0
    assert fake.inits[0]["id"] == (tmp_path / WANDB_ID).read_text().strip()


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with tracker(tmp_path, wandb="online") as tracked:
        play_layer(tracked, 0)
    fake.logged.clear()
    with tracker(tmp_path, wandb="online", keep_layers={0}) as tracked:
        play_layer(tracked, 1)
    assert fake.inits[0]["id"] == fake.inits[1]["id"]
    assert [values["step/global"] for values in fake.logged if "step/global" in values] == [3, 4, 5]


@pytest.mark.parametrize(
    ("broken", "modes", "remedy"),
    [(["online"], ["offline"], "wandb login"), (["online", "offline"], [], METRICS)],
)
def test_wandb_never_stops_a_run(tmp_path, monkeypatch, broken, modes, remedy):
    fake = FakeWandb(broken)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    out = console()
    with tracker(tmp_path, wandb="online", console=out) as tracked:
        tracked.event("plan", **PLAN)
    assert [options["mode"] for options in fake.inits] == modes
    assert remedy in out.file.getvalue().replace("\n", "")
    assert kinds(tmp_path) == ["start", "plan"]


def test_failure_is_told_to_wandb(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(KeyError), tracker(tmp_path, wandb="offline"):
        raise KeyError
    assert fake.exit_code == 1


def test_short_name():
    assert short_name("model.layers.3.mlp.up_proj.weight", 3) == "mlp.up_proj"
    assert short_name("mlp.experts.down_proj", 3) == "mlp.experts.down_proj"
