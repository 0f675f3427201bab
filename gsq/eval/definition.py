"""What a suite says: the kinds of tests there are, suites by name, and those of YAML files and the command line.

A test is a module listed in `TESTS`, with its `Settings` and `parts(settings)`: named pieces of work that take a model
and return what JSON can hold. One that reads no `weights` also has `check(settings, subject)`, which raises `UserError`
for what that subject cannot do. Nothing here looks at a model; doing what a suite says is `gsq.eval.suite`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import Field

from gsq.config import Section, read_yaml, validated
from gsq.errors import UserError
from gsq.eval.views import file_names


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
    if models and not base and content.get("base") not in models:  # it may be one of the file's models
        content = content | {"base": _base_of(content)}
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


def _base_of(content: dict) -> Any:
    """The suite's base, the path of it if that is one of its models."""
    base, models = content.get("base"), content.get("models")
    model = models.get(base, base) if isinstance(models, dict) and isinstance(base, str) else base
    return model.get("path") if isinstance(model, dict) else model


def _read_yaml(path: Path) -> dict:
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"there is no suite {str(path)!r}; suites: {', '.join(SUITES)}, or a YAML file")
    return read_yaml(path, "suite", "`tests`, and `models` if none are given on the command line")


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
    if divided := [label for label in tests if "/" in label]:
        raise UserError(f"{origin}: tests.{divided[0]}: a test's name has no slash")
    file_names("tests", tests)
    return validated(Suite, {**content, "models": models, "tests": tests}, origin)


def test_settings(label: str, given: dict, origin: str) -> tuple[str, Section]:
    """Which test a label of a suite means, and its settings."""
    given = dict(given)
    name = given.pop("test", label)
    if name not in TESTS:
        raise UserError(f"{origin}: tests.{label}: there is no test {name!r}; tests: {', '.join(TESTS)}")
    return name, validated(TESTS[name].load().Settings, given, f"{origin}: tests.{label}")
