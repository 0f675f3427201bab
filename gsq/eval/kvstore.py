"""How the keys, or the values, of one attention layer are stored in a few bits each, and read again.

A vector, the key or value of one token in one head, is rotated (random signs, Hadamard), so that its
numbers look like draws of one known distribution; the codes of the nearest Lloyd-Max levels are
packed at exact width, beside one scale in 16 bits. Three things go beyond that:

- The scale makes the vector unbiased along itself, `scale = |x|^2 / <x, levels>`: attention averages
  over tokens, which cancels independent errors but no common shrinking.
- Keys are stored relative to their mean over the first tokens of the sequence. Before rotary position
  embedding the mean of a head's keys hardly moves, so this center turns with the position, as the
  model's own code turns keys. A center that does not fit costs accuracy only: what was subtracted is
  what is added again.
- The first tokens, `sinks`, stay in 16 bits.

Nothing here knows of caches and schemes: those are in `gsq.eval.kvcache`.

Source: TurboQuant, https://arxiv.org/abs/2504.19874.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from gsq.errors import UserError
from gsq.kernels.columns import levels_of, nearest, tables
from gsq.kernels.packing import OCTET, pack_bytes, unpack_bytes
from gsq.levels import sphere_levels
from gsq.rotation import Rotation

SCALE = torch.bfloat16  # of a vector's scale: keys may be longer than float16 reaches
ROUNDS = 1  # of choosing codes for a scale and a scale for codes, before the last choice of codes
FIRST = 64  # keys behind the sinks whose mean is the center
LEAST, SHARE = 16, 8  # tokens of room that storage has at least when it grows, and the share of its length
FREE_TURNS = {"dynamic", "longrope"}  # rotary embeddings whose frequencies change while a text grows


class Codec(Protocol):
    """How vectors are stored."""

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """What is stored of vectors `x` float32 `[..., D]`: tensors `[..., n]` or `[...]`."""

    def decode(self, *parts: Tensor) -> Tensor:
        """The vectors `[..., D]`, float32, that `parts` stand for."""

    def nbytes(self, width: int) -> int:
        """Bytes of a vector of `width` numbers."""


@dataclass(frozen=True)
class Turbo:
    """Packed Lloyd-Max codes of the rotated vector, uint8 `[..., D * bits / 8]`, and a bfloat16 scale `[...]`."""

    bits: int

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of the nearest levels, under the scale that suits them best, and that which leaves no bias."""
        width = x.shape[-1]
        if width % OCTET:
            raise UserError(f"a KV cache codes heads of a multiple of {OCTET} numbers, not {width}; use the 16-bit one")
        x, levels = _rotation(width).rotate(x), sphere_levels(self.bits, width)
        table, _ = tables(levels, x.device, x.dtype)
        squares = x.square().sum(-1)
        scale = squares.sqrt()
        for _ in range(ROUNDS):
            units = levels_of(nearest(x / _never_zero(scale)[..., None], levels), table)
            scale = (x * units).sum(-1) / units.square().sum(-1)
        codes = nearest(x / _never_zero(scale)[..., None], levels)
        # 0 for vectors of zeros only: levels have the signs of the numbers
        along = (x * levels_of(codes, table)).sum(-1)
        return pack_bytes(codes, self.bits), (squares / _never_zero(along)).to(SCALE)

    def decode(self, packed: Tensor, scales: Tensor) -> Tensor:
        """Levels of the codes, scaled and rotated back."""
        width = packed.shape[-1] * OCTET // self.bits
        table, _ = tables(sphere_levels(self.bits, width), packed.device, torch.float32)
        values = levels_of(unpack_bytes(packed, self.bits), table)
        return _rotation(width).unrotate(values.mul_(scales.float()[..., None]))

    def nbytes(self, width: int) -> int:
        """Codes and scale."""
        return width * self.bits // 8 + SCALE.itemsize


def _rotation(width: int) -> Rotation:
    """Signs, then Hadamard blocks of the descending powers of two that a vector's width consists of."""
    return Rotation("jangtq", width, width)


def _never_zero(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1, x)


