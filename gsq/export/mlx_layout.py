"""Where MLX's module trees have the tensors of Hugging Face checkpoints, and how affine codes lie there.

Names differ in how they begin, and the routed experts of a layer are stacked, gate and up apart:
`...mlp.experts.gate_up_proj`, or the Linears of all experts, become `...mlp.switch_mlp.gate_proj`
and `...up_proj`, `[experts, out, in]`. What else the `sanitize` of mlx_lm's models does to tensors
is data here, for every type of model that was compared with it. Exports are stored as `sanitize`
leaves a model, and it leaves them alone.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, takewhile

from torch import Tensor

from gsq.codebook import Codebook, QuantizedTensor
from gsq.errors import UserError
from gsq.export.base import PackedTensor, PlanEntry
from gsq.kernels.affine import affine_columns
from gsq.model.checkpoint import Checkpoint
from gsq.model.targets import EXPERT_PARTS

Places = tuple[tuple[str, str], ...]  # how names begin in Hugging Face checkpoints, and in MLX's module tree
SAME: Places = (("", ""),)
QWEN3_5: Places = (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."))
NOTHING = r"(?!)"
PARTS = (".weight", ".scales", ".biases")  # tensors of an affine module

EXPERT = re.compile(r"(?P<mlp>.+)\.experts\.(?P<index>\d+)\.(?P<part>\w+)\.weight")
FUSED = re.compile(rf"(?P<mlp>.+)\.experts\.(?P<fused>{'|'.join(EXPERT_PARTS)})")
STACK = re.compile(r"(?P<mlp>.+)\.switch_mlp\.(?P<part>\w+)")


@dataclass(frozen=True)
class Layout:
    """What mlx_lm makes of a type of model. Patterns are searched in Hugging Face names.

    `dropped`: what it has no place for. `raised`: norms that have one added. `channels_last`: convolutions that
    become `[out, width, in]`. `fused`: experts are published as fused tensors, not one by one.
    """

    places: Places = SAME
    dropped: str = r"rotary_emb\.inv_freq$"
    raised: str = NOTHING
    channels_last: str = NOTHING
    fused: bool = False

    def stored_name(self, name: str) -> str | None:
        """Where a tensor goes, None if it is dropped; raises `UserError` if it is known to be neither."""
        if re.search(self.dropped, name):
            return None
        place = stored_name(self.places, name)
        if place is None:
            known = ", ".join(before + "*" for before, _ in self.places)
            raise UserError(f"format mlx has no place for {name}: the tensors of this type of model are {known}")
        return place

    def original_name(self, name: str) -> str:
        """Inverse of `stored_name`."""
        return original_name(self.places, name)


PLAIN = Layout()
HYBRID = Layout(
    dropped=r"(^|\.)mtp\.|^model\.visual\.",
    raised=r"(input_layernorm|post_attention_layernorm|q_norm|k_norm|model\.norm|language_model\.norm)\.weight$",
    channels_last=r"conv1d\.weight$",
)
LAYOUTS = {  # by model_type
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "phi3", "granite"), PLAIN),
    **dict.fromkeys(("ernie4_5", "hunyuan_v1_dense", "seed_oss", "qwen3_moe", "olmoe"), PLAIN),
    "qwen3_next": HYBRID,
    "qwen3_5": replace(HYBRID, places=QWEN3_5),
    "qwen3_5_moe": replace(HYBRID, places=QWEN3_5, fused=True),
}


def layout_of(config: dict) -> Layout:
    """The layout for the model that a `config.json` describes; raises `UserError` for a type that is not listed."""
    kind = config.get("model_type")
    if kind not in LAYOUTS:
        raise UserError(f"format mlx knows models of the types {', '.join(LAYOUTS)}, and not {kind}")
    return LAYOUTS[kind]


def source_layout(source: Checkpoint) -> Layout:
    """The layout for a Hugging Face checkpoint; a head that is tied, but stored nevertheless, is dropped."""
    layout = layout_of(source.config)
    return replace(layout, dropped=rf"{layout.dropped}|^lm_head\.") if is_tied(source) else layout


def is_tied(source: Checkpoint) -> bool:
    """Whether the head of a Hugging Face checkpoint is its embedding."""
    return "lm_head.weight" not in source.tensors or bool(text_config(source.config).get("tie_word_embeddings"))


def text_config(config: dict) -> dict:
    """The part of a `config.json` that describes the language model."""
    return config.get("text_config") or config


def stored_name(places: Places, name: str) -> str | None:
    """Where MLX's module tree has a tensor; None if it has no place for it."""
    return next((after + name.removeprefix(before) for before, after in places if name.startswith(before)), None)


