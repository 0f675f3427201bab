"""The model card of an export: a README for the hub that tells what is stored, how it came about, and how to use it.

`gsq.export.facts` finds out what is known; here it is put into words. Sections take a `Card` and give Markdown, or
None if there is nothing to say.
"""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import yaml

from gsq import units
from gsq.errors import UserError
from gsq.eval.tables import all_tables, environments, headline, inline, markdown_table
from gsq.export.facts import (
    HUB_ID,
    MARK,
    README,
    Card,
    Stored,
    collect,
    find,
    measured_by_run,
    missing,
    public_name,
    replaceable,
)
from gsq.files import write_whole
from gsq.plan.roles import ROLES, Role, together
from gsq.report import METHODS, method_errors
from gsq.run import Run
from gsq.serve.launch import MACHINES, describe, servers_of

INHERITED = ("license", "license_name", "license_link", "language")  # keys of the original's front matter
IMAGES = "image-text-to-text"
LIBRARIES = {"mlx": "mlx", "jangtq": "mlx"}  # of the hub, by format; others are transformers'
TAGS = {
    "humming": ("humming", "vllm"),
    "tq": ("turboquant", "vllm"),
    "jangtq": ("jang", "jangtq"),
    "compressed-tensors": ("compressed-tensors", "vllm"),
    "mlx": ("mlx",),
}
TRANSFORMERS = """\
{imports}from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained({path!r}, {arguments})
tokenizer = AutoTokenizer.from_pretrained({path!r})"""
LOADING: dict[str, tuple[str, str, str]] = {  # by format: what it takes, language and text of the code
    "humming": ("transformers 5.21 or newer, and GSQ", "python", TRANSFORMERS),
    "tq": ("transformers 5.21 or newer, and GSQ; `tq_config.json` must be beside the shards", "python", TRANSFORMERS),
    "compressed-tensors": ("transformers 5, and compressed-tensors 0.20 or newer", "python", TRANSFORMERS),
    "mlx": ("mlx-lm 0.32 or newer", "bash", 'mlx_lm.generate --model {path} --prompt "Hello"'),
    "jangtq": (
        "jang with MLX (not tried)",
        "python",
        "from jang_tools.load_jangtq import load_jangtq_model\n\nmodel, tokenizer = load_jangtq_model({path!r})",
    ),
}
MEMORY = {"RAM": "peak_rss_gb", "GPU memory": "device_gb"}  # in events of a run
IMPORTS = {"humming": "import gsq.hf\n", "tq": "import gsq.hf\n"}
ARGUMENTS = {"tq": 'device_map="auto", quantization_config=gsq.hf.TQConfig()'}


@dataclass(frozen=True)
class Written:
    """A card that was written, and what it would tell if that were known."""

    path: Path
    missing: list[str]


def write_card(
    folder: str | Path,
    run: str | Path | None = None,
    base: str | None = None,
    evaluations: Sequence[Path] = (),
    name: str | None = None,
    out: str | Path | None = None,
    force: bool = False,
) -> Written:
    """Write the card of an export, or of the one in a run's folder, to its `README.md` or to `out`.

    `evaluations` are files that `gsq eval` wrote. Raises `UserError` for a README that this did not write, unless it
    is that of the original, copied from the run's source, or `force` says so.
    """
    for given in filter(None, (base, name)):
        if not HUB_ID.fullmatch(given):
            raise UserError(f"{given!r} is no id of the hub; give one such as org/model")
    folder, run = find(Path(folder), run and Path(run))
    path = Path(out) if out else folder / README
    card = collect(folder, run, base, evaluations, name)
    if path.exists() and not force and not replaceable(path, card.run):
        raise UserError(f"{path} was not written by gsq card; --force replaces it, --out writes elsewhere")
    text = render(card)
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"), len(text.encode()))
    return Written(path, missing(card))


def render(card: Card) -> str:
    """The whole README."""
    front = yaml.safe_dump(front_matter(card), sort_keys=False, allow_unicode=True, width=1000)
    parts = [part for write in SECTIONS if (part := write(card))]
    return f"---\n{front}---\n{MARK}\n\n" + "\n\n".join(parts) + "\n"


