"""What running a decoder layer takes, found without weights: every operation is dispatched on the meta device.

The model's own code runs, forward and backward, on tensors that have shapes and no values. Counted are floating
point operations, bytes that kernels read and write, the calls themselves, and the bytes alive at once: nothing
need be known of an architecture. Attention stands for its fused kernel, whatever the meta device would do.
What the code asks of values (is any token masked?) is answered as for plain text: yes to "all", 1 to counts.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers.integrations import moe  # noqa: F401  registers its product of experts

from gsq.errors import UserError
from gsq.model.checkpoint import Checkpoint
from gsq.model.skeleton import SeenEnough, Skeleton, first_tensor

META = torch.device("meta")
aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward
SLOW = 4  # times as long as adding take: exponentials, looking up, sorting
SLOWLY = {
    aten.exp, aten.silu, aten.silu_backward, aten.sigmoid, aten.gelu, aten.gelu_backward, aten.softplus, aten._softmax,
    aten._safe_softmax, aten.index, aten.index_put, aten.index_put_, aten.gather, aten.sort, aten.topk,
    aten.linalg_solve_triangular,
}  # fmt: skip
EXPERTS, EXPERTS_BACKWARD = (getattr(torch.ops.transformers, f"grouped_mm_fallback{end}") for end in ("", "_backward"))
GROUPED = {torch._grouped_mm, getattr(torch.nn.functional, "grouped_mm", None)}
FREE = {torch.ops.prim.device, aten.detach, aten.alias, aten.empty, aten.empty_like, aten.new_empty}  # move no byte


@dataclass(frozen=True)
class Work:
    """Operations by what bounds them: `calls` that move `bytes`, of which products of matrices do `flops`.

    `exact` are those of products in float32, where activations have another dtype or not; `small` are bytes of
    operations that are small enough for a CPU's cache (`CACHED`).
    """

    flops: float = 0.0
    exact: float = 0.0
    bytes: float = 0.0
    small: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Work) -> Work:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Work(*(mine + its for mine, its in pairs))

    def __mul__(self, times: float) -> Work:
        return Work(*(mine * times for mine in vars(self).values()))


CACHED = 1 << 22  # bytes that an operation may touch to find them in a CPU's cache
INTENSE = 32  # operations for each byte from which on a product does not wait for memory


def moved(nbytes: float, calls: float = 1.0) -> Work:
    """`calls` of operations that read and write `nbytes` together."""
    small = nbytes <= CACHED * calls
    return Work(bytes=0.0 if small else nbytes, small=nbytes if small else 0.0, calls=calls)


@dataclass
class Trace:
    """One run of a layer: its `work`, and bytes at once (`peak`) beside arguments and weights.

    `reached` is the work until each Linear reads its input, by the module's path; `inputs` tells by equal numbers
    which of them read one tensor. `routed` is how many rows each product of fused experts takes, `called` the bytes
    of what the module at work is called with and puts out.
    """

    work: Work = field(default_factory=Work)
    peak: int = 0
    reached: dict[str, Work] = field(default_factory=dict)
    inputs: dict[str, tuple] = field(default_factory=dict)
    routed: int = 0
    called: int = 0


class UntracedError(UserError):
    """A model whose code asks for values, so that shapes do not tell what it does."""


class Outline(Skeleton):
    """A skeleton whose layers become real in shape only."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, max_layers: int | None = None):
        super().__init__(checkpoint, META, dtype, max_layers)

    def read(self, parameter: str, shape: tuple[int, ...], dtype: torch.dtype, *_: object) -> Tensor:
        """A parameter without values."""
        return torch.empty(shape, dtype=dtype, device=META)

    def calls(self, windows: int, length: int) -> tuple[Tensor, list[dict]]:
        """Hidden states `[windows, length, H]` before layer 0, and each layer's keyword arguments."""
        with self._explained(), Counter():
            return self.embed(torch.empty(windows, length, dtype=torch.long, device=META))

    def trace(self, index: int, windows: int, length: int, learned: Iterable[str] = (), module: str = "") -> Trace:
        """Layer `index`, run on so many windows; back, too, to the parameters `learned`, by their names in it.

        With `module`, a path in the layer, the backward pass covers only what that module does.
        """
        hidden, kwargs = self.calls(windows, length)
        layer, learned = self.load_layer(index), set(learned)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name in learned)
        counter = Counter(hidden, *tree_leaves(kwargs), *layer.parameters(), *layer.buffers())
        handles = [counter.watch(path, part) for path, part in layer.named_modules() if isinstance(part, nn.Linear)]
        handles += counter.only(layer.get_submodule(module))
        with self._explained(), torch.set_grad_enabled(bool(learned)), _AsOnDevices(), counter:
            with suppress(SeenEnough):
                self.run_layer(layer, hidden, kwargs[index])
            if learned:
                loss = counter.output.float().square().sum()
                torch.autograd.grad(loss, [p for p in layer.parameters() if p.requires_grad], allow_unused=True)
        for handle in handles:
            handle.remove()
        return counter.trace

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # which is what the meta device raises for what it cannot do
            name = type(self.model).__name__
            reason = str(error).splitlines()[0]
            raise UntracedError(f"{name} does not run without weights ({reason}); its cost is unknown") from error


