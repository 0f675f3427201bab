"""A suite of tests for several models: what to do is found out first, then done part by part, and kept.

A test is a module listed in `TESTS`, with its `Settings` and `parts(settings)`: named pieces of work that
take a model and return what JSON can hold. Everything that can be wrong is found before the first part runs:
unknown settings, text that is missing or too short, a model without a tokenizer, one that does not fit into memory.

Each model has one JSON file, written anew, whole or not at all, behind every part. A part is kept with a key
made of everything that its result depends on (settings, text, weights of the model and its base, KV-cache scheme,
dtype, kind of device), and is done again only if that has changed. So a suite that was killed goes on where it was.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from pydantic import Field

from gsq.calib.tokens import text_mark
from gsq.config import Section, validated
from gsq.errors import UserError
from gsq.eval.filler import require_window
from gsq.eval.kvcache import Scheme
from gsq.eval.subject import KERNEL_FORMATS, Local, Server, check_room
from gsq.eval.tables import file_name
from gsq.eval.text import BaseWalks, Weights
from gsq.export.base import format_of, open_model
from gsq.export.inspect import inspect
from gsq.files import write_whole
from gsq.model.checkpoint import Checkpoint, fingerprint
from gsq.model.resolve import load_tokenizer, resolve_model
from gsq.model.skeleton import build_meta_model

SCHEMA = 1  # of the result files
PACKAGES = ("gsq", "torch", "transformers", "tokenizers", "lm-eval")  # whose versions results name
Told = Callable[[str, str, int, int], None]  # told of a label, a part, and the layers done of how many


@dataclass(frozen=True)
class Test:
    """A module of tests. `axes` are the settings that only say which parts there are.

    One that reads `weights` takes a folder layer by layer; any other asks a model, in memory or behind a URL.
    """

    module: str
    axes: tuple[str, ...]
    weights: bool = False

    def load(self) -> ModuleType:
        """The module; imported only if a suite has such a test."""
        return importlib.import_module(self.module)


TESTS: dict[str, Test] = {
    "perplexity": Test("gsq.eval.text", axes=("contexts",), weights=True),
    "needle": Test("gsq.eval.needle", axes=("contexts", "depths")),
    "samples": Test("gsq.eval.samples", axes=("contexts", "prompts")),
    "speed": Test("gsq.eval.speed", axes=("contexts",)),
    "accuracy": Test("gsq.eval.harness", axes=("tasks",)),
}

# What is measured of models that are named on the command line. Texts come from the hub; `--text FILE` replaces them.
SUITES: dict[str, dict[str, dict]] = {
    "quick": {
        "perplexity": {"words": 8000, "contexts": [512, 2048]},
        "needle": {"contexts": [512, 1024], "depths": [10, 50, 90], "trials": 1},
        "speed": {"contexts": [512], "new_tokens": 32, "repeats": 3},
        "samples": {"contexts": [0], "max_tokens": 64},
    },
    "card": {
        "perplexity": {"words": 50000, "contexts": [1024, 4096]},
        "needle": {"contexts": [1024, 4096]},
        "speed": {"contexts": [512, 2048]},
        "samples": {"contexts": [0, 2048]},
    },
    "full": {
        "perplexity": {"words": 250000, "contexts": [512, 1024, 2048, 4096, 8192]},
        "rolling": {"test": "perplexity", "words": 250000, "contexts": [2048], "mode": "rolling"},
        "needle": {"contexts": [1024, 2048, 4096, 8192], "trials": 5},
        "speed": {"contexts": [512, 2048, 8192], "new_tokens": 128},
        "samples": {"contexts": [0, 2048, 8192]},
        "accuracy": {"tasks": ["arc", "hellaswag", "winogrande", "piqa", "gsm8k", "ifeval"]},
    },
}


class Model(Section):
    """One model of a suite, a row of its tables."""

    path: str | None = Field(None, description="folder, .gguf file or hub id")
    url: str | None = Field(None, description="server that generates in its place, OpenAI-compatible")
    served_as: str | None = Field(None, description="what the server calls it; default: its only model")
    base: str | None = Field(None, description="model to measure divergence from; default: the suite's")
    kv: str | None = Field(None, description="KV-cache scheme; default: the suite's")


class Suite(Section):
    """Models, and what to measure of them. `models` are `Model`s and `tests` settings, by what tables call them."""

    name: str
    models: dict[str, Model] = Field(min_length=1)
    tests: dict[str, dict[str, Any]] = Field(min_length=1)


@dataclass(frozen=True)
class Task:
    """A part of a test to be done for a model; `settings` are those that its result depends on."""

    label: str
    part: str
    test: str
    settings: dict
    key: str
    work: Callable[[Any], dict]


@dataclass(frozen=True)
class Preview:
    """What is known of the model in a folder before it is loaded; `nbytes` are those of its weights in memory."""

    name: str
    window: int | None
    chats: bool
    device: torch.device
    nbytes: int
    scheme: Scheme | None = None

    @classmethod
    def of(cls, label: str, folder: Path, kv: str | None, device: torch.device, dtype: torch.dtype) -> Preview:
        """Read from config and headers."""
        model, stored = build_meta_model(open_model(folder).config, dtype), Checkpoint.open(folder)
        packed = device.type == "cuda" and format_of(stored) in KERNEL_FORMATS
        nbytes = stored.nbytes if packed else sum(parameter.nbytes for parameter in model.parameters())
        window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        scheme = Scheme.parse(kv) if kv else None
        return cls(label, window, bool(load_tokenizer(folder).chat_template), device, nbytes, scheme)


@dataclass
class Candidate:
    """A model of the suite that was found: where it is, and what identifies it (`mark`).

    `preview` shows the model in the folder, `server` is what answers in its place.
    """

    label: str
    model: Model
    folder: Path | None
    base: Path | None
    mark: str
    base_mark: str | None
    preview: Preview | None
    server: Server | None

    @classmethod
    def find(cls, label: str, model: Model, device: torch.device, dtype: torch.dtype) -> Candidate:
        """Resolve its folder and its base, and ask its server for a sign of life."""
        if model.path is None and model.url is None:
            raise UserError(f"model {label!r} has neither `path` nor `url`")
        folder, base = (resolve_model(name) if name else None for name in (model.path, model.base))
        mark = fingerprint(Checkpoint.open(folder)) if folder else f"{model.url} {model.served_as}"
        base_mark = fingerprint(Checkpoint.open(base)) if base else None
        server = Server(model.url, model.served_as, folder) if model.url else None
        preview = Preview.of(label, folder, model.kv, device, dtype) if folder else None
        return cls(label, model, folder, base, mark, base_mark, preview, server)

    def walked(self, test: str) -> bool:
        """Whether a test takes this model layer by layer, so that it need not fit into memory."""
        return TESTS[test].weights and self.model.kv is None

    def served(self, test: str) -> bool:
        """Whether a test asks this model's server."""
        return not TESTS[test].weights and self.server is not None

    def facts(self) -> dict:
        """What its result file says about it."""
        facts = {"label": self.label, **self.model.model_dump(mode="json"), "fingerprint": self.mark}
        if self.folder is None:
            return facts
        total = inspect(self.folder)[-1]
        source = Path(self.model.path).expanduser()
        nbytes = source.stat().st_size if source.is_file() else total["bytes"]  # a GGUF file was unpacked
        form = "gguf" if source.is_file() else format_of(Checkpoint.open(self.folder))
        weights = total["weights"]
        return facts | {"format": form, "bytes": nbytes, "weights": weights, "bits_per_weight": 8 * nbytes / weights}


