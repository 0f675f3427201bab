"""Model cards: their numbers against the bytes on disk, their front matter and Markdown read by others' parsers."""

import json
import random
import re
import string
import struct
from collections import defaultdict
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import models
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from runs import MemoryRun

from gsq import units
from gsq.cli import app
from gsq.codebook import Codebook
from gsq.config import parse_config
from gsq.errors import UserError
from gsq.eval import suite
from gsq.eval.definition import make_suite
from gsq.eval.results import result_files
from gsq.export import card, facts
from gsq.export.base import FORMATS, export_run, open_model
from gsq.export.card import render, role_rows, write_card
from gsq.export.facts import Card, Stored, collect
from gsq.plan.roles import Role
from gsq.tracking import read_metrics
from gsq.train import train

MLP = r"^model\.(language_model\.)?layers\.\d+\.mlp\..*_proj"
ATTENTION = r"^model\.(language_model\.)?layers\.\d+\.self_attn\..*_proj"
EXPERTS = r"language_model\..*\.mlp\.experts\."
TWO, FOUR = Codebook.integer(2, 32), Codebook.integer(4, 32)


def tq(bits: int):
    return lambda width: Codebook.tq(bits, 32, width)


INTEGERS = {r"layers\.1\.mlp\.down_proj": FOUR, MLP: TWO}
CASES = {  # format: model, rules, and the width that most weights have
    "humming": (models.tiny_llama, INTEGERS, 2),
    "compressed-tensors": (models.tiny_qwen3, INTEGERS, 2),
    "compressed-tensors-wide": (models.tiny_llama, {MLP: TWO}, 4),  # 2 bits are stored in 4
    "tq": (models.tiny_qwen3_moe, {r"mlp\.experts": tq(3), ATTENTION: tq(4)}, 3),
    "mlx": (models.tiny_qwen3_5_moe, {EXPERTS: TWO}, 2),
    "jangtq": (models.tiny_qwen3_5_moe, {EXPERTS: lambda width: Codebook.jangtq(4, width)}, 4),
}
OURS = {"humming": "humming", "jangtq": "jang", "mlx": "mlx", "tq": "turboquant"}  # tags
ORIGINAL = """---
license: other
license_name: tiny-licence
license_link: LICENSE.txt
language: [en, de]
base_model: someone/older
pipeline_tag: image-text-to-text
---
# The original
"""
ELEMENT = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U32": 4, "U8": 1}


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts.constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("card")
    found = {}
    for format, (make, rules, _) in CASES.items():
        run = MemoryRun(make(folder / f"{format}-source", layers=2), rules)
        found[format] = export_run(run, format, folder / format)
    return found


@pytest.fixture(scope="module")
def cards(exports) -> dict[str, Card]:
    return {format: collect(folder) for format, folder in exports.items()}


def headers(folder: Path) -> dict[str, int]:
    """Bytes of the tensors of all safetensors files by name, from dtypes and shapes, without the library."""
    found = {}
    for path in folder.glob("model*.safetensors"):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(length))
        for name, entry in entries.items():
            if name != "__metadata__":
                found[name] = int(torch.Size(entry["shape"]).numel()) * ELEMENT[entry["dtype"]]
    return found


def family(name: str) -> str:
    """The family of roles of a stored tensor of these models, from any format's name."""
    if "visual" in name or "vision" in name:
        return "vision"
    patterns = {
        "mtp": r"^mtp\.",
        "norm": r"norm\.weight$",
        "convolution": "conv1d",
        "linear attention": "linear_attn",
        "attention": "self_attn",
        "router": r"mlp\.gate\.|shared_expert_gate",
        "shared expert": r"shared_expert\.",
        "expert": r"experts|switch_mlp",
        "mlp": r"\.mlp\.",
        "head": "lm_head",
        "embedding": "embed_tokens",
    }
    return next(role for role, pattern in patterns.items() if re.search(pattern, name))


def tables(markdown: str) -> list[list[dict[str, str]]]:
    """Rows of each table, by a Markdown parser."""
    found, rows, cells, inside = [], [], [], False
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type == "table_open":
            rows = []
        elif token.type == "tr_open":
            cells = []
        elif token.type in ("th_open", "td_open"):
            inside = True
        elif token.type == "inline" and inside:
            cells.append(token.content)
            inside = False
        elif token.type == "tr_close":
            rows.append(cells)
        elif token.type == "table_close":
            head, *body = rows
            found.append([dict(zip(head, row, strict=True)) for row in body])
    return found


