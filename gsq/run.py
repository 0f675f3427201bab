"""The run directory: what one quantization has finished, so that it can be resumed, inspected and exported.

    config.yaml           the whole configuration
    plan.json             what becomes of each tensor
    source.json           where the weights come from, and a fingerprint of them
    tokens.safetensors    calibration tokens
    layers/00007.safetensors   packed codes and scales of a finished decoder layer
    journal.jsonl         one line per finished layer, with the checksum of its file
    metrics.jsonl         everything measured (`gsq.tracking`)

A layer counts as finished when its journal line is complete and its file has that checksum; both
are on disk before the next layer starts. So a run may be killed at any moment.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path

import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gsq.codebook import QuantizedTensor
from gsq.config import Config, parse_config
from gsq.errors import UserError
from gsq.kernels.packing import pack_dense, unpack_dense
from gsq.model.checkpoint import Checkpoint, read_json
from gsq.plan.rules import Plan

CONFIG, PLAN, SOURCE, TOKENS, JOURNAL, LAYERS = (
    "config.yaml", "plan.json", "source.json", "tokens.safetensors", "journal.jsonl", "layers",
)  # fmt: skip


class Run:
    """An existing run folder. `config`, `plan` and `source` are what it was started with."""

    def __init__(self, folder: Path, config: Config, plan: Plan):
        self.folder, self.config, self.plan = folder, config, plan

    @classmethod
    def create(cls, folder: Path, config: Config, plan: Plan, source: Checkpoint) -> Run:
        """Start a run in a folder that does not exist yet."""
        if folder.exists():
            raise UserError(
                f"run folder {folder} exists already; continue it with --resume, or choose another with --out"
            )
        partial = folder.with_name(folder.name + ".partial")
        (partial / LAYERS).mkdir(parents=True, exist_ok=True)
        (partial / CONFIG).write_text(config.to_yaml())
        (partial / PLAN).write_text(plan.to_json())
        (partial / SOURCE).write_text(json.dumps({"folder": str(source.folder), "fingerprint": fingerprint(source)}))
        (partial / JOURNAL).touch()
        partial.rename(folder)
        return cls(folder, config, plan)

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Open a run for reading."""
        folder = Path(folder)
        if not (folder / PLAN).exists():
            raise UserError(f"{folder} is no run folder (it has no {PLAN})")
        config = parse_config(yaml.safe_load((folder / CONFIG).read_text()), str(folder / CONFIG))
        return cls(folder, config, Plan.from_json(folder / PLAN))

    @classmethod
    def resume(cls, folder: Path, config: Config, source: Checkpoint) -> Run:
        """Open a run to continue it; refused, naming what changed, if config or source differ."""
        run = cls.open(folder)
        before, now = run.config.fixed(), config.fixed()
        changed = [f"{key} was {before[key]!r}, is {now[key]!r}" for key in now if before[key] != now[key]]
        if changed:
            raise UserError(f"cannot resume {folder}: {'; '.join(changed)}. Restore the setting, or start another run")
        if read_json(folder / SOURCE)["fingerprint"] != fingerprint(source):
            raise UserError(f"cannot resume {folder}: the checkpoint {source.folder} has changed since the run began")
        run.config = config
        run._cut_journal()
        return run

    @cached_property
    def source(self) -> Checkpoint:
        """The checkpoint that this run quantizes."""
        return Checkpoint.open(read_json(self.folder / SOURCE)["folder"])

    def finished(self) -> list[dict]:
        """Journal lines of the finished layers 0, 1, ... in order."""
        lines = []
        for text in (self.folder / JOURNAL).read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # cut off by a kill
                break
            path = self._layer_file(len(lines))
            if line["layer"] != len(lines) or not path.exists() or _checksum(path) != line["sha256"]:
                break
            lines.append(line)
        return lines

    def save_layer(self, layer: int, quantized: dict[str, QuantizedTensor], **facts: object) -> None:
        """Write a finished layer, then its journal line."""
        tensors: dict[str, Tensor] = {}
        for name, q in quantized.items():
            tensors[name + ".codes"] = pack_dense(q.codes, q.codebook.bits).cpu()
            tensors[name + ".scales"] = q.scales.cpu().contiguous()
        path = self._layer_file(layer)
        _write(path, lambda partial: save_file(tensors, partial))
        line = {"layer": layer, "sha256": _checksum(path), "targets": list(quantized), **facts}
        with open(self.folder / JOURNAL, "a") as journal:
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def load(self, name: str) -> QuantizedTensor:
        """The quantized tensor of a target; raises `UserError` if its layer is not finished."""
        entry = self.plan.entries[name]
        path = self._layer_file(entry.layer)
        if not path.exists():
            raise UserError(f"layer {entry.layer} of {self.folder} is not finished; continue the run with --resume")
        with safe_open(path, framework="pt") as layer:
            codes = unpack_dense(layer.get_tensor(name + ".codes"), entry.codebook.bits)
            return QuantizedTensor(codes, layer.get_tensor(name + ".scales"), entry.codebook)

    def load_layer(self, layer: int) -> dict[str, QuantizedTensor]:
        """All targets of a finished layer."""
        return {entry.name: self.load(entry.name) for entry in self.plan.targets(layer)}

    def tokens(self) -> Tensor | None:
        """Calibration tokens `[windows, length]`, if they were saved."""
        path = self.folder / TOKENS
        return load_file(path)["tokens"] if path.exists() else None

    def save_tokens(self, tokens: Tensor) -> None:
        """Keep the calibration tokens."""
        _write(self.folder / TOKENS, lambda partial: save_file({"tokens": tokens.contiguous()}, partial))

    def _layer_file(self, layer: int) -> Path:
        return self.folder / LAYERS / f"{layer:05d}.safetensors"

    def _cut_journal(self) -> None:
        """Forget lines behind the last finished layer, so that new ones follow it."""
        text = "".join(json.dumps(line) + "\n" for line in self.finished())
        _write(self.folder / JOURNAL, lambda partial: partial.write_text(text))


def fingerprint(source: Checkpoint) -> str:
    """Hash of what a checkpoint's headers say, with the sizes of its files."""
    digest = hashlib.sha256()
    for name, info in sorted(source.tensors.items()):
        digest.update(f"{name} {info.dtype} {info.shape} {info.file.name} {info.file.stat().st_size}\n".encode())
    digest.update(json.dumps(source.config, sort_keys=True).encode())
    return digest.hexdigest()


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, write) -> None:
    """Write to a temporary name, flush to disk, rename; a full disk is the user's to mend."""
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space and continue with --resume"
        ) from None
