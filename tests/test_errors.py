"""Each mistake of a user, and each damage to a file, ends in one message that names it and its remedy, and exit code 2.

All through the command line, in this process. What stops before work starts leaves no run behind; what stops
later keeps the layers that are finished.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import yaml
from models import tiny_llama
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gsq import files
from gsq.cli import main, stopped_by_sigterm
from gsq.model.checkpoint import INDEX

FIRST = "model-00001-of-"  # begins the name of a shard


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """No network, and paths relative to a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def recipe(tmp_path: Path) -> dict:
    """A recipe that would work, beside its model and text in the current folder."""
    tiny_llama(tmp_path / "model", shards=3)
    Path("text.txt").write_text("".join(random.Random(0).choices("abcdefgh ijkl\n", k=400)))
    return {
        "model": {"name": "./model"},
        "plan": {"rules": [{"match": "_proj", "bits": 2, "group_size": 32}]},
        "calib": {"source": "text.txt", "windows": 4, "length": 16, "validation": 1, "batch": 2},
        "init": {"method": "rtn", "polish": 0},
        "refine": {"enabled": False},
        "run": "run",
    }


@pytest.fixture
def gsq(capfd: pytest.CaptureFixture):
    """Run a command line that must fail; returns its error message, without line breaks."""

    def run(*arguments: str) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        err = capfd.readouterr().err
        assert end.value.code == 2, err
        assert "Traceback" not in err
        assert err.count("error: ") == 1
        return " ".join(err[err.index("error: ") :].split())

    return run


def quantize(recipe: dict, *more: str) -> list[str]:
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    return ["quantize", "recipe.yaml", *more]


def succeed(*arguments: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 0


def shards() -> list[Path]:
    return sorted(Path("model").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": {}}, "recipe.yaml: unknown key modle; did you mean 'model'?"),
        ({"refine": {"stepps": 3}}, "unknown key refine.stepps; did you mean 'steps'?"),
        (
            {"plan": {"rules": [{"match": "self_atn", "bits": 2}]}},
            "plan rule 'self_atn' matches no tensor that can be quantized; nearest are model.layers.0.self_attn.",
        ),
        (
            {"plan": {"rules": [{"match": "[qk]_prj", "bits": 2}]}},  # brackets are no markup
            "plan rule '[qk]_prj' matches no tensor",
        ),
        (
            {"plan": {"rules": [{"match": "_proj", "bits": 2, "group_size": 128}]}},
            "model.layers.0.self_attn.q_proj.weight: group size 128 does not divide in_features 64; use 64 or 32 or 16",
        ),
        (
            {"plan": {"rules": [{"match": "q_proj", "bits": 2, "group_size": 32}]}},
            "differ, but vLLM reads both as one module model.layers.0.self_attn.qkv_proj; give all parts",
        ),
        (
            {"calib": {"source": "text.txt", "windows": 400, "length": 16, "validation": 1}},
            "text.txt holds 400 tokens, enough for 25 windows of 16, not 400; give more text, or lower the number",
        ),
        ({"calib": {"source": "none.txt"}}, "calib.source 'none.txt' does not exist"),
        ({"eval": {"text": "text.txt"}}, "text.txt has 400 tokens, enough for 0 windows of 1024, not 20"),
        ({"eval": {"text": "none.txt"}}, "cannot read none.txt as UTF-8 text"),
        ({"model": {"name": "./none"}}, "model './none' does not exist; give a folder, a .gguf file or a hub id"),
        ({"model": {"name": "none/none"}}, "model 'none/none' is no local folder, and the hub did not give it"),
        ({"model": {"name": "."}}, "config.json is missing; is"),
        ({"export": {"out": "model"}}, "export folder model exists already; set export.out to another, or remove it"),
        ({"run": "model"}, "run folder model exists already; continue it with --resume, or choose another with --out"),
    ],
)
def test_mistakes_end_before_work_starts(change: dict, message: str, recipe: dict, gsq):
    assert message in gsq(*quantize(recipe | change))
    assert not Path("run").exists()


def test_commands_name_files_that_do_not_exist(recipe: dict, gsq):
    assert "cannot read config file none.yaml: No such file" in gsq("quantize", "none.yaml")
    assert "none is no run folder" in gsq("export", "none", "--out", "out")
    assert "none/config.json is missing; is none a model folder?" in gsq("inspect", "none")
    assert "cannot read none.txt" in gsq("eval", "model", "--text", "none.txt")
    measure = ["eval", "model", "--text", "text.txt", "--windows", "1", "--length", "8"]
    assert "--json no/out.json: there is no folder no" in gsq(*measure, "--json", "no/out.json")
    assert "model is dense already" in gsq("dequantize", "model", "--out", "out")


def test_missing_shard(recipe: dict, gsq):
    shards()[1].unlink()
    assert "is missing; download the checkpoint again" in gsq(*quantize(recipe))


def test_truncated_shard(recipe: dict, gsq):
    shards()[0].write_bytes(shards()[0].read_bytes()[:-10])
    message = gsq(*quantize(recipe))
    assert FIRST in message
    assert "is truncated or damaged" in message


