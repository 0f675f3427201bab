"""A suite of tests for several models: parts that are done are not done again, whatever stopped it."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given as given_text
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from models import tiny_llama
from runs import MemoryRun
from served import served
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from gsq.cli import app
from gsq.codebook import Codebook
from gsq.device import activation_dtype
from gsq.errors import UserError
from gsq.eval import definition, quality, suite, tables, text, views
from gsq.eval.results import read_results
from gsq.export.base import export_run
from gsq.model.checkpoint import Checkpoint

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
W4 = Codebook(tuple(float(level) for level in range(-8, 8)), 32)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a text, a model, another of the same kind, and an export of the first."""
    folder = tmp_path_factory.mktemp("world")
    draw = random.Random(0)
    words = (" ".join("".join(draw.choices("abcdefgh", k=5)) for _ in range(9)) + ".\n" for _ in range(40))
    (folder / "text.txt").write_text("".join(words))
    (folder / "short.txt").write_text("Too short.\n")
    tiny_llama(folder / "first")
    tiny_llama(folder / "second", seed=1)
    export_run(MemoryRun(folder / "first", {"mlp": W4}), "humming", folder / "export")
    return folder


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    return world


def text_of() -> st.SearchStrategy[str]:
    """Text full of what Markdown means something by."""
    return st.lists(st.sampled_from([*r"\|`*_[]()<>!&#~-:;1a ", "<!--", "&lt;", "](", "](x)", "**a**", "__a__"])).map(
        "".join
    )


def content(**tests) -> dict:
    models = {"original": "first", "4 bits": "export", "other": "second"}
    perplexity = {"text": "text.txt", "contexts": [32, 64], "words": 80}
    return {"models": models, "base": "original", "tests": tests or {"perplexity": perplexity}}


def run(given: dict, out: Path, dtype: torch.dtype = torch.float32) -> dict[str, dict]:
    results = suite.run_suite(definition.make_suite(given, "test", "test"), out, CPU, dtype)
    return {content["model"]["label"]: content for content in results}


def stamps(results: dict[str, dict]) -> dict[tuple[str, str], float]:
    """What tells that a part was done anew: the seconds that it took."""
    return {(label, part): kept["seconds"] for label, of in results.items() for part, kept in of["parts"].items()}


@pytest.fixture
def work(monkeypatch):
    """Labels and parts that are worked on, as they come; after `work.limit` of them the program dies."""

    class Work(list):
        limit = None

    done, plan = Work(), suite.plan

    def watched(*args):
        for task in plan(*args):

            def call(subject, task=task):
                if done.limit is not None and len(done) >= done.limit:
                    raise KeyboardInterrupt
                done.append((task.label, task.part))
                return task.work(subject)

            yield replace(task, work=call)

    monkeypatch.setattr(suite, "plan", watched)
    return done


# What is measured


def test_results_are_those_of_the_measurement_alone(here, tmp_path):
    found = run(content(), tmp_path)
    settings = text.Settings(**content()["tests"]["perplexity"])
    for label, folder in (("original", "first"), ("4 bits", "export"), ("other", "second")):
        parts = found[label]["parts"]
        assert list(parts) == ["perplexity/32", "perplexity/64"]
        for context in (32, 64):
            tokens = text.parts(settings)[f"perplexity/{context}"].windows(here / folder).tokens
            expected = quality.evaluate(suite.open_model(here / folder), Checkpoint.open(here / "first"), tokens)
            result = parts[f"perplexity/{context}"]["result"]
            assert {key: result[key] for key in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)
            assert sum(row["tokens"] for row in result["positions"]) == expected["tokens"]
    assert found["original"]["parts"]["perplexity/32"]["result"]["kl"] == 0
    assert found["4 bits"]["parts"]["perplexity/64"]["result"]["kl"] > 0


def test_files_say_what_was_measured_and_with_what(here, tmp_path):
    found = run(content(), tmp_path)
    stored = json.loads((tmp_path / "4-bits.json").read_text())
    assert stored == found["4 bits"]
    model, part = stored["model"], stored["parts"]["perplexity/32"]
    assert (model["format"], model["bytes"]) == ("humming", Checkpoint.open(here / "export").nbytes)
    assert part["settings"]["words"] == 80
    environment = stored["environments"][part["environment"]]
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["dtype"] == "float32"