@dataclass
class Results:
    """The result file of one model: `content["parts"]` by name, each with its key."""

    path: Path
    content: dict = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, candidate: Candidate) -> Results:
        """What is there already of this model; of other weights under its name nothing is kept."""
        before = read_results(path) if path.exists() else {"model": {}}
        facts = candidate.facts()
        if before["model"].get("fingerprint") != candidate.mark:
            before = {"environments": [], "parts": {}}
        kept = {key: before[key] for key in ("environments", "parts")}
        return cls(path, {"schema": SCHEMA, "model": facts, **kept})

    def has(self, task: Task) -> bool:
        """Whether the task is done, and nothing that it depends on has changed since."""
        return self.content["parts"].get(task.part, {}).get("key") == task.key

    def add(self, task: Task, result: dict, seconds: float, environment: dict) -> None:
        """Keep a finished part."""
        environments = self.content["environments"]
        if environment not in environments:
            environments.append(environment)
        self.content["parts"][task.part] = {
            "test": task.test,
            "settings": task.settings,
            "key": task.key,
            "environment": environments.index(environment),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "result": result,
        }
        self.save()

    def save(self) -> None:
        """Write the file, whole or not at all."""
        text = json.dumps(self.content, indent=1, ensure_ascii=False) + "\n"
        write_whole(self.path, lambda path: path.write_text(text, encoding="utf-8"), len(text))


