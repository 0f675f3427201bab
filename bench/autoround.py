"""AutoRound baseline: quantize a model with the `auto-round` package and save it dense.

    python bench/autoround.py MODEL_DIR --text FILE --out DIR [--bits 2 --group-size 64] [--json FILE]

Every linear layer of every transformer block is quantized (symmetric, weights only); the embeddings and the
output head stay as they are. Whatever is not an option here is left at AutoRound's own default: SignSGD with
learning rate 1/iters decaying linearly to zero, tuning of the rounding and of the group ranges, batches of
8 windows, bfloat16 on a CPU, `torch.compile` where it works.

Calibration: the text is tokenized as one stream without special tokens, and cut from the start into
consecutive windows that do not overlap.

The folder written is an ordinary checkpoint that plain `transformers` loads: its weights are quantized and
dequantized (AutoRound's "fake" format). `--json` records seconds, settings and versions.

This runs in an environment of its own: `torch`, `auto-round` 0.16 or later, `transformers`, and a C++
compiler for `torch.compile`.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import torch
from auto_round import AutoRound
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of the dense model, with its tokenizer")
    parser.add_argument("--text", type=Path, required=True, help="plain text to calibrate on")
    parser.add_argument("--out", type=Path, required=True, help="folder for the dense quantized checkpoint")
    parser.add_argument("--bits", type=int, default=2, help="bits of a weight")
    parser.add_argument("--group-size", type=int, default=64, help="weights that share a scale")
    parser.add_argument("--windows", type=int, default=128, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--iters", type=int, default=200, help="tuning steps for each block")
    parser.add_argument("--batch-size", type=int, default=8, help="windows in a tuning step")
    parser.add_argument("--seed", type=int, default=42, help="seed of the batches' order")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; torch chooses if not given")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to tune")
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    parser.add_argument("--json", type=Path, default=None, help="file for seconds, settings and versions")
    args = parser.parse_args()
    if args.iters < 1:
        parser.error("--iters must be at least 1: with 0 AutoRound rounds to nearest and does not tune")
    return args


def calibration_batches(
    tokenizer: PreTrainedTokenizerBase, text: str, windows: int, length: int, batch_size: int
) -> list[Tensor]:
    """Cut the text's token stream into its first `windows` windows, grouped into batches."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < windows * length:
        raise SystemExit(f"the text has {len(ids)} tokens; {windows} windows of {length} need {windows * length}")
    stream = torch.tensor(ids[: windows * length], dtype=torch.long)
    return list(stream.view(windows, length).split(batch_size))


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers inside the transformer blocks, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in f".{name}"}


def most_levels(weight: Tensor, group_size: int) -> int:
    """Return the largest number of different values that one group of a row takes."""
    groups = weight.detach().cpu().float().split(group_size, dim=1)
    return max(int((g.sort(dim=1).values.diff(dim=1) != 0).sum(dim=1).max()) + 1 for g in groups)


def main() -> None:
    """Quantize, save, and check what was saved."""
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    before = {name: m.weight.detach().clone() for name, m in model.named_modules() if hasattr(m, "weight")}
    text = args.text.read_text(encoding="utf-8")
    batches = calibration_batches(tokenizer, text, args.windows, args.length, args.batch_size)

    start, start_cpu = time.perf_counter(), time.process_time()
    rounder = AutoRound(
        model,
        tokenizer,
        scheme=f"W{args.bits}A16",
        group_size=args.group_size,
        sym=True,
        dataset=batches,
        iters=args.iters,
        seqlen=args.length,
        nsamples=args.windows,
        batch_size=args.batch_size,
        seed=args.seed,
        device_map=args.device,
        enable_torch_compile=False if args.no_compile else None,
    )
    rounder.quantize()
    rounder.save_quantized(str(args.out), format="fake")
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu

    saved = AutoModelForCausalLM.from_pretrained(args.out, dtype="auto")
    linears = block_linears(saved)
    after = {name: m.weight for name, m in saved.named_modules() if hasattr(m, "weight")}
    levels = max(most_levels(m.weight, args.group_size) for m in linears.values())
    touched = [name for name in before if name not in linears and not torch.equal(before[name], after[name])]
    if levels > 2**args.bits:
        raise SystemExit(f"a group in {args.out} takes {levels} values, more than {args.bits} bits hold")
    if touched:
        raise SystemExit(f"changed although it was to stay as it was: {', '.join(touched)}")

    report = {
        "method": "autoround",
        "model": str(args.model),
        "text": args.text.name,
        "out": str(args.out),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "bits": args.bits,
        "group_size": args.group_size,
        "symmetric": True,
        "windows": args.windows,
        "length": args.length,
        "iters": args.iters,
        "batch_size": args.batch_size,
        "learning_rate": rounder.quantize_config.lr,
        "minmax_learning_rate": rounder.quantize_config.minmax_lr,
        "seed": args.seed,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "tuning_dtype": str(rounder.model_context.amp_dtype).removeprefix("torch."),
        "torch_compile": bool(rounder.enable_torch_compile),
        "layers_quantized": len(linears),
        "most_levels_in_a_group": levels,
        "versions": {name: version(name) for name in ("auto-round", "torch", "transformers")},
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
