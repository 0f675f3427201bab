"""Accuracy on known benchmarks through lm-eval: its prompts, its scoring, its numbers.

Any of lm-eval's tasks can be named; those of `BENCHMARKS` go by short names, too. Data comes from the hub, or from
local files (`data`) that have the columns of the hub's: then lm-eval's own task is taken with only its data
replaced. With a KV-cache scheme both generations and likelihoods attend to what the cache has stored.

Source: https://github.com/EleutherAI/lm-evaluation-harness, version 0.4.13.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import Field
from torch import Tensor

from gsq.config import Positive, Section
from gsq.errors import UserError
from gsq.eval.intervals import wilson
from gsq.eval.subject import TIMEOUT, Local, Server, Subject

try:
    import lm_eval.tasks
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
except ImportError as error:
    raise UserError(
        f"accuracy is measured by lm-eval, which is not installed ({error}); pip install 'gsq[eval]'"
    ) from None

# Short names: folder of lm-eval's tasks, and the tasks in it
BENCHMARKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "gsm8k": ("gsm8k", ("gsm8k",)),
    "ifeval": ("ifeval", ("ifeval",)),
    "mmlu_pro": ("mmlu_pro", ("mmlu_pro",)),
    "gpqa": ("gpqa", ("gpqa_diamond_zeroshot",)),
    "arc": ("arc", ("arc_easy", "arc_challenge")),
    "hellaswag": ("hellaswag", ("hellaswag",)),
    "winogrande": ("winogrande", ("winogrande",)),
    "piqa": ("piqa", ("piqa",)),
}
# The metric that stands for a task: the first of these that it has. All are shares of documents.
METRICS = (
    "acc_norm,none",
    "acc,none",
    "exact_match,flexible-extract",
    "exact_match,custom-extract",
    "exact_match,strict-match",
    "exact_match,none",
    "prompt_level_strict_acc,none",
)
LIKELIHOODS = {"multiple_choice", "loglikelihood", "loglikelihood_rolling"}
UNKNOWN_WINDOW = 32768  # tokens, of servers that do not tell theirs; they refuse what is too long


class Settings(Section):
    """Which tasks, and how they are put."""

    tasks: tuple[str, ...] = Field(("arc", "hellaswag", "winogrande", "piqa", "gsm8k"), min_length=1)
    limit: Positive | None = Field(None, description="only so many documents of each task, the first ones")
    fewshot: int | None = Field(None, ge=0, description="examples before each question; default: the task's own number")
    batch: Positive = Field(1, description="documents at once; always one with a KV-cache scheme")
    concurrent: Positive = Field(1, description="requests that a server gets at once")
    chat: bool = Field(False, description="put questions as chat messages")
    data: dict[str, str | dict[str, str]] = Field(
        {}, description="local JSONL by task: one file, or one for each split of `train`, `validation` and `test`"
    )
    seed: int = Field(1234, description="draws the examples")


def parts(settings: Settings) -> dict[str, Callable[[Subject], dict]]:
    """One part per task of lm-eval, `accuracy/gsm8k`; raises `UserError` for local data that is not there."""
    names = task_names(settings.tasks)
    if stray := set(settings.data) - set(settings.tasks) - set(names):
        raise UserError(f"accuracy.data: {min(stray)} is none of the tasks {', '.join(names)}")
    for task in names:
        for file in _data_files(settings, task).values():
            if not Path(file).is_file():
                raise UserError(f"accuracy.data: {task}: {file} does not exist")
    return {f"accuracy/{task}": lambda subject, task=task: measure(subject, settings, task) for task in names}


def check(settings: Settings, subject: Subject) -> None:
    """Raise `UserError`, before any work, for tasks that are unknown, without data, or beyond a server's abilities."""
    for name in task_names(settings.tasks):
        if _compares(settings.model_dump_json(), name) and isinstance(subject, Server):
            _check_likelihoods(settings, subject, name)
    if settings.chat and not subject.chats:
        raise UserError(f"accuracy.chat: {subject.name} has no chat template; use chat: false")


def measure(subject: Subject, settings: Settings, task: str) -> dict:
    """All metrics of a task or group by lm-eval's names, with standard errors, and that which stands for it."""
    with _quiet(), loaded(settings, task) as found:
        likelihoods = any(map(_needs_likelihoods, found["tasks"].values()))
        output = lm_eval.simple_evaluate(
            model=language_model(subject, settings, likelihoods),
            tasks=[found["groups"].get(task) or found["tasks"][task]],
            num_fewshot=settings.fewshot,
            limit=settings.limit,
            apply_chat_template=settings.chat,
            log_samples=False,
            fewshot_random_seed=settings.seed,
            task_manager=_manager(_folder(task)),
        )
    return summarized(output, task)