def test_index_that_leads_outside(recipe: dict, gsq):
    index = json.loads((Path("model") / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../secret.safetensors"
    (Path("model") / INDEX).write_text(json.dumps(index))
    assert "names '../secret.safetensors', a file outside the checkpoint's folder; do not trust it" in gsq(
        *quantize(recipe)
    )


def test_model_without_tokenizer(recipe: dict, gsq):
    for path in Path("model").glob("tokenizer*"):
        path.unlink()
    text = {"eval": {"text": "text.txt", "windows": 1, "length": 8}}
    assert "has no usable tokenizer" in gsq(*quantize(recipe | text))


def test_model_that_is_quantized_already(recipe: dict, gsq):
    succeed(*quantize(recipe))
    message = gsq(*quantize(recipe | {"model": {"name": "run/export"}, "run": "again"}))
    assert "run/export is quantized already (humming); give the original checkpoint" in message
    assert "run/export exists already; choose another folder or remove it" in gsq(
        "export", "run", "--out", "run/export"
    )


def test_an_export_is_in_the_format_of_its_run_unless_told(recipe: dict, gsq):
    rules = [{"role": "embedding", "bits": 8, "codebook": "affine", "group_size": 64}, *recipe["plan"]["rules"]]
    succeed(*quantize(recipe | {"plan": {"rules": rules}, "export": {"format": "mlx"}}))
    succeed("export", "run", "--out", "again")
    assert json.loads(Path("again/config.json").read_text())["quantization"]["bits"] == 2
    assert "format humming holds no offsets" in gsq("export", "run", "--out", "other", "--format", "humming")
    Path("run/config.yaml").write_text(Path("run/config.yaml").read_text().replace("format: mlx", "format: null"))
    message = gsq("export", "run", "--out", "other")
    assert "the config of run has no export.format; give one with --format: humming, " in message
    Path("run/layers/outside.safetensors").unlink()
    message = gsq("export", "run", "--out", "other", "--format", "mlx")
    assert "what lies outside the layers (embedding or head) of run is not finished, or its file is damaged" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number(value: float, recipe: dict, gsq):
    name = "model.layers.1.mlp.up_proj.weight"
    shard = next(path for path in shards() if name in load_file(path))
    tensors = load_file(shard)
    tensors[name][3, 5] = value
    save_file(tensors, shard, metadata={"format": "pt"})
    assert f"{name} holds NaN or Inf; the source checkpoint is damaged, download it again" in gsq(*quantize(recipe))
    assert len(Path("run/journal.jsonl").read_text().splitlines()) == 1  # layer 0 is finished
    assert "layer 1 of run is not finished" in gsq("export", "run", "--out", "out")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch):
    """`full_disk(n)`: files of tensors can be written `n` times, then the disk is full, as safetensors says it."""

    def fill(room: int) -> None:
        left = iter(range(room))

        def save(tensors: dict, path: Path, **options: object) -> None:
            if next(left, None) is None:
                path.write_bytes(b"part")
                raise SafetensorError(f"Error while serializing: I/O error: full (os error {errno.ENOSPC})")
            save_file(tensors, path, **options)

        monkeypatch.setattr(files, "save_file", save)

    return fill


@pytest.mark.parametrize(
    ("room", "layers", "place", "needed"),
    [
        (0, None, "No space left on device", ""),  # the tokens, before the run has its name
        (1, 0, "run/layers/00000.safetensors", "63.10 kB"),  # all layers and the export
        (2, 1, "run/layers/00001.safetensors", "51.58 kB"),
        (3, 2, "run/export", "40.06 kB"),
    ],
)
def test_full_disk(room: int, layers: int | None, place: str, needed: str, recipe: dict, full_disk, gsq):
    full_disk(room)
    message = gsq(*quantize(recipe))
    assert place in message
    assert f"{needed} needed" in message or not needed
    assert "make room and run the same command again; `quantize --resume` keeps finished layers" in message
    assert list(Path().rglob("run/**/*.partial")) == []
    if layers is not None:
        assert len(Path("run/journal.jsonl").read_text().splitlines()) == layers
    full_disk(1 << 30)
    succeed("quantize", "recipe.yaml", "--resume")
    assert Path("run/export/model.safetensors").exists()


def test_full_disk_of_small_files(recipe: dict, monkeypatch: pytest.MonkeyPatch, gsq):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("gsq.tracking._MetricsFile.write", refuse)
    assert "No space left on device; make room and run the same command again" in gsq(*quantize(recipe))


def test_too_little_space_is_found_before_work_starts(recipe: dict, monkeypatch: pytest.MonkeyPatch, gsq):
    monkeypatch.setattr(files, "free_bytes", lambda path: 50_000)
    assert "run needs 63.10 kB, but only 50.00 kB are free there; make room" in gsq(*quantize(recipe))
    monkeypatch.setattr(files, "free_bytes", lambda path: 1 << 30)
    succeed("quantize", "recipe.yaml", "--resume")
    monkeypatch.setattr(files, "free_bytes", lambda path: 50_000)
    message = gsq("dequantize", "run/export", "--out", "dense")
    assert "dense needs 164.48 kB, but only 50.00 kB are free there" in message
    assert not list(Path().glob("dense*"))


@pytest.mark.parametrize("swallow", [False, True])
def test_sigterm_inside_a_library_that_turns_it_into_an_error(swallow: bool, capsys):
    def library() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except BaseException:
            if swallow:
                raise ValueError("could not determine the shape") from None
            raise

    with pytest.raises(SystemExit) as end, stopped_by_sigterm():
        library()
    assert end.value.code == 0
    assert "stopped by SIGTERM; finished layers are kept" in capsys.readouterr().err


def test_other_errors_stay_errors():
    with pytest.raises(ValueError, match="mine"), stopped_by_sigterm():
        raise ValueError("mine")
