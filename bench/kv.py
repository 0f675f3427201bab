"""KV caches of few bits side by side: size, perplexity, and divergence from the same model with a 16-bit cache.

    python bench/kv.py MODEL --text test.txt --out runs/kv

Beside the schemes stand caches of plain uniform quantization (minimum and maximum of every group of a vector, two
16-bit numbers beside its codes), which store and read back as strictly as the schemes do, and, where
optimum-quanto is installed, transformers' own `QuantizedCache`: as it is, which lets a piece of text attend to
itself uncoded (lenient), and made as strict. One of the schemes is shown lenient, too. After every window the
table is written anew, from all windows so far.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from transformers import Cache, DynamicCache, QuantizedCache
from transformers.cache_utils import DynamicLayer, QuantoQuantizedLayer
from transformers.utils import is_optimum_quanto_available

from gsq.device import activation_dtype, pick_device
from gsq.errors import UserError
from gsq.eval.kvcache import KVCache, Layer, Scheme, Size
from gsq.eval.kvquality import cache_sizes, kv_scores
from gsq.eval.kvstore import Vectors
from gsq.eval.quality import Scores, eval_tokens, summary
from gsq.export.base import open_model
from gsq.kernels.packing import pack_bytes, unpack_bytes
from gsq.model.resolve import load_tokenizer, resolve_model
from gsq.model.skeleton import Skeleton

LENGTHS = {"128": 128, "1k": 1 << 10, "4k": 1 << 12, "32k": 1 << 15}
GROUP = 64  # numbers of a vector that share a minimum and a maximum, or the whole vector if it has fewer
UNIFORM = {"uniform K4 V4": (4, 4), "uniform K4 V2": (4, 2), "uniform K2 V2": (2, 2)}
QUANTO = {f"quanto {bits}, {how}": (bits, how == "strict") for bits in (4, 2) for how in ("lenient", "strict")}
LENIENT = "turbo4"  # the scheme that is also shown as lenient as transformers' cache is


@dataclass(frozen=True)
class Uniform:
    """Evenly spaced levels from the least to the greatest number of a group; a codec of `gsq.eval.kvcache`."""

    bits: int

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Packed codes uint8 `[..., D * bits / 8]`; minimum and step of each group, float16 `[..., 2 * groups]`."""
        groups = x.unflatten(-1, (-1, min(GROUP, x.shape[-1])))
        low, high = groups.aminmax(dim=-1, keepdim=True)
        ends = torch.cat([low, (high - low) / (2**self.bits - 1)], dim=-1).half()  # [..., groups, 2]
        low, step = ends.float().split(1, dim=-1)
        codes = ((groups - low) / torch.where(step == 0, 1, step)).round_().clamp_(0, 2**self.bits - 1)
        return pack_bytes(codes.flatten(-2).to(torch.uint8), self.bits), ends.flatten(-2)

    def decode(self, packed: Tensor, ends: Tensor) -> Tensor:
        """The vectors `[..., D]`, float32."""
        low, step = ends.float().unflatten(-1, (-1, 2)).split(1, dim=-1)  # [..., groups, 1]
        codes = unpack_bytes(packed, self.bits)
        return codes.float().unflatten(-1, (low.shape[-2], -1)).mul_(step).add_(low).flatten(-2)

    def nbytes(self, width: int) -> int:
        """Codes, and two numbers a group."""
        return width * self.bits // 8 + 4 * (width // min(GROUP, width))


