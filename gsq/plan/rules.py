"""The plan: for every parameter of the model, and every other tensor of the checkpoint, quantize or keep, and why.

Made from names and shapes alone, so that an impossible recipe stops before any weight is read; where a
rule asks for it, also from the kurtosis of weights, which `gsq.plan.kurtosis` measures.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from gsq.codebook import Codebook, CodebookError
from gsq.config import Kurtosis, Rule
from gsq.errors import UserError
from gsq.model.skeleton import Skeleton
from gsq.model.targets import EXPERT_PARTS
from gsq.plan.kurtosis import bits_for

DEFAULT_LIMITS = MappingProxyType(Kurtosis().limits())


@dataclass(frozen=True)
class PlanEntry:
    """What becomes of one parameter: `codebook` None means kept. `sources` are its tensors in the checkpoint.

    `rule` is the pattern that decided, or why none did; `kurtosis` that of its weights, if it was measured.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    codebook: Codebook | None
    sources: list[str]
    rule: str
    role: str
    layer: int | None
    bytes_before: int
    kurtosis: float | None = None

    @property
    def reason(self) -> str:
        """The rule, and what it saw."""
        return self.rule if self.kurtosis is None else f"{self.rule} (kurtosis {self.kurtosis:.2f})"

    @property
    def numel(self) -> int:
        """Number of weights."""
        return torch.Size(self.shape).numel()

    @property
    def bytes_after(self) -> int:
        """Bytes when exported at exact width."""
        return self.bytes_before if self.codebook is None else self.codebook.nbytes(self.shape)


@dataclass(frozen=True)
class Plan:
    """Entries by parameter name, in the order of the model, then of the checkpoint."""

    entries: dict[str, PlanEntry]

    def targets(self, layer: int | None = None) -> list[PlanEntry]:
        """Entries to quantize; of one decoder layer, if given."""
        return [e for e in self.entries.values() if e.codebook is not None and layer in (None, e.layer)]

    def summary(self) -> dict:
        """Totals: bits per quantized weight and per weight of the model, bytes before and after."""
        targets = self.targets()
        weights = sum(e.numel for e in targets)
        after = sum(e.bytes_after for e in self.entries.values())
        return {
            "targets": len(targets),
            "quantized_weights": weights,
            "bits_per_quantized_weight": 8 * sum(e.bytes_after for e in targets) / max(weights, 1),
            "bits_per_weight": 8 * after / sum(e.numel for e in self.entries.values()),
            "bytes_before": sum(e.bytes_before for e in self.entries.values()),
            "bytes_after": after,
        }

    def to_json(self) -> str:
        """For `plan.json` of a run; `from_json` reads it back."""
        entries = [
            vars(e) | {"codebook": e.codebook and e.codebook.to_dict(), "bytes_after": e.bytes_after}
            for e in self.entries.values()
        ]
        return json.dumps({"summary": self.summary(), "entries": entries}, indent=1)

    @classmethod
    def from_json(cls, path: Path) -> Plan:
        """Read a `plan.json`."""
        entries = {}
        for fields in json.loads(path.read_text())["entries"]:
            del fields["bytes_after"]
            codebook = fields["codebook"] and Codebook.from_dict(fields["codebook"])
            entry = PlanEntry(**fields | {"codebook": codebook, "shape": tuple(fields["shape"])})
            entries[entry.name] = entry
        return cls(entries)


def make_plan(
    skeleton: Skeleton,
    rules: list[Rule],
    kurtosis: Mapping[str, float] = MappingProxyType({}),
    limits: Mapping[int, float] = DEFAULT_LIMITS,
) -> Plan:
    """Apply `rules` to the targets of the layers to walk; raises `UserError` for a rule that cannot hold.

    `kurtosis` is that of weights by parameter name: of all `candidates(skeleton, rules)` at least; `limits`
    are those of the config.
    """
    entries: dict[str, PlanEntry] = {}
    claimed: set[str] = set()
    targets = _targets(skeleton)
    _check_rules(rules, targets)
    for name, parameter in skeleton.model.named_parameters():
        shape = tuple(parameter.shape)
        names = skeleton.sources(name, shape)
        if claimed.issuperset(names):  # tied to a parameter above
            continue
        rule = _first_match(name, rules)
        layer = _layer(name, skeleton.layer_names)
        walked = layer is not None and layer < skeleton.num_layers
        bits = rule and rule.bits
        if bits == "kurtosis":
            bits = bits_for(kurtosis[name], limits, rule.widths) if name in targets and walked else None
        codebook = _codebook(rule, bits, name, shape) if rule and name in targets else None
        reason = _reason(rule, name in targets, layer, skeleton.num_layers)
        if not walked:
            codebook = None
        before = sum(skeleton.checkpoint.tensors[source].nbytes for source in names)
        claimed |= set(names)
        dtype = str(skeleton.checkpoint.tensors[names[0]].dtype).removeprefix("torch.")
        role, found = role_of(name), kurtosis.get(name)
        entries[name] = PlanEntry(name, shape, dtype, codebook, names, reason, role, layer, before, found)
    for name, info in skeleton.checkpoint.tensors.items():
        if name not in claimed:  # tensors that transformers does not load, such as MTP
            dtype = str(info.dtype).removeprefix("torch.")
            role = role_of(name)
            entries[name] = PlanEntry(name, info.shape, dtype, None, [name], "not walked", role, None, info.nbytes)
    if not any(entry.codebook for entry in entries.values()):
        raise UserError("the plan quantizes nothing: its rules match only layers beyond model.max_layers, or keep all")
    return Plan(entries)