def summarized(output: dict, task: str) -> dict:
    """What is kept of lm-eval's `output` for a task or group; `accuracy` has a 95 % interval, Wilson's."""
    scores = output["results"][task]
    metrics = {
        key: {"value": _number(value), "stderr": _number(scores.get(key.replace(",", "_stderr,", 1)))}
        for key, value in scores.items()
        if "," in key and "_stderr," not in key and _number(value) is not None
    }
    documents = sum(count["effective"] for count in output["n-samples"].values())
    main = next((name for name in METRICS if name in metrics), None)
    accuracy = metrics[main]["value"] if main else None
    return {
        "task": task,
        "documents": documents,
        "metric": main,
        "accuracy": accuracy,
        "stderr": metrics[main]["stderr"] if main else None,
        "interval": wilson(round(accuracy * documents), documents) if main else None,
        "metrics": metrics,
        "fewshot": output["n-shot"].get(task, max(output["n-shot"].values(), default=None)),
        "version": output["versions"].get(task),
        "lm_eval": version("lm-eval"),
    }


def summary(results: dict[str, dict]) -> dict:
    """Accuracy and interval by task, and the mean over tasks, from the results of parts by their names."""
    tasks = {cell["task"]: {"accuracy": cell["accuracy"], "interval": cell["interval"]} for cell in results.values()}
    known = [cell["accuracy"] for cell in tasks.values() if cell["accuracy"] is not None]
    return {"mean": sum(known) / len(known) if known else None, "tasks": tasks}


def task_names(tasks: tuple[str, ...]) -> list[str]:
    """lm-eval's names of tasks and groups, each once, tags spelt out; raises `UserError` for those that it lacks."""
    names: dict[str, None] = {}
    for name in (name for task in tasks for name in BENCHMARKS.get(task, (None, (task,)))[1]):
        entry = _manager(_folder(name)).task_index.get(name)
        if entry is None:
            raise UserError(f"lm-eval {version('lm-eval')} has no task {name!r}; short names: {', '.join(BENCHMARKS)}")
        names |= dict.fromkeys(sorted(entry.tags) if entry.yaml_path is None else [name])
    return list(names)


