"""Products of experts with few different numbers of rows, on a CPU.

For numbers of 16 bits, torch has oneDNN compile a program for every shape of a product that it meets, and keep it: a
millisecond or two and up to some megabytes each. How many tokens an expert gets is another number in every batch, so
hundreds of experts would have thousands of programs, and each would hardly ever be used again.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gsq.model.skeleton import Skeleton
from gsq.model.targets import EXPERT_PARTS

LEAST = 32  # rows to a multiple of which an expert's tokens are filled up, at least
SIZES = 8  # different numbers of rows between one power of two and the next
HALF = (torch.bfloat16, torch.float16)


def even_groups(skeleton: Skeleton) -> AbstractContextManager:
    """`EvenGroups` where they help, else nothing: what sees all calls costs each of them a microsecond."""
    names = [name for name, _ in skeleton.decoder.layers.named_parameters()]
    experts = any(name.rpartition(".")[2] in EXPERT_PARTS for name in names)
    return EvenGroups() if experts and skeleton.device.type == "cpu" and skeleton.dtype in HALF else nullcontext()


class EvenGroups(TorchFunctionMode):
    """While active, grouped products on a CPU get rows of zeros, up to a few numbers per expert; results lack them.

    What is inside of it, such as `ObserveLinears`, sees the products as they were asked for.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Intercepts torch calls; only products of tokens `[rows, in]` and experts `[experts, in, out]` are changed."""
        kwargs = kwargs or {}
        if function is torch._grouped_mm and _is_uneven(*args, **kwargs):
            return even_product(*args, **kwargs)
        return function(*args, **kwargs)


def even_product(x: Tensor, weight: Tensor, offs: Tensor, bias=None, out_dtype=None) -> Tensor:
    """Products `[rows, out]` of `x` `[rows, in]`, sorted by expert, whose rows end at `offs` `[experts]`."""
    counts = torch.diff(offs, prepend=offs.new_zeros(1)).long()
    room = even(counts)
    shift = (room - counts).cumsum(0) - (room - counts)  # of each expert's first row
    place = torch.arange(len(x)) + shift.repeat_interleave(counts)
    filled = x.new_zeros(int(room.sum()), x.shape[1]).index_copy(0, place, x)
    ends = room.cumsum(0).to(offs.dtype)
    return torch._grouped_mm(filled, weight, offs=ends, bias=bias, out_dtype=out_dtype)[place]


def _is_uneven(x: Tensor, weight: Tensor, offs: Tensor | None = None, bias=None, out_dtype=None) -> bool:
    halves = x.device.type == "cpu" and x.dtype in HALF
    return halves and x.ndim == 2 and weight.ndim == 3 and int(offs[-1]) == len(x)


def even(counts: Tensor) -> Tensor:
    """Counts rounded up, by an eighth at most or to `LEAST`: few of them are different."""
    power = torch.log2(counts.clamp_min(1).double()).floor().long()
    step = torch.clamp_min((2**power) // SIZES, LEAST)
    return -(-counts // step) * step