def candidates(skeleton: Skeleton, rules: list[Rule] | None = None) -> dict[str, list[str]]:
    """Parameters of the layers to walk that can be quantized, with their tensors in the checkpoint.

    With `rules`, only those whose bits depend on their kurtosis.
    """
    found = {}
    for name in _targets(skeleton):
        rule = _first_match(name, rules or [])
        wanted = rules is None or (rule is not None and rule.bits == "kurtosis")
        if wanted and _layer(name, skeleton.layer_names) < skeleton.num_layers:
            found[name] = skeleton.sources(name, tuple(skeleton.model.get_parameter(name).shape))
    return found


ROLES = (  # the first pattern found in a name gives its role
    (r"^mtp\.|\.mtp\.", "mtp"),
    (r"visual\.|vision", "vision"),
    (r"mlp\.experts\.", "routed experts"),
    (r"shared_expert", "shared expert"),
    (r"linear_attn\.", "linear attention"),
    (r"self_attn\.", "attention"),
    (r"mlp\.gate\.weight", "router"),
    (r"mlp\.", "mlp"),
    (r"lm_head", "head"),
    (r"embed", "embedding"),
    (r"norm", "norm"),
)


def role_of(name: str) -> str:
    """A tensor's part in the model, for tables."""
    return next((role for pattern, role in ROLES if re.search(pattern, name)), "other")


def _targets(skeleton: Skeleton) -> dict[str, None]:
    """Names, in order, of parameters in decoder layers that can be quantized: Linear weights and fused experts."""
    found = {}
    for prefix, layer in zip(skeleton.layer_names, skeleton.decoder.layers, strict=True):
        for path, module in layer.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                linear = isinstance(module, nn.Linear) and leaf == "weight"
                if linear or (parameter.ndim == 3 and leaf in EXPERT_PARTS):
                    found[f"{prefix}.{path}.{leaf}"] = None
    return found


def _first_match(name: str, rules: list[Rule]) -> Rule | None:
    return next((rule for rule in rules if re.search(rule.match, name)), None)


def _codebook(rule: Rule, bits: int | None, name: str, shape: tuple[int, ...]) -> Codebook | None:
    """The codebook of a target under its rule, of so many bits unless ternary; None: kept."""
    if bits is None and not rule.ternary:
        return None
    in_features, size = shape[-1], rule.group_size
    try:
        if rule.ternary:
            codebook = Codebook.ternary(size)
        elif rule.codebook == "tq":
            codebook = Codebook.tq(bits, size, in_features)
        elif rule.codebook == "jangtq":
            codebook = Codebook.jangtq(bits, in_features)
        else:
            codebook = getattr(Codebook, rule.codebook)(bits, size)
        codebook.groups(codebook.columns(in_features))
    except CodebookError as error:
        raise UserError(f"{name}: {error}") from None
    return codebook


def _reason(rule: Rule | None, target: bool, layer: int | None, walked: int) -> str:
    if not target:
        return "not a target"
    if layer >= walked:
        return "beyond model.max_layers"
    return rule.match if rule else "no rule matches"


def _layer(name: str, layer_names: list[str]) -> int | None:
    return next((index for index, prefix in enumerate(layer_names) if name.startswith(prefix + ".")), None)


def _check_rules(rules: list[Rule], targets: Collection[str]) -> None:
    """Every rule that quantizes must decide about something; one that keeps may be a precaution."""
    deciding = [_first_match(name, rules) for name in targets]
    for rule in rules:
        if rule.keep or any(rule is decides for decides in deciding):
            continue
        earlier = [first for name, first in zip(targets, deciding, strict=True) if re.search(rule.match, name)]
        if earlier:
            raise UserError(
                f"plan rule {rule.match!r} decides about nothing: earlier rules, such as {earlier[0].match!r}, "
                "take all that it matches; move it up, or remove it"
            )
        kinds = {re.sub(r"(?<=\.)\d+(?=\.)", "0", name) for name in targets}
        near = difflib.get_close_matches(rule.match, sorted(kinds), n=3, cutoff=0)
        raise UserError(
            f"plan rule {rule.match!r} matches no tensor that can be quantized; nearest are "
            f"{', '.join(near)}; mend the pattern, or remove the rule"
        )
