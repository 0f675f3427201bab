"""Modules whose weights stay packed, in place of a model's Linears and fused experts.

They know nothing of files: `pack_modules` puts them into a model on the meta device, and whoever
loads it fills their buffers. A packed weight stands where the parameter of its name stood.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from gsq.codebook import Codebook
from gsq.kernels.packed import PackedWeight, packed_grouped_matmul, packed_matmul
from gsq.model.checkpoint import Checkpoint
from gsq.model.targets import EXPERT_PARTS
from gsq.serve.parameters import PackedParameter

EXPERTS = "gsq_packed"  # transformers' name for `packed_experts_forward`
# How a module of experts must be built, in the words of transformers' `use_experts_implementation`
PLAIN_EXPERTS = {"has_gate": True, "has_bias": False, "is_transposed": False, "has_post_expert_norm": False}


class PackedMatrix(nn.Module):
    """Products with a packed weight `[out, in]`, or with experts `[experts, out, in]`.

    Buffers `words`, int32 `[..., out, in * bits / 32]`, and `scales` `[..., out, groups]`.
    """

    words: Tensor
    scales: Tensor

    def __init__(self, parameter: PackedParameter):
        super().__init__()
        self.shape, self.codebook = parameter.shape, parameter.codebook
        words = torch.empty(parameter.words_shape, dtype=torch.int32, device="meta")
        scales = torch.empty(parameter.scales_shape, dtype=parameter.codebook.scale_dtype, device="meta")
        self.register_buffer("words", words)
        self.register_buffer("scales", scales)
        self._packed: PackedWeight | None = None

    def forward(self, x: Tensor, ends: Tensor | None = None) -> Tensor:
        """`x` `[rows, in]` to `[rows, out]`; with experts, rows are sorted by expert and end at `ends` `[experts]`."""
        packed = self._description()
        return packed_matmul(x, packed) if ends is None else packed_grouped_matmul(x, ends, packed)

    def extra_repr(self) -> str:
        """What is packed, and how."""
        return f"{list(self.shape)}, {self.codebook.bits} bits, group_size={self.codebook.group_size}"

    def _description(self) -> PackedWeight:
        """Kept between calls: it holds the table of levels, which a GPU would wait for."""
        if self._packed is None or self._packed.words is not self.words or self._packed.scales is not self.scales:
            self._packed = _packed_weight(self.words, self.scales, self.codebook)
        return self._packed


class PackedLinear(nn.Module):
    """A Linear whose `weight` is a `PackedMatrix`."""

    def __init__(self, parameter: PackedParameter, bias: nn.Parameter | None):
        super().__init__()
        self.out_features, self.in_features = parameter.shape
        self.weight = PackedMatrix(parameter)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` to `[..., out]`, in the dtype of `x`."""
        y = self.weight(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def pack_modules(model: PreTrainedModel, parameters: Mapping[str, PackedParameter]) -> set[str]:
    """Put packed modules in place of those whose `parameters` can stay packed; returns the names of these.

    Buffers of the new modules are on the meta device. What is left is to be decoded: embeddings, Linears
    with code of their own, experts that transformers does not let others compute.
    """
    owners: dict[str, dict[str, PackedParameter]] = {}
    for name, parameter in parameters.items():
        path, _, leaf = name.rpartition(".")
        owners.setdefault(path, {})[leaf] = parameter
    packed = set()
    for path, own in owners.items():
        owner = model.get_submodule(path)
        if not all(parameter.whole_words for parameter in own.values()):
            continue
        if type(owner) is nn.Linear:
            model.set_submodule(path, PackedLinear(own["weight"], owner.bias))
        elif _are_plain_experts(owner) and own.keys() == EXPERT_PARTS.keys():
            _pack_experts(owner, own)
            model.config._experts_implementation = EXPERTS  # so that `packed_experts_forward` computes them
        else:
            continue
        packed |= {f"{path}.{leaf}" for leaf in own}
    return packed


def load_packed(
    module: nn.Module, parameters: Mapping[str, PackedParameter], checkpoint: Checkpoint, device: torch.device
) -> None:
    """Fill parameters of these names inside `module` from the export that stores them, packed or decoded as they are.

    Packed matrices may be on the meta device, decoded weights are not.
    """
    for name, parameter in parameters.items():
        codes, scales = parameter.read(checkpoint)
        path, _, leaf = name.rpartition(".")
        place = getattr(module.get_submodule(path), leaf)
        if isinstance(place, PackedMatrix):
            words, joined = parameter.joined(codes, scales)
            place.words, place.scales = words.to(device), joined.to(device)
        else:
            place.data.copy_(parameter.decoded(codes, scales, place.dtype))


def packed_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What experts of transformers compute: `[tokens, H]` from `[tokens, H]`, for each token the sum over its experts.

    `top_k_index` and `top_k_weights` are `[tokens, k]`. The host waits for nothing.
    """
    if not isinstance(self.gate_up_proj, PackedMatrix):  # other experts of the same model
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
    tokens, k = top_k_index.shape
    expert, order = top_k_index.flatten().sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(self.gate_up_proj.shape[0], device=expert.device), right=True)
    inner = self._apply_gate(self.gate_up_proj(hidden_states[order // k], ends))
    weighted = self.down_proj(inner, ends) * top_k_weights.flatten()[order, None]
    by_token = torch.empty_like(weighted)
    by_token[order] = weighted
    return by_token.view(tokens, k, -1).sum(1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, packed_experts_forward)


def _are_plain_experts(module: nn.Module) -> bool:
    return all(getattr(module, key, None) == value for key, value in PLAIN_EXPERTS.items())


def _pack_experts(experts: nn.Module, parameters: Mapping[str, PackedParameter]) -> None:
    for leaf, parameter in parameters.items():
        delattr(experts, leaf)
        experts.add_module(leaf, PackedMatrix(parameter))
    experts._is_hf_initialized = True  # transformers must not draw weights where there are none


def _packed_weight(words: Tensor, scales: Tensor, codebook: Codebook) -> PackedWeight:
    rotate = codebook.rotation and codebook.rotation.rotate
    return PackedWeight(words, scales, codebook.levels, rotate=rotate)