def test_a_base_is_walked_once_for_all_models(here, tmp_path, monkeypatch):
    walked, walk = [], text.final_states
    monkeypatch.setattr(
        text, "final_states", lambda model, *args, **more: walked.append(model) or walk(model, *args, **more)
    )
    run(content(), tmp_path)
    assert len(walked) == 2 * (3 + 1)  # contexts, models and the base


def test_tests_that_generate(here, tmp_path):
    tests = {
        "needle": {"text": "text.txt", "contexts": [256], "depths": [10, 90], "trials": 2},
        "speed": {"contexts": [64, 96], "new_tokens": 4, "repeats": 2},
        "samples": {"contexts": [0], "max_tokens": 8, "prompts": ["list"]},
    }
    given = content(**tests)
    given["models"]["few bits"] = {"path": "second", "kv": "turbo4", "base": None}
    found = run(given, tmp_path)
    names = ["needle/256/10", "needle/256/90", "speed/64", "speed/96", "samples/0/list"]
    assert all(list(of["parts"]) == names for of in found.values())
    written = tables.write_tables(list(found.values()), tmp_path).read_text()
    assert all(f"](needle-{name}.png)" in written for name in ("original", "4-bits", "other", "few-bits"))
    assert (tmp_path / "speed-by-context.png").stat().st_size > 1000


def test_a_server_generates_in_place_of_the_folder(here, tmp_path):
    tests = {"perplexity": content()["tests"]["perplexity"], "speed": {"contexts": [64], "new_tokens": 4, "repeats": 1}}
    model = AutoModelForCausalLM.from_pretrained("second")
    with served(model, AutoTokenizer.from_pretrained("second")) as server:
        given = content(**tests) | {"models": {"there": {"path": "second", "url": server.url}}}
        found = run(given | {"base": "first"}, tmp_path)["there"]["parts"]
        assert list(found) == ["perplexity/32", "perplexity/64", "speed/64"]
        assert found["speed/64"]["result"]["device"] is None
        assert server.requests
        with pytest.raises(UserError, match="'there' is but a URL; give its folder, too, or leave out perplexity"):
            run(content(**tests) | {"models": {"there": server.url}, "base": None}, tmp_path / "other")


# What is not done again


def test_a_second_run_does_nothing(here, tmp_path, work):
    first = run(content(), tmp_path)
    assert len(work) == 6
    assert run(content(), tmp_path) == first
    assert len(work) == 6


@pytest.mark.parametrize("died", [1, 4])
def test_what_was_done_before_a_death_is_kept(here, tmp_path, work, died):
    work.limit = died
    with pytest.raises(KeyboardInterrupt):
        run(content(), tmp_path)
    work.limit = None
    found = run(content(), tmp_path)
    assert len(work) == len(set(work)) == 6  # each part once
    assert {key: part["result"] for key, part in found["other"]["parts"].items()} == {
        key: part["result"] for key, part in run(content(), tmp_path / "unbroken")["other"]["parts"].items()
    }


