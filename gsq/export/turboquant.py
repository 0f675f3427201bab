"""TQ native checkpoints (`tq3_native`), as the vLLM plugin and the MLX loader of turboquant-plus-vllm read them.

A weight `X` becomes `X.tq_packed`, uint8 `[rows * groups, group * bits / 8]`, and `X.tq_norms`,
float32 `[rows, groups]`; experts keep the layout they had, rows being those of all experts. All
other tensors are stored in float16 under their own names. `tq_config.json` says the rest:

* one group size; one width, or two, of which `sensitive_bits` is that of the tensors whose names
  contain one of `sensitive_patterns`;
* `orig_in_dims`, the width of rows that were padded with zeros to whole groups.

Source: `turboquant_vllm.checkpoint.save_tq3_checkpoint` and `turboquant_vllm.mlx_loader`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from gsq.codebook import Codebook, QuantizedTensor
from gsq.errors import UserError
from gsq.export.base import (
    DecodedCheckpoint,
    PackedTensor,
    PlanEntry,
    Run,
    as_float16,
    float16_bytes,
    linear_names,
    linears,
    require_codebook,
    walk,
)
from gsq.export.patterns import cover
from gsq.kernels.packing import OCTET, pack_bytes, unpack_bytes
from gsq.model.checkpoint import Checkpoint, CheckpointWriter, read_json
from gsq.rotation import SEED

CONFIG, FORMAT = "tq_config.json", "tq3_native"
PACKED, NORMS = ".tq_packed", ".tq_norms"
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # where a model's config may say it


def check(source: Checkpoint, entries: Mapping[str, PlanEntry]) -> None:
    """Raise `UserError` naming the first tensor that the format cannot hold, and what could."""
    tq_config(source, entries)


def write(run: Run, writer: CheckpointWriter) -> None:
    """Add all tensors, `config.json` and `tq_config.json`."""
    for name, entry in walk(run.source, run.plan.entries):
        if entry is None:
            writer.add(name, as_float16(name, run.source.read(name), "tq"))
            continue
        for weight, quantized in stored_parts(entry, run.load(entry.name)):
            packed, norms = pack(quantized)
            writer.add(weight + PACKED, packed)
            writer.add(weight + NORMS, norms)
    config = {key: value for key, value in run.source.config.items() if key != "quantization_config"}
    writer.write_json("config.json", config)
    writer.write_json(CONFIG, tq_config(run.source, run.plan.entries))


def packed_bytes(entry: PlanEntry) -> int:
    """Bytes of a planned tensor that is packed."""
    return entry.codebook.nbytes(entry.shape)


def kept_bytes(source: Checkpoint, name: str) -> int:
    """Bytes of a tensor that is not packed."""
    return float16_bytes(source, name)


def recognizes(checkpoint: Checkpoint) -> bool:
    """Whether a folder is in this format."""
    return (checkpoint.folder / CONFIG).exists()


def decoded(checkpoint: Checkpoint) -> DecodedCheckpoint:
    """The export as dense tensors; raises `UserError` where tensors and `tq_config.json` disagree."""
    config = read_config(checkpoint)
    names = [name.removesuffix(PACKED) for name in checkpoint.tensors if name.endswith(PACKED)]
    packed = {name: _packed_tensor(checkpoint, config, name) for name in names}
    return DecodedCheckpoint(checkpoint, packed, markers=(CONFIG,))


def read_config(checkpoint: Checkpoint) -> dict:
    """`tq_config.json` of a folder; raises `UserError` for what this reader, or theirs, would misread."""
    path = checkpoint.folder / CONFIG
    config = read_json(path)
    expected = {"format": FORMAT, "quantizer_seed": SEED}
    wrong = [f"{key} {config.get(key)!r}, not {value!r}" for key, value in expected.items() if config.get(key) != value]
    widths = [
        config.get(key) for key in ("bits", "sensitive_bits") if key == "bits" or config.get("sensitive_patterns")
    ]
    wrong += [f"{width!r} bits" for width in widths if width not in (2, 3, 4)]
    size = config.get("group_size")
    if not isinstance(size, int) or size < OCTET or size & (size - 1):
        wrong.append(f"group size {size!r}")
    if wrong:
        raise UserError(f"{path} says {', '.join(wrong)}, which GSQ does not write; export again")
    return config


def bits_of(config: dict, weight: str) -> int:
    """Width of a tensor, as readers find it."""
    sensitive = any(pattern in weight for pattern in config.get("sensitive_patterns", []))
    return config["sensitive_bits" if sensitive else "bits"]


def pack(quantized: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """`tq_packed` and `tq_norms` of a weight `[..., out, in]`."""
    codebook, codes = quantized.codebook, quantized.codes
    packed = pack_bytes(codes.reshape(-1, codebook.group_size), codebook.bits)
    return packed, quantized.scales.reshape(-1, codes.shape[-1] // codebook.group_size)


def stored_names(entry: PlanEntry) -> list[str]:
    """Names under which an entry is stored: fused experts as one tensor, others a Linear each."""
    return entry.sources if len(entry.sources) == 1 else [name for parts in linear_names(entry) for name in parts]


def stored_parts(entry: PlanEntry, quantized: QuantizedTensor) -> Iterator[tuple[str, QuantizedTensor]]:
    """The tensors that an entry is stored as, by name."""
    return iter([(entry.sources[0], quantized)]) if len(entry.sources) == 1 else linears(entry, quantized)


def tq_config(source: Checkpoint, entries: Mapping[str, PlanEntry]) -> dict:
    """The `tq_config.json` under which readers decode exactly the planned tensors."""
    planned = {entry.sources[0]: entry for _, entry in walk(source, entries) if entry}
    for entry in planned.values():
        _check_entry(entry)
    sizes = {entry.codebook.group_size: entry.name for entry in planned.values()}
    if len(sizes) > 1:
        (size, name), (other, another) = list(sizes.items())[:2]
        raise UserError(f"format tq has one group size, but {name} has {size} and {another} {other}; use one for both")
    stored = {name: entry.codebook for entry in planned.values() for name in stored_names(entry)}
    weights: Counter[int] = Counter()
    for entry in planned.values():
        weights[entry.codebook.bits] += torch.Size(entry.shape).numel()
    default, *others = [bits for bits, _ in weights.most_common()]
    if len(others) > 1:
        raise UserError(f"format tq holds two widths at most, the plan has {sorted(weights)}; drop one")
    config = {
        "format": FORMAT, "bits": default, "group_size": next(iter(sizes)), "quantizer_seed": SEED,
        "compressed_layers": len(stored), "original_model": _model_id(source),
    }  # fmt: skip
    if others:
        wanted = {name for name, codebook in stored.items() if codebook.bits != default}
        patterns = [run for run, _ in cover(wanted, [name for name in stored if name not in wanted], {False})]
        config |= {"sensitive_bits": others[0], "sensitive_patterns": patterns}
    padded = {name: book.rotation.width for name, book in stored.items() if book.rotation.columns > book.rotation.width}
    return config | ({"orig_in_dims": padded} if padded else {})


def _model_id(source: Checkpoint) -> str:
    """Hub id of a checkpoint in the hub's cache (`models--org--name/snapshots/<commit>`), else its folder's name."""
    folder = source.folder
    cached = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.parent.parent.name.removeprefix("models--").replace("--", "/") if cached else folder.name


def _check_entry(entry: PlanEntry) -> None:
    require_codebook(entry, "tq")
    size = entry.codebook.group_size
    if size % OCTET:
        raise UserError(f"{entry.name}: format tq packs groups of a multiple of {OCTET}, not {size}")


def _packed_tensor(checkpoint: Checkpoint, config: dict, name: str) -> PackedTensor:
    packed, norms = checkpoint.tensors[name + PACKED], checkpoint.tensors.get(name + NORMS)
    size, bits = config["group_size"], bits_of(config, name)
    if norms is None or len(norms.shape) != 2 or packed.shape != (norms.numel, size * bits // 8):
        raise UserError(
            f"{name} is packed as {packed.shape} with norms {norms and norms.shape}, which is no weight of {bits} bits "
            f"in groups of {size}, as {CONFIG} says; export again"
        )
    rows, columns = norms.shape[0], norms.shape[1] * size
    in_features = config.get("orig_in_dims", {}).get(name, columns)
    if not columns - size < in_features <= columns:
        raise UserError(f"{CONFIG} says that rows of {name} have {in_features} weights, not {columns}; export again")
    shape = (rows, in_features)
    if not name.endswith(".weight"):  # fused experts
        experts = _experts(checkpoint)
        shape = (experts, rows // experts, in_features)
    codebook = Codebook.tq(bits, size, in_features)
    decode = partial(_decode, checkpoint, name, codebook, shape)
    return PackedTensor(shape, (name + PACKED, name + NORMS), f"tq{bits} g{size}", decode, codebook=codebook)


def _experts(checkpoint: Checkpoint) -> int:
    places = (checkpoint.config, checkpoint.config.get("text_config") or {})
    found = [place[key] for place in places for key in EXPERT_COUNTS if key in place]
    if not found:
        raise UserError(f"{checkpoint.folder / 'config.json'} does not say how many experts there are; export again")
    return found[0]


def _decode(checkpoint: Checkpoint, name: str, codebook: Codebook, shape: tuple[int, ...], part: int | None) -> Tensor:
    """bfloat16 weights of `shape`, or index `part` of its first dimension."""
    rows = None
    if part is not None:
        count = math.prod(shape[1:-1])
        rows, shape = slice(part * count, (part + 1) * count), shape[1:]
    norms = checkpoint.read(name + NORMS, rows)  # [rows, groups]
    groups = rows and slice(rows.start * norms.shape[1], rows.stop * norms.shape[1])
    codes = unpack_bytes(checkpoint.read(name + PACKED, groups), codebook.bits).view(len(norms), -1)
    return QuantizedTensor(codes, norms, codebook).dequantize(torch.bfloat16).view(shape)