class Counter(TorchDispatchMode):
    """Counts what is dispatched while it is active; `known` tensors were there before."""

    def __init__(self, *known: object):
        super().__init__()
        self.trace, self.output = Trace(), None
        self._alive, self._made, self._numbers = 0, 0, {}
        self._known = {_storage(tensor) for tensor in known if isinstance(tensor, Tensor)}

    def watch(self, path: str, module: nn.Module) -> object:
        """Note when `module` first reads its input; returns the hook's handle."""

        def before(_: nn.Module, args: tuple) -> None:
            x = args[0]
            self.trace.reached.setdefault(path, self.trace.work)
            number = self._numbers.get(_storage(x), 0)  # an address may be used again, a number is not
            self.trace.inputs.setdefault(path, (number, x.storage_offset(), x.shape[-1]))

        return module.register_forward_pre_hook(before)

    def only(self, module: nn.Module) -> list:
        """Count nothing before `module`, and end the run behind it, with its `output`; returns the hooks' handles."""

        def before(*_: object) -> None:
            self.trace.work, self.trace.peak = Work(), self._alive

        def behind(_: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            self.output = first_tensor(output)
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.trace.called = sum(tensor.nbytes for tensor in (*given, self.output))
            raise SeenEnough

        return [module.register_forward_pre_hook(before), module.register_forward_hook(behind, with_kwargs=True)]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run an operation and add what it takes."""
        kwargs = kwargs or {}
        if function is aten._local_scalar_dense.default and args[0].is_meta:
            return args[0].dtype == torch.bool or 1
        output = function(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self.trace.work += self._work(function, args, kwargs, output, given, made)
        for tensor in made:
            self._count(tensor)
        return output

    def _work(self, function, args, kwargs, output, given: list[Tensor], made: list[Tensor]) -> Work:
        packet = function.overloadpacket
        if packet in FREE:
            return Work()
        if function.is_view:
            return Work(calls=0.5)
        flops = _flops(packet, args, kwargs, output)
        if packet in (aten._grouped_mm, EXPERTS) and args[0].ndim == 2 and args[1].ndim == 3:
            self.trace.routed = args[0].shape[0]
        work = moved((SLOW if packet in SLOWLY else 1) * sum(tensor.nbytes for tensor in (*given, *made)))
        bound = flops > INTENSE * (work.bytes + work.small)
        kind = "exact" if flops and given[0].dtype == torch.float32 else "flops"
        counted = Work(**{kind: flops}, calls=1.0)
        return counted if bound else counted + Work(bytes=work.bytes, small=work.small)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self._made += 1
        self._numbers[storage._cdata] = self._made
        self._alive += storage.nbytes()
        self.trace.peak = max(self.trace.peak, self._alive)
        weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())

    def _release(self, address: int, nbytes: int) -> None:
        self._known.discard(address)
        self._alive -= nbytes


class _AsOnDevices(TorchFunctionMode):
    """Kernels that devices have and the meta device would not choose: fused attention, experts in float32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if function in GROUPED and args[0].dtype == torch.float32:
            return EXPERTS(args[0], args[1], kwargs["offs"])
        return function(*args, **kwargs)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`scaled_dot_product_attention`; fewer key heads are read again, not copied, so they need no expansion."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    return ATTENTION(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _flops(packet, args: tuple, kwargs: dict, output) -> float:
    """Of products of matrices and of attention; 0 for all else."""
    if packet is ATTENTION:
        query, key = args[:2]
        return 4.0 * query.numel() * key.shape[2]  # a causal one is half of that, at half the speed
    if packet is ATTENTION_BACKWARD:
        query, key = args[1:3]
        return 10.0 * query.numel() * key.shape[2]
    if packet is EXPERTS_BACKWARD:
        return 4.0 * args[0].numel() * args[1].shape[-1]
    if packet in (aten._grouped_mm, EXPERTS):
        return 2.0 * args[0].numel() * args[1].shape[-1]  # rows by expert, or the columns of a gradient
    counted = flop_registry.get(packet)
    return float(counted(*args, **kwargs, out_val=output)) if counted else 0.0


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
