"""See every product with a target's weight, wherever in a module's code it happens.

A Linear calls `F.linear(x, weight)`, and so does a loop over experts, with a slice of a fused
parameter; otherwise all experts go through one grouped product of tokens sorted by expert. Each is
caught at that call, so no family of models needs a hook of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.integrations import moe  # noqa: F401  registers its grouped product

# `x` `[tokens, in]` sorted by expert, `weight` `[experts, in, out]`, and where each expert's tokens end, `offs`
GROUPED_PRODUCTS = (torch._grouped_mm, torch.ops.transformers.grouped_mm_fallback)
Seen = Callable[[str, int, Tensor], None]  # (target, expert, inputs [tokens, in])


class ObserveLinears(TorchFunctionMode):
    """While active, calls `seen(target, expert, x)` for each product whose weight is (a slice of) a target."""

    def __init__(self, targets: dict[str, Tensor], seen: Seen):
        super().__init__()
        self.seen = seen
        self.by_storage = {weight.untyped_storage().data_ptr(): name for name, weight in targets.items()}
        self.targets = targets

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Intercepts torch calls; only the products are looked at, none is changed."""
        kwargs = kwargs or {}
        if function is torch.nn.functional.linear or function in GROUPED_PRODUCTS:
            x = args[0] if args else kwargs["input"]
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            name = self.by_storage.get(weight.untyped_storage().data_ptr())
            if name is not None:
                for expert, read in self._by_expert(function, name, x, weight, kwargs):
                    self.seen(name, expert, read)
        return function(*args, **kwargs)

    def _by_expert(
        self, function: Callable, name: str, x: Tensor, weight: Tensor, kwargs: dict
    ) -> Iterator[tuple[int, Tensor]]:
        """Experts, and what each reads of `x`; a Linear is expert 0."""
        if function in GROUPED_PRODUCTS:
            ends = kwargs["offs"].tolist()
            spans = zip([0, *ends], ends, strict=False)
            yield from ((expert, x[start:end]) for expert, (start, end) in enumerate(spans) if end > start)
        else:
            expert = weight.storage_offset() // weight.numel() if self.targets[name].ndim == 3 else 0
            yield expert, x.reshape(-1, x.shape[-1])


def shared_inputs(module: nn.Module, targets: Iterable[str], run: Callable[[], object]) -> list[list[str]]:
    """Targets of `module` grouped by the tensor they read, in the order of first use.

    Targets of one group (q, k and v; gate and up) share a Hessian, and are quantized before the next
    group's inputs are looked at. `run` runs the module once on a sample. Targets that no token
    reached in the sample come last, alone.
    """
    weights = {name: module.get_parameter(name) for name in targets}
    readers: dict[tuple, list[str]] = {}
    alive: list[Tensor] = []  # keeps addresses from being reused while they serve as keys
    unseen = dict.fromkeys(weights)

    def seen(name: str, expert: int, x: Tensor) -> None:
        if name in unseen:
            alive.append(x)
            del unseen[name]
            key = (x.data_ptr(), weights[name].ndim, x.shape[-1], expert if weights[name].ndim == 3 else 0)
            readers.setdefault(key, []).append(name)

    with torch.no_grad(), ObserveLinears(weights, seen):
        run()
    return [*readers.values(), *([name] for name in unseen)]