class Turn:
    """A model's rotary position embedding, as its own code applies it, with a token's place as its position.

    Padding only shifts all positions alike, which a center learned in the same places makes up for. The table of
    cosines and sines is shared by all layers, and computed, not stored: it is not counted in a cache's bytes.
    """

    def __init__(self, rotary: Callable[..., tuple[Tensor, Tensor]], apply: Callable[..., tuple[Tensor, Tensor]]):
        self.rotary, self.apply = rotary, apply
        self.table: tuple[Tensor, Tensor] | None = None  # cosines and sines [1, positions, R], R at most D

    @classmethod
    def of(cls, model: nn.Module) -> Turn | None:
        """That of `model`; None if its keys do not turn, or not the same way while a text grows."""
        rotary = getattr(model.get_decoder(), "rotary_emb", None)
        apply = getattr(sys.modules[type(rotary).__module__], "apply_rotary_pos_emb", None)
        kind, more = getattr(rotary, "rope_type", None), {}
        if rotary is not None and "layer_type" in inspect.signature(rotary.forward).parameters:
            more = {"layer_type": "full_attention"}
            kind = kind.get("full_attention") if isinstance(kind, dict) else kind
        if rotary is None or apply is None or kind is None or kind in FREE_TURNS:
            return None
        return cls(lambda x, positions: rotary(x, positions, **more), apply)

    def __call__(self, x: Tensor, start: int, back: bool = False) -> Tensor:
        """Vectors `[B, H, T, D]` of the places from `start` on, turned as the model turns them, or back."""
        cos, sin = (side[:, start : start + x.shape[2]] for side in self._tables(start + x.shape[2], x))
        if back:  # some models stretch what they turn
            stretch = cos.square() + sin.square()
            cos, sin = cos / stretch, -sin / stretch
        return self.apply(x[:, :1], x, cos, sin)[1]

    def fits(self, x: Tensor) -> bool:
        """Whether the model's code takes vectors like `x` `[B, H, T, D]`; some turn only a part of a key."""
        try:
            return self(x, 0).shape == x.shape
        except RuntimeError:
            return False

    def _tables(self, positions: int, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.table is None or self.table[0].shape[1] < positions or self.table[0].device != x.device:
            places = torch.arange(_roomy(positions), device=x.device)
            self.table = self.rotary(x.new_empty(0), places[None])
        return self.table


class Rows:
    """A tensor `[T, B, ...]` that grows at its end, a token at a time if need be, with little copying."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.length = 0

    @property
    def data(self) -> Tensor:
        """The rows in use."""
        return self.buffer[: self.length]

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use."""
        return 0 if self.buffer is None else self.data.nbytes

    @property
    def room(self) -> int:
        """Bytes that are held for rows to come."""
        return 0 if self.buffer is None else self.buffer.nbytes - self.nbytes

    def append(self, rows: Tensor) -> None:
        """Add `rows` `[n, B, ...]`; those in use are copied only each time that they grew by an eighth."""
        end = self.length + len(rows)
        if self.buffer is None or end > len(self.buffer):
            grown = rows.new_empty(_roomy(end), *rows.shape[1:])
            if self.length:
                grown[: self.length] = self.data
            self.buffer = grown
        self.buffer[self.length : end] = rows
        self.length = end

    def crop(self, length: int) -> None:
        """Forget all but the first `length` rows."""
        self.length = min(self.length, max(0, length))

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the rows by what `change` makes of them."""
        if self.buffer is not None:
            self.buffer = change(self.data)


def _roomy(length: int) -> int:
    return length + max(LEAST, length // SHARE)


class Vectors:
    """The keys, or the values, of one layer: `[B, H, T, D]`, stored token after token.

    The first `sinks` tokens are `whole`, in 16 bits, the others `coded`; without a codec all are whole. If
    `centered`, tokens are coded relative to a center `[B, H, D]`, which `turn`, if it fits them better, turns with
    their place; as long as it is not known, the tokens that it will be taken from are whole, too.
    """

    def __init__(self, codec: Codec | None, sinks: int, centered: bool = False, turn: Turn | None = None):
        self.codec, self.sinks, self.turn = codec, sinks, turn
        self.first = FIRST if centered else 0
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.whole, self.coded = Rows(), []
        self.center: Tensor | None = None
        self.turned = False

    @property
    def length(self) -> int:
        """Tokens T."""
        return self.whole.length + self._coded_length

    @property
    def parts(self) -> list[Rows]:
        """All that grows."""
        return [self.whole, *self.coded]

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return sum(rows.nbytes for rows in self.parts) + (0 if self.center is None else self.center.nbytes)

    def nbytes_at(self, length: int) -> int:
        """What `nbytes` is for sequences of `length` tokens that were never cropped; some must have been stored."""
        _, batch, heads, width = self.whole.buffer.shape
        whole = length if self.codec is None or length < self.sinks + self.first else self.sinks
        vectors = whole * width * self.whole.buffer.itemsize
        if length > whole:
            vectors += (length - whole) * self.codec.nbytes(width)
            vectors += width * SCALE.itemsize if self.first else 0
        return batch * heads * vectors

    def numbers(self, length: int) -> int:
        """Numbers in `length` tokens; 0 as long as no token was stored."""
        return 0 if self.whole.buffer is None else length * math.prod(self.whole.buffer.shape[1:])

    def append(self, x: Tensor) -> None:
        """Store `x` `[B, H, n, D]`."""
        rows = x.detach().permute(2, 0, 1, 3)
        fixed = self.center is not None or not self.first
        limit = math.inf if self.codec is None else self.sinks + (0 if fixed else self.first)
        kept = min(len(rows), max(0, limit - self.whole.length))
        self.whole.append(rows[:kept].to(rows.dtype if rows.dtype.itemsize == 2 else torch.bfloat16))
        if not fixed and self.whole.length == limit:
            waiting = self.whole.data[self.sinks :].float()
            self.whole.crop(self.sinks)
            self.whole.map(torch.clone)  # without the room
            self._fix_center(waiting)
            self._encode(waiting)
        if kept < len(rows):
            self._encode(rows[kept:].float())

    def read(self, dtype: torch.dtype) -> Tensor:
        """All of them, `[B, H, T, D]` in `dtype`; the caller's own."""
        rows = self.whole.data.to(dtype, copy=True)
        if self._coded_length:
            decoded = self.codec.decode(*(part.data for part in self.coded))
            rows = torch.cat([rows, self._centered(decoded, self.whole.length, decoded.add_).to(dtype)])
        return rows.permute(1, 2, 0, 3)

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        for part in self.coded:
            part.crop(length - self.whole.length)
        self.whole.crop(length)

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor, whose second dimension is the batch, by what `change` makes of it."""
        for part in self.parts:
            part.map(change)
        if self.center is not None:
            self.center = change(self.center[None])[0]

    @property
    def _coded_length(self) -> int:
        return self.coded[0].length if self.coded else 0

    def _encode(self, rows: Tensor) -> None:
        """Code `rows` `[n, B, H, D]`, float32, which follow on the last."""
        parts = self.codec.encode(self._centered(rows, self.length, rows.sub))
        self.coded = self.coded or [Rows() for _ in parts]
        for part, new in zip(self.coded, parts, strict=True):
            part.append(new)

    def _centered(self, rows: Tensor, start: int, combine: Callable[[Tensor], Tensor]) -> Tensor:
        """`combine` applied to the center of each of `rows` `[n, B, H, D]`, of the places from `start` on."""
        if self.center is None:
            return rows
        center = self.center.float().expand_as(rows)
        if self.turned:
            center = self.turn(center.permute(1, 2, 0, 3), start).permute(2, 0, 1, 3)
        return combine(center)

    def _fix_center(self, rows: Tensor) -> None:
        """The mean of `rows` `[n, B, H, D]`, or that before they were turned: what leaves the shorter vectors."""
        x = rows.permute(1, 2, 0, 3)
        self.center = rows.mean(0).to(SCALE)
        if self.turn is None or not self.turn.fits(x):
            return
        plain, fixed = self._energy(rows), self.center
        self.center, self.turned = self.turn(x, self.sinks, back=True).mean(2).to(SCALE), True
        if not self._energy(rows) < plain:
            self.center, self.turned = fixed, False

    def _energy(self, rows: Tensor) -> float:
        return float(self._centered(rows, self.sinks, rows.sub).square().sum())
