"""Keys and values of a model in a few bits each: TurboQuant as a transformers `Cache`.

    model.generate(tokens, past_key_values=Scheme.parse("turbo4v2").cache(model))

How vectors are coded is in `gsq.eval.kvstore`: rotated, at the nearest Lloyd-Max levels, keys relative to a center.
The first tokens, `sinks`, stay in 16 bits, and with `boundary` so do the outermost layers.

Storing is strict: a token attends to what is stored, itself included, as one that comes later does. Only
until the center of the keys is known (`sinks` + 64 tokens) do keys stay in 16 bits. So how a text is cut into
pieces changes nothing but its first tokens.

Nothing is simulated: between two calls of the model a layer's keys and values exist only as codes, and
`nbytes` adds up tensors. Layers that hold something else than all keys and values (sliding windows,
linear attention) keep the form that transformers gives them.

Source: TurboQuant, https://arxiv.org/abs/2504.19874.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields

from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from gsq.errors import UserError
from gsq.eval.kvstore import Turbo, Turn, Vectors

WHOLE = 16  # bits of what is not coded
WIDTHS = (*range(2, 9), WHOLE)
TEXT = re.compile(r"(?:turbo(?P<both>\d+)(?:v(?P<v>\d+))?|k(?P<k>\d+)v(?P<of_k>\d+)|16)(?P<options>(?:,\w+=\d+)*)")


@dataclass(frozen=True)
class Scheme:
    """How keys and values are stored: bits of a number, 16 for uncoded ones.

    `sinks` first tokens, and all of the `boundary` first and last attention layers, stay in 16 bits.
    """

    key_bits: int
    value_bits: int
    sinks: int = 4
    boundary: int = 0

    def __post_init__(self) -> None:
        for bits in (self.key_bits, self.value_bits):
            if bits not in WIDTHS:
                raise UserError(f"a KV cache has 2 to 8 or 16 bits, not {bits}; turbo4, turbo3 and turbo4v2 are usual")

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """`turbo4` (keys and values in 4 bits), `turbo4v2` or `k4v2` (values in 2), `16` (nothing coded).

        Options follow after commas: `turbo4v2,sinks=8,boundary=2`. Raises `UserError` for anything else.
        """
        found = TEXT.fullmatch(text.strip().lower())
        if not found:
            raise UserError(
                f"unknown KV cache {text!r}; use turbo4, turbo3, turbo4v2, k8v4 or 16, with ,sinks=8 behind"
            )
        pairs = [option.split("=") for option in found["options"].split(",")[1:]]
        options = {name: int(number) for name, number in pairs}
        known = [option.name for option in fields(cls)][2:]
        if unknown := set(options) - set(known):
            raise UserError(f"a KV cache has no option {unknown.pop()!r}; options are {', '.join(known)}")
        keys = int(found["both"] or found["k"] or WHOLE)
        return cls(keys, int(found["v"] or found["of_k"] or keys), **options)

    def __str__(self) -> str:
        """The text that `parse` reads, in its shortest form."""
        if self.key_bits == self.value_bits:
            name = "16" if self.key_bits == WHOLE else f"turbo{self.key_bits}"
        else:
            name = f"turbo{self.key_bits}v{self.value_bits}"
        options = [option for option in fields(self)[2:] if getattr(self, option.name) != option.default]
        return ",".join([name, *(f"{option.name}={getattr(self, option.name)}" for option in options)])

    def cache(self, model: nn.Module) -> KVCache:
        """An empty cache for one batch of sequences through `model`, a causal language model of transformers."""
        turn = Turn.of(model)
        keys, values = (None if bits == WHOLE else Turbo(bits) for bits in (self.key_bits, self.value_bits))
        return KVCache.of(
            model,
            lambda: Layer(Vectors(keys, self.sinks, centered=True, turn=turn), Vectors(values, self.sinks)),
            self.boundary,
        )


class Layer(CacheLayerMixin):
    """Keys and values of one attention layer."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, stored_keys: Vectors, stored_values: Vectors):
        super().__init__()
        self.sides = (stored_keys, stored_values)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is needed ahead."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store new keys and values `[B, H, n, D]`; all of them, `[B, H, T, D]`, as they were stored."""
        self.is_initialized = True
        for side, states in zip(self.sides, (key_states, value_states), strict=True):
            side.append(states)
        return tuple(side.read(key_states.dtype) for side in self.sides)

    def get_seq_length(self) -> int:
        """Tokens that are stored."""
        return self.sides[0].length

    def get_max_length(self) -> int:
        """There is none."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that the next `query_length` ones attend to, and the place of the first."""
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        for side in self.sides:
            side.clear()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, not {tokens_to_remove}")
        for side in self.sides:
            side.crop(side.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence `i` becomes what `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times, side by side."""
        self._map(lambda t: t.repeat_interleave(repeats, dim=1))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch."""
        self._map(lambda t: t[:, indices.to(t.device)])

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for side in self.sides:
            side.map(change)

    def size(self, length: int | None = None) -> Size:
        """What it takes now, or with so many tokens."""
        tokens = self.get_seq_length() if length is None else length
        stored = sum(side.nbytes if length is None else side.nbytes_at(length) for side in self.sides)
        return Size(stored, sum(side.numbers(tokens) for side in self.sides))


@dataclass(frozen=True)
class Size:
    """What a cache takes: bytes of keys and values, how many numbers that is, and bytes of recurrent states beside."""

    nbytes: int = 0
    numbers: int = 0
    states: int = 0

    @property
    def plain_nbytes(self) -> int:
        """Bytes of the same keys and values in 16 bits."""
        return 2 * self.numbers

    @property
    def bits_per_value(self) -> float:
        """Bits that a number takes on average, all included."""
        return 8 * self.nbytes / self.numbers if self.numbers else 0.0

    def __add__(self, other: Size) -> Size:
        return Size(self.nbytes + other.nbytes, self.numbers + other.numbers, self.states + other.states)


class KVCache(Cache):
    """The cache of a whole model, whose layers of full attention are of our own kind."""

    @classmethod
    def of(cls, model: nn.Module, coded: Callable[[], Layer], boundary: int = 0) -> KVCache:
        """An empty one: what transformers would use, with `coded()` for layers of full attention.

        `boundary` of these at either end are whole.
        """
        layers = DynamicCache(config=model.config).layers
        places = [place for place, layer in enumerate(layers) if type(layer) is DynamicLayer]
        for rank, place in enumerate(places):
            inner = boundary <= rank < len(places) - boundary
            layers[place] = coded() if inner else Layer(Vectors(None, 0), Vectors(None, 0))
        return cls(layers=layers)

    def size(self, length: int | None = None) -> Size:
        """What the cache takes now, counted from its tensors, or would take with `length` tokens.

        The latter holds for sequences that were not cropped, and needs some tokens to have been stored, whose
        shapes it goes by.
        """
        sizes = (layer.size(length) if isinstance(layer, Layer) else _size(layer, length) for layer in self.layers)
        return sum(sizes, Size())

    def nbytes(self) -> int:
        """Bytes of all keys and values as they are stored."""
        return self.size().nbytes

    @property
    def room(self) -> int:
        """Bytes held beside those for tokens to come: those of an eighth of the tokens, or of 16, at most."""
        sides = (side for layer in self.layers if isinstance(layer, Layer) for side in layer.sides)
        return sum(part.room for side in sides for part in side.parts)


def _size(layer: object, length: int | None) -> Size:
    """What a layer of transformers' own takes; one with a sliding window keeps a token less than it is long."""
    stored = [t for t in (layer.keys, layer.values) if t is not None and t.numel()] if hasattr(layer, "keys") else []
    states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
    nbytes = numbers = 0
    for tensor in stored:
        kept = tensor.shape[-2]
        if length is not None:
            kept = min(length, getattr(layer, "sliding_window", length + 1) - 1)
        values = tensor.numel() // tensor.shape[-2] * kept
        nbytes, numbers = nbytes + values * tensor.itemsize, numbers + values
    return Size(nbytes, numbers, sum(state.nbytes for state in states if state is not None))