def test_kill_9_loses_the_part_at_work_and_no_more(here, tmp_path):
    given = content(perplexity={"text": "text.txt", "contexts": [16, 20, 24, 28, 32, 36], "words": 40})
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    code = "import sys, torch; torch.set_num_threads(1); from gsq.cli import main; main(sys.argv[1:])"
    arguments = ["eval", tmp_path / "suite.yaml", "--out", tmp_path / "out"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )
    while b"4 bits: perplexity/20" not in (line := process.stderr.readline()):
        assert line, "it ended before it was killed"
    time.sleep(random.Random(0).uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    done = stamps({of["model"]["label"]: of for of in before.values()})
    assert 4 <= len(done) < 18
    after = stamps(run(given, tmp_path / "out", activation_dtype(CPU)))
    assert len(after) == 18
    assert {key: after[key] for key in done} == done


def changed(given: dict, **settings) -> dict:
    return given | {"tests": {"perplexity": given["tests"]["perplexity"] | settings}}


def test_only_what_changed_is_done_again(here, tmp_path, work):
    run(content(), tmp_path)
    work.clear()
    found = run(changed(content(), contexts=[64, 48]), tmp_path)  # one more context
    assert work == [(label, "perplexity/48") for label in ("original", "4 bits", "other")]
    assert list(found["other"]["parts"]) == [
        "perplexity/32",
        "perplexity/64",
        "perplexity/48",
    ]  # nothing is thrown away
    work.clear()
    run(changed(content(), words=60, contexts=[64]), tmp_path)
    assert work == [(label, "perplexity/64") for label in ("original", "4 bits", "other")]
    work.clear()
    given = content()
    given["models"]["4 bits"] = {"path": "export", "base": "second"}
    run(changed(given, contexts=[32]), tmp_path)
    assert work == [("4 bits", "perplexity/32")]


def test_another_text_or_other_weights_are_done_again(here, tmp_path, work):
    (tmp_path / "text.txt").write_text((here / "text.txt").read_text())
    tiny_llama(tmp_path / "model")
    given = {"models": {"x": str(tmp_path / "model")}, "tests": content()["tests"]}
    given = changed(given, text=str(tmp_path / "text.txt"), contexts=[32])
    run(given, tmp_path / "out")
    (tmp_path / "text.txt").write_text((here / "text.txt").read_text().replace("a", "b"))
    run(given, tmp_path / "out")
    assert work == [("x", "perplexity/32")] * 2
    run(changed(given, contexts=[48]), tmp_path / "out")
    (tmp_path / "model").rename(tmp_path / "old")
    tiny_llama(tmp_path / "model", seed=3)
    found = run(given, tmp_path / "out")
    assert work[3:] == [("x", "perplexity/32")]
    assert list(found["x"]["parts"]) == ["perplexity/32"]  # the other model's are gone


def test_a_changed_tokenizer_is_a_change(here, tmp_path, work):
    tiny_llama(tmp_path / "model")
    given = changed(content() | {"models": {"x": str(tmp_path / "model")}, "base": None}, contexts=[32])
    run(given, tmp_path / "out")
    (tmp_path / "model" / "README.md").write_text("says nothing of tokens")
    run(given, tmp_path / "out")
    assert len(work) == 1
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    run(given, tmp_path / "out")
    assert work == [("x", "perplexity/32")] * 2


def test_changed_data_of_a_benchmark_is_a_change(here, tmp_path, monkeypatch):
    harness = pytest.importorskip("gsq.eval.harness", exc_type=UserError)
    monkeypatch.setattr(harness, "check", lambda *_: None)
    data = tmp_path / "data.jsonl"
    made = definition.make_suite(content(accuracy={"tasks": ["gsm8k"], "data": {"gsm8k": str(data)}}), "test", "test")
    found = {label: suite.Candidate.find(label, model, CPU, torch.float32) for label, model in made.models.items()}

    def keys() -> set[str]:
        return {task.key for task in suite.plan(made, found, CPU, torch.float32)}

    data.write_text("{}")
    before = keys()
    assert keys() == before
    data.write_text("{} ")
    assert not keys() & before


def test_tables_show_what_the_last_suite_asked_for(here, tmp_path):
    """Not results of other settings beside them, and of tests that it left out, what there is."""
    run(content(), tmp_path)
    found = run(changed(content(), words=60, contexts=[64]), tmp_path)
    table = tables.all_tables(list(found.values()))[0][1][0]
    assert list(table.rows[0]) == ["model", "64"]
    assert "perplexity/32" in found["original"]["parts"]
    speed = {"contexts": [64], "new_tokens": 4, "repeats": 1}
    found = run(content(speed=speed), tmp_path)
    assert [label for label, _ in tables.all_tables(list(found.values()))] == ["perplexity", "speed"]
    found = run(changed(content(), contexts=[32]), tmp_path)
    assert list(tables.all_tables(list(found.values()))[0][1][0].rows[0]) == ["model", "32"]


def test_one_model_at_a_time_is_in_memory(here, tmp_path, monkeypatch):
    living, opened = [], suite.Local.open

    def watched(*args):
        assert [model for model in living if model() is not None] == []
        local = opened(*args)
        living.append(weakref.ref(local.model))
        return local

    monkeypatch.setattr(suite.Local, "open", watched)
    run(content(speed={"contexts": [64], "new_tokens": 4, "repeats": 1}), tmp_path)
    assert len(living) == 3


def test_settings_that_only_list_parts_change_no_other_part():
    for name, test in definition.TESTS.items():
        try:
            fields = test.load().Settings.model_fields
        except UserError:  # lm-eval is not installed
            assert name == "accuracy"
            continue
        assert set(test.axes) <= set(fields)


# What is refused before any work


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tests": {"perplexity": {"text": "none.txt"}}}, "text 'none.txt' does not exist"),
        ({"tests": {"perplexity": {"text": "text.txt", "contexts": [400], "words": 20}}}, "does not fill a window"),
        ({"tests": {"perplexity": {"text": "text.txt", "contexts": [600]}}}, "original takes 512 tokens"),
        ({"tests": {"perplexity": {"text": "text.txt", "contxts": [32]}}}, "unknown key contxts; did you mean"),
        ({"tests": {"perplexities": {}}}, "there is no test 'perplexities'; tests: perplexity, needle"),
        ({"tests": {"needle": {"text": "none.txt"}}}, "needle.text 'none.txt' does not exist"),
        ({"tests": {"needle": {"text": "short.txt", "contexts": [400]}}}, "needle.contexts: the text fills a context"),
        ({"tests": {"needle": {"text": "text.txt", "contexts": [100]}}}, "question and answer alone take"),
        ({"tests": {"needle": {"text": "text.txt", "contexts": [256], "form": "chat"}}}, "has no chat template"),
        ({"tests": {"samples": {"text": "short.txt", "contexts": [400]}}}, "samples.contexts: the text fills"),
        ({"tests": {"samples": {"text": "text.txt", "contexts": [200]}}}, "question and answer alone take"),
        ({"tests": {"speed": {"contexts": [64, 1024]}}}, "takes 512 tokens"),
        ({"tests": {"speed": {"text": "short.txt", "contexts": [400]}}}, "speed.contexts: the text fills a context"),
        ({"tests": {"speed": {"contexts": [64], "new_tokens": 64}}}, "question and answer alone take"),
        ({"tests": {"perplexity": {"text": "text.txt", "contexts": [0]}}}, "greater than or equal to 2"),
        ({"tests": {"a/b": {"test": "perplexity", "text": "text.txt"}}}, "tests.a/b: a test's name has no slash"),
        ({"tests": {"FIRST": {"test": "perplexity", "text": "text.txt"}}}, "'first' and 'FIRST' make the same file"),
        ({"models": {"x": {"path": "first", "url": "http://[::1]:9", "kv": "turbo4"}}}, "keeps its cache as it likes"),
        ({"models": {"...": "first"}, "base": None}, "no letter or digit"),
        ({"models": {"x": "nowhere/at/all"}}, "'nowhere/at/all' does not exist"),
        ({"models": {"x": {"path": "first", "bas": "y"}}}, "unknown key bas; did you mean 'base'"),
        ({"models": {"x": {"base": "first"}}}, "'x' has neither `path` nor `url`"),
        ({"models": {"x": {"path": "first", "kv": "turbo9"}}}, "turbo4v2 are usual"),
        ({"models": {"x y": "first", "x-y": "second"}, "base": None}, "the same file names"),
        ({"models": {"x": "http://127.0.0.1:9", "y": {"path": "first", "base": "x"}}}, "base 'x' is but a URL"),
        ({"modls": {}}, "unknown key modls; did you mean 'models'"),
        ({"tests": None}, "must hold `models` and `tests`"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_any_work(here, tmp_path, work, change, message):
    good = content()["tests"]  # done first, if anything were
    given = content() | {"base": "first"} | change
    if isinstance(given["tests"], dict) and change.get("tests"):
        given["tests"] = {"first": {"test": "perplexity", **good["perplexity"]}, **given["tests"]}
    with pytest.raises(UserError, match=re.escape(message)):
        run(given, tmp_path)
    assert work == []
    assert not list(tmp_path.glob("*.json"))


def test_a_base_with_another_tokenizer_is_refused(here, tmp_path):
    stranger = tiny_llama(tmp_path / "stranger", seed=5)
    tokenizer = AutoTokenizer.from_pretrained(stranger)
    tokenizer.add_tokens(["abc"])
    tokenizer.save_pretrained(stranger)
    (tmp_path / "text.txt").write_text("abc " * 100)
    given = changed(content(), text=str(tmp_path / "text.txt"), contexts=[32])
    with pytest.raises(UserError, match="reads the text as other tokens than"):
        run(given | {"base": str(stranger)}, tmp_path / "out")


def test_models_that_do_not_fit_are_refused(here, tmp_path, monkeypatch, work):
    monkeypatch.setattr("gsq.eval.subject.available_bytes", lambda: 1e5)
    given = content(perplexity=content()["tests"]["perplexity"], speed={"contexts": [64], "new_tokens": 4})
    with pytest.raises(UserError, match=r"needs .* of memory to generate.*URL"):
        run(given, tmp_path)
    assert work == []
    run(content(), tmp_path)  # walks need no more than a layer
    assert len(work) == 6


def test_files_that_are_no_results_are_left_alone(here, tmp_path):
    (tmp_path / "original.json").write_text('{"name": "something else"}')
    with pytest.raises(UserError, match="no result file"):
        run(content(), tmp_path)
    assert json.loads((tmp_path / "original.json").read_text()) == {"name": "something else"}


# Suites in files and by name


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "eval").glob("*.yaml")), ids=lambda path: path.stem)
def test_suites_in_files_are_valid(path):
    check_settings(definition.compose(str(path)))


