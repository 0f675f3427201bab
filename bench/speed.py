"""Speed of the kernels at the sizes of Qwen3.6-35B-A3B, against what the device can do.

    python bench/speed.py --out bench/results/kernels.md

Shares are of bandwidth and arithmetic measured on the same device in the same run: a copy of 2 GiB, and a
bfloat16 product of two square matrices. Weights, activations and routes are random. Products with packed
weights stand beside those of Humming, where it is installed and starts. What fails is a row that says so;
the others are measured, and the program ends with an error. `--only packing,hadamard` measures some parts,
`--shrink 64` divides all sizes, to try the program anywhere; its times mean nothing then, and on a CPU they
are of the plain versions.
"""

from __future__ import annotations

import datetime
import gc
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeExperts

from gsq.calib.stream import Calls
from gsq.codebook import Codebook, QuantizedTensor
from gsq.init.gptq import gptq
from gsq.init.polish import polish
from gsq.kernels import relaxation
from gsq.kernels.hadamard import hadamard
from gsq.kernels.packed import PackedWeight, packed_grouped_matmul, packed_matmul
from gsq.kernels.packing import pack_dense, unpack_dense
from gsq.memory import Batch, Memory
from gsq.refine.gumbel import Relaxation, Temperature
from gsq.refine.objective import OutputObjective, epochs

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 256, 2048, 512, 8  # of Qwen3.6-35B-A3B
MATRICES = ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))  # of an expert: gate and up, down
LENGTH, WINDOWS = 4096, 64  # tokens of a window, windows of a step
GROUP = 128
PACKAGES = ("torch", "triton", "transformers", "humming-kernels", "fast-hadamard-transform")
AT = Temperature(tau=0.3, kappa=200.0, lr=1e-3, scale_lr=4e-3)


@dataclass
class Row:
    """One line of the table: what was done, in how many seconds, what share of what that is, and the goal."""

    work: str
    seconds: float
    reached: str
    goal: str = ""


@dataclass
class Bench:
    """A device, what it can do, and by how much all sizes are divided."""

    device: torch.device
    shrink: int
    bytes_per_second: float = 0.0
    operations_per_second: float = 0.0

    def size(self, full: int, least: int = 64) -> int:
        """A dimension, divided."""
        return max(least, full // self.shrink)

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, dtype=dtype, device=self.device)

    def seconds(self, work: Callable[[], object], repeats: int = 9, warmups: int = 2) -> float:
        """Median time of `work`, which ran `warmups` times before."""
        times = []
        for run in range(-warmups, repeats):
            self._wait()
            start = time.perf_counter()
            work()
            self._wait()
            if run >= 0:
                times.append(time.perf_counter() - start)
        return statistics.median(times)

    def kernel_seconds(self, work: Callable[[], object], repeats: int = 20) -> float:
        """Median time on the device of work too short for the host's clock, the device's cache cold.

        Overwriting the cache takes the device so long that the host has queued the work by then.
        """
        if self.device.type != "cuda":
            return self.seconds(work, 3)
        work()  # compiled and tuned
        filler = torch.empty(1 << 31, dtype=torch.uint8, device=self.device)  # half a millisecond's work
        events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
        for start, end in events:
            filler.zero_()
            start.record()
            work()
            end.record()
        self._wait()
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1000

    def share_of_copy(self, moved: float, seconds: float) -> str:
        """Bytes moved in so many seconds, beside a copy."""
        speed = moved / seconds
        return f"{speed / 1e12:.2f} TB/s, {speed / self.bytes_per_second:.0%} of copy"

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def floors(bench: Bench) -> Iterator[Row]:
    """What the device can do."""
    source = bench.randn(bench.size(1 << 30))
    target = torch.empty_like(source)
    seconds = bench.kernel_seconds(lambda: target.copy_(source))
    bench.bytes_per_second = 2 * source.nbytes / seconds
    label = f"copy of {source.nbytes / 2**30:.2g} GiB"
    yield Row(label, seconds, f"{bench.bytes_per_second / 1e12:.2f} TB/s", "4.3 TB/s on an H200")
    side = bench.size(8192)
    a, b = bench.randn(side, side), bench.randn(side, side)
    seconds = bench.kernel_seconds(lambda: a @ b)
    bench.operations_per_second = 2 * side**3 / seconds
    yield Row(
        f"product of {side} x {side}", seconds, f"{bench.operations_per_second / 1e12:.0f} TFLOP/s", "790 on an H200"
    )


