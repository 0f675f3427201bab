"""The hidden states of all calibration tokens, and the calls that a module gets while they pass a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from gsq.memory import Batch, Memory
from gsq.model.skeleton import Skeleton, first_tensor
from gsq.ranks import Share

Module = Callable[..., Tensor | tuple]


class Stream:
    """Hidden states `[windows, length, H]` in front of a decoder layer, and the layers' other arguments.

    Of a process's `share` of all windows, in its order; by default of all `tokens` `[windows, length]`.
    They live where `memory` has room, and what is run with them comes back on the skeleton's device.
    """

    def __init__(
        self, skeleton: Skeleton, tokens: Tensor, batch: Batch, share: Share | None = None, memory: Memory | None = None
    ):
        """`batch` windows go through a layer at once."""
        self.share = share or Share.whole(len(tokens))
        self.skeleton, self.tokens, self.batch = skeleton, tokens[list(self.share.numbers)], batch
        self.memory = memory or Memory(skeleton.device)
        self._kwargs: dict[int, list[dict]] = {}
        self.hidden: Tensor | None = None
        for part in self.parts():
            hidden, self._kwargs[len(self.tokens[part])] = skeleton.embed(self.tokens[part])
            if self.hidden is None:
                self.hidden = self._empty(hidden)
            self.hidden[part] = hidden

    def copy(self) -> Stream:
        """Another stream with hidden states of its own."""
        other = copy.copy(self)
        other.hidden = self._empty(self.hidden).copy_(self.hidden)
        return other

    def parts(self, lanes: Iterable[range] | None = None) -> Iterator[slice]:
        """Windows in micro-batches, none of which holds windows of two lanes; of all `lanes` by default."""
        for lane in self.share.lanes if lanes is None else lanes:
            for start in range(lane.start, lane.stop, self.batch.windows):
                yield slice(start, min(start + self.batch.windows, lane.stop))

    def forward(self, layer: Module, index: int, windows: slice | Tensor) -> Tensor:
        """Output `[windows, length, H]` of `layer`, called as decoder layer `index`, for some windows."""
        hidden = self.hidden[windows]
        if len(hidden) not in self._kwargs:
            self._kwargs[len(hidden)] = self.skeleton.embed(self.tokens[: len(hidden)])[1]
        return self.skeleton.run_layer(layer, hidden, self._kwargs[len(hidden)][index])

    @torch.no_grad()
    def run(self, layer: nn.Module, index: int, part: slice) -> Tensor:
        """The same without a graph."""
        return self.forward(layer, index, part)

    def outputs(self, layer: nn.Module, index: int) -> Tensor:
        """Hidden states `[windows, length, H]` behind the layer."""
        return self._pushed(layer, index, self._empty(self.hidden))

    def advance(self, layer: nn.Module, index: int) -> None:
        """Replace the hidden states by those behind the layer."""
        self._pushed(layer, index, self.hidden)

    def _pushed(self, layer: nn.Module, index: int, into: Tensor) -> Tensor:
        for lane in self.share.lanes:
            done = lane.start

            def rest(lane: range = lane) -> None:
                nonlocal done
                for part in self.parts([range(done, lane.stop)]):
                    into[part] = self.run(layer, index, part)
                    done = part.stop

            self.batch.fitted(rest)
        return into

    def _empty(self, like: Tensor) -> Tensor:
        return self.memory.empty((len(self.tokens), *like.shape[1:]), like.dtype)


class Calls:
    """What a module was called with, window by window, so that any of `total` windows can be run again.

    Tensors whose first dimension runs over windows, or over the tokens of all windows of a
    micro-batch, are kept per window, where `memory` has room; what is the same for every window is kept once.
    """

    def __init__(self, length: int, total: int, memory: Memory):
        self.length, self.total, self.memory = length, total, memory
        self._spec = None
        self._kinds: list[str] = []
        self._leaves: list = []
        self._done = 0
        self.outputs: Tensor | None = None  # [windows, length, ...]

    def hook(self, windows: Callable[[], int]) -> Callable:
        """A forward hook (with kwargs) that records; `windows()` tells the size of the current micro-batch."""

        def record(module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            leaves, self._spec = tree_flatten((args, kwargs))
            if not self._kinds:
                self._kinds = [_kind(leaf, windows(), self.length) for leaf in leaves]
                self._leaves = [None] * len(leaves)
            part = slice(self._done, self._done + windows())
            for position, leaf in enumerate(leaves):
                self._keep(position, leaf, part)
            self.outputs = self._stored(self.outputs, first_tensor(output), part)
            self._done = part.stop

        return record

    def _keep(self, position: int, leaf: object, part: slice) -> None:
        kind, kept = self._kinds[position], self._leaves[position]
        if kind == "repeated" and kept is not None and not bool((leaf == kept).all()):
            self._kinds[position] = kind = "window"  # the windows before these were alike by chance
            past = kept.expand(self._done, *kept.shape[1:])
            self._leaves[position] = kept = self._stored(None, past, slice(0, self._done))
        if kind in ("window", "token"):
            self._leaves[position] = self._stored(kept, leaf, part)
        elif kept is None:
            self._leaves[position] = leaf[:1] if kind == "repeated" else leaf

    def _stored(self, kept: Tensor | None, tensor: Tensor, part: slice) -> Tensor:
        """`kept`, which is made if there is none, with `tensor` in the windows `part`."""
        tensor = _per_window(tensor, part.stop - part.start)
        if kept is None:
            kept = self.memory.empty((self.total, *tensor.shape[1:]), tensor.dtype)
        kept[part] = tensor
        return kept

    def __call__(self, module: Module, windows: Tensor) -> Tensor:
        """Output `[len(windows), length, ...]` of `module` for the windows with these indices."""
        leaves = []
        for leaf, kind in zip(self._leaves, self._kinds, strict=True):
            if kind in ("window", "token"):
                leaf = leaf[windows].to(self.memory.device)
            if kind == "token":
                leaf = leaf.flatten(0, 1)
            elif kind == "repeated":
                leaf = leaf.expand(len(windows), *leaf.shape[1:]).contiguous()
            leaves.append(leaf)
        args, kwargs = tree_unflatten(leaves, self._spec)
        return _per_window(first_tensor(module(*args, **kwargs)), len(windows))


def layer_calls(stream: Stream, index: int) -> Callable[[Module, Tensor], Tensor]:
    """`Calls` of decoder layer `index` itself, which a stream can make at any time: nothing need be recorded."""
    return lambda module, windows: stream.forward(module, index, windows)


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
