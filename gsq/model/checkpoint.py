"""Hugging Face checkpoints as a dictionary of tensors on disk: read lazily, written shard by shard.

Opening a checkpoint reads headers only, and checks them: every shard there and whole, every name
inside the folder. A tensor is read when asked for and belongs to the caller. Nothing here knows
what a layer is, or that anything is quantized.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gsq.errors import UserError
from gsq.files import check_space, explained, save_tensors, sync

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SAMPLE = 1 << 20  # bytes of a file that a fingerprint looks at
PART = 1 << 26  # bytes of a tensor that is read in parts
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.numel * self.dtype.itemsize


class Checkpoint:
    """A folder with `config.json` and safetensors shards.

    `tensors` maps every name to its `TensorInfo`; `config` is the parsed `config.json`.
    """

    def __init__(self, folder: Path, config: dict, tensors: dict[str, TensorInfo]):
        self.folder, self.config, self.tensors = folder, config, tensors

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read and check all headers. Raises `UserError` for what is missing, truncated or outside the folder."""
        folder = Path(folder)
        config = read_json(folder / "config.json")
        index = folder / INDEX
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map or {str} != set(map(type, weight_map.values())):
                raise UserError(f"{index} has no weight_map; download the checkpoint again")
            files = {
                file: [name for name in weight_map if weight_map[name] == file] for file in set(weight_map.values())
            }
        elif (folder / SINGLE).exists():
            files = {SINGLE: None}
        else:
            raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}; GSQ reads safetensors checkpoints and .gguf")
        tensors: dict[str, TensorInfo] = {}
        for file in sorted(files):
            found = _read_header(_inside(folder, file))
            missing = set(files[file] or ()) - set(found)
            if missing:
                raise UserError(
                    f"{folder / file} lacks {sorted(missing)[0]}, which {INDEX} says it holds; download it again"
                )
            tensors |= found
        return cls(folder, config, tensors)

    def read(self, name: str, part: int | slice | None = None) -> Tensor:
        """The tensor `name` on the CPU in its stored dtype; with `part`, only that much of its first dimension."""
        with safe_open(self.tensors[name].file, framework="pt") as shard:
            return shard.get_tensor(name) if part is None else shard.get_slice(name)[part]

    def read_sound(self, name: str, part: int | slice | None = None) -> Tensor:
        """Like `read`, of a weight; raises `UserError` for NaN or Inf in it."""
        return sound(name, self.read(name, part))

    def parts(self, name: str) -> Iterator[Tensor]:
        """The tensor `name`; if it is large, in parts of its first dimension."""
        info = self.tensors[name]
        if info.nbytes <= PART:
            yield self.read(name)
            return
        step = max(1, PART * info.shape[0] // info.nbytes)
        for start in range(0, info.shape[0], step):
            yield self.read(name, slice(start, start + step))

    def side_files(self) -> Iterator[Path]:
        """Everything beside the weights that a user of the model needs: tokenizer, chat template, configs, licence."""
        shards = {info.file.name for info in self.tensors.values()}
        weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
        for path in sorted(self.folder.iterdir()):
            if path.is_file() and path.name not in shards | {INDEX, "config.json"} and path.suffix not in weights:
                yield path

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())


