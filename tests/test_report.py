"""The report of a run: one page with everything in it, that loads nothing and takes whatever a run has so far."""

import json
import re
from html.parser import HTMLParser

import pytest

from gsq import report
from gsq.errors import UserError
from gsq.report import write_report

VOID = {"meta", "br", "path", "use", "image", "rect"}
HEADINGS = [
    "Result", "Weight error by layer", "Held-out error before and after refinement", "Loss curves", "Bits and bytes",
    "Expert coverage", "Time by layer", "Config",
]  # fmt: skip


class Page(HTMLParser):
    """Headings, ids and references of a page; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.references, self.headings = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src"):
                self.references.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def metrics(layers=3, stages=("attention", "mlp")):
    sizes = {"bits_per_weight": 2.25, "bytes_before": 4000, "bytes_after": 700}
    events = [
        {"kind": "start", "versions": {"torch": "2.13.0"}, "resumed": False},
        {"kind": "plan", **sizes, "targets": 6, "layers": layers},
    ]
    for layer in range(layers):
        at = {"layer": layer}
        target = f"model.layers.{layer}.mlp.up_proj.weight"
        events.append({"kind": "target", **at, "target": target, "rtn": 0.2, "gptq": 0.05, "polish": 0.04, "gsq": None})
        events.append({"kind": "coverage", **at, "target": target, "tokens": [0, 5 + layer, 9]})
        for stage in stages:
            outcome = {"error_init": 0.5, "error_final": 0.25, "accepted": True}
            events.append({"kind": "stage", **at, "stage": stage, **outcome})
            events += [{"kind": "step", **at, "stage": stage, "step": n, "loss": 1 / (1 + n)} for n in range(200)]
        seconds = {"init": 1, "refine": 2, "total": 4}
        events.append({"kind": "layer", **at, "layers": layers, "seconds": seconds, "peak_rss_gb": 1.2})
    evaluation = {"base_perplexity": 17.25, "top1": 0.75, "tokens": 1024}
    events.append({"kind": "eval", "label": "export", "perplexity": 99.0, "kl": 0.9, **evaluation})
    events.append({"kind": "eval", "label": "export", "perplexity": 21.5, "kl": 0.125, **evaluation})  # done again
    events.append({"kind": "done", "seconds": 60, "bytes": 700})
    return [{"time": 1.8e9, **event} for event in events]


def save(folder, events, config="model:\n  name: org/<model>\n", plan=True):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if config:
        (folder / "config.yaml").write_text(config)
    if plan:
        codebook = {"levels": [-2, -1, 0, 1], "group_size": 64, "scale_dtype": "bfloat16"}
        kept = {"name": "a.weight", "shape": [10, 50], "dtype": "bfloat16", "codebook": None, "rule": "keep",
                "bytes_before": 1000, "bytes_after": 1000, "role": "norm"}  # fmt: skip
        packed = {**kept, "name": "b.weight", "codebook": codebook, "bytes_after": 141, "role": "mlp"}
        (folder / "plan.json").write_text(json.dumps({"entries": [kept, packed]}))
    return folder


def page_of(folder):
    text = write_report(folder, folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_page_is_whole_and_loads_nothing(tmp_path):
    text, page = page_of(save(tmp_path / "run", metrics()))
    assert page.headings == HEADINGS
    assert "http" not in re.sub("<meta http-equiv", "", text)
    assert not re.search(r"<script|<link|@import|<!DOCTYPE svg", text)
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    assert {reference[1:] for reference in page.references if reference[0] == "#"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "prefers-color-scheme: dark" in text
    assert "currentColor" in text
    assert not list(tmp_path.glob("run/*.partial"))


def test_page_tells_the_run(tmp_path):
    text, _ = page_of(save(tmp_path / "run", metrics()))
    facts = (
        "org/&lt;model&gt;", "2027-01-15", "torch 2.13.0", "2.25 bits per weight", "peak RAM 1.2 GB", "took 60 s",
        "17.25", "21.5", "0.125", "75.0%", "1,024 predicted tokens", "4 levels, groups of 64", "2.26",
        "accepted in 6 of 6 stages", "error there by 50%", "none at all (3 of 9)", "12 s for 3 layers",
    )  # fmt: skip
    for fact in facts:
        assert fact in text, fact
    assert ">99<" not in text  # the later evaluation of a label counts
    assert "<model>" not in text


def test_same_run_gives_the_same_page(tmp_path):
    folder = save(tmp_path / "run", metrics(layers=1, stages=("mlp",)))
    assert page_of(folder)[0] == page_of(folder)[0]


@pytest.mark.parametrize("write", report.SECTIONS[1:])
def test_section_without_data_is_left_out(write):
    assert write(report.Run("run")) is None


def test_means_are_of_the_same_targets():
    """A target that was not refined keeps its error before; GSQ's mean is not of the refined ones alone."""
    run = report.Run("run")
    run.events["target"] = [{"layer": 0, "target": "a", "gptq": 0.4, "gsq": None},
                            {"layer": 0, "target": "b", "gptq": 0.2, "gsq": 0.1}]  # fmt: skip
    means = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_legend", lambda axes: None)
        patch.setattr(report.Axes, "plot", lambda axes, layers, values, label, **_: means.append((label, *values)))
        report.errors(run)
    assert means == [("GPTQ", pytest.approx(0.3)), ("GSQ", pytest.approx(0.25))]