@pytest.mark.parametrize("name", definition.SUITES)
def test_suites_by_name_are_valid(name):
    check_settings(definition.compose(name, {"x": "first"}))


def check_settings(made: definition.Suite) -> None:
    for label, given in made.tests.items():
        try:
            _, settings = definition.test_settings(label, given, made.name)
        except UserError as error:
            assert "lm-eval" in str(error)  # noqa: PT017 (it need not be installed)
            continue
        assert set(given) - {"test"} <= set(type(settings).model_fields)


def test_the_command_line_names_models_and_texts():
    made = definition.compose(
        "card", definition.named(["a=x/first", "second"]), "x/first", "turbo4", "t.txt", ["needle", "speed"]
    )
    assert {label: model.path for label, model in made.models.items()} == {"a": "x/first", "second": "second"}
    assert {(model.base, model.kv) for model in made.models.values()} == {("x/first", "turbo4")}
    assert list(made.tests) == ["needle", "speed"]
    assert made.tests["needle"]["text"] == "t.txt"
    assert "text" not in made.tests["speed"]  # which reads none unless told to
    assert definition.named([], "http://there", "x") == {"x": {"path": None, "url": "http://there", "served_as": "x"}}
    given = definition.compose(str(ROOT / "configs" / "eval" / "smollm2.yaml"), {"mine": "second"})
    assert given.models["mine"].base == "HuggingFaceTB/SmolLM2-135M-Instruct"  # a model of the file, by its name there
    given = definition.compose(str(ROOT / "configs" / "eval" / "smollm2.yaml"), {"mine": "second", "original": "first"})
    assert given.models["mine"].base == "first"
    with pytest.raises(UserError, match="server of one model"):
        definition.named(["a", "b"], "http://there")
    with pytest.raises(UserError, match="no test 'nedle'"):
        definition.compose("card", {"x": "first"}, tests=["nedle"])
    with pytest.raises(UserError, match="no suite 'cards'"):
        definition.compose("cards", {"x": "first"})
    with pytest.raises(UserError, match="names no models"):
        definition.compose("card")