class Quanto(QuantizedCache):
    """Transformers' own, which codes a piece once it was attended to, or, if `strict`, before."""

    def __init__(self, model: nn.Module, bits: int, strict: bool):
        options = {"nbits": bits, "q_group_size": GROUP, "residual_length": 1}
        super().__init__("quanto", model.config, **options)
        self.bits = bits
        if strict:
            self.layers = [StrictLayer(**options) for _ in self.layers]

    def size(self, length: int | None = None) -> Size:
        """By its formula, as if its scales and shifts had 16 bits, which they have in models of 16 bits."""
        stored = [side for layer in self.layers if layer.is_initialized for side in quantized(layer)]
        length = self.get_seq_length() if length is None else length
        numbers = sum(side.numel() // side.shape[-2] * length for side in stored)
        return Size(numbers * self.bits // 8 + 4 * numbers // GROUP, numbers)


class StrictLayer(QuantoQuantizedLayer):
    """Reads back all that it has stored."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store new keys and values; all of them `[B, H, T, D]`."""
        super().update(key_states, value_states, *args, **kwargs)
        return tuple(self._dequantize(side) for side in quantized(self))


def quantized(layer: object) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer of transformers' quantized cache, `[B, H, T, D]`."""
    return layer._quantized_keys, layer._quantized_values


def main(
    model: str,
    text: Annotated[Path, typer.Option(help="text to measure on")],
    out: Annotated[Path, typer.Option(help="folder for results")],
    schemes: Annotated[str, typer.Option(help="space-separated")] = "turbo4 turbo3 turbo4v2 turbo2",
    beside: Annotated[str, typer.Option(help="of the other caches, those whose names contain this")] = "",
    windows: int = 8,
    length: int = 512,
    chunk: Annotated[int, typer.Option(help="tokens that enter a cache at once")] = 128,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
) -> None:
    """Measure window by window, then write table.md and table.json."""
    chosen = [Scheme.parse(scheme) for scheme in schemes.split()]
    source, device = resolve_model(model), pick_device()
    tokens = eval_tokens(text, load_tokenizer(source), windows, length)
    network = Skeleton(open_model(source), device, activation_dtype(device, dtype)).whole()
    makers = {str(scheme): partial(scheme.cache, network) for scheme in chosen}
    makers |= {name: make for name, make in others(network).items() if beside in name}
    parts: dict[str, list[Scores]] = {name: [] for name in makers}
    out.mkdir(parents=True, exist_ok=True)
    for window in tokens.split(1):
        scores, filled = kv_scores(network, window, list(makers.values()), chunk)
        for name, found in zip(makers, scores, strict=True):
            parts[name].append(found)
        rows = [row(name, parts[name], cache) for name, cache in zip(makers, filled, strict=True)]
        save(rows, out, f"{network.dtype}".removeprefix("torch."), chunk)
    Console().print((out / "table.md").read_text(), highlight=False, soft_wrap=True)


def others(model: nn.Module) -> dict[str, Callable[[], Cache]]:
    """Makers of what stands beside the schemes, by name."""
    makers: dict[str, Callable[[], Cache]] = {f"{LENIENT}, lenient": partial(lenient_cache, model)}
    makers |= {name: partial(uniform_cache, model, *bits) for name, bits in UNIFORM.items()}
    plain = DynamicCache(config=model.config).layers
    if is_optimum_quanto_available() and all(type(layer) is DynamicLayer for layer in plain):  # it takes no others
        makers |= {name: partial(Quanto, model, *how) for name, how in QUANTO.items()}
    return makers


class LenientLayer(Layer):
    """Reads back what it had stored before, and lets a piece attend to itself uncoded."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store new keys and values `[B, H, n, D]`; all of them, `[B, H, T, D]`, the new ones as they came."""
        stored = super().update(key_states, value_states)
        for states, new in zip(stored, (key_states, value_states), strict=True):
            states[:, :, -new.shape[2] :] = new
        return stored


def lenient_cache(model: nn.Module) -> KVCache:
    """The cache of a scheme, with lenient layers."""
    cache = Scheme.parse(LENIENT).cache(model)
    cache.layers = [LenientLayer(*layer.sides) if isinstance(layer, Layer) else layer for layer in cache.layers]
    return cache


def uniform_cache(model: nn.Module, key_bits: int, value_bits: int) -> KVCache:
    """Uniform quantization of all tokens."""
    return KVCache.of(model, lambda: Layer(Vectors(Uniform(key_bits), 0), Vectors(Uniform(value_bits), 0)))


def row(name: str, parts: list[Scores], cache: KVCache | Quanto) -> dict:
    """What was measured of a cache in all windows so far."""
    joined = Scores(*(torch.cat(column) for column in zip(*map(astuple, parts), strict=True)))
    return {"cache": name, **summary(joined), **cache_sizes(cache, list(LENGTHS.values()))}


def save(rows: list[dict], out: Path, dtype: str, chunk: int) -> None:
    """Write the tables: quality, then bytes by length."""
    first = rows[0]
    note = (
        f"perplexity with 16 bits {first['base_perplexity']:.2f}; {first['windows']} windows of {first['length']} "
        f"tokens in pieces of {chunk}; {dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}; {time.strftime('%Y-%m-%d')}"
    )
    head = ["bits per value at 4k", "KL", "95%", "KL median", "KL p99", "perplexity", "top-1"]
    sizes = {found["cache"]: [size["bytes"] for size in found["kv_sizes"].values()] for found in rows}
    plain = {"16 bits": [size["plain_bytes"] for size in first["kv_sizes"].values()]}
    tables = [
        table(head, {found["cache"]: quality_cells(found) for found in rows}),
        table(
            [f"KB at {name}" for name in LENGTHS],
            {name: [f"{n / 1e3:.0f}" for n in at] for name, at in (plain | sizes).items()},
        ),
    ]
    (out / "table.md").write_text("\n".join([*tables, note]) + "\n")
    (out / "table.json").write_text(json.dumps(rows, indent=1) + "\n")


def quality_cells(found: dict) -> list[str]:
    """Cells of a row of the first table."""
    bits = found["kv_sizes"][str(LENGTHS["4k"])]["bits_per_value"]
    interval = f"{found['kl_low']:.4f}–{found['kl_high']:.4f}" if "kl_low" in found else "–"
    return [
        f"{bits:.3f}", f"{found['kl']:.4f}", interval, f"{found['kl_median']:.4f}", f"{found['kl_p99']:.3f}",
        f"{found['perplexity']:.2f}", f"{found['top1']:.1%}",
    ]  # fmt: skip


def table(head: list[str], rows: dict[str, list[str]]) -> str:
    """Markdown of rows by the name of their cache."""
    lines = [["cache", *head], ["---"] * (len(head) + 1), *([name, *cells] for name, cells in rows.items())]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(f"error: {error}")
