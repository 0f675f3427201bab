"""A suite of tests for several models: what to do is found out first, then done part by part, and kept.

What a suite says is in `gsq.eval.definition`. Everything that can be wrong is found before the first part runs:
unknown settings, text that is missing or too short, a model without a tokenizer, one that does not fit into memory.

Each model has one JSON file (`gsq.eval.results`). A part is kept there with a key made of everything that its result
depends on (settings, text and data, weights and tokenizer of the model, weights of its base, KV-cache scheme, dtype,
kind of device), and is done again only if that has changed. So a suite that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gsq.calib.tokens import text_mark
from gsq.config import Section
from gsq.errors import UserError
from gsq.eval.definition import TESTS, Model, Suite, test_settings
from gsq.eval.filler import require_window
from gsq.eval.kvcache import Scheme
from gsq.eval.results import Results, describe_environment, result_files
from gsq.eval.subject import KERNEL_FORMATS, Local, Prompt, Server, check_room, encode, free_memory
from gsq.eval.text import BaseWalks, Weights
from gsq.export.base import format_of, open_model
from gsq.export.inspect import inspect
from gsq.model.checkpoint import Checkpoint, fingerprint
from gsq.model.resolve import load_tokenizer, resolve_model
from gsq.model.skeleton import build_meta_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

READING = (".json", ".jinja", ".txt", ".model")  # files of tokenizers, and settings of generation
Told = Callable[[str, str, int, int], None]  # told of a label, a part, and the layers done of how many


@dataclass(frozen=True)
class Task:
    """A part of a test to be done for a model; `settings` are those that its result depends on."""

    label: str
    part: str
    test: str
    settings: dict
    key: str
    work: Callable[[Any], dict]

    def about(self) -> dict:
        """What its result file says of it."""
        return {"test": self.test, "settings": self.settings, "key": self.key}


@dataclass(frozen=True)
class Preview:
    """What is known of the model in a folder before it is loaded; `nbytes` are those of its weights in memory."""

    name: str
    window: int | None
    tokenizer: PreTrainedTokenizerBase
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
        return cls(label, window, load_tokenizer(folder), device, nbytes, scheme)

    @property
    def chats(self) -> bool:
        """Whether it takes messages."""
        return bool(self.tokenizer.chat_template)

    def count(self, prompt: Prompt) -> int:
        """Tokens of the prompt as the model will see them."""
        return len(encode(self.tokenizer, prompt))


@dataclass
class Candidate:
    """A model of the suite that was found: where it is, and what identifies its weights (`mark`).

    `reads` identifies tokenizer and chat template. `preview` shows the model in the folder, `server` is what answers
    in its place.
    """

    label: str
    model: Model
    folder: Path | None
    base: Path | None
    mark: str
    base_mark: str | None
    reads: str
    preview: Preview | None
    server: Server | None

    @classmethod
    def find(cls, label: str, model: Model, device: torch.device, dtype: torch.dtype) -> Candidate:
        """Resolve its folder and its base, and ask its server for a sign of life."""
        if model.path is None and model.url is None:
            raise UserError(f"model {label!r} has neither `path` nor `url`")
        if model.url and model.kv:
            raise UserError(f"model {label!r}: {model.url} keeps its cache as it likes; leave out `kv` (`kv: null`)")
        folder, base = (resolve_model(name) if name else None for name in (model.path, model.base))
        server = Server(model.url, model.served_as, folder) if model.url else None
        mark = fingerprint(Checkpoint.open(folder)) if folder else f"{model.url} {server.name}"
        base_mark = fingerprint(Checkpoint.open(base)) if base else None
        preview = Preview.of(label, folder, model.kv, device, dtype) if folder else None
        return cls(label, model, folder, base, mark, base_mark, _reads(folder) if folder else "", preview, server)

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


def run_suite(
    suite: Suite, out: Path, device: torch.device, dtype: torch.dtype, told: Told = lambda *_: None
) -> list[dict]:
    """Do what is missing in the folder `out`; returns the content of all models' result files.

    Raises `UserError` before any work for what cannot be done; finished parts are kept in any case.
    """
    candidates = {label: Candidate.find(label, model, device, dtype) for label, model in suite.models.items()}
    files = result_files(out, suite.models)
    tasks = list(plan(suite, candidates, device, dtype))
    out.mkdir(parents=True, exist_ok=True)
    results = {label: Results.open(files[label], candidate.facts()) for label, candidate in candidates.items()}
    missing = {
        label: kept.expect({task.part: task.key for task in tasks if task.label == label})
        for label, kept in results.items()
    }
    subjects = Subjects(candidates, device, dtype)
    environment = describe_environment(device, dtype)
    for task in ordered([task for task in tasks if task.part in missing[task.label]], candidates):
        told(task.label, task.part, 0, 0)
        result, seconds = subjects.do(task, partial(told, task.label, task.part))
        results[task.label].add(task.part, task.about(), result, seconds, environment)
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
        read += [text_mark(file, f"{label}.data") for file in _files(fixed.get("data"))]
        for candidate in candidates.values():
            check(label, name, settings, parts, candidate)
            for part, work in parts.items():
                part = label + part.removeprefix(name)
                key = _key(name, part, fixed | {"read": read}, candidate, device, dtype)
                yield Task(candidate.label, part, name, fixed, key, work)


def _files(settings: Any) -> list[str]:
    """Files that are named anywhere in settings of files."""
    if isinstance(settings, str):
        return [settings]
    inner = settings.values() if isinstance(settings, dict) else settings if isinstance(settings, list) else ()
    return [file for value in inner for file in _files(value)]


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

    def do(self, task: Task, progress: Callable[[int, int], None]) -> tuple[dict, float]:
        """The result of a task, and the seconds that it took once the model was there."""
        subject = self._of(task, progress)
        start = time.perf_counter()
        return task.work(subject), time.perf_counter() - start

    def _of(self, task: Task, progress: Callable[[int, int], None]) -> Weights | Local | Server:
        """What a task takes. Only `loaded` and `bases` outlive it, so that they can be freed."""
        candidate = self.candidates[task.label]
        if candidate.served(task.test):
            return candidate.server
        if not TESTS[task.test].weights:
            return self._local(candidate)
        local = None if candidate.walked(task.test) else self._local(candidate)
        return Weights(candidate.folder, candidate.base, self.device, self.dtype, local, self.bases, progress)

    def _local(self, candidate: Candidate) -> Local:
        if self.loaded is None or self.loaded[0] != candidate.label:
            self.loaded, self.bases = None, BaseWalks()  # frees the one before, and what walks have left
            free_memory()
            local = Local.open(candidate.folder, self.device, self.dtype, candidate.preview.scheme)
            self.loaded = candidate.label, local
        return self.loaded[1]


def _key(test: str, part: str, settings: dict, candidate: Candidate, device: torch.device, dtype: torch.dtype) -> str:
    """Hash of everything that a part's result depends on."""
    model = candidate.model
    facts = [test, part, settings, candidate.mark, candidate.reads, model.kv, device.type, str(dtype)]
    facts += [candidate.base_mark] if TESTS[test].weights else [model.url, candidate.server and candidate.server.name]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _reads(folder: Path) -> str:
    """Hash of the files beside the weights that decide about tokens: tokenizer, chat template, what ends an answer."""
    digest = hashlib.sha256()
    for path in Checkpoint.open(folder).side_files():
        if path.suffix in READING:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()