def front_matter(card: Card) -> dict:
    """Keys that the hub documents, those only whose values are known."""
    fields = {key: card.original[key] for key in INHERITED if card.original.get(key)}
    link = str(fields.pop("license_link", ""))
    if "://" in link or (link == Path(link).name and (card.folder / link).is_file()):
        fields["license_link"] = link
    elif link and card.base:  # a file that the export does not carry along
        fields["license_link"] = f"https://huggingface.co/{card.base}/blob/main/{link}"
    if card.base:
        fields |= {"base_model": card.base, "base_model_relation": "quantized"}
    seen = any(tensor.role.family == "vision" for tensor in card.tensors)
    task = card.original.get("pipeline_tag", IMAGES)
    fields["library_name"] = LIBRARIES.get(card.format, "transformers")
    fields["pipeline_tag"] = task if seen or task != IMAGES else "text-generation"
    fields["tags"] = [*TAGS[card.format], *(["gsq"] if card.run else []), f"{_common_bits(card.tensors)}-bit"]
    return fields


def role_rows(tensors: Sequence[Stored]) -> list[dict[str, str]]:
    """A row for what is stored alike of one family of roles in the same layers."""
    layers: dict[tuple[Role, str], set[int | None]] = defaultdict(set)
    for tensor in tensors:
        layers[tensor.role, tensor.kind].add(tensor.layer)
    groups: dict[tuple, list[Stored]] = defaultdict(list)
    for tensor in tensors:
        places = frozenset(layers[tensor.role, tensor.kind] - {None})
        groups[tensor.role.family, tensor.kind, places].append(tensor)
    every = set().union(*layers.values()) - {None}
    families = [*ROLES, *(family for family, *_ in groups)]
    rows = []
    for (_, kind, places), found in sorted(groups.items(), key=lambda group: _place(families, *group[0])):
        [role] = together(tensor.role for tensor in found)
        rows.append(
            {
                "role": str(role),
                "stored as": kind,
                "layers": "all" if places == every else _ranges(places) or "–",
                "weights": units.count(_weights(found)),
                "bits each": f"{_bits(found):.3f}",
                "size": units.size(_bytes(found)),
            }
        )
    return rows


# Sections


def header(card: Card) -> str:
    """What it is, in a sentence or two."""
    source = f"`{card.source}`" if card.source else "A model"
    base = f"[{card.base}](https://huggingface.co/{card.base})" if card.base else source
    exactly = f"revision `{card.revision[:12]}`" if card.revision else f"from {source}" if card.source else ""
    revision = f" ({exactly})" if card.base and exactly else ""
    size = f"{_bits(card.tensors):.2f} bits per weight, {units.size(_bytes(card.tensors))}"
    made = f" {_method(card.run)}" if card.run else ""
    return f"# {card.title}\n\n{base}{revision} in the format `{card.format}`: {size}.{made}"


def use(card: Card) -> str:
    """Commands that serve it, and code that loads it."""
    where = "Commands are for this folder; elsewhere, give its path in place of the dot."
    download = f"hf download {card.name} --local-dir {card.path}"
    parts = ["## Use", _code("bash", download) if card.name else where]
    for server in servers_of(*describe(card.folder)):
        tried = f"tried with {server.tried}" if server.tried else "not tried"
        parts.append(f"On {MACHINES[server.machines[0]]}, {server.name} serves it ({tried}):")
        parts.append(_code("bash", f"{server.installing()}\n{shlex.join(server.starting(card.path))}"))
    needs, language, code = LOADING[card.format]
    filled = code.format(
        path=card.path,
        imports=IMPORTS.get(card.format, ""),
        arguments=ARGUMENTS.get(card.format, 'device_map="auto"'),
        auto="AutoModelForImageTextToText" if "vision_config" in card.model.config else "AutoModelForCausalLM",
    )
    parts += [f"To load it, with {needs}:", _code(language, filled)]
    parts.append("For what reads none of these, GSQ decodes it to an ordinary bfloat16 checkpoint:")
    parts.append(_code("bash", f"gsq dequantize {card.path} --out dense"))
    return "\n\n".join(parts)


def sizes(card: Card) -> str:
    """Totals, then what is stored of each role."""
    packed = [tensor for tensor in card.tensors if tensor.bits]
    share = _weights(packed) / _weights(card.tensors)
    files = [path for path in sorted(card.folder.iterdir()) if path.is_file() and path.name != README]
    shards = [path for path in files if path.suffix == ".safetensors"]
    facts = {
        "weights": units.count(_weights(card.tensors)),
        "bits per weight": f"{_bits(card.tensors):.3f}",
        "quantized": f"{share:.1%} of the weights, at {_bits(packed):.3f} bits with their scales",
        "tensors": _exactly(_bytes(card.tensors)),
        "safetensors files": f"{len(shards)}, {_exactly(_on_disk(shards))}",
        "other files": f"{len(files) - len(shards)}, {_exactly(_on_disk(files) - _on_disk(shards))}",
    }
    if card.run:
        facts["tensors of the original"] = _exactly(card.run.plan.summary()["bytes_before"])
    totals = markdown_table([{"of these files": fact, "": value} for fact, value in facts.items()])
    return f"## Size\n\n{totals}\n\n{markdown_table(role_rows(card.tensors))}"


