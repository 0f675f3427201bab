"""What can be quantized in a module tree, and the names its parts have on disk.

A target is the weight of a Linear, `[out, in]`, or a fused expert parameter, `[experts, out, in]`.
Checkpoints store the experts either fused, as the module has them, or one by one; `EXPERT_PARTS`
is the whole knowledge of that.
"""

from __future__ import annotations

from collections.abc import Container

# Fused parameter -> the Linears of one expert that it holds, stacked along `out`.
EXPERT_PARTS: dict[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}


def expert_part_names(parameter: str, experts: int) -> list[list[str]]:
    """Names on disk of a fused expert parameter stored one by one: for each expert, one per part.

    `...mlp.experts.gate_up_proj` -> `[[...experts.0.gate_proj.weight, ...experts.0.up_proj.weight], ...]`
    """
    prefix, _, leaf = parameter.rpartition(".")
    parts = EXPERT_PARTS[leaf]
    return [[f"{prefix}.{expert}.{part}.weight" for part in parts] for expert in range(experts)]


def sources(parameter: str, shape: tuple[int, ...], names: Container[str]) -> list[str] | None:
    """Tensors of a checkpoint (`names`) that make up a parameter of the module; None if it lacks them."""
    if parameter in names:
        return [parameter]
    if len(shape) == 3 and parameter.rpartition(".")[2] in EXPERT_PARTS:
        parts = [name for expert in expert_part_names(parameter, shape[0]) for name in expert]
        if all(part in names for part in parts):
            return parts
    return None
