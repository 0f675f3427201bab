"""The run directory: what one quantization has finished, so that it can be resumed, inspected and exported.

    config.yaml           the whole configuration
    plan.json             what becomes of each tensor
    source.json           where the weights come from, a fingerprint of them, and the checksum of the tokens
    tokens.safetensors    calibration tokens
    layers/00007.safetensors   packed codes, scales and offsets of a finished decoder layer
    layers/outside.safetensors   those of embedding and head, if they are quantized
    journal.jsonl         one line per finished layer, with the checksum of its file
    metrics.jsonl         everything measured (`gsq.tracking`)

A layer counts as finished when its journal line is complete and its file has that checksum; both
are on disk before the next layer starts. So a run may be killed at any moment. A program that works on a run
holds a lock on its config.yaml, which ends with the program.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import IO

import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from gsq.codebook import QuantizedTensor
from gsq.config import Config, parse_config
from gsq.errors import UserError
from gsq.files import explained, save_tensors, sync, write_whole
from gsq.kernels.packing import WORD, pack_dense, unpack_dense
from gsq.model.checkpoint import Checkpoint, fingerprint, read_json
from gsq.plan.rules import Plan, PlanEntry

CONFIG, PLAN, SOURCE, TOKENS, JOURNAL, LAYERS, EXPORT = (
    "config.yaml", "plan.json", "source.json", "tokens.safetensors", "journal.jsonl", "layers", "export",
)  # fmt: skip
OUTSIDE = "what lies outside the layers (embedding or head)"  # in messages


class Run:
    """An existing run folder. `config`, `plan` and `source` are what it was started with."""

    def __init__(self, folder: Path, config: Config, plan: Plan):
        self.folder, self.config, self.plan = folder, config, plan
        self._lock: IO | None = None

    @classmethod
    def create(cls, folder: Path, config: Config, plan: Plan, source: Checkpoint, tokens: Tensor) -> Run:
        """Start a run, and lock it, in a folder that does not exist yet; `tokens` `[windows, length]` calibrate it."""
        cls.refuse_existing(folder)
        partial = folder.with_name(folder.name + ".partial")
        (partial / LAYERS).mkdir(parents=True, exist_ok=True)
        save_tensors({"tokens": tokens.contiguous()}, partial / TOKENS)
        (partial / CONFIG).write_text(config.to_yaml())
        (partial / PLAN).write_text(plan.to_json())
        facts = {"folder": str(source.folder), "fingerprint": fingerprint(source), TOKENS: _checksum(partial / TOKENS)}
        (partial / SOURCE).write_text(json.dumps(facts))
        (partial / JOURNAL).touch()
        for name in (CONFIG, PLAN, SOURCE, TOKENS):
            sync(partial / name)
        partial.rename(folder)
        run = cls(folder, config, plan)
        run._claim()
        return run

    @staticmethod
    def refuse_existing(folder: Path) -> None:
        """Raise `UserError` if a new run cannot have this folder."""
        if folder.exists():
            raise UserError(
                f"run folder {folder} exists already; continue it with --resume, or choose another with --out"
            )

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
        """Open a run to continue it, and lock it; refused, naming what changed, if config, source or tokens differ."""
        run = cls.open(folder)
        before, now = run.config.fixed(), config.fixed()
        changed = [f"{key} was {before[key]!r}, is {now[key]!r}" for key in now if before[key] != now[key]]
        if changed:
            raise UserError(f"cannot resume {folder}: {'; '.join(changed)}. Restore the setting, or start another run")
        facts = read_json(folder / SOURCE)
        if facts["fingerprint"] != fingerprint(source):
            raise UserError(f"cannot resume {folder}: the checkpoint {source.folder} has changed since the run began")
        if facts.get(TOKENS) != _checksum(folder / TOKENS):
            raise UserError(f"cannot resume {folder}: its {TOKENS} is damaged; start another run")
        run._claim()
        run.config = config
        run._cut_journal()
        return run

    def close(self) -> None:
        """Let others work on this run."""
        if self._lock:
            self._lock.close()

    def _claim(self) -> None:
        """Raise `UserError` if another program works on this run; keep others from it until `close`."""
        self._lock = open(self.folder / CONFIG)  # noqa: SIM115 (until `close`)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UserError(f"another program is at work on {self.folder}; wait for its end, or stop it") from None
        except OSError:  # a file system without locks
            self.close()

    @cached_property
    def source(self) -> Checkpoint:
        """The checkpoint that this run quantizes."""
        return Checkpoint.open(read_json(self.folder / SOURCE)["folder"])

    def finished(self) -> list[dict]:
        """Journal lines of the finished layers 0, 1, ... in order."""
        return [line for line in self._lines() if line["layer"] is not None]

    def outside_finished(self) -> bool:
        """Whether the targets outside the decoder layers are done, if there are any."""
        return not self._outside() or any(line["layer"] is None for line in self._lines())

    def completed(self) -> Run:
        """This run, if every layer is there and whole; else raises `UserError`."""
        finished = len(self.finished())
        if not self.outside_finished():
            missing = OUTSIDE
        elif any(entry.layer >= finished for entry in self._inside()):
            missing = f"layer {finished}"
        else:
            return self
        raise UserError(
            f"{missing} of {self.folder} is not finished, or its file is damaged; continue the run with --resume"
        )

    def bytes_from(self, layer: int) -> int:
        """Bytes on disk that the layers from this one on will take, and the export, if it is to go into this folder."""
        outside = [] if self.outside_finished() else self._outside()
        missing = [*outside, *(entry for entry in self._inside() if entry.layer >= layer)]
        layers = sum(entry.codebook.nbytes(entry.shape) for entry in missing)  # whatever an export makes of them
        export = self.config.export
        inside = export.format and not export.out and not (self.folder / EXPORT).exists()
        return layers + (self.plan.summary()["bytes_after"] if inside else 0)

    def save_layer(self, layer: int | None, quantized: dict[str, QuantizedTensor], **facts: object) -> None:
        """Write a finished layer, or (None) what is outside of all, then its journal line."""
        tensors: dict[str, Tensor] = {}
        for name, q in quantized.items():
            padding = -q.codes.shape[-1] % WORD
            tensors[name + ".codes"] = pack_dense(pad(q.codes, (0, padding)), q.codebook.bits).cpu()
            tensors[name + ".scales"] = q.scales.cpu().contiguous()
            if q.offsets is not None:
                tensors[name + ".offsets"] = q.offsets.cpu().contiguous()
        path = self._layer_file(layer)
        space = self.bytes_from(layer or 0)
        write_whole(path, lambda partial: save_tensors(tensors, partial), space)
        line = {"layer": layer, "sha256": _checksum(path), "targets": list(quantized), **facts}
        journal_file = self.folder / JOURNAL
        with explained(journal_file, space), open(journal_file, "a") as journal:
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def load(self, name: str) -> QuantizedTensor:
        """The quantized tensor of a target; raises `UserError` if its layer is not finished."""
        entry = self.plan.entries[name]
        path = self._layer_file(entry.layer)
        if not path.exists():
            part = OUTSIDE if entry.layer is None else f"layer {entry.layer}"
            raise UserError(f"{part} of {self.folder} is not finished; continue the run with --resume")
        with safe_open(path, framework="pt") as layer:
            codes = unpack_dense(layer.get_tensor(name + ".codes"), entry.codebook.bits)
            codes = codes[..., : entry.codebook.columns(entry.shape[-1])].contiguous()
            offsets = layer.get_tensor(name + ".offsets") if entry.codebook.offset else None
            return QuantizedTensor(codes, layer.get_tensor(name + ".scales"), entry.codebook, offsets)

    def load_layer(self, layer: int | None) -> dict[str, QuantizedTensor]:
        """All targets of a finished layer, or (None) those outside of all."""
        return {entry.name: self.load(entry.name) for entry in self.plan.targets() if entry.layer == layer}

    def tokens(self) -> Tensor:
        """Calibration tokens `[windows, length]`."""
        return load_file(self.folder / TOKENS)["tokens"]

    def _inside(self) -> list[PlanEntry]:
        return [entry for entry in self.plan.targets() if entry.layer is not None]

    def _outside(self) -> list[PlanEntry]:
        return [entry for entry in self.plan.targets() if entry.layer is None]

    def _layer_file(self, layer: int | None) -> Path:
        return self.folder / LAYERS / ("outside.safetensors" if layer is None else f"{layer:05d}.safetensors")

    def _lines(self) -> list[dict]:
        """Lines of the journal, in order, up to the first that is incomplete or whose file is not whole."""
        lines = []
        order = chain([None] if self._outside() else [], count())
        for text, layer in zip((self.folder / JOURNAL).read_text().splitlines(), order, strict=False):
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # cut off by a kill
                break
            path = self._layer_file(layer)
            if line["layer"] != layer or not path.exists() or _checksum(path) != line["sha256"]:
                break
            lines.append(line)
        return lines

    def _cut_journal(self) -> None:
        """Forget lines behind the last finished layer, so that new ones follow it."""
        text = "".join(json.dumps(line) + "\n" for line in self._lines())
        write_whole(self.folder / JOURNAL, lambda partial: partial.write_text(text), len(text))


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