def evaluation(card: Card) -> str | None:
    """What was measured: by the run, by `gsq eval` on one text, by its suites."""
    parts = []
    if measured := [*measured_by_run(card), *card.measured]:
        parts.append(markdown_table([_measured_row(result) for result in measured]))
        parts.append("KL: divergence from the original, nats per token; top-1: the same token is the likeliest.")
    if card.results:
        parts.append(markdown_table(headline(card.results).rows))
        for label, tables in all_tables(card.results):
            parts += [
                _folded(inline(": ".join(filter(None, (label, table.title)))), markdown_table(table.rows), table.note)
                for table in tables
                if table.rows
            ]
        parts.append(environments(card.results))
    return "\n\n".join(["## Evaluation", *parts]) if parts else None


def errors(card: Card) -> str | None:
    """Errors by layer, which the run measured on the way."""
    rows = layer_rows(card.events)
    if not rows:
        return None
    said = []
    if stages := [event for event in card.events["stage"] if event.get("error_init")]:
        kept = [event for event in stages if event.get("accepted") and event.get("error_final")]
        said.append(f"Refinement was accepted in {len(kept)} of {len(stages)} stages")
        gains = [1 - event["error_final"] / event["error_init"] for event in kept]
        said[-1] += f", and lowered the held-out error there by {median(gains):.0%} (median)." if gains else "."
    means = {METHODS[name][0]: fmean(found.values()) for name, found in method_errors(card.events["target"]).items()}
    if means:
        listed = ", ".join(f"{name} {units.number(mean)}" for name, mean in means.items())
        said.append(f"Weight error, mean of the layers: {listed}.")
    note = (
        "Weight error: tr(D H Dᵀ) / tr(W H Wᵀ), mean of a layer's tensors, with W the wanted weights, D what the "
        "quantized ones lack of them, H the second moments of their inputs. Held out: error of a stage's output on "
        "tokens kept out of calibration, before and after refinement, which lowers this and not the weight error. "
        "Distance: of the hidden states behind the layer from the original model's, squared and relative."
    )
    return "\n\n".join(["## Errors", " ".join(said), _folded("By layer", markdown_table(rows), note)])


def layer_rows(events: dict[str, list[dict]]) -> list[dict[str, str]]:
    """What the run measured of each finished layer."""
    methods = method_errors(events.get("target", ()))
    stages = {(event["stage"], event["layer"]): event for event in events.get("stage", ()) if event.get("error_init")}
    names = list(dict.fromkeys(stage for stage, _ in stages))
    rows = []
    for event in events.get("layer", ()):
        layer = event["layer"]
        row = {"layer": str(layer)}
        row |= {METHODS[name][0]: units.number(found.get(layer)) for name, found in methods.items()}
        for stage in names:
            title = "held out" if len(names) == 1 else f"held out, {stage}"
            row[title] = _before_and_after(stages.get((stage, layer)))
        rows.append(row | {"distance": units.number(event.get("output_error"))})
    return rows


def recipe(card: Card) -> str | None:
    """How it was made: calibration, time, and the settings that decide about the result."""
    if card.run is None:
        return None
    config = card.run.config
    content = config.model_dump(mode="json", include={key.partition(".")[0] for key in config.fixed()})
    content["model"]["name"] = card.source or card.base
    content["calib"]["source"] = public_name(config.calib.source)
    text = yaml.safe_dump(content, sort_keys=False).rstrip()
    facts = " ".join([*_calibration(card), *_costs(card)])
    return f"## Recipe\n\n{facts}\n\n" + _folded("Settings, for `gsq quantize`", _code("yaml", text))


def license_of(card: Card) -> str:
    """Whose licence applies."""
    known = card.original.get("license_name") or card.original.get("license")
    files = [f"[{path.name}](<{path.name}>)" for path in sorted(card.folder.glob("LICENSE*"))]
    named = f", {inline(str(known))}" if known else ""
    return f"## License\n\nThat of the base model{named}.{f' See {files[0]}.' if files else ''}"


