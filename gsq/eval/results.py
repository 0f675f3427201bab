"""The result file of a model: one JSON, written anew, whole or not at all, behind every part of a suite.

A part is kept with a key, a hash of everything that its result depends on, and with the environment that it was
computed in. Parts whose test a suite has, but which it does not ask for any more, or which are out of date, stay in
the file without being `listed`; tables and cards show those that are.
"""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from gsq.errors import UserError
from gsq.eval.views import file_names
from gsq.files import write_whole

SCHEMA = 1
PACKAGES = ("gsq", "torch", "transformers", "tokenizers", "lm-eval")  # whose versions results name
FIELDS = {"model": dict, "environments": list, "parts": dict}


@dataclass
class Results:
    """The result file of one model: `content["parts"]` by name, each with its key."""

    path: Path
    content: dict

    @classmethod
    def open(cls, path: Path, facts: dict) -> Results:
        """What is there already of the model with these facts; of other weights under its name nothing is kept."""
        before = read_results(path) if path.exists() else {"model": {}}
        if before["model"].get("fingerprint") != facts["fingerprint"]:
            before = {"environments": [], "parts": {}}
        kept = {key: before[key] for key in ("environments", "parts")}
        return cls(path, {"schema": SCHEMA, "model": facts, **kept})

    def expect(self, keys: dict[str, str]) -> list[str]:
        """List the parts with these keys, by name, as far as they are done; returns the names of the others."""
        parts, labels = self.content["parts"], {name.partition("/")[0] for name in keys}
        missing = [name for name, key in keys.items() if parts.get(name, {}).get("key") != key]
        for name, part in parts.items():
            if name.partition("/")[0] in labels:
                part["listed"] = name in keys and name not in missing
        return missing

    def add(self, name: str, about: dict, result: dict, seconds: float, environment: dict) -> None:
        """Keep a finished part; `about` has its `test`, `settings` and `key`."""
        environments = self.content["environments"]
        if environment not in environments:
            environments.append(environment)
        self.content["parts"][name] = {
            **about,
            "listed": True,
            "environment": environments.index(environment),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "result": result,
        }
        self.save()

    def save(self) -> None:
        """Write the file, whole or not at all."""
        text = json.dumps(self.content, indent=1, ensure_ascii=False) + "\n"
        write_whole(self.path, lambda path: path.write_text(text, encoding="utf-8"), len(text.encode()))


def read_results(path: Path) -> dict:
    """The content of a result file; raises `UserError` if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no result file ({error}); remove it") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise UserError(f"{path} is no result file of this version; remove it, or give another folder with --out")
    if wrong := [name for name, kind in FIELDS.items() if not isinstance(content.get(name), kind)]:
        raise UserError(f"{path} is a damaged result file, without {wrong[0]}; remove it")
    return content


def result_files(out: Path, labels: Iterable[str]) -> dict[str, Path]:
    """The result file of each label; raises `UserError` if two models had the same."""
    return {label: out / f"{name}.json" for label, name in file_names("models", labels).items()}


def describe_environment(device: torch.device, dtype: torch.dtype) -> dict:
    """What results are computed with."""
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
