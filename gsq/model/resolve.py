"""From what a user calls a model (hub id, folder, .gguf file) to a folder of safetensors on this disk."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gsq.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "README.md"]


def resolve_model(name: str) -> Path:
    """Folder that holds the checkpoint `name`.

    A hub id is downloaded into the hub's own cache; a `.gguf` file is dequantized once into
    GSQ's cache (`GSQ_CACHE`, else `~/.cache/gsq`). Raises `UserError` if there is no such model.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _dequantize_gguf(path.resolve())
    if path.is_dir():
        return path.resolve()
    if path.suffix in {".gguf", ".safetensors"} or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model {name!r} does not exist; give a folder, a .gguf file or a hub id such as org/model")
    return _download(name)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; raises `UserError` if it has none that works."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{folder} has no usable tokenizer ({reason}); download the model again, or copy its tokenizer files there"
        ) from None


def _download(repo: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model {repo!r} is no local folder, and the hub did not give it ({reason}); "
            "check the name, `hf auth login` for gated models, or give a local folder"
        ) from None


def _dequantize_gguf(path: Path) -> Path:
    """bfloat16 safetensors of a GGUF file, through transformers; cached by path, size and time of change."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    stat = path.stat()
    key = hashlib.sha256(f"{path}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    cache = Path(os.environ.get("GSQ_CACHE", "~/.cache/gsq")).expanduser()
    folder = cache / f"{path.stem}-{key}"
    if folder.exists():
        return folder
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise UserError(f"transformers cannot read {path}: {error}") from None
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(partial)
    return folder