class CheckpointWriter:
    """Writes a checkpoint that appears under its name only when it is whole.

    Tensors are gathered into shards of at most `shard_bytes`, so that memory holds one shard;
    everything is written to `<folder>.partial` and renamed by `finish`. `expected_bytes` of tensors,
    if known, must be free at the start.
    """

    def __init__(self, folder: str | Path, shard_bytes: int = 2 << 30, expected_bytes: int = 0):
        self.folder = Path(folder)
        if self.folder.exists():
            raise UserError(f"{self.folder} exists already; choose another folder or remove it")
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        shutil.rmtree(self.partial, ignore_errors=True)
        check_space(self.folder, expected_bytes)
        self.partial.mkdir(parents=True)
        self.shard_bytes, self.expected_bytes = shard_bytes, expected_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self._metadata: dict | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Queue a tensor; a full shard is written at once."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += size
        self._total_bytes += size

    def add_all(self, tensors: dict[str, Tensor]) -> None:
        """Queue several tensors."""
        for name, tensor in tensors.items():
            self.add(name, tensor)

    def add_parts(self, shape: tuple[int, ...], parts: Iterator[dict[str, Tensor]]) -> None:
        """Queue tensors that come in parts of their first dimension, which is that of `shape`.

        If there is more than one part, they are written at once, as a shard of their own.
        """
        first, second = next(parts), next(parts, None)
        if second is None:
            self.add_all(first)
            return
        layout = {name: (tensor.dtype, (shape[0], *tensor.shape[1:])) for name, tensor in first.items()}
        with self._writing():
            self._total_bytes += save_parts(self._next_shard(), layout, chain([first, second], parts))
        self._shards.append(list(layout))

    def write_json(self, file: str, content: dict) -> None:
        """A JSON file of the checkpoint, such as its `config.json`."""
        with self._writing():
            (self.partial / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def write_tensors(self, file: str, tensors: dict[str, Tensor]) -> None:
        """A safetensors file that is no shard: its tensors are not in the index."""
        with self._writing():
            save_tensors(tensors, self.partial / file)

    def describe(self, metadata: dict) -> None:
        """Put `metadata` into the index, which is then written even if there is only one shard."""
        self._metadata = metadata

    def copy(self, path: Path) -> None:
        """A side file, byte for byte."""
        with self._writing():
            shutil.copyfile(path, self.partial / path.name)

    def finish(self) -> Path:
        """Write what is pending and the index, then give the folder its name."""
        if self._pending or not self._shards:
            self._flush()
        if len(self._shards) == 1 and self._metadata is None:
            (self.partial / self._shard_file(0, None)).rename(self.partial / SINGLE)
        else:
            self._name_shards()
        with self._writing():
            for path in self.partial.iterdir():
                sync(path)
            self.partial.rename(self.folder)
        return self.folder

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Around everything that writes: a disk that is full gets back what this checkpoint took of it."""
        with explained(self.folder, max(self.expected_bytes, self._total_bytes)):
            try:
                yield
            except OSError:
                shutil.rmtree(self.partial, ignore_errors=True)
                raise

    def _flush(self) -> None:
        with self._writing():
            save_tensors(self._pending, self._next_shard())
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _next_shard(self) -> Path:
        return self.partial / self._shard_file(len(self._shards), None)

    def _name_shards(self) -> None:
        """Shards know their total only at the end; the index is written last."""
        weight_map = {}
        for number, names in enumerate(self._shards):
            final = self._shard_file(number, len(self._shards))
            (self.partial / self._shard_file(number, None)).rename(self.partial / final)
            weight_map |= dict.fromkeys(names, final)
        metadata = {**(self._metadata or {}), "total_size": self._total_bytes}
        self.write_json(INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})

    @staticmethod
    def _shard_file(number: int, total: int | None) -> str:
        return f"model-{number + 1:05d}" + (f"-of-{total:05d}" if total else "") + ".safetensors"


def save_parts(
    path: Path, layout: dict[str, tuple[torch.dtype, tuple[int, ...]]], parts: Iterable[dict[str, Tensor]]
) -> int:
    """Write a safetensors file of tensors that come in parts of their first dimension; returns their bytes.

    `layout` has the dtype and shape of each.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for name, (dtype, shape) in sorted(layout.items(), key=lambda item: (-item[1][0].itemsize, item[0])):  # aligned
        places[name] = end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": (places[name], end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        start = file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            for name, tensor in part.items():
                file.seek(start + places[name])
                places[name] += file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return end


def fingerprint(source: Checkpoint) -> str:
    """Hash of what a checkpoint's headers say, with the size and the last megabyte of each file."""
    digest = hashlib.sha256()
    for name, info in sorted(source.tensors.items()):
        digest.update(f"{name} {info.dtype} {info.shape} {info.file.name}\n".encode())
    for path in sorted({info.file for info in source.tensors.values()}):
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - SAMPLE))
            digest.update(f"{size}\n".encode() + file.read())
    digest.update(json.dumps(source.config, sort_keys=True).encode())
    return digest.hexdigest()


def sound(name: str, tensor: Tensor) -> Tensor:
    """`tensor`, if it holds no NaN or Inf; else raises `UserError`."""
    if tensor.is_floating_point() and tensor.numel() and not all(map(torch.isfinite, tensor.aminmax())):
        raise UserError(f"{name} holds NaN or Inf; the source checkpoint is damaged, download it again")
    return tensor


def read_json(path: Path) -> dict:
    """Parse a JSON file of a checkpoint; raises `UserError` if it is missing or broken."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; is {path.parent} a model folder?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; download it again")
    return content


def _inside(folder: Path, file: str) -> Path:
    """`folder / file`, refused if it leads out of the folder. Hub caches link files, so links are not followed."""
    path = Path(os.path.normpath(folder / file))
    if os.path.isabs(file) or path.parent != Path(os.path.normpath(folder)):
        raise UserError(f"{folder / INDEX} names {file!r}, a file outside the checkpoint's folder; do not trust it")
    return path


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of a shard. safetensors itself checks that the file is as long as they say."""
    if not path.exists():
        raise UserError(f"shard {path} is missing; download the checkpoint again")
    try:
        with safe_open(path, framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 (not a dict)
            return {name: TensorInfo(path, DTYPES[s.get_dtype()], tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"shard {path} is truncated or damaged ({error}); download it again") from None
    except KeyError as error:
        raise UserError(f"{path} holds tensors of dtype {error}, which GSQ does not read") from None
