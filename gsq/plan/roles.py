"""Roles: the part that a tensor plays in its model, such as `attention q`, `expert down` or `norm`.

Found from the module tree where that tells (what holds a convolution or experts, what the model calls
its embeddings), and else from the names that modules commonly have; no family of models is known
here. A tensor that holds several Linears, such as the fused gate and up of experts, has all their parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from gsq.model.targets import EXPERT_PARTS

ROLES: dict[str, tuple[str, ...]] = {  # families of roles, and their parts in order
    "attention": ("q", "k", "v", "o"),
    "linear attention": ("in", "out"),
    "mlp": ("gate", "up", "down"),
    "expert": ("gate", "up", "down"),
    "shared expert": ("gate", "up", "down"),
    "router": (),  # of experts, routed or shared
    "embedding": (),
    "head": (),
    "norm": (),
    "convolution": (),
    "vision": (),
    "mtp": (),
    "other": (),
}
OUTSIDE = ("embedding", "head")  # families that can be quantized although they are in no decoder layer

MLP = ((r"gate_up", "gate up"), (r"gate|^w1$", "gate"), (r"up|fc1|^w3$", "up"), (r"down|fc2|^w2$", "down"))
QKV = ((r"qkv|query_key_value", "q k v"), (r"^kv", "k v"), (r"^q", "q"), (r"^k", "k"), (r"^v", "v"))
PARTS = {  # by a Linear's own name; the first pattern found decides
    "attention": (*QKV, (r"^(o|dense)", "o")),
    "linear attention": ((r"^o", "out"), (r"", "in")),
    "mlp": MLP,
    "expert": MLP,
    "shared expert": MLP,
}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
VISION, MTP = r"visual|vision|image|multi_modal", r"(^|\.)(mtp|nextn)"


@dataclass(frozen=True)
class Role:
    """A family of `ROLES` and some of its parts; no part: all of the family, or something in it that is no part."""

    family: str
    parts: tuple[str, ...] = ()

    @classmethod
    def read(cls, text: str) -> Role:
        """The role that `str` gives as `text`; a family that is not known is all of it."""
        words = text.split()
        for end in range(len(words), 0, -1):
            if " ".join(words[:end]) in ROLES:
                return cls(" ".join(words[:end]), tuple(words[end:]))
        return cls(text)

    @property
    def known(self) -> bool:
        """Whether `ROLES` has it."""
        return set(self.parts) <= set(ROLES.get(self.family, ())) and self.family in ROLES

    def covers(self, other: Role) -> bool:
        """Whether a rule for this role is one for the other, or for a part of it."""
        return self.family == other.family and (not self.parts or not set(self.parts).isdisjoint(other.parts))

    def __str__(self) -> str:
        return " ".join([self.family, *self.parts])


def together(roles: Iterable[Role]) -> list[Role]:
    """One role for each family, of all parts that `roles` have of it; families in the order of `ROLES`."""
    parts: dict[str, set[str]] = {}
    for role in roles:
        parts.setdefault(role.family, set()).update(role.parts)
    families = sorted(parts, key=[*ROLES, *parts].index)
    return [Role(family, tuple(part for part in ROLES.get(family, ()) if part in parts[family])) for family in families]


def find_roles(model: nn.Module, layer_names: list[str]) -> dict[str, Role]:
    """Roles of all parameters of a model by name; `layer_names` are the paths of its decoder layers."""
    found = {}
    blocks = {
        f"{layer}.{name}": _block(name, block)
        for layer in layer_names
        for name, block in model.get_submodule(layer).named_children()
    }
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for path, module in model.named_modules():
        block = next((block for block in blocks if f"{path}.".startswith(f"{block}.")), None)
        for leaf, _ in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}".removeprefix(".")
            if module is embedding or module is head:
                found[name] = Role("embedding" if module is embedding else "head")
            elif block is None:
                found[name] = _outside(name, module)
            else:
                inside = path.removeprefix(block.rpartition(".")[0] + ".").split(".")
                found[name] = _inside(blocks[block], inside, leaf, module)
    return found


def role_of_unloaded(name: str, layer_names: list[str]) -> Role:
    """The role of a tensor of the checkpoint that is no parameter of the model."""
    layers, _, _ = layer_names[0].rpartition(".")
    behind = re.match(rf"{re.escape(layers)}\.(\d+)\.", name)  # some count their MTP layers on
    if re.search(MTP, name) or (behind and int(behind[1]) >= len(layer_names)):
        return Role("mtp")
    return Role("vision" if re.search(VISION, name) else "other")


def _block(name: str, block: nn.Module) -> str:
    """The family of what is in a child of a decoder layer, unless it shows to be another."""
    modules = list(block.named_modules())
    if any(path.rpartition(".")[2] == "experts" for path, _ in modules):
        return "router"  # what is no expert there decides about experts
    if any(isinstance(module, CONVOLUTIONS) for _, module in modules):
        return "linear attention"
    return "attention" if re.search("attn|attention", name) else "mlp"


def _inside(family: str, path: list[str], leaf: str, module: nn.Module) -> Role:
    """The role of parameter `leaf` of the module at `path` in a decoder layer, in a block of this `family`."""
    if _is_norm(module):
        return Role("norm")
    if isinstance(module, CONVOLUTIONS):
        return Role("convolution")
    own = leaf if leaf in EXPERT_PARTS else path[-1]
    if "experts" in path:
        family = "expert"
    elif any("shared" in name for name in path[:-1]):
        family = "shared expert"
    if not isinstance(module, nn.Linear) and leaf not in EXPERT_PARTS:
        return Role(family)
    parts = next((parts for pattern, parts in PARTS.get(family, ()) if re.search(pattern, own)), "")
    return Role(family, tuple(parts.split()))


def _outside(name: str, module: nn.Module) -> Role:
    if re.search(VISION, name):
        return Role("vision")
    if re.search(MTP, name):
        return Role("mtp")
    return Role("norm" if _is_norm(module) else "other")


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()