def test_curves_of_two_objectives_are_apart():
    steps = [{"stage": "mlp", "objective": name, "step": step} for name in ("hessian", "output") for step in range(2)]
    panels = report._by_stage([*steps, {"stage": "attention", "objective": "output", "step": 0}])
    assert {name: len(events) for name, events in panels.items()} == {
        "mlp, hessian": 2, "mlp, output": 2, "attention": 1,
    }  # fmt: skip


@pytest.mark.parametrize("apart", [True, False], ids=["now", "as runs had it"])
def test_plans_beside_the_chosen_one_are_named(apart, tmp_path):
    """Runs had presets among the others, before it was told of them that their KL is approximate."""
    flat, presets = {"2 bits": [2.5, 0.5], "4 bits": [4.5, 0.05]}, {"tq3": [3.25, 0.2]}
    curve = {"solved": [[2.5, 0.5], [3.5, 0.1], [4.5, 0.05]], "chosen": [3.5, 0.1]}
    curve |= {"others": flat, "presets": presets} if apart else {"others": flat | presets}
    text, page = page_of(save(tmp_path / "run", [*metrics(layers=1), {"kind": "curve", "time": 1.8e9, **curve}]))
    assert "The plan among others" in page.headings
    for label in ("2 bits", "4 bits", "tq3", "this plan", "best widths"):
        assert f">{label}</text>" in text
    assert ("presets, KL as if in this codebook" in text) == apart


def test_run_that_has_only_begun(tmp_path):
    text, page = page_of(save(tmp_path / "run", metrics()[:1], plan=False))
    assert page.headings == ["Config"]
    text, page = page_of(save(tmp_path / "bare", metrics()[:2], config="", plan=False))
    assert page.headings == []
    assert "<h1>bare</h1>" in text


def test_gaps_in_metrics(tmp_path):
    """Losses and errors that were not finite are null in the file; dense models have no coverage."""
    lost = {"loss", "error_final", "rtn", "kl", "top1", "base_perplexity"}
    events = [{key: None if key in lost else value for key, value in event.items()} for event in metrics(stages="abcd")]
    _, page = page_of(save(tmp_path / "run", events))
    assert "Loss curves" not in page.headings
    assert "Held-out error before and after refinement" in page.headings


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="give the folder of a run"):
        write_report(tmp_path, tmp_path / "report.html")