def totals(markdown: str) -> dict[str, str]:
    """The table of totals."""
    return {row["of these files"]: row[""] for row in next(rows for rows in tables(markdown) if len(rows[0]) == 2)}


def exactly(text: str) -> int:
    return int(re.search(r"\(([\d,]+) bytes\)", text)[1].replace(",", ""))


@pytest.mark.parametrize("format", CASES)
def test_totals_are_those_of_the_files(exports, cards, format):
    folder = exports[format]
    told, sizes = totals(render(cards[format])), headers(folder)
    shards = list(folder.glob("*.safetensors"))
    others = [path for path in folder.iterdir() if path not in shards]
    assert exactly(told["tensors"]) == sum(sizes.values())
    assert exactly(told["safetensors files"]) == sum(path.stat().st_size for path in shards)
    assert exactly(told["other files"]) == sum(path.stat().st_size for path in others)
    weights = sum(info.numel for info in open_model(folder).tensors.values())
    assert float(told["bits per weight"]) == pytest.approx(8 * sum(sizes.values()) / weights, abs=6e-4)


@pytest.mark.parametrize("format", CASES)
def test_sizes_by_role_are_those_of_the_headers(exports, cards, format):
    """Bytes are added up by the names on disk, under which formats store a tensor's codes and scales."""
    wanted, found = defaultdict(int), defaultdict(int)
    for name, size in headers(exports[format]).items():
        wanted[family(name)] += size
    for tensor in cards[format].tensors:
        found[tensor.role.family] += tensor.nbytes
    assert found == wanted
    shown = next(rows for rows in tables(render(cards[format])) if "role" in rows[0])
    for role, size in wanted.items():
        of_role = [row for row in shown if Role.read(row["role"]).family == role]
        assert of_role
        if len(of_role) == 1:
            assert of_role[0]["size"] == units.size(size)


@pytest.mark.parametrize("format", CASES)
def test_what_is_packed_is_told_in_words(cards, format):
    packed = [tensor for tensor in cards[format].tensors if "float" not in tensor.label]
    assert packed
    assert all(tensor.bits and f"{tensor.bits}-bit" in tensor.kind for tensor in packed)


@pytest.mark.parametrize("format", CASES)
def test_front_matter_is_what_the_hub_reads(exports, cards, format):
    folder, data = exports[format], ModelCard(render(replace(cards[format], base="org/tiny"))).data
    bits = CASES[format][2]
    assert (data.base_model, data.base_model_relation) == ("org/tiny", "quantized")
    assert data.to_dict()["library_name"] == ("mlx" if format in ("mlx", "jangtq") else "transformers")
    assert OURS.get(format, "compressed-tensors") in data.tags
    assert f"{bits}-bit" in data.tags
    assert data.license is None
    vision = any("visual" in name or "vision" in name for name in headers(folder))
    assert data.pipeline_tag == ("image-text-to-text" if vision else "text-generation")
    assert vision == (format == "jangtq")  # mlx leaves the tower of the same model out


@pytest.mark.parametrize("format", CASES)
def test_the_whole_card_is_markdown(cards, format):
    body = render(replace(cards[format], name="org/tiny-quantized")).partition(facts.MARK)[2]
    for block in re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    kinds = [token.type for token in MarkdownIt("commonmark").enable("table").parse(body)]
    assert kinds.count("table_open") == len(re.findall(r"^\| -", body, re.MULTILINE)) == 2
    assert kinds.count("fence") == body.count("\n```") / 2
    assert not re.search(r"\{\w*\}", body), "a placeholder was left"
    assert "hf download org/tiny-quantized --local-dir tiny-quantized" in body


