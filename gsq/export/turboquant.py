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

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from gsq.codebook import Codebook, QuantizedTensor
from gsq.errors import UserError
from gsq.export.base import DecodedCheckpoint, PackedTensor, PlanEntry, Run, linear_names, linears, walk
from gsq.export.patterns import cover
from gsq.kernels.packing import OCTET, pack_bytes, unpack_bytes
from gsq.model.checkpoint import Checkpoint, CheckpointWriter, read_json
from gsq.rotation import SEED

CONFIG = "tq_config.json"
PACKED, NORMS = ".tq_packed", ".tq_norms"
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # where a model's config may say it


def check(source: Checkpoint, entries: Mapping[str, PlanEntry]) -> None:
    """Raise `UserError` naming the first tensor that the format cannot hold, and what could."""
    tq_config(source, entries)


def write(run: Run, writer: CheckpointWriter) -> None:
    """Add all tensors, `config.json` and `tq_config.json`."""
    for name, entry in walk(run.source, run.plan.entries):
        if entry is None:
            writer.add(name, as_float16(name, run.source.read(name)))
            continue
        for weight, quantized in stored_parts(entry, run.load(entry.name)):
            packed, norms = pack(quantized)
            writer.add(weight + PACKED, packed)
            writer.add(weight + NORMS, norms)
    config = {key: value for key, value in run.source.config.items() if key != "quantization_config"}
    writer.write_json("config.json", config)
    writer.write_json(CONFIG, tq_config(run.source, run.plan.entries))


def recognizes(checkpoint: Checkpoint) -> bool:
    """Whether a folder is in this format."""
    return (checkpoint.folder / CONFIG).exists()


def decoded(checkpoint: Checkpoint) -> DecodedCheckpoint:
    """The export as dense tensors; raises `UserError` where tensors and `tq_config.json` disagree."""
    config = read_json(checkpoint.folder / CONFIG)
    names = [name.removesuffix(PACKED) for name in checkpoint.tensors if name.endswith(PACKED)]
    packed = {name: _packed_tensor(checkpoint, config, name) for name in names}
    return DecodedCheckpoint(checkpoint, packed, markers=(CONFIG,))


def pack(quantized: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """`tq_packed` and `tq_norms` of a weight `[..., out, in]`."""
    codebook, codes = quantized.codebook, quantized.codes
    packed = pack_bytes(codes.reshape(-1, codebook.group_size), codebook.bits)
    return packed, quantized.scales.reshape(-1, codes.shape[-1] // codebook.group_size)


def as_float16(name: str, tensor: Tensor) -> Tensor:
    """A tensor as the format stores what it does not pack; raises `UserError` if float16 cannot hold it."""
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    if not half.isfinite().all() and tensor.isfinite().all():
        raise UserError(
            f"{name} holds {float(tensor.abs().max()):g}, and format tq stores it in float16, which ends at 65504; "
            "quantize this tensor, or export to another format"
        )
    return half


def stored_names(entry: PlanEntry) -> list[str]:
    """Names under which an entry is stored: fused experts as one tensor, others a Linear each."""
    return entry.sources if len(entry.sources) == 1 else [name for parts in linear_names(entry) for name in parts]


def stored_parts(entry: PlanEntry, quantized: QuantizedTensor) -> Iterator[tuple[str, QuantizedTensor]]:
    """The tensors that an entry is stored as, by name."""
    return iter([(entry.sources[0], quantized)]) if len(entry.sources) == 1 else linears(entry, quantized)


def tq_config(source: Checkpoint, entries: Mapping[str, PlanEntry]) -> dict:
    """The `tq_config.json` under which readers decode exactly the planned tensors."""
    planned = {entry.sources[0]: entry for _, entry in walk(source, entries) if entry}
    if not planned:
        raise UserError("the plan quantizes nothing, so there is nothing to export")
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
        "format": "tq3_native", "bits": default, "group_size": next(iter(sizes)), "quantizer_seed": SEED,
        "compressed_layers": len(stored), "original_model": source.folder.name,
    }  # fmt: skip
    if others:
        wanted = {name for name, codebook in stored.items() if codebook.bits != default}
        patterns = [run for run, _ in cover(wanted, [name for name in stored if name not in wanted], {False})]
        config |= {"sensitive_bits": others[0], "sensitive_patterns": patterns}
    padded = {name: book.rotation.width for name, book in stored.items() if book.rotation.columns > book.rotation.width}
    return config | ({"orig_in_dims": padded} if padded else {})


def _check_entry(entry: PlanEntry) -> None:
    codebook = entry.codebook
    kind = codebook.rotation.kind if codebook.rotation else None
    if kind != "tq":
        home = kind or "humming"
        raise UserError(
            f"{entry.name}: format tq holds codebook tq only; use it in the plan's rule, or export as {home}"
        )
    if codebook.group_size % OCTET:
        raise UserError(f"{entry.name}: format tq packs groups of a multiple of {OCTET}, not {codebook.group_size}")


def _packed_tensor(checkpoint: Checkpoint, config: dict, name: str) -> PackedTensor:
    packed, norms = checkpoint.tensors[name + PACKED], checkpoint.tensors.get(name + NORMS)
    size = config["group_size"]
    if norms is None or len(norms.shape) != 2 or packed.shape[0] != norms.numel:
        raise UserError(f"{name}{PACKED} needs norms for {packed.shape[0]} groups, but has {norms}; export again")
    bits = packed.shape[1] * 8 // size
    rows, in_features = norms.shape[0], config.get("orig_in_dims", {}).get(name, norms.shape[1] * size)
    shape = (rows, in_features)
    if not name.endswith(".weight"):  # fused experts
        experts = _experts(checkpoint)
        shape = (experts, rows // experts, in_features)
    codebook = Codebook.tq(bits, size, in_features)
    decode = partial(_decode, checkpoint, name, codebook, shape)
    return PackedTensor(shape, (name + PACKED, name + NORMS), f"tq{bits} g{size}", decode)


def _experts(checkpoint: Checkpoint) -> int:
    places = (checkpoint.config, checkpoint.config.get("text_config") or {})
    found = [place[key] for place in places for key in EXPERT_COUNTS if key in place]
    if not found:
        raise UserError(f"{checkpoint.folder / 'config.json'} does not say how many experts there are; export again")
    return found[0]


def _decode(checkpoint: Checkpoint, name: str, codebook: Codebook, shape: tuple[int, ...]) -> Tensor:
    """bfloat16 weights of `shape`."""
    norms = checkpoint.read(name + NORMS)  # [rows, groups]
    codes = unpack_bytes(checkpoint.read(name + PACKED), codebook.bits).view(len(norms), -1)
    return QuantizedTensor(codes, norms, codebook).dequantize(torch.bfloat16).view(shape)