class CachedModel(HFLM):
    """lm-eval's view of a model in this process, with a fresh cache of the subject's scheme for every request."""

    def __init__(self, subject: Local, batch: int):
        # A shorter prompt of a batch starts with padding, which would take the place of the first tokens in the cache
        batch = 1 if subject.scheme else batch
        super().__init__(subject.model, tokenizer=subject.tokenizer, batch_size=batch, max_length=subject.window)
        self.subject = subject

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Logits `[B, L, V]`; every token attends to what the cache has stored."""
        if self.subject.scheme is None:
            return super()._model_call(inps, *args, **kwargs)
        with torch.no_grad():
            return self.model(inps, past_key_values=self.subject.scheme.cache(self.model)).logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        """Tokens `[B, L]`, prompts included."""
        if self.subject.scheme is not None:
            settings["past_key_values"] = self.subject.scheme.cache(self.model)
        return super()._model_generate(context, max_length, stop, **settings)


def language_model(subject: Subject, settings: Settings, likelihoods: bool) -> lm_eval.api.model.LM:
    """A subject as lm-eval sees it.

    Servers get tokens where likelihoods must be told apart from the prompt's, and else text, which all of them take.
    """
    if isinstance(subject, Local):
        return CachedModel(subject, settings.batch)
    kind, route = (LocalChatCompletion, "chat/completions") if settings.chat else (LocalCompletionsAPI, "completions")
    return kind(
        base_url=f"{subject.url}/{route}",
        model=subject.name,
        tokenizer_backend="huggingface" if likelihoods else None,
        tokenizer=str(subject.tokenizer_path) if likelihoods else None,
        tokenized_requests=likelihoods,
        num_concurrent=settings.concurrent,
        max_length=subject.window or UNKNOWN_WINDOW,
        timeout=TIMEOUT,
        seed=settings.seed,
    )


@contextmanager
def loaded(settings: Settings, name: str) -> Iterator[dict[str, dict]]:
    """lm-eval's own objects for a task or group, `tasks` and `groups` by name, reading local data if there is some.

    Raises `UserError` if the data is missing.
    """
    manager, files = _manager(_folder(name)), _data_files(settings, name)
    with tempfile.TemporaryDirectory() as folder:
        if files:
            for task in _leaves(manager.task_index, name):
                config = localized(manager.task_index[task], files)
                Path(folder, f"{task}.yaml").write_text(yaml.safe_dump(config))
            manager = _build_manager(_folder(name), folder)
        try:
            found = {"groups": {}, **manager.load(name)}
        except (OSError, ValueError, RuntimeError, LookupError, ImportError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"accuracy: no data for {name} ({reason}); with a network, log in to the hub if the data is gated, "
                f"without, give files of its columns: data: {{{name}: {{train: FILE.jsonl, test: FILE.jsonl}}}}"
            ) from None
        yield found


def localized(entry: Any, files: dict[str, str]) -> dict:
    """A task config in lm-eval's words: that of its index's `entry`, reading `files` by split.

    Splits that have no file are dropped; examples are drawn from `train`, or else from the documents that are asked,
    which never are their own example.
    """
    renamed = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
    splits = {key: split if split in files else None for key, split in renamed.items()}
    asked = splits["test_split"] or splits["validation_split"] or splits["training_split"]
    if entry.cfg.get("fewshot_split") or entry.cfg.get("training_split"):
        splits["fewshot_split"] = splits["training_split"] or asked
    paths = {split: str(Path(file).resolve()) for split, file in files.items()}
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": paths}}
    return {"include": str(entry.yaml_path), **local, **splits}


def _data_files(settings: Settings, task: str) -> dict[str, str]:
    """Local files of a task by split; a single one is what is asked."""
    short = next((name for name, (_, tasks) in BENCHMARKS.items() if task in tasks), task)
    given = settings.data.get(task, settings.data.get(short, {}))
    files = {"test": given} if isinstance(given, str) else given
    return {split: str(Path(file).expanduser()) for split, file in files.items()}


@cache
def _compares(settings: str, name: str) -> bool:
    """Whether a task or group compares likelihoods; its data is loaded once for all models, not once for each."""
    with _quiet(), loaded(Settings.model_validate_json(settings), name) as found:
        return any(map(_needs_likelihoods, found["tasks"].values()))


def _needs_likelihoods(task: lm_eval.api.task.Task) -> bool:
    return task.get_config("output_type") in LIKELIHOODS


def _check_likelihoods(settings: Settings, server: Server, task: str) -> None:
    if settings.chat:
        raise UserError(f"accuracy: {task} compares likelihoods, which chat messages have none of; use chat: false")
    if server.tokenizer_path is None:
        raise UserError(f"accuracy: {task} compares likelihoods of tokens; give the model's folder, for its tokenizer")
    if not server.scores_prompts():
        raise UserError(
            f"accuracy: {task} compares likelihoods, and {server.url} tells none of a prompt (echo, logprobs); "
            "use a server that does, such as vLLM, or tasks that generate, such as gsm8k"
        )


def _folder(name: str) -> str | None:
    """Folder of lm-eval that has a task; None for those that are not looked up by short names."""
    return next((folder for folder, tasks in BENCHMARKS.values() if name in tasks), None)


@cache
def _manager(folder: str | None) -> lm_eval.tasks.TaskManager:
    return _build_manager(folder)


def _build_manager(folder: str | None, *more: str) -> lm_eval.tasks.TaskManager:
    """An index of one folder of lm-eval's tasks, or of all, which takes several seconds; `more` override them."""
    own = [] if folder is None else [str(Path(lm_eval.tasks.__file__).parent / folder)]
    with _quiet():
        return lm_eval.tasks.TaskManager(include_path=[*own, *more], include_defaults=folder is None)


def _leaves(index: dict[str, Any], name: str) -> list[str]:
    """Names of the tasks in a group or under a tag, or the task's own."""
    entry = index[name]
    members = (entry.cfg or {}).get("task", sorted(entry.tags))
    if isinstance(members, str):
        return [name]
    return [leaf for member in members for leaf in _leaves(index, member)]


def _number(value: object) -> float | None:
    """A finite number, or None, which lm-eval says as N/A."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and the hub without the warnings that they give on every call."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub", "datasets")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
