"""Products with packed weights, `y = x W^T`: W stays in the bits that a checkpoint stores, and is decoded in passing.

A `PackedWeight` describes one Linear, or a stack of experts, whose rows are dense streams of codes as
`gsq.kernels.packing.pack_dense` and `pack_bytes` write them. What is computed is the same everywhere,
in a server's order:

    weight = round(levels[code] * scale + offset)    in float32, then rounded to the dtype of x
    y      = round(sum of x * weight)                summed in float32, then rounded to the dtype of x

The order of the sum is not defined: on a GPU it follows the tiles, which are tuned per shape, so that
results may differ by float32 rounding from one process to the next, not from call to call in one.
Nothing can be differentiated.

| stored as | words | levels | offsets | rotate |
|---|---|---|---|---|
| Humming, compressed-tensors | `weight`, int32 | `-2^(bits-1) ..` | | |
| MLX | `weight`, uint32 | `0 ..` | `biases` | |
| TQ | `tq_packed`, uint8, viewed as `[out, bytes]` | a table | | blocks |
| JANGTQ, 2 and 4 bits | `tq_packed`, uint32 | a table | | rows |

Words of which some bits are unused (`pack_words` at 3 bits) are not held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gsq.kernels.dispatch import triton_runs
from gsq.kernels.packing import OCTET, WORD, unpack_bytes

WORDS = (torch.int32, torch.uint32, torch.uint8)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 1 << 27  # weights in a row: the place of a bit in its row fits an int32
LARGEST = 1 << 20  # integer levels that need no table: kernels count from 2^23, where float32 still has units
CHUNK = 1 << 22  # weights decoded at once, so that little memory is needed beside the result


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight `[out, in]`, or experts `[experts, out, in]`, as stored; raises `ValueError` for what is not held.

    `words`: contiguous int32, uint32 or uint8, the codes of a row in a dense stream, least significant
    bit first, that fills whole 32-bit words; `in` is a multiple of 8. `scales`: `[..., out, groups]`
    in bfloat16, float16 or float32, each for `in / groups` neighbours. `levels`: what the `2^bits`
    codes stand for, 1 to 8 bits. `offsets`: like `scales`, added behind the product with them.
    `rotate`: what brings an input to the basis of the weight, `[rows, width]` to `[rows, in]` in the
    dtype that is its second argument, that of the input.
    """

    words: Tensor
    scales: Tensor
    levels: tuple[float, ...]
    offsets: Tensor | None = None
    rotate: Callable[[Tensor, torch.dtype], Tensor] | None = None

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ValueError(f"a packed weight {problem}")

    @property
    def bits(self) -> int:
        """Width of a code."""
        return (len(self.levels) - 1).bit_length()

    @property
    def columns(self) -> int:
        """Codes in a row: `in`, and what a rotation pads."""
        return self.words.shape[-1] * self.words.itemsize * 8 // self.bits

    @property
    def group_size(self) -> int:
        """Neighbours that share a scale."""
        return self.columns // self.scales.shape[-1]

    @cached_property
    def table(self) -> Tensor:
        """Levels float32 `[2^bits]` beside the words."""
        return torch.tensor(self.levels, dtype=torch.float32, device=self.words.device)

    @cached_property
    def first_integer(self) -> int | None:
        """The first level, if they are consecutive integers, so that no table is needed."""
        first = self.levels[0]
        small = abs(first) <= LARGEST and float(first).is_integer()
        return int(first) if small and all(level == first + i for i, level in enumerate(self.levels)) else None

    def decode(self, dtype: torch.dtype) -> Tensor:
        """All weights `[..., out, in]`, not rotated back, as products with an `x` of `dtype` take them."""
        return self._rows(0, self.words[..., 0].numel(), dtype).view(*self.words.shape[:-1], self.columns)

    def _rows(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """Rows `start .. end` of all experts in one, `[end - start, in]`."""
        packed = self.words.view(torch.uint8).view(-1, self.columns * self.bits // 8)
        values = self.table[unpack_bytes(packed[start:end], self.bits).int()]
        groups = values.view(len(values), -1, self.group_size)
        groups.mul_(self.scales.view(-1, groups.shape[1])[start:end, :, None].float())
        if self.offsets is not None:
            groups.add_(self.offsets.view(-1, groups.shape[1])[start:end, :, None].float())
        return values.to(dtype)

    def _problem(self) -> str | None:
        words, scales, offsets = self.words, self.scales, self.offsets
        tensors = [tensor for tensor in (words, scales, offsets) if tensor is not None]
        if len(self.levels) not in (2, 4, 8, 16, 32, 64, 128, 256):
            return f"needs a level for each of 2, 4, ... or 256 codes, not {len(self.levels)}"
        if words.dtype not in WORDS or words.ndim not in (2, 3):
            return f"needs [out, words] or [experts, out, words] of int32, uint32 or uint8, not {_described(words)}"
        row = words.shape[-1] * words.itemsize * 8
        if row == 0 or row % WORD or row % (self.bits * OCTET):
            return f"of {self.bits} bits needs rows of whole words and a multiple of {OCTET} codes, not {row} bits"
        if self.columns > WIDEST:
            return f"has rows of at most {WIDEST} weights, not {self.columns}"
        fits = scales.shape[:-1] == words.shape[:-1] and scales.shape[-1] and self.columns % scales.shape[-1] == 0
        if scales.dtype not in FLOATS or not fits:
            return f"{_described(words)}, rows of {self.columns}, does not fit scales {_described(scales)}"
        if offsets is not None and (offsets.dtype not in FLOATS or offsets.shape != scales.shape):
            return f"with scales {_described(scales)} does not fit offsets {_described(offsets)}"
        if not all(tensor.is_contiguous() for tensor in tensors):
            return "needs contiguous tensors; call contiguous() once, since copies in every product would be slow"
        if words.data_ptr() % (WORD // 8):
            return f"needs words that start at a multiple of {WORD // 8} bytes; clone() them"
        if len({tensor.device for tensor in tensors}) > 1:
            return f"needs its tensors on one device, not {', '.join(str(tensor.device) for tensor in tensors)}"
        return None


@torch.no_grad()
def packed_matmul(x: Tensor, weight: PackedWeight) -> Tensor:
    """`x W^T` `[rows, out]`, in the dtype of `x` `[rows, in]`: bfloat16, float16 or float32.

    Raises `ValueError` if `weight` is no single Linear or `x` does not fit it.
    """
    if weight.words.ndim != 2:
        raise ValueError(f"experts {tuple(weight.words.shape)} need packed_grouped_matmul")
    x = _input(x, weight)
    if _in_triton(x, weight.words):
        from gsq.kernels import packed_triton

        return packed_triton.packed_matmul(x, weight)
    y = x.new_empty(len(x), weight.words.shape[0])
    _multiply(x, weight, 0, y)
    return y


@torch.no_grad()
def packed_grouped_matmul(x: Tensor, ends: Tensor, weight: PackedWeight) -> Tensor:
    """Rows of `x` `[rows, in]`, sorted by expert, each times its expert: `[rows, out]`, in the dtype of `x`.

    Expert `e` has the rows `ends[e - 1] .. ends[e]`, perhaps none: `ends` `[experts]`, int32 or int64,
    ascending, as `torch.cumsum` of counts gives it. Rows behind the last end are zero in the result.
    Raises `ValueError` for what does not fit; the numbers in `ends` are checked on a CPU only, since on
    a GPU the host would have to wait for them.
    """
    if weight.words.ndim != 3:
        raise ValueError(f"a single Linear {tuple(weight.words.shape)} needs packed_matmul")
    experts, out, _ = weight.words.shape
    if ends.shape != (experts,) or ends.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{experts} experts need as many ends, int32 or int64, not {_described(ends)}")
    x, ends = _input(x, weight), ends.contiguous()
    if ends.device.type == "cpu":
        _check_ends(ends, len(x))
    if _in_triton(x, ends, weight.words):
        from gsq.kernels import packed_triton

        return packed_triton.packed_grouped_matmul(x, ends, weight)
    y = x.new_zeros(len(x), out)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        _multiply(x[start:end], weight, expert * out, y[start:end])
        start = end
    return y


def _in_triton(x: Tensor, *tensors: Tensor) -> bool:
    """Whether `x` times such tensors goes to Triton: never in float32, which tensor cores do not multiply."""
    return triton_runs(x, *tensors) and x.dtype != torch.float32


def _multiply(x: Tensor, weight: PackedWeight, first: int, y: Tensor) -> None:
    """`y` `[rows, out]` becomes `x` times rows `first .. first + out` of all experts in one."""
    if not len(x):
        return
    x, step = x.float(), max(1, CHUNK // weight.columns)
    for start in range(0, y.shape[1], step):
        part = slice(start, min(start + step, y.shape[1]))
        y[:, part] = x @ weight._rows(first + part.start, first + part.stop, y.dtype).float().mT


def _input(x: Tensor, weight: PackedWeight) -> Tensor:
    """`x` in the basis of the weight, contiguous `[rows, in]`."""
    if x.ndim != 2 or x.dtype not in FLOATS:
        raise ValueError(f"an input is [rows, in] in bfloat16, float16 or float32, not {_described(x)}")
    turned = x if weight.rotate is None else weight.rotate(x, x.dtype)
    if turned.shape != (len(x), weight.columns) or turned.dtype != x.dtype:
        raise ValueError(f"a weight with rows of {weight.columns} takes no input {_described(turned)}")
    return turned.contiguous()


def _check_ends(ends: Tensor, rows: int) -> None:
    numbers = [0, *ends.tolist(), rows]
    if numbers != sorted(numbers):
        raise ValueError(f"ends must ascend up to at most {rows}, the rows of the input, not {numbers[1:-1]}")


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