def relaxations(bench: Bench) -> Iterator[Row]:
    """Softening, and backward with the step, of all expert weights of a layer."""
    size = bench.size(EXPERTS * 3 * HIDDEN * INTERMEDIATE)
    levels = torch.tensor([-2.0, -1.0, 0.0, 1.0], device=bench.device)
    scales = torch.rand(size // GROUP, device=bench.device)
    draw = relaxation.Draw(levels, None, scales, GROUP, AT.tau, AT.kappa, 0.0, (0, 0, 0))
    logits = bench.randn(4, size).mul_(0.01)
    seconds = bench.kernel_seconds(lambda: relaxation.soften(logits, draw, torch.bfloat16))
    yield Row("relaxation forward, bfloat16", seconds, bench.share_of_copy(10 * size, seconds), "75%")
    gradient, momentum = bench.randn(size), torch.zeros_like(logits)
    tape = None if bench.device.type == "cuda" else relaxation.soften(logits, draw)[1]
    step = lambda: relaxation.lion_step(logits, momentum, gradient, draw, tape, 1e-3, 0.0, (0.9, 0.95))  # noqa: E731
    seconds = bench.kernel_seconds(step)
    part = bench.size(size, 1 << 20) // 16 // GROUP * GROUP
    slow = bench.seconds(lambda: _eager_step(logits, momentum, gradient, scales, levels, part), 3) * size / part
    reached = f"{bench.share_of_copy(34 * size, seconds)}; {slow / seconds:.1f} times eager PyTorch"
    yield Row("backward and Lion step, bfloat16", seconds, reached, "70%; 8 times")
    noisy = relaxation.Draw(levels, None, scales, GROUP, AT.tau, AT.kappa, 1.0, (0, 0, 0))
    seconds = bench.kernel_seconds(lambda: relaxation.soften(logits, noisy, torch.bfloat16))
    yield Row("relaxation forward with Gumbel noise", seconds, bench.share_of_copy(10 * size, seconds))


def _eager_step(logits: Tensor, momentum: Tensor, gradient: Tensor, scales: Tensor, levels: Tensor, size: int) -> None:
    """Softmax, its gradient by autograd, and Lion, as PyTorch operations on the first `size` weights."""
    x = logits[:, :size].float().requires_grad_()
    p = torch.softmax(x * (AT.kappa / AT.tau), dim=0)
    weights = (p * levels[:, None]).sum(0).view(-1, GROUP) * scales[: size // GROUP, None]
    weights.view(-1).backward(gradient[:size].float())
    m, g = momentum[:, :size].float(), x.grad
    logits[:, :size] = x.detach() - 1e-3 * torch.sign(0.9 * m + 0.1 * g)
    momentum[:, :size] = 0.95 * m + 0.05 * g


def init(bench: Bench) -> Iterator[Row]:
    """GPTQ of the experts of a layer under given Hessians, and a round of polish of what it gives."""
    experts, of_gptq, of_polish = bench.size(EXPERTS, 2), 0.0, 0.0
    codebook = Codebook.integer(2, GROUP)
    for out, columns in MATRICES:
        weights = bench.randn(experts, bench.size(out), bench.size(columns, GROUP))
        x = bench.randn(experts, 64, weights.shape[-1], dtype=torch.float32)
        hessian = x.mT @ x + 0.5 * torch.eye(weights.shape[-1], device=bench.device)
        quantized = gptq(weights, hessian, codebook)  # compiled
        of_gptq += bench.seconds(partial(gptq, weights, hessian, codebook), 1, warmups=0)
        of_polish += bench.seconds(partial(polish, weights, quantized, hessian, rounds=1), 1, warmups=1)
    yield Row(f"GPTQ of {experts} experts", of_gptq, f"{of_gptq:.2f} s", "5 s")
    yield Row(f"coordinate descent of {experts} experts, 1 round", of_polish, f"{of_polish:.2f} s")


def packing(bench: Bench) -> Iterator[Row]:
    """Codes, a byte each, into dense words and back."""
    for bits in (2, 3):
        codes = torch.randint(1 << bits, (bench.size(1 << 17), 8192), dtype=torch.uint8, device=bench.device)
        words = pack_dense(codes, bits)
        for work, call in {"pack": partial(pack_dense, codes), "unpack": partial(unpack_dense, words)}.items():
            seconds = bench.kernel_seconds(partial(call, bits))
            share = bench.share_of_copy(codes.nbytes + words.nbytes, seconds)
            reached = f"{codes.numel() / seconds / 1e9:.0f} GB/s of codes, {share}"
            yield Row(f"{work} {codes.numel() >> 20} Mi codes, {bits} bits", seconds, reached)


def hadamards(bench: Bench) -> Iterator[Row]:
    """Hadamard transforms of activations."""
    x = bench.randn(bench.size(32768), 2048)
    for width in (128, 2048):
        seconds = bench.kernel_seconds(lambda w=width: hadamard(x, w))
        reached = bench.share_of_copy(2 * x.nbytes, seconds)
        if find_spec("fast_hadamard_transform"):
            from fast_hadamard_transform import hadamard_transform

            other = bench.kernel_seconds(lambda w=width: hadamard_transform(x.view(-1, w)))
            reached += f"; {other / seconds:.2f} times fast-hadamard-transform"
        yield Row(f"Hadamard {width}, {len(x)} x 2048 bfloat16", seconds, reached, "75%")


def packed_products(bench: Bench) -> Iterator[Row]:
    """Packed weights of 2 bits times one token's experts, one row, and many rows; the last two as Humming does them."""
    for out, columns in MATRICES:
        experts = bench.size(EXPERTS, TOP_K)
        weight = _packed(bench, 2, bench.size(out), bench.size(columns, GROUP), experts)
        x = bench.randn(TOP_K, weight.columns)
        counts = torch.zeros(experts, dtype=torch.int32, device=bench.device)
        counts[torch.randperm(experts, device=bench.device)[:TOP_K]] = 1
        seconds = bench.kernel_seconds(partial(packed_grouped_matmul, x, counts.cumsum(0, dtype=torch.int32), weight))
        reached = bench.share_of_copy(_bytes(weight) * TOP_K / experts, seconds)
        shape = f"{weight.words.shape[1]} x {weight.columns}"
        yield Row(f"{TOP_K} of {experts} experts, a row each, 2 bits, {shape}", seconds, reached, "60%")
    for rows, side in ((1, 4096), (1, 16384), (4096, 4096)):
        side = bench.size(side, GROUP)
        weight, x = _packed(bench, 2, side, side), bench.randn(rows if rows == 1 else bench.size(rows, 16), side)
        dense = weight.decode(torch.bfloat16)
        seconds = bench.kernel_seconds(partial(packed_matmul, x, weight))
        cublas = bench.kernel_seconds(partial(torch.mm, x, dense.T))
        share = bench.share_of_copy(_bytes(weight), seconds) if rows == 1 else f"{cublas / seconds:.0%} of cuBLAS"
        reached = f"{share}; cuBLAS bfloat16 {cublas * 1e6:.0f} us; {_of_humming(bench, weight, x)}"
        goal = "60% of copy on packed bytes" if rows == 1 else "60% of cuBLAS"
        yield Row(f"packed product, M = {len(x)}, 2 bits, {side} x {side}", seconds, reached, goal)


def _bytes(weight: PackedWeight) -> int:
    return weight.words.nbytes + weight.scales.nbytes


def _of_humming(bench: Bench, weight: PackedWeight, x: Tensor) -> str:
    """How long Humming's kernel takes for the same product, or why it does not start."""
    try:
        product = _humming_product(weight, x)
        product()  # compiled
    except Exception as error:  # whatever it lacks here: CUDA headers, a compiler, a GPU
        return f"Humming did not start: {_reason(error)}"
    return f"Humming {bench.kernel_seconds(product) * 1e6:.0f} us"


def _humming_product(weight: PackedWeight, x: Tensor) -> Callable[[], Tensor]:
    """What its layer does with `x`, in the configuration that it has for as many rows."""
    from humming.layer import HummingLayer
    from humming.schema import HummingWeightSchema
    from humming.tune import get_heuristics_config

    schema = HummingWeightSchema(b_dtype=f"uint{weight.bits}", weight_scale_group_size=weight.group_size)
    layer = HummingLayer(len(weight.words), weight.columns, schema, torch_dtype=x.dtype).to(x.device)
    layer.load_from_tensors({"weight": weight.words, "weight_scale": weight.scales})
    layer.transform()
    return partial(layer, x, tuning_config=get_heuristics_config(layer.humming_config, shape_m=len(x)))


def _packed(bench: Bench, bits: int, out: int, columns: int, experts: int | None = None) -> PackedWeight:
    shape = (out, columns) if experts is None else (experts, out, columns)
    codes = torch.randint(1 << bits, shape, dtype=torch.uint8, device=bench.device)
    scales = torch.rand(*shape[:-1], columns // GROUP, device=bench.device).bfloat16()
    half = 1 << (bits - 1)
    return PackedWeight(pack_dense(codes, bits), scales, tuple(float(level) for level in range(-half, half)))


def refinement_step(bench: Bench) -> Iterator[Row]:
    """One step on the experts of a layer: soften, forward and backward of 64 windows, and the Lion step."""
    experts, hidden = bench.size(EXPERTS, 8), bench.size(HIDDEN, GROUP)
    intermediate, length = bench.size(INTERMEDIATE, GROUP), bench.size(LENGTH)
    windows = bench.size(WINDOWS, 2)
    module = _experts(bench, experts, hidden, intermediate)
    tokens = windows * length
    inputs = bench.randn(windows, length, hidden).mul_(0.5)
    chosen = torch.rand(tokens, experts, device=bench.device).topk(TOP_K, dim=-1)
    routes = chosen.values.softmax(-1).to(inputs.dtype)
    calls = Calls(length, windows, Memory(bench.device))
    count = windows
    handle = module.register_forward_hook(calls.hook(lambda: count), with_kwargs=True)
    with torch.no_grad():
        module(inputs.flatten(0, 1), chosen.indices, routes)
    handle.remove()
    weights = torch.ones(windows, length, device=bench.device)
    objective = OutputObjective(module, calls, calls.outputs, weights, 0, windows, Batch(8), epochs(0))
    codebook = Codebook.integer(2, GROUP)
    relaxed = {name: _relaxed(parameter, codebook) for name, parameter in module.named_parameters()}

    def step() -> None:
        soft = {name: r.soft(0, AT, torch.bfloat16) for name, r in relaxed.items()}
        _, gradients = objective.gradients(0, soft)
        for name, r in relaxed.items():
            r.update(gradients[name], AT)

    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = bench.seconds(step, 3)
    hard = {name: parameter.data for name, parameter in module.named_parameters()}
    products = bench.seconds(lambda: objective.gradients(0, hard), 3)
    operations = 3 * 2 * tokens * TOP_K * 3 * hidden * intermediate
    ideal = operations / bench.operations_per_second
    peak = torch.cuda.max_memory_allocated() / 1e9 if bench.device.type == "cuda" else 0.0
    reached = (
        f"{products / seconds:.0%} in forward and backward, of which matrix products at full speed would take "
        f"{ideal / products:.0%}; peak {peak:.0f} GB"
    )
    yield Row(f"refinement step of a layer, {windows} x {length} tokens", seconds, reached, "200 ms")


def _experts(bench: Bench, experts: int, hidden: int, intermediate: int) -> torch.nn.Module:
    config = CONFIG_MAPPING["qwen3_5_moe_text"](
        hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=experts, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = "grouped_mm"
    module = Qwen3_5MoeExperts(config).to(bench.device, torch.bfloat16).requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(std=0.02)
    return module


def _relaxed(weight: Tensor, codebook: Codebook) -> Relaxation:
    scales = weight.unflatten(-1, (-1, GROUP)).abs().amax(-1).float().div_(2).to(codebook.scale_dtype)
    codes = codebook.encode(weight.float(), scales)
    start = QuantizedTensor(codes, scales, codebook)
    return Relaxation(start, weight, 0.06, 0.0, (0.9, 0.95), 0, 0, 0.0, dtype=torch.bfloat16)


PARTS = {
    "relaxation": relaxations,
    "init": init,
    "hadamard": hadamards,
    "packing": packing,
    "refinement": refinement_step,
    "products": packed_products,  # last: what goes wrong in code of others may leave a device without use
}


def main(
    out: Annotated[Path | None, typer.Option(help="Markdown file to write")] = None,
    shrink: Annotated[int, typer.Option(help="divide all sizes by this")] = 1,
    only: Annotated[str, typer.Option(help="parts to measure: " + ", ".join(PARTS))] = ",".join(PARTS),
) -> None:
    """Measure all kernels and print a table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and shrink == 1:
        raise SystemExit("there is no GPU; --shrink 64 tries the program on a CPU")
    unknown = set(only.split(",")) - set(PARTS)
    if unknown:
        raise SystemExit(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    torch.manual_seed(0)
    bench, rows, failed = Bench(device, shrink), [], 0
    console = Console(soft_wrap=True, markup=False, highlight=False)
    for name in ("floors", *only.split(",")):
        try:
            for row in PARTS.get(name, floors)(bench):
                rows.append(row)
                console.print(f"{row.work}: {row.seconds * 1e3:.3f} ms, {row.reached}")
        except Exception as error:  # a part more or less: the others are measured, and the end is an error
            console.print_exception(max_frames=20)
            rows.append(Row(name, math.nan, f"failed: {_reason(error)}"))
            failed += 1
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if out:  # at once, since a run may be cut short
            out.write_text(table(rows, device))
    console.print(table(rows, device))
    raise typer.Exit(min(failed, 1))


def _reason(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def table(rows: list[Row], device: torch.device) -> str:
    """The results as Markdown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    installed = {found.name.replace("_", "-"): found.version for found in metadata.distributions()}
    versions = (f"{package} {installed[package]}" for package in PACKAGES if package in installed)
    lines = [
        f"# Kernels on {name}", "", f"{datetime.date.today()}; {', '.join(versions)}; medians.", "",
        "| work | ms | reached | goal |", "|---|---|---|---|",
        *(f"| {row.work} | {row.seconds * 1e3:.3f} | {row.reached} | {row.goal} |" for row in rows),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