def read_results(path: Path) -> dict:
    """A result file; raises `UserError` if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no result file ({error}); remove it") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise UserError(f"{path} is no result file of this version; remove it, or give another folder with --out")
    return content


def compose(
    suite: str,
    models: dict[str, str | dict] | None = None,
    base: str | None = None,
    kv: str | None = None,
    text: str | None = None,
    tests: Sequence[str] = (),
) -> Suite:
    """A suite by the name of a built-in one or its YAML file, with what the command line says of it.

    `models`, `base` and `kv` take the place of the file's, `text` that of every text that its tests read, and
    only `tests` are done, if any are named. Raises `UserError` for any mistake.
    """
    name = Path(suite).stem
    content = {"tests": SUITES[suite]} if suite in SUITES else _read_yaml(Path(suite))
    given = {"models": models, "base": base, "kv": kv}
    content |= {key: value for key, value in given.items() if value}
    if not content.get("models"):
        raise UserError(f"suite {suite} names no models; give their folders on the command line")
    if unknown := set(tests) - set(content.get("tests") or {}):
        raise UserError(f"suite {suite} has no test {min(unknown)!r}; tests: {', '.join(content.get('tests') or {})}")
    made = make_suite(content, suite, name)
    chosen = {label: settings for label, settings in made.tests.items() if label in tests or not tests}
    if text:
        chosen = {label: _reading(text, label, settings, suite) for label, settings in chosen.items()}
    return made.model_copy(update={"tests": chosen})


def named(models: Sequence[str], url: str | None = None, served_as: str | None = None) -> dict[str, dict | str]:
    """Models of the command line, `NAME=DIR` or just `DIR`, the `url` being the server of the only one."""
    if url and len(models) > 1:
        raise UserError("--url is the server of one model; name several models with their URLs in a suite's YAML file")
    found: dict[str, dict | str] = {}
    for model in models:
        label, separator, path = model.partition("=")
        label, path = (label, path) if separator and not Path(model).exists() else (model, model)
        if label in found:
            raise UserError(f"two models are called {label!r}; name them: NAME=DIR")
        found[label] = path
    if url:
        label, path = next(iter(found.items()), (served_as or url, None))
        found = {label: {"path": path, "url": url, "served_as": served_as}}
    return found


def _read_yaml(path: Path) -> dict:
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"there is no suite {str(path)!r}; suites: {', '.join(SUITES)}, or a YAML file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read suite {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold `tests`, and `models` if none are given on the command line")
    return content


def _reading(text: str, label: str, given: dict, origin: str) -> dict:
    """Settings of a test with another text, if it reads one."""
    _, settings = test_settings(label, given, origin)
    return given | {"text": text} if getattr(settings, "text", None) else given


def make_suite(content: Any, origin: str, name: str) -> Suite:
    """A suite from parsed YAML: `models`, `tests`, and `base` and `kv` of those models that have none of their own.

    A model may be just its path or URL; a base may be a model's label.
    """
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("models", "tests")):
        raise UserError(f"{origin} must hold `models` and `tests`")
    content = {"name": name, **content}
    defaults = {key: content.pop(key) for key in ("base", "kv") if key in content}
    models = {}
    for label, given in content["models"].items():
        given = given if isinstance(given, dict) else {"url" if "://" in str(given) else "path": given}
        models[str(label)] = validated(Model, defaults | given, f"{origin}: models.{label}")
    paths = {label: model.path for label, model in models.items()}
    for label, model in models.items():
        if model.base in paths and paths[model.base] is None:
            raise UserError(f"{origin}: models.{label}: base {model.base!r} is but a URL; give it a `path`, too")
        models[label] = model.model_copy(update={"base": paths.get(model.base, model.base)})
    tests = {str(label): given or {} for label, given in content["tests"].items()}
    return validated(Suite, {**content, "models": models, "tests": tests}, origin)


def run_suite(
    suite: Suite, out: Path, device: torch.device, dtype: torch.dtype, told: Told = lambda *_: None
) -> list[dict]:
    """Do what is missing in the folder `out`; returns the content of all models' result files.

    Raises `UserError` before any work for what cannot be done; finished parts are kept in any case.
    """
    candidates = {label: Candidate.find(label, model, device, dtype) for label, model in suite.models.items()}
    tasks = list(plan(suite, candidates, device, dtype))
    out.mkdir(parents=True, exist_ok=True)
    files = result_files(out, suite.models)
    results = {label: Results.open(files[label], candidate) for label, candidate in candidates.items()}
    missing = [task for task in tasks if not results[task.label].has(task)]
    subjects = Subjects(candidates, device, dtype)
    environment = describe_environment(device, dtype)
    for task in ordered(missing, candidates):
        told(task.label, task.part, 0, 0)
        subject = subjects.of(task, lambda done, layers, task=task: told(task.label, task.part, done, layers))
        start = time.perf_counter()
        results[task.label].add(task, task.work(subject), time.perf_counter() - start, environment)
    for kept in results.values():
        kept.save()
    return [kept.content for kept in results.values()]


def plan(suite: Suite, candidates: dict[str, Candidate], device: torch.device, dtype: torch.dtype) -> Iterator[Task]:
    """Everything that the suite asks for, checked."""
    for label, given in suite.tests.items():
        name, settings = test_settings(label, given, suite.name)
        parts = TESTS[name].load().parts(settings)
        fixed = settings.model_dump(mode="json", exclude=set(TESTS[name].axes))
        read = [text_mark(fixed["text"], f"{label}.text")] if fixed.get("text") else []
        read += [text_mark(file, label) for file in _files(fixed)]
        for candidate in candidates.values():
            check(label, name, settings, parts, candidate)
            for part, work in parts.items():
                part = label + part.removeprefix(name)
                key = _key(name, part, fixed | {"read": read}, candidate, device, dtype)
                yield Task(candidate.label, part, name, fixed, key, work)


def _files(settings: Any) -> list[str]:
    """Files that are named anywhere in settings."""
    if isinstance(settings, str):
        return [settings] if Path(settings).is_file() else []
    inner = settings.values() if isinstance(settings, dict) else settings if isinstance(settings, list) else ()
    return [file for value in inner for file in _files(value)]


def test_settings(label: str, given: dict, origin: str) -> tuple[str, Section]:
    """Which test a label of a suite means, and its settings."""
    given = dict(given)
    name = given.pop("test", label)
    if name not in TESTS:
        raise UserError(f"{origin}: tests.{label}: there is no test {name!r}; tests: {', '.join(TESTS)}")
    return name, validated(TESTS[name].load().Settings, given, f"{origin}: tests.{label}")


def check(label: str, name: str, settings: Section, parts: dict[str, Callable], candidate: Candidate) -> None:
    """Raise `UserError` if this test cannot be done with this model."""
    if TESTS[name].weights:
        _check_text(label, settings, parts, candidate)
    else:
        TESTS[name].load().check(settings, candidate.server or candidate.preview)
    if not candidate.walked(name) and not candidate.served(name):
        check_room(candidate.folder, candidate.preview.nbytes, candidate.preview.device)


def _check_text(label: str, settings: Section, parts: dict[str, Callable], candidate: Candidate) -> None:
    """Raise `UserError` unless the model, and its base alike, can read the text layer by layer."""
    if candidate.folder is None:
        raise UserError(
            f"{label} reads weights, and {candidate.label!r} is but a URL; give its folder, too, or leave out {label}"
        )
    require_window(settings.contexts, candidate.preview, f"{label}.contexts")
    for work in parts.values():
        windows = work.windows(candidate.folder)
        if candidate.base and work.windows(candidate.base).digest != windows.digest:
            raise UserError(
                f"{candidate.base} reads the text as other tokens than {candidate.label!r}, so it is not its base; "
                "give the model that it was made from, or `base: null`"
            )


def ordered(tasks: list[Task], candidates: dict[str, Candidate]) -> list[Task]:
    """Walks first, all models on one text, so that bases are walked once; then model by model, each loaded once."""

    def place(task: Task) -> tuple:
        candidate = candidates[task.label]
        walked = candidate.walked(task.test)
        return (
            not walked,
            *((parts.index(task.part), bases.index(candidate.base)) if walked else (0, 0)),
            labels.index(task.label),
        )

    parts, labels = (list(dict.fromkeys(names)) for names in ((task.part for task in tasks), candidates))
    bases = [candidate.base for candidate in candidates.values()]
    return sorted(tasks, key=place)


@dataclass
class Subjects:
    """What tasks take; one model at a time is in memory."""

    candidates: dict[str, Candidate]
    device: torch.device
    dtype: torch.dtype
    bases: BaseWalks = field(default_factory=BaseWalks)
    loaded: tuple[str, Local] | None = None

    def of(self, task: Task, progress: Callable[[int, int], None]) -> Weights | Local | Server:
        """The subject of a task."""
        candidate = self.candidates[task.label]
        if candidate.served(task.test):
            return candidate.server
        if not TESTS[task.test].weights:
            return self._local(candidate)
        local = None if candidate.walked(task.test) else self._local(candidate)
        return Weights(candidate.folder, candidate.base, self.device, self.dtype, local, self.bases, progress)

    def _local(self, candidate: Candidate) -> Local:
        if self.loaded is None or self.loaded[0] != candidate.label:
            self.loaded = None  # frees the one before
            local = Local.open(candidate.folder, self.device, self.dtype, candidate.preview.scheme)
            self.loaded = candidate.label, local
        return self.loaded[1]


def result_files(out: Path, labels: Any) -> dict[str, Path]:
    """The result file of each label."""
    files = {label: out / f"{file_name(label)}.json" for label in labels}
    if len(set(files.values())) < len(files):
        raise UserError(f"the names {', '.join(files)} make the same file names; name the models differently")
    return files


def describe_environment(device: torch.device, dtype: torch.dtype) -> dict:
    """What results were computed with."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "versions": versions,
        "platform": platform.platform(),
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _key(test: str, part: str, settings: dict, candidate: Candidate, device: torch.device, dtype: torch.dtype) -> str:
    """Hash of everything that a part's result depends on."""
    model = candidate.model
    facts = [test, part, settings, candidate.mark, model.kv, device.type, str(dtype)]
    facts += [candidate.base_mark] if TESTS[test].weights else [model.url, model.served_as]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