def test_python_in_a_card_is_python_and_loads_the_export(exports, monkeypatch):
    """The snippet of a format that transformers reads by itself, run in the folder."""
    body = render(collect(exports["compressed-tensors"]))
    (code,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    monkeypatch.chdir(exports["compressed-tensors"])
    names: dict = {}
    exec(compile(code.replace('device_map="auto"', 'device_map="cpu"'), "card", "exec"), names)
    assert names["model"].config.model_type == "qwen3"
    assert names["tokenizer"]("a")["input_ids"]


def test_every_format_has_code_and_tags():
    names = {"compressed-tensors" if "compressed" in format else format for format in FORMATS}
    assert card.LOADING.keys() == card.TAGS.keys() == names
    for format, (_, language, code) in card.LOADING.items():
        filled = code.format(path="folder", imports="", arguments='device_map="auto"', auto="Auto")
        if language == "python":
            compile(filled, format, "exec")


@given(st.dictionaries(st.tuples(st.sampled_from("qkvo"), st.integers(0, 9)), st.sampled_from([2, 3, 4]), min_size=1))
def test_rows_say_of_every_part_in_every_layer_how_it_is_stored(widths):
    tensors = [
        Stored(f"{layer}.{part}", Role("attention", (part,)), layer, f"uint{bits} g32", 64, 8 * bits)
        for (part, layer), bits in widths.items()
    ]
    rows, found = role_rows(tensors), {}
    every = sorted({layer for _, layer in widths})
    for row in rows:
        layers = every if row["layers"] == "all" else []
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", row["layers"]):
            layers = [*layers, *range(int(first), int(last or first) + 1)]
        for part in Role.read(row["role"]).parts:
            for layer in layers:
                assert (part, layer) not in found
                found[part, layer] = int(row["stored as"][0])
        assert float(row["bits each"]) == int(row["stored as"][0])
    assert found == widths


# Cards of runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a model in the hub's cache, which has a card and a licence."""
    folder = tmp_path_factory.mktemp("run")
    cache = folder / "models--org--tiny" / "snapshots"
    cache.mkdir(parents=True)
    source = models.tiny_llama(cache / ("0123456789" * 4))
    (source / "README.md").write_text(ORIGINAL)
    letters = random.Random(0).choices(string.ascii_letters + string.digits + " ", k=900)
    (folder / "text.txt").write_text("".join(letters))
    config = {
        "model": {"name": str(source)},
        "plan": {"rules": [{"match": MLP, "bits": 2, "group_size": 32}]},
        "calib": {"source": str(folder / "text.txt"), "windows": 6, "length": 20, "validation": 2},
        "refine": {"steps": 4, "windows": 2},
        "eval": {"text": str(folder / "text.txt"), "windows": 3, "length": 32},
        "dtype": "float32",
    }
    return train(parse_config(config), folder / "tiny").folder


def test_a_run_tells_base_licence_and_calibration(finished):
    text = render(collect(*facts.find(finished, None)))
    data = ModelCard(text).data
    assert (data.base_model, data.license, data.license_name) == ("org/tiny", "other", "tiny-licence")
    assert data.license_link == "https://huggingface.co/org/tiny/blob/main/LICENSE.txt"
    assert data.language == ["en", "de"]
    assert data.pipeline_tag == "text-generation"  # there is no vision tower, whatever the original's card says
    assert "gsq" in data.tags
    assert "(revision `012345678901`)" in text
    assert "Calibrated on 120 tokens of text.txt (6 windows of 20, 2 of them held out" in text
    assert str(finished.parent) not in text  # no path of this machine


def test_a_run_tells_what_it_measured(finished):
    text = render(collect(finished / "export", finished))
    events = read_metrics(finished)
    (measured,) = (event for event in events if event["kind"] == "eval")
    (row,) = next(rows for rows in tables(text) if "measured" in rows[0])
    assert row["measured"] == "this, text.txt"
    assert row["KL"] == units.number(measured["kl"])
    assert float(row["perplexity"]) == pytest.approx(measured["perplexity"], rel=1e-3)
    assert float(row["of the original"]) == pytest.approx(measured["base_perplexity"], rel=1e-3)
    layers = next(rows for rows in tables(text) if "layer" in rows[0])
    distances = [event["output_error"] for event in events if event["kind"] == "layer"]
    assert [row["distance"] for row in layers] == [units.number(distance) for distance in distances]
    for layer, row in enumerate(layers):
        of_layer = [event for event in events if event.get("layer") == layer]
        gptq = [event["gptq"] for event in of_layer if event["kind"] == "target"]
        assert float(row["GPTQ"]) == pytest.approx(sum(gptq) / len(gptq), rel=1e-3)
        (stage,) = (event for event in of_layer if event["kind"] == "stage")
        assert row["held out"].startswith(units.number(stage["error_init"]))


def test_the_recipe_is_one_and_decides_the_same(finished):
    text = render(collect(finished / "export", finished))
    (found,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    recipe, original = (parse_config(yaml.safe_load(t)) for t in (found, (finished / "config.yaml").read_text()))
    assert recipe.model.name == "org/tiny"
    assert recipe.calib.source == "text.txt"
    same = recipe.fixed() | {key: original.fixed()[key] for key in ("model.name", "calib.source")}
    assert same == original.fixed()


def test_an_export_of_another_run_is_refused(finished, tmp_path):
    other = export_run(MemoryRun(models.tiny_llama(tmp_path / "source"), {ATTENTION: TWO}), "mlx", tmp_path / "mlx")
    with pytest.raises(UserError, match=r"quantized model\.layers\.0\.mlp.* but the export did not"):
        collect(other, finished)


def test_another_export_of_a_run_says_which_one_was_measured(finished, tmp_path):
    from gsq.run import Run

    mlx = export_run(Run.open(finished), "mlx", tmp_path / "mlx")
    assert "the run's export in format humming, text.txt" in render(collect(mlx, finished))


def test_the_original_is_replaced_and_other_readmes_only_by_force(finished, tmp_path):
    readme = finished / "export" / "README.md"
    assert readme.read_text() == ORIGINAL  # exports carry it along
    assert write_card(finished).path == readme
    first = readme.read_text()
    assert facts.MARK in first
    assert write_card(finished / "export", finished).missing == []
    assert readme.read_text() == first
    readme.write_text("# Mine\n")
    with pytest.raises(UserError, match="not written by gsq card"):
        write_card(finished)
    write_card(finished, force=True)
    assert readme.read_text() == first
    readme.write_text(ORIGINAL)


def test_what_is_not_known_is_left_out_and_said(exports, tmp_path, capsys):
    app(["card", str(exports["mlx"]), "--out", str(tmp_path / "card.md")], standalone_mode=False)
    said = capsys.readouterr().out
    assert all(remedy in said for remedy in ("--base", "licence", "--run", "--eval"))
    text = (tmp_path / "card.md").read_text()
    assert not {"base_model", "license"} & ModelCard(text).data.to_dict().keys()
    assert "GSQ:" not in text  # nothing is said of how it came about: other programs write this format, too
    assert not (exports["mlx"] / "README.md").exists()


def test_an_older_card_tells_base_and_licence(exports, tmp_path):
    """Of an export alone: what the card in it says, if that is one of ours; of an original's, the licence only."""
    readme = exports["humming"] / "README.md"
    try:
        readme.write_text(ORIGINAL)
        data = ModelCard(render(collect(exports["humming"]))).data
        assert (data.base_model, data.license, data.license_link) == (None, "other", None)
        readme.write_text(render(collect(exports["humming"], base="org/tiny")))
        data = ModelCard(render(collect(exports["humming"]))).data
        assert (data.base_model, data.license_name) == ("org/tiny", "tiny-licence")
    finally:
        readme.unlink()


class Hub(BaseHTTPRequestHandler):
    """Knows one model, `org/tiny`."""

    def do_GET(self):
        known = self.path == "/api/models/org/tiny"
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(json.dumps({"id": "org/tiny", "cardData": {"license": "mit"}}).encode() if known else b"")

    def log_message(self, *_):
        pass


def test_the_hub_is_asked_for_a_licence_that_nothing_else_tells(exports, monkeypatch):
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=hub.serve_forever, daemon=True).start()
    monkeypatch.setattr(facts.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(facts.constants, "ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    licences = {base: collect(exports["tq"], base=base).original.get("license") for base in ("org/tiny", "org/other")}
    assert licences == {"org/tiny": "mit", "org/other": None}
    hub.shutdown()
    hub.server_close()
    assert collect(exports["tq"], base="org/tiny").original == {}  # nobody answers


def test_results_of_gsq_eval_are_shown(exports, tmp_path):
    result = {"perplexity": 99.25, "base_perplexity": 17.5, "kl": 0.125, "top1": 0.75, "tokens": 1024}
    (tmp_path / "wikitext.json").write_text(json.dumps(result))
    (row,) = tables(render(collect(exports["tq"], evaluations=[tmp_path / "wikitext.json"])))[-1]
    assert list(row.values()) == ["wikitext", "99.25", "17.5", "0.125", "75.0%", "1,024"]


def test_results_of_a_suite_are_shown_and_told_from_those_of_other_weights(exports, tmp_path):
    (tmp_path / "text.txt").write_text("".join(random.Random(0).choices(string.ascii_letters + " ", k=2000)))
    content = {
        "models": {"small": str(exports["humming"]), "other": str(exports["tq"])},
        "tests": {"perplexity": {"text": str(tmp_path / "text.txt"), "words": 100, "contexts": [32]}},
    }
    settings = make_suite(content, "test", "test")
    results = suite.run_suite(settings, tmp_path / "out", torch.device("cpu"), torch.float32)
    files = result_files(tmp_path / "out", ["small", "other"])
    shown = collect(exports["humming"], evaluations=list(files.values()))
    text = render(shown)
    measured = results[0]["parts"]["perplexity/32"]["result"]
    row = next(row for rows in tables(text) for row in rows if row.get("model") == "small")
    assert units.number(measured["perplexity"]) in row.values()
    assert not any("weights" in gap for gap in facts.missing(shown))
    strange = collect(exports["humming"], evaluations=[files["other"]])
    assert any("weights" in gap for gap in facts.missing(strange))


def suite_result(label: str, prompt: str = "Say hello.", answer: str = "hello") -> dict:
    """A result file's content with one sample."""
    cell = {"context": 0, "prompt": prompt, "text": answer, "distinct": {"4": None}}
    part = {"test": "samples", "environment": 0, "result": cell}
    environment = {"device": "cpu: x", "dtype": "float32", "versions": {}}
    parts = {"samples/0/own": part}
    return {"schema": 1, "model": {"label": label}, "environments": [environment], "parts": parts}


def test_what_models_and_people_wrote_is_text(exports, tmp_path):
    """Nothing in it ends a cell or a fold, hides what follows, or links."""
    said = "a \\\\| b </details> <!-- [x](http://y) ![z](w) **c** `d"
    (tmp_path / "r.json").write_text(json.dumps(suite_result("*m*", prompt="1 < 2\n| </summary>", answer=said)))
    text = render(collect(exports["tq"], evaluations=[tmp_path / "r.json"]))
    assert text.count("</details>") == text.count("</summary>") == text.count("<details>") == 1
    tokens = MarkdownIt("commonmark").enable("table").parse(text.partition(facts.MARK)[2])
    (row,) = (token for token in tokens if token.type == "inline" and "details" in token.content and token.level == 4)
    assert {child.type for child in row.children} <= {"text", "text_special"}
    assert "".join(child.content for child in row.children) == said
    assert "<!--" not in text.partition(facts.MARK)[2]


def test_two_results_of_one_name_are_refused(exports, tmp_path):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        file.write_text(json.dumps(suite_result("mine")))
    with pytest.raises(UserError, match="two of the results are of models called 'mine'"):
        collect(exports["tq"], evaluations=files)


def test_links_to_licences_stay_in_the_folder(exports, tmp_path):
    for link in ("../outside.txt", str(tmp_path / "outside.txt")):
        (exports["tq"].parent / "outside.txt").touch()
        (tmp_path / "outside.txt").touch()
        shown = replace(collect(exports["tq"]), original={"license": "other", "license_link": link})
        assert "license_link" not in ModelCard(render(shown)).data.to_dict()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"base": "tiny"}, "'tiny' is no id of the hub"),
        ({"name": "a/b/c"}, "'a/b/c' is no id of the hub"),
        ({"evaluations": [Path("nowhere.json")]}, "nowhere.json is missing"),
    ],
)
def test_mistakes_are_named(exports, tmp_path, arguments, said):
    with pytest.raises(UserError, match=re.escape(said)):
        write_card(exports["tq"], out=tmp_path / "card.md", **arguments)


def test_a_dense_model_has_no_card(tmp_path):
    with pytest.raises(UserError, match="is not quantized"):
        write_card(models.tiny_llama(tmp_path / "dense"))
