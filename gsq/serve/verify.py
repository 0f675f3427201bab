"""Does an export compute with packed kernels what its run computes with decoded weights?

`gsq.export.verify` compares bits; here everything is computed, on the run's calibration tokens and with
the inputs that arise from them. Two models walk layer by layer: the *hard* one has the weights that
the run decodes to, the *packed* one keeps the export's words and computes with them. Every product
of the latter is compared with a float64 product of the same input and the run's weights; at the end,
perplexity and divergence of one model from the other. Memory holds one layer of each.

Errors are relative to the size of what is summed: `|y - x W^T|` divided by
`sqrt((x W^T)^2 + sum (x_i w_i)^2)`, so that an output near zero need not be more exact than its terms.
In the sum, inputs and weights are those in the codebook's basis, since that is where they are rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from gsq.calib.stream import Stream
from gsq.codebook import QuantizedTensor
from gsq.errors import UserError
from gsq.eval.quality import FinalStates, compare
from gsq.export.base import format_of
from gsq.memory import Batch
from gsq.model.skeleton import Skeleton
from gsq.quantize import quantized_layer
from gsq.run import Run
from gsq.serve.modules import load_packed, pack_modules
from gsq.serve.parameters import open_packed, packed_parameters

TOKENS = 2048  # of the run's calibration tokens, in whole windows, at least one
# Input (if rotated), weight and result are rounded once each, by at most one unit. In a sum over many terms the errors
# of the first two add up like dice, to a standard deviation of 0.6 to 0.8 units; the worst of 1e10 outputs is six away.
ROUNDINGS = 8
DIVERGENCE = 0.05  # nats per token, beyond which two models do not differ by rounding alone
CHUNK = 1 << 25  # weights decoded to float64 at once
TINY = 1e-300  # so that nothing divided by nothing is no error
Progress = Callable[[int, int], None]
T = TypeVar("T")


@dataclass
class LayerReport:
    """What was seen of decoder layer `layer` (None: the head): the worst relative error of each of its products.

    `limits` are the errors that rounding explains; `drift` is the relative distance of the two models'
    hidden states behind the layer, the median over tokens.
    """

    layer: int | None
    errors: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    drift: float = 0.0

    @property
    def worst(self) -> str | None:
        """Name of the product nearest to its limit, or farthest beyond it."""
        return max(self.errors, key=lambda name: self.errors[name] / self.limits[name], default=None)


@dataclass(frozen=True)
class KernelReport:
    """A comparison that passed; `quality` as `gsq.eval.quality.compare` has it, of the packed model from the hard one.

    `decoded` are the quantized parameters that no kernel multiplies with, such as embeddings.
    """

    format: str
    device: str
    dtype: str
    layers: list[LayerReport]
    decoded: list[str]
    quality: dict

    def __str__(self) -> str:
        products = sum(len(layer.errors) for layer in self.layers)
        decoded = f", {len(self.decoded)} decoded when loaded" if self.decoded else ""
        return (
            f"{self.format}: {products} packed weights multiply as the run's do, up to rounding to {self.dtype}, on "
            f"{self.device}{decoded} · perplexity {self.quality['perplexity']:.4f}, of the run's weights "
            f"{self.quality['base_perplexity']:.4f} · KL divergence {self.quality['kl']:.2e} · "
            f"{self.quality['tokens']} tokens"
        )


@torch.no_grad()
def verify_kernels(
    folder: str | Path,
    run: Run,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = lambda done, layers: None,
) -> KernelReport:
    """Compare every packed product, then the models; raises `UserError` naming the weight or layer that differs.

    Kernels are those of `device`; activations have `dtype`. `progress(done, layers)` is told of every layer.
    """
    walk = _Walk(folder, run, device, dtype)
    layers = []
    for index in range(walk.num_layers):
        layers.append(walk.layer(index))
        progress(index + 1, walk.num_layers)
    head, quality = walk.head()
    if not quality["kl"] <= DIVERGENCE:  # nor if it is no number
        before = [0.0, *(layer.drift for layer in layers)]
        index = max(range(len(layers)), key=lambda i: layers[i].drift - before[i])
        raise UserError(
            f"with packed kernels on {device} the model is {quality['kl']:.3g} nats per token from the run's, though "
            f"each product is right; hidden states part most in layer {index}, where something is put together wrongly"
        )
    return KernelReport(
        walk.format, str(device), _name(dtype), [*layers, head] if head.errors else layers, walk.decoded, quality
    )


class _Walk:
    """The packed and the hard model, layer by layer, on the same tokens."""

    def __init__(self, folder: str | Path, run: Run, device: torch.device, dtype: torch.dtype):
        view, tokens = open_packed(folder), run.tokens()
        tokens = tokens[: max(1, TOKENS // tokens.shape[1])]
        packed, hard = (Skeleton(source, device, dtype, run.config.model.max_layers) for source in (view, run.source))
        parameters = packed_parameters(packed.model, view)
        multiplied = pack_modules(packed.model, parameters)
        planned = {entry.name for entry in run.plan.targets()}
        for name in sorted(multiplied - planned):
            raise UserError(f"{folder} has {name} packed, which the run in {run.folder} kept; export it again")
        self.run, self.device, self.dtype, self.checkpoint = run, device, dtype, view.stored
        self.parameters, self.multiplied = parameters, multiplied
        self.decoded = sorted(planned - multiplied)
        self.outside = run.load_layer(None)
        for name, quantized in self.outside.items():
            hard.replace(name, quantized.dequantize())
            if name in parameters and name not in multiplied:
                packed.replace(name, parameters[name].decoded(*parameters[name].read(view.stored), torch.float32))
        self.packed, self.hard = (Stream(skeleton, tokens, Batch(len(tokens))) for skeleton in (packed, hard))

    @property
    def format(self) -> str:
        """Name of the export's format."""
        return format_of(self.checkpoint)

    @property
    def num_layers(self) -> int:
        """Decoder layers that are walked."""
        return self.hard.skeleton.num_layers

    def layer(self, index: int) -> LayerReport:
        """Take both models through a layer, which is number `index`."""
        prefix = self.hard.skeleton.layer_names[index] + "."
        quantized = _inside(prefix, self.run.load_layer(index))
        module = self.packed.skeleton.load_layer(index)
        load_packed(module, _inside(prefix, self.parameters), self.checkpoint, self.device)
        report = LayerReport(index)
        with self._watched(module, prefix, quantized, report):
            self.packed.advance(module, index)
        self.hard.advance(quantized_layer(self.hard.skeleton.load_layer(index), quantized), index)
        distance = (self.packed.hidden.double() - self.hard.hidden.double()).norm(dim=-1)
        report.drift = float((distance / self.hard.hidden.double().norm(dim=-1)).median())
        return report

    def head(self) -> tuple[LayerReport, dict]:
        """Products outside the decoder layers, and how far the packed model is from the hard one."""
        model = self.packed.skeleton.model
        multiplied = {name: self.parameters[name] for name in self.outside if name in self.multiplied}
        load_packed(model, multiplied, self.checkpoint, self.device)
        report = LayerReport(None)
        states = (FinalStates(stream.skeleton, stream.tokens, stream.hidden) for stream in (self.packed, self.hard))
        with self._watched(model, "", self.outside, report):
            return report, compare(*states)

    @contextmanager
    def _watched(
        self, module: nn.Module, prefix: str, quantized: Mapping[str, QuantizedTensor], report: LayerReport
    ) -> Iterator[None]:
        """Inside, products of `module` with `quantized` are compared; behind it, a wrong one raises `UserError`."""
        handles = []
        for name, wanted in quantized.items():
            if prefix + name in self.multiplied:
                report.limits[name] = rounding_limit(wanted.codes.shape[-1], self.dtype)
                hook = partial(_compare_product, report, name, wanted)
                handles.append(module.get_submodule(name).register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        worst = report.worst
        if worst and not report.errors[worst] <= report.limits[worst]:
            raise UserError(
                f"{prefix}{worst}: its packed product on {self.device} is off by {report.errors[worst]:.2g} of its "
                f"size, and rounding to {_name(self.dtype)} explains {report.limits[worst]:.2g}; export it again, and "
                "report the kernel if `gsq verify` finds no difference in the bits"
            )


def rounding_limit(columns: int, dtype: torch.dtype) -> float:
    """The relative error that rounding explains in a product over `columns`, summed in float32."""
    units = torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    return ROUNDINGS * (units[0] + math.sqrt(columns) * units[1])


def _compare_product(
    report: LayerReport, name: str, quantized: QuantizedTensor, module: nn.Module, args: tuple[Tensor, ...], y: Tensor
) -> None:
    """A forward hook of packed matrices: `args` are `x` `[rows, in]` and, with experts, the ends of their rows."""
    x, *ends = args
    if ends:
        bounds = [0, *ends[0].tolist()]
        parts = [(slice(*span), quantized.map(lambda t, e=e: t[e])) for e, span in enumerate(pairwise(bounds))]
    else:
        parts = [(slice(None), quantized)]
    errors = [product_error(x[rows], y[rows], own) for rows, own in parts if x[rows].numel()]
    report.errors[name] = max([report.errors.get(name, 0.0), *errors])


def product_error(x: Tensor, y: Tensor, quantized: QuantizedTensor) -> float:
    """The worst relative error of `y` `[rows, out]`, which ought to be `x` `[rows, in]` times codes `[out, columns]`.

    Weights are decoded on the CPU, so that no kernel has a part in it.
    """
    x, worst = x.double(), 0.0
    step = max(1, CHUNK // x.shape[1])
    turned = quantized.codebook.rotate(x.cpu()).to(x)
    for start in range(0, y.shape[1], step):
        part = quantized.rows(start, start + step)
        weight, values = (w.to(x.device).double() for w in (part.dequantize(), part.values()))
        exact = x @ weight.mT
        size = (exact.square() + turned.square() @ values.square().mT).sqrt()
        error = (y[:, start : start + step].double() - exact).abs() / size.clamp_min(TINY)
        worst = max(worst, float(error.nan_to_num(nan=math.inf).max()))
    return worst


def _inside(prefix: str, things: Mapping[str, T]) -> dict[str, T]:
    """What is named below a prefix, by the rest of its name."""
    return {name.removeprefix(prefix): thing for name, thing in things.items() if name.startswith(prefix)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