def original_name(places: Places, name: str) -> str:
    """Inverse of `stored_name`; a name that it never gives is left as it is."""
    return stored_name(tuple((after, before) for before, after in places), name) or name


def stored_modules(places: Places, entry: PlanEntry) -> list[str]:
    """The modules that the rows of an entry are divided between: one of a Linear, one for each part of experts."""
    name = stored_name(places, entry.sources[0])
    if len(entry.shape) == 2:
        return [name.removesuffix(".weight")]
    return stacks(name.partition(".experts.")[0], entry.name.rpartition(".")[2])


def stored_parts(places: Places, entry: PlanEntry, quantized: QuantizedTensor) -> Iterator[tuple[str, QuantizedTensor]]:
    """What of an entry is in which module, by name: codes `[out, in]`, or of experts `[experts, out, in]`."""
    modules = stored_modules(places, entry)
    rows = entry.shape[-2] // len(modules)
    for index, module in enumerate(modules):
        yield module, quantized.rows(index * rows, (index + 1) * rows)


def stacks(mlp: str, fused: str) -> list[str]:
    """The modules that a fused parameter of experts is divided between."""
    return [f"{mlp}.switch_mlp.{part}" for part in EXPERT_PARTS[fused]]


def stacked_beside(module: str) -> tuple[str, list[str]]:
    """The fused parameter that a stack of experts is a part of, and the stacks of all its parts."""
    mlp, part = STACK.fullmatch(module).groups()
    fused = next((fused for fused, parts in EXPERT_PARTS.items() if part in parts), None)
    if fused is None:
        raise UserError(f"{module} holds experts' {part}, which GSQ does not know; export again")
    return f"{mlp}.experts.{fused}", stacks(mlp, fused)


def expert_names(name: str, names: Container[str]) -> list[str]:
    """Of experts that are stored one by one: `name`, a Linear of one, and the same of all others, in order."""
    mlp, _, part = EXPERT.fullmatch(name).groups()
    every = (f"{mlp}.experts.{index}.{part}.weight" for index in count())
    return list(takewhile(names.__contains__, every))


def affine_module(checkpoint: Checkpoint, module: str) -> tuple[Codebook, tuple[int, ...], tuple[str, ...]]:
    """How a packed module is stored: its codebook, the shape of its weights, the names of `PARTS`.

    Raises `UserError` if `config.json`, codes, scales and biases do not fit together.
    """
    stored = tuple(module + part for part in PARTS)
    missing = next((name for name in stored if name not in checkpoint.tensors), None)
    setting = checkpoint.config.get("quantization", {})
    setting = setting.get(module, setting)
    if missing or not isinstance(setting, dict) or not {"bits", "group_size"} <= setting.keys():
        raise UserError(f"{module} is packed, but {missing or 'its setting in config.json'} is missing; export again")
    words, scales, biases = (checkpoint.tensors[name].shape for name in stored)
    bits, size = setting["bits"], setting["group_size"]
    shape = (*words[:-1], affine_columns(words[-1], bits))
    if not scales == biases == (*words[:-1], shape[-1] // size):
        raise UserError(f"{module} needs scales and biases for groups of {size}; export again")
    return Codebook.affine(bits, size, checkpoint.tensors[stored[1]].dtype), shape, stored


def kept_tensor(checkpoint: Checkpoint, name: str) -> PackedTensor:
    """A tensor that is stored as it is."""
    info = checkpoint.tensors[name]
    label = str(info.dtype).removeprefix("torch.")
    return PackedTensor(info.shape, (name,), label, partial(checkpoint.read, name), info.dtype)


def channels_first(tensor: PackedTensor) -> PackedTensor:
    """A convolution as PyTorch has it, `[out, in, ...]`, that MLX has with channels last."""

    def decode(part: int | None) -> Tensor:
        moved = tensor.decode(None).movedim(-1, 1)
        return moved if part is None else moved[part]

    return replace(tensor, shape=(tensor.shape[0], tensor.shape[-1], *tensor.shape[1:-1]), decode=decode)
