"""The hidden states of all calibration tokens, and the calls that a module gets while they pass a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from gsq.model.skeleton import Skeleton, first_tensor
from gsq.ranks import Share


class Stream:
    """Hidden states `[windows, length, H]` in front of a decoder layer, and the layers' other arguments.

    Of a process's `share` of all windows, in its order; by default of all `tokens` `[windows, length]`.
    """

    def __init__(self, skeleton: Skeleton, tokens: Tensor, batch: int, share: Share | None = None):
        self.share = share or Share.whole(len(tokens))
        self.skeleton, self.tokens, self.batch = skeleton, tokens[list(self.share.numbers)], batch
        self._kwargs: dict[int, list[dict]] = {}
        parts = []
        for part in self.parts():
            hidden, kwargs = skeleton.embed(self.tokens[part])
            self._kwargs.setdefault(len(hidden), kwargs)
            parts.append(hidden)
        self.hidden = torch.cat(parts)

    def copy(self) -> Stream:
        """Another stream with hidden states of its own."""
        other = copy.copy(self)
        other.hidden = self.hidden.clone()
        return other

    def parts(self, lanes: Iterable[range] | None = None) -> Iterator[slice]:
        """Windows in micro-batches, none of which holds windows of two lanes; of all `lanes` by default."""
        for lane in self.share.lanes if lanes is None else lanes:
            for start in range(lane.start, lane.stop, self.batch):
                yield slice(start, min(start + self.batch, lane.stop))

    @torch.no_grad()
    def run(self, layer: nn.Module, index: int, part: slice) -> Tensor:
        """Output `[windows, length, H]` of decoder layer `index` for the windows `part`."""
        hidden = self.hidden[part]
        if len(hidden) not in self._kwargs:
            self._kwargs[len(hidden)] = self.skeleton.embed(self.tokens[part])[1]
        return self.skeleton.run_layer(layer, hidden, self._kwargs[len(hidden)][index])

    def outputs(self, layer: nn.Module, index: int) -> Tensor:
        """Hidden states `[windows, length, H]` behind the layer."""
        return torch.cat([self.run(layer, index, part) for part in self.parts()])

    def advance(self, layer: nn.Module, index: int) -> None:
        """Replace the hidden states by those behind the layer."""
        for part in self.parts():
            self.hidden[part] = self.run(layer, index, part)


class Calls:
    """What a module was called with, window by window, so that any windows can be run again.

    Tensors whose first dimension runs over windows, or over the tokens of all windows of a
    micro-batch, are kept per window; what is the same for every window is kept once.
    """

    def __init__(self, length: int):
        self.length = length
        self._spec = None
        self._leaves: list[list] = []
        self._kinds: list[str] = []
        self._outputs: list[Tensor] = []

    def hook(self, windows: Callable[[], int]) -> Callable:
        """A forward hook (with kwargs) that records; `windows()` tells the size of the current micro-batch."""

        def record(module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            leaves, self._spec = tree_flatten((args, kwargs))
            if not self._kinds:
                self._kinds = [_kind(leaf, windows(), self.length) for leaf in leaves]
                self._leaves = [[] for _ in leaves]
            for position, leaf in enumerate(leaves):
                self._keep(position, leaf, windows())
            self._outputs.append(_per_window(first_tensor(output), windows()))

        return record

    def _keep(self, position: int, leaf: object, windows: int) -> None:
        kind, kept = self._kinds[position], self._leaves[position]
        if kind == "repeated" and kept and not bool((leaf == kept[0]).all()):
            kind = self._kinds[position] = "window"  # the windows before these were alike by chance
            kept[:] = [kept[0].expand(len(past), *kept[0].shape[1:]) for past in self._outputs]
        if kind in ("window", "token"):
            kept.append(_per_window(leaf, windows))
        elif not kept:
            kept.append(leaf[:1] if kind == "repeated" else leaf)

    def finish(self) -> Calls:
        """Join the micro-batches; call once after the last."""
        for position, kind in enumerate(self._kinds):
            kept = self._leaves[position]
            self._leaves[position] = torch.cat(kept) if kind in ("window", "token") else kept[0]
        self.outputs = torch.cat(self._outputs)  # [windows, length, ...]
        self._outputs = []
        return self

    def __call__(self, module: Callable, windows: Tensor) -> Tensor:
        """Output `[len(windows), length, ...]` of `module` for the windows with these indices."""
        leaves = []
        for leaf, kind in zip(self._leaves, self._kinds, strict=True):
            if kind == "window":
                leaf = leaf[windows]
            elif kind == "token":
                leaf = leaf[windows].flatten(0, 1)
            elif kind == "repeated":
                leaf = leaf.expand(len(windows), *leaf.shape[1:]).contiguous()
            leaves.append(leaf)
        args, kwargs = tree_unflatten(leaves, self._spec)
        return _per_window(first_tensor(module(*args, **kwargs)), len(windows))


def _kind(leaf: object, windows: int, length: int) -> str:
    """What an argument runs over: the "window", the "token" of all windows, or neither, "constant".

    "repeated" holds one window's values again and again, as position embeddings do.
    """
    if not isinstance(leaf, Tensor) or leaf.ndim == 0:
        return "constant"
    if leaf.shape[0] == windows:
        return "repeated" if bool((leaf == leaf[:1]).all()) else "window"
    return "token" if leaf.shape[0] == windows * length else "constant"


def _per_window(tensor: Tensor, windows: int) -> Tensor:
    """`[windows * length, ...]` as `[windows, length, ...]`; what has windows already stays."""
    return tensor if tensor.shape[0] == windows else tensor.unflatten(0, (windows, -1))
