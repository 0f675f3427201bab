"""Calibration tokens: fixed windows of token ids from a hub dataset, local text, or the model itself."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gsq.errors import UserError
from gsq.model.resolve import load_tokenizer

# Short names of hub datasets: repository, configuration, split
DATASETS = {
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train"),
    "c4": ("allenai/c4", "en", "train"),
    "open-thoughts": ("open-thoughts/OpenThoughts-114k", "default", "train"),
}
FIELDS = ("text", "content", "page", "conversations", "messages", "question", "answer", "prompt", "response")
FILES = {".txt", ".md", ".json", ".jsonl"}  # a hub id may hold a dot, but not end like these
SELF_BATCH = 64  # sequences sampled at once


def calibration_tokens(
    source: str, folder: Path, windows: int, length: int, seed: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Token ids int64 `[windows, length]` from `source`, with the tokenizer (and for `self` the model) in `folder`."""
    if source == "self":
        return sample_from_model(folder, windows, length, seed, device, dtype)
    if source.endswith(".safetensors"):
        return stored_tokens(Path(source).expanduser(), windows, length)
    tokenizer = load_tokenizer(folder)
    return pack(documents(source, seed), tokenizer, windows, length, source)


def documents(
    source: str,
    seed: int | None,
    setting: str = "calib.source",
    known: dict[str, tuple[str, str | None, str]] = DATASETS,
) -> Iterator[str]:
    """Texts of the local file or glob `source`, or of that hub dataset, for which `known` has short names.

    Rows of a dataset come in an order drawn from `seed`; for None in their own. Errors name the `setting`.
    """
    if _is_local(source, setting):
        return _local_texts(source, setting)
    return _dataset_texts(source, seed, setting, known)


def stored_tokens(path: Path, windows: int, length: int) -> Tensor:
    """The tokens that another run was calibrated on, its `tokens.safetensors`: the first of so many, if it has more."""
    try:
        tokens = load_file(path)["tokens"]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"calib.source {path} holds no tokens of a run ({error})") from None
    if tokens.shape[0] < windows or tokens.shape[1] < length:
        raise UserError(
            f"{path} holds {tokens.shape[0]} windows of {tokens.shape[1]} tokens, not {windows} of {length}; "
            "lower calib.windows and calib.length, or those of plan.sensitivity"
        )
    return tokens[:windows, :length].long()


def pack(texts: Iterator[str], tokenizer, windows: int, length: int, origin: str) -> Tensor:
    """The first `windows * length` tokens of `texts`, an end-of-text token between documents, `[windows, length]`."""
    wanted, ids = windows * length, []
    for document in joined(texts, tokenizer):
        ids += document
        if len(ids) >= wanted:
            return torch.tensor(ids[:wanted]).view(windows, length)
    raise UserError(
        f"{origin} holds {len(ids)} tokens, enough for {len(ids) // length} windows of {length}, not {windows}; "
        "give more text, or lower the number or length of the windows"
    )


def joined(texts: Iterable[str], tokenizer) -> Iterator[list[int]]:
    """Token ids of each text in turn, with an end-of-text token in front of all but the first."""
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    begun = False
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        yield separator + ids if begun else ids
        begun = begun or bool(ids)


def sample_from_model(
    folder: Path, windows: int, length: int, seed: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Windows that the model itself writes, at temperature 1, each from a random first token (as in LLM-QAT,
    https://arxiv.org/abs/2305.17888). Needs the whole model in memory."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    damaged = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if damaged:
        raise UserError(f"{damaged[0]} holds NaN or Inf; the source checkpoint is damaged, download it again")
    parts = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, windows, SELF_BATCH):
            count = min(SELF_BATCH, windows - start)
            first = torch.randint(model.get_input_embeddings().num_embeddings, (count, 1)).to(device)
            ids = model.generate(
                first, attention_mask=torch.ones_like(first), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=length - 1, min_new_tokens=length - 1, eos_token_id=None, pad_token_id=0, use_cache=True,
            )  # fmt: skip
            parts.append(ids.cpu())
    return torch.cat(parts)


def _is_local(source: str, setting: str) -> bool:
    local = bool(_local_paths(source, setting))
    looks_local = source.startswith((".", "/", "~")) or "*" in source or Path(source).suffix in FILES
    if looks_local and not local:
        raise UserError(f"{setting} {source!r} does not exist")
    return local


def _local_paths(source: str, setting: str) -> list[Path]:
    """The file that `source` names, or the files that it matches as a glob."""
    path = Path(source).expanduser()
    if path.is_dir():
        raise UserError(f"{setting} {source!r} is a folder; give its files, such as {path / '*.txt'}")
    return [path] if path.exists() else sorted(filter(Path.is_file, map(Path, glob.glob(str(path)))))


def text_mark(source: str, setting: str = "calib.source") -> str:
    """The source as a config names it, with a hash of its files if it is local."""
    if source == "self" or not _is_local(source, setting):
        return source
    digest = hashlib.sha256()
    for path in _local_paths(source, setting):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"{source} {digest.hexdigest()}"


def _local_texts(source: str, setting: str) -> Iterator[str]:
    for path in _local_paths(source, setting):
        try:
            yield from _json_texts(path) if path.suffix in {".jsonl", ".json"} else [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is no UTF-8 text ({error}); convert it, or leave it out") from None


def _json_texts(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    yield _document(json.loads(line))
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
                raise UserError(f"{path}, line {number}: no JSON object with one of {', '.join(FIELDS)}") from None


def _dataset_texts(
    source: str, seed: int | None, setting: str, known: dict[str, tuple[str, str | None, str]]
) -> Iterator[str]:
    import datasets

    repository, name, split = known.get(source, (source, None, "train"))
    try:
        stream = datasets.load_dataset(repository, name, split=split, streaming=True)
        for row in stream if seed is None else stream.shuffle(seed=seed, buffer_size=1000):
            yield _document(row)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{setting} {source!r} is no local file, and the hub did not give it ({reason}); known datasets: "
            f"{', '.join(known)}; offline, use a text file, or to calibrate `self`"
        ) from None


def _document(row: dict) -> str:
    """The text of a row: all fields that hold text, conversations turn by turn."""
    found = [row[field] for field in FIELDS if isinstance(row.get(field), str | list)]
    if not found:
        raise KeyError(f"its rows have none of {', '.join(FIELDS)}")
    turns = (turn for value in found for turn in (value if isinstance(value, list) else [value]))
    texts = (turn if isinstance(turn, str) else turn.get("content") or turn.get("value") or "" for turn in turns)
    return "\n\n".join(texts)