SECTIONS: tuple[Callable[[Card], str | None], ...] = (header, use, sizes, evaluation, errors, recipe, license_of)


def _measured_row(result: dict) -> dict[str, str]:
    percent = "–" if result.get("top1") is None else f"{result['top1']:.1%}"
    return {
        "measured": result["label"],
        "perplexity": units.number(result["perplexity"]),
        "of the original": units.number(result.get("base_perplexity")),
        "KL": units.number(result.get("kl")),
        "top-1": percent,
        "tokens": f"{result['tokens']:,}" if "tokens" in result else "–",
    }


def _method(run: Run) -> str:
    """How the run went about it."""
    init, refine = run.config.init, run.config.refine
    start = "GPTQ" if init.method == "gptq" else "Rounded to nearest"
    polished = ", polished" if init.polish else ""
    refined = f", then refined by Gumbel-Softmax in {refine.steps} steps" if refine.enabled else ""
    return f"Quantized with GSQ: {start}{polished}{refined}."


def _calibration(card: Card) -> Iterator[str]:
    """What activations were taken from, and whether all experts saw some."""
    config = card.run.config
    windows, length = card.run.tokens().shape
    text = "that the model wrote itself" if config.calib.source == "self" else f"of {public_name(config.calib.source)}"
    yield (
        f"Calibrated on {windows * length:,} tokens {text} ({windows} windows of {length}, "
        f"{config.calib.validation} of them held out to judge results)."
    )
    counts = list({event["layer"]: event["tokens"] for event in card.events.get("coverage", ())}.values())
    if counts:
        unseen, experts = sum(tokens.count(0) for tokens in counts), sum(map(len, counts))
        yield f"{unseen} of {experts:,} experts saw no token." if unseen else f"Each of {experts:,} experts saw tokens."


def _costs(card: Card) -> Iterator[str]:
    """Time, memory and versions, as far as the run noted them."""
    layers = card.events.get("layer", ())
    if layers:
        seconds = sum(event.get("seconds", {}).get("total") or 0 for event in layers)
        peaks = {name: max(event.get(key) or 0 for event in layers) for name, key in MEMORY.items()}
        listed = "".join(f", at most {peak:.1f} GB of {name}" for name, peak in peaks.items() if peak)
        yield f"The {len(layers)} layers took {units.duration(seconds)}{listed}."
    if starts := card.events.get("start"):
        yield f"Versions: {', '.join(f'{name} {number}' for name, number in starts[-1]['versions'].items())}."


# Numbers and Markdown


def _weights(tensors: Iterable[Stored]) -> int:
    return sum(tensor.weights for tensor in tensors)


def _bytes(tensors: Iterable[Stored]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _bits(tensors: Sequence[Stored]) -> float:
    """Per weight, scales included."""
    return 8 * _bytes(tensors) / max(_weights(tensors), 1)


def _common_bits(tensors: Iterable[Stored]) -> int:
    """The width that most of the quantized weights have."""
    weights: Counter[int] = Counter()
    for tensor in tensors:
        if tensor.bits:
            weights[tensor.bits] += tensor.weights
    return weights.most_common(1)[0][0]


def _on_disk(files: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def _exactly(nbytes: int) -> str:
    return f"{units.size(nbytes)} ({nbytes:,} bytes)"


def _place(families: list[str], family: str, kind: str, layers: frozenset[int]) -> tuple:
    """Sort key of a group of tensors."""
    return families.index(family), min(layers, default=-1), kind


def _ranges(layers: Iterable[int]) -> str:
    """`0-2, 5`."""
    found: list[list[int]] = []
    for layer in sorted(layers):
        if found and layer == found[-1][-1] + 1:
            found[-1].append(layer)
        else:
            found.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in found)


def _before_and_after(stage: dict | None) -> str:
    """Held-out error of a stage."""
    if stage is None:
        return "–"
    if not (stage.get("accepted") and stage.get("error_final")):
        return f"{units.number(stage['error_init'])} (init kept)"
    return f"{units.number(stage['error_init'])} → {units.number(stage['error_final'])}"


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def _folded(title: str, *parts: str) -> str:
    """Parts that are seen when the title is clicked."""
    body = "\n\n".join(filter(None, parts))
    return f"<details>\n<summary>{title}</summary>\n\n{body}\n\n</details>"
