"""See every product with a target's weight, wherever in a module's code it happens.

A Linear calls `F.linear(x, weight)`; a loop over experts calls it with a slice of a fused
parameter. Both are caught at that call, so no family of models needs a hook of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Seen = Callable[[str, int, Tensor], None]  # (target, expert, inputs [tokens, in])


class ObserveLinears(TorchFunctionMode):
    """While active, calls `seen(target, expert, x)` for each `F.linear` whose weight is (a slice of) a target."""

    def __init__(self, targets: dict[str, Tensor], seen: Seen):
        super().__init__()
        self.seen = seen
        self.by_storage = {weight.untyped_storage().data_ptr(): name for name, weight in targets.items()}
        self.targets = targets

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Intercepts torch calls; only `linear` is looked at, none is changed."""
        if function is torch.nn.functional.linear:
            x = args[0] if args else kwargs["input"]
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            name = self.by_storage.get(weight.untyped_storage().data_ptr())
            if name is not None:
                expert = weight.storage_offset() // weight.numel() if self.targets[name].ndim == 3 else 0
                self.seen(name, expert, x.reshape(-1, x.shape[-1]))
        return function(*args, **(kwargs or {}))


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