# The command, and tables


def command(*arguments) -> str:
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_the_command_without_a_suite(here, tmp_path):
    shown = command(
        "export", "--base", "first", "--text", "text.txt", "--windows", 3, "--length", 64, "--json", tmp_path / "r"
    )
    result = json.loads((tmp_path / "r").read_text())
    assert {"perplexity", "tokens", "windows", "length", "base_perplexity", "kl", "kl_median", "kl_p99", "top1"} <= set(
        result
    )
    assert {"word_perplexity", "words", "perplexity_low", "kl_high"} <= set(result)
    assert (result["windows"], result["length"], result["tokens"]) == (3, 64, 189)
    assert f"{result['kl']:.4g} [" in shown
    with pytest.raises(UserError, match="one model and --text FILE, or a suite"):
        command("first", "second", "--text", "text.txt")
    with pytest.raises(UserError, match="--out are of suites"):
        command("first", "--text", "text.txt", "--out", tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        command("first", "--text", "text.txt", "--json", tmp_path / "none" / "r")
    with pytest.raises(UserError, match="--json are for one text"):
        command("first", "--suite", "quick", "--json", tmp_path / "r")
    shown = command("first", "--text", "text.txt", "--windows", 1, "--length", 128, "--kv", "turbo4v2")
    assert "bits per value" in shown


def test_the_command_with_a_suite(here, tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content()))
    shown = command(tmp_path / "mine.yaml", "--out", tmp_path / "out")
    assert "4 bits" in shown
    assert "results.md" in shown
    shown = command("x=second", "--suite", tmp_path / "mine.yaml", "--base", "first", "--out", tmp_path / "out")
    assert "original" not in shown
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "original.json", "4-bits.json", "other.json", "x.json", "results.md",
        "perplexity-by-context.png", "perplexity-kl-by-position.png", "perplexity-loss-by-position.png",
    }  # fmt: skip


def test_tables_are_regular_and_hold_what_was_measured(here, tmp_path):
    tests = {"rolling": {"test": "perplexity", "mode": "rolling", "text": "text.txt", "contexts": [32], "words": 100}}
    tests |= content()["tests"] | {"samples": {"contexts": [0], "max_tokens": 8, "prompts": ["list", "a | b"]}}
    found = run(content(**tests), tmp_path)
    document = tables.markdown(list(found.values()))
    blocks = re.findall(r"(?:^\|.*\n?)+", document, re.MULTILINE)
    assert len(blocks) >= 6
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    kl = found["4 bits"]["parts"]["perplexity/64"]["result"]["kl"]
    [row] = [line for line in blocks[0].splitlines() if line.startswith("| 4 bits |")]
    assert f"| {kl:.4g} |" in row
    assert "## rolling" in document
    assert f"torch {torch.__version__}" in document


def test_every_kind_of_test_has_a_view_and_others_are_shown_plainly():
    assert views.VIEWS.keys() == definition.TESTS.keys()
    part = {"test": "weight of the moon", "environment": 0, "result": {"kilograms": 7.3e22}}
    environments = [{"device": "cpu", "dtype": "float32", "versions": {}}, {"device": "of nothing shown"}]
    shown = tables.markdown([{"model": {"label": "x"}, "environments": environments, "parts": {"moon/1": part}}])
    assert "| x | moon/1 | 7.3e+22 |" in shown


def test_divergence_of_a_cache_is_no_divergence_from_the_base(here, tmp_path):
    given = changed(content(), contexts=[64])
    given["models"] = {"4 bits": "export", "small": {"path": "export", "kv": "turbo4"}}
    found = list(run(given | {"base": "first"}, tmp_path).values())
    rows = {row["model"]: row for row in tables.headline(found).rows}
    assert rows["small"]["KL"] == rows["4 bits"]["KL of the cache"] == "–"
    assert rows["small"]["KL of the cache"] == f"{found[1]['parts']['perplexity/64']['result']['kl']:.4g}"
    titles = {table.title: [row["model"] for row in table.rows] for table in tables.all_tables(found)[0][1]}
    assert titles["Divergence from the base, nats per token"] == ["4 bits"]
    assert titles["Divergence from the same model with a 16-bit KV cache, nats per token"] == ["small"]


def test_pictures_of_many_models_and_of_one_that_is_broken(tmp_path):
    def part(context: int, perplexity: float) -> dict:
        positions = [{"from": 1, "loss": 1.0}, {"from": 2, "loss": 2.0}]
        ends = {"perplexity_low": perplexity / 2, "perplexity_high": perplexity * 2}
        return {"context": context, "perplexity": perplexity, "positions": positions, **ends}

    models = {str(n): {str(c): part(c, 3.0 + n) for c in (32, 64)} for n in range(30)}
    models["broken"] = {str(c): part(c, math.inf) for c in (32, 64)}
    paths = views.VIEWS["perplexity"].pictures("long / documents", models, tmp_path)
    assert [path.name for path in paths] == ["long-documents-by-context.png", "long-documents-loss-by-position.png"]
    assert len(list(zip(views._styles(), models, strict=False))) == 31


@given_text(text_of())
def test_any_text_shows_as_it_is_in_a_cell(text):
    tokens = MarkdownIt("commonmark").enable("table").parse(tables.markdown_table([{"a": "x", "b": text}]))
    cells = [token for token in tokens if token.type == "inline"]
    assert len(cells) == 4
    assert "".join(child.content for child in cells[3].children) == " ".join(text.split())


def test_damaged_result_files_are_told(tmp_path):
    (tmp_path / "x.json").write_text('{"schema": 1, "model": {}}')
    with pytest.raises(UserError, match="damaged result file, without environments"):
        read_results(tmp_path / "x.json")


@pytest.mark.parametrize("name", definition.TESTS)
def test_settings_are_documented_with_their_defaults(name):
    if name == "accuracy":
        pytest.importorskip("lm_eval")
    section = re.split(r"^### ", (ROOT / "docs" / "evaluation.md").read_text(), flags=re.MULTILINE)
    [listed] = [part for part in section if part.startswith(f"{name}\n")]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", listed, re.MULTILINE))
    fields = definition.TESTS[name].load().Settings.model_fields
    assert rows == {field: shown(info.default) for field, info in fields.items()}


def shown(default: object) -> str:
    if default is None:
        return "–"
    return f"[{', '.join(map(str, default))}]" if isinstance(default, tuple) else str(default).lower()
