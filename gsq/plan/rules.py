"""The plan: for every parameter of the model, and every other tensor of the checkpoint, quantize or keep, and why.

Made from the module tree, names and shapes alone, so that an impossible recipe stops before any weight is
read; where a rule asks for it, also from the kurtosis of weights, which `gsq.plan.kurtosis` measures.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from gsq.codebook import Codebook, CodebookError
from gsq.config import LAYERS, Kurtosis, Rule
from gsq.errors import UserError
from gsq.model.skeleton import Skeleton
from gsq.model.targets import EXPERT_PARTS
from gsq.plan.kurtosis import bits_for
from gsq.plan.roles import OUTSIDE, Role, find_roles, role_of_unloaded, together

DEFAULT_LIMITS = MappingProxyType(Kurtosis().limits())


@dataclass(frozen=True)
class PlanEntry:
    """What becomes of one parameter: `codebook` None means kept. `sources` are its tensors in the checkpoint.

    `rule` is the rule that decided, or why none did; `role` is a `gsq.plan.roles.Role` in words; `layer` is None
    outside the decoder layers; `bytes_after` is what an export stores of it, see `Plan.priced`; `kurtosis` is that
    of its weights, if it was measured.
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
    bytes_after: int
    kurtosis: float | None = None

    @property
    def reason(self) -> str:
        """The rule, and what it saw."""
        return self.rule if self.kurtosis is None else f"{self.rule} (kurtosis {self.kurtosis:.2f})"

    @property
    def numel(self) -> int:
        """Number of weights."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Plan:
    """Entries by parameter name, in the order of the model, then of the checkpoint."""

    entries: dict[str, PlanEntry]

    def targets(self, layer: int | None = None) -> list[PlanEntry]:
        """Entries to quantize; of one decoder layer, if given."""
        return [e for e in self.entries.values() if e.codebook is not None and layer in (None, e.layer)]

    def priced(self, sizes: Mapping[str, int]) -> Plan:
        """The same plan, of whose entries an export stores so many bytes."""
        return Plan({name: replace(entry, bytes_after=sizes[name]) for name, entry in self.entries.items()})

    def summary(self) -> dict:
        """Totals: bits per quantized weight and per weight that is stored, bytes before and after."""
        targets = self.targets()
        weights = sum(e.numel for e in targets)
        stored = sum(e.numel for e in self.entries.values() if e.bytes_after)  # formats leave out what is not read
        after = sum(e.bytes_after for e in self.entries.values())
        return {
            "targets": len(targets),
            "quantized_weights": weights,
            "bits_per_quantized_weight": 8 * sum(e.bytes_after for e in targets) / max(weights, 1),
            "bits_per_weight": 8 * after / stored,
            "bytes_before": sum(e.bytes_before for e in self.entries.values()),
            "bytes_after": after,
        }

    def to_json(self) -> str:
        """For `plan.json` of a run; `from_json` reads it back."""
        entries = [vars(e) | {"codebook": e.codebook and e.codebook.to_dict()} for e in self.entries.values()]
        return json.dumps({"summary": self.summary(), "entries": entries}, indent=1)

    @classmethod
    def from_json(cls, path: Path) -> Plan:
        """Read a `plan.json`."""
        entries = {}
        for fields in json.loads(path.read_text())["entries"]:
            codebook = fields["codebook"] and Codebook.from_dict(fields["codebook"])
            entry = PlanEntry(**fields | {"codebook": codebook, "shape": tuple(fields["shape"])})
            entries[entry.name] = entry
        return cls(entries)


@dataclass(frozen=True)
class Target:
    """A parameter that can be quantized, as rules see it; `layer` None: outside the decoder layers."""

    name: str
    role: Role
    layer: int | None


def make_plan(
    skeleton: Skeleton,
    rules: list[Rule],
    kurtosis: Mapping[str, float] = MappingProxyType({}),
    limits: Mapping[int, float] = DEFAULT_LIMITS,
    solved: Mapping[str, int] = MappingProxyType({}),
) -> Plan:
    """Apply `rules` to what is walked and can be quantized; raises `UserError` for a rule that cannot hold.

    `kurtosis` is that of weights by parameter name: of all `candidates(skeleton, rules)` at least; `limits`
    are those of the config. `solved` are the bits of all `flexible(skeleton, rules)`. Bytes are those of codes and
    scales at exact width, and of kept tensors as they are.
    """
    entries: dict[str, PlanEntry] = {}
    claimed: set[str] = set()
    roles = find_roles(skeleton.model, skeleton.layer_names)
    targets, layers = _targets(skeleton, roles), len(skeleton.layer_names)
    _check_layers(rules, layers)
    deciding = {name: _deciding(target, rules, layers) for name, target in targets.items()}
    _check_rules(rules, list(targets.values()), deciding, layers)
    for name, parameter in skeleton.model.named_parameters():
        shape = tuple(parameter.shape)
        names = skeleton.sources(name, shape)
        if claimed.issuperset(names):  # tied to a parameter above
            continue
        codebook, target, found = None, targets.get(name), kurtosis.get(name)
        if target and _walked(target, skeleton) and deciding[name]:
            rule = deciding[name][0]
            bits = rule.bits
            if bits == "kurtosis":
                bits = bits_for(kurtosis[name], limits, rule.widths)
            elif bits == "sensitivity":
                bits = solved[name]
            codebook = _codebook(rule, bits, name, shape)
        before = sum(skeleton.checkpoint.tensors[source].nbytes for source in names)
        after = before if codebook is None else codebook.nbytes(shape)
        claimed |= set(names)
        dtype = str(skeleton.checkpoint.tensors[names[0]].dtype).removeprefix("torch.")
        reason = _reason(target, deciding.get(name, []), skeleton)
        layer = _layer(name, skeleton.layer_names)
        role = str(roles[name])
        entries[name] = PlanEntry(name, shape, dtype, codebook, names, reason, role, layer, before, after, found)
    for name, info in skeleton.checkpoint.tensors.items():
        if name not in claimed:  # tensors that transformers does not load, such as MTP
            dtype = str(info.dtype).removeprefix("torch.")
            role = str(role_of_unloaded(name, skeleton.layer_names))
            size = info.nbytes
            entries[name] = PlanEntry(name, info.shape, dtype, None, [name], "not walked", role, None, size, size)
    if not any(entry.codebook for entry in entries.values()):
        raise UserError("the plan quantizes nothing: its rules match only layers beyond model.max_layers, or keep all")
    return Plan(entries)


def candidates(skeleton: Skeleton, rules: list[Rule] | None = None) -> dict[str, list[str]]:
    """Parameters of the layers to walk that can be quantized, with their tensors in the checkpoint.

    With `rules`, only those, there and outside, whose bits depend on their kurtosis.
    """
    found, layers = {}, len(skeleton.layer_names)
    for target in _targets(skeleton, find_roles(skeleton.model, skeleton.layer_names)).values():
        deciding = _deciding(target, rules or [], layers)
        wanted = target.layer is not None if rules is None else any(rule.bits == "kurtosis" for rule in deciding)
        if wanted and _walked(target, skeleton):
            shape = tuple(skeleton.model.get_parameter(target.name).shape)
            found[target.name] = skeleton.sources(target.name, shape)
    return found


def flexible(skeleton: Skeleton, rules: list[Rule], widths: Iterable[int]) -> dict[str, dict[int, Codebook]]:
    """Parameters whose bits are to be solved for, with their codebooks at those of `widths` that a codebook has."""
    found, layers = {}, len(skeleton.layer_names)
    for target in _targets(skeleton, find_roles(skeleton.model, skeleton.layer_names)).values():
        rule = next(iter(_deciding(target, rules, layers)), None)
        if rule and rule.bits == "sensitivity" and _walked(target, skeleton):
            if target.layer is None:
                raise UserError(f"{target.name} is in no decoder layer; give it bits of its own, not sensitivity")
            shape = tuple(skeleton.model.get_parameter(target.name).shape)
            own = [bits for bits in widths if bits in rule.widths]
            if not own:
                has = ", ".join(map(str, rule.widths))
                raise UserError(f"codebook {rule.codebook} has {has} bits, none of plan.sensitivity.widths; add some")
            found[target.name] = {bits: _codebook(rule, bits, target.name, shape) for bits in own}
    return found


def _targets(skeleton: Skeleton, roles: Mapping[str, Role]) -> dict[str, Target]:
    """What can be quantized: Linears and fused experts in decoder layers, the embedding, and a head of its own."""
    found, outside = {}, set()
    for path, module in skeleton.model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}".removeprefix(".")
            layer = _layer(name, skeleton.layer_names)
            linear = isinstance(module, nn.Linear) and leaf == "weight"
            if layer is not None and (linear or (parameter.ndim == 3 and leaf in EXPERT_PARTS)):
                found[name] = Target(name, roles[name], layer)
            elif roles[name].family in OUTSIDE and leaf == "weight":
                names = tuple(skeleton.sources(name, tuple(parameter.shape)))
                if names not in outside:  # else a head that is tied to the embedding
                    found[name] = Target(name, roles[name], None)
                outside.add(names)
    return found


def _deciding(target: Target, rules: list[Rule], layers: int) -> list[Rule]:
    """The first rule that fits a target; of fused parts the first for each, if all come to the same."""
    parts = [replace(target, role=Role(target.role.family, (part,))) for part in target.role.parts] or [target]
    found = [next((rule for rule in rules if _fits(rule, part, layers)), None) for part in parts]
    if len({rule and rule.outcome for rule in found}) > 1:
        wanted = [
            f"{part.role} by {str(rule)!r}" if rule else f"{part.role} by none"
            for part, rule in zip(parts, found, strict=True)
        ]
        raise UserError(
            f"{target.name} is one tensor with one codebook, but plan rules differ for what it holds: "
            f"{', '.join(wanted)}; use one rule with role: {target.role}"
        )
    return [rule for index, rule in enumerate(found) if rule and rule not in found[:index]]


def _fits(rule: Rule, target: Target, layers: int) -> bool:
    """Whether the conditions of a rule hold for a target, or a part of it, of a model of so many `layers`.

    Embedding and head are quantized only by rules that name their roles: patterns are written for layers.
    """
    if target.layer is None and not (rule.role or rule.keep):
        return False
    return (
        (not rule.role or any(role.covers(target.role) for role in rule.roles))
        and (not rule.layers or any(target.layer in found for found in _ranges(rule, layers)))
        and (not rule.match or re.search(rule.match, target.name) is not None)
    )


def _ranges(rule: Rule, layers: int) -> list[range]:
    """The layers that a rule is for, in a model that has so many; perhaps more than those."""
    ranges = []
    for found in map(LAYERS.fullmatch, rule.layers or ()):
        if found["end"]:
            count = int(found["count"])
            ranges.append(range(count) if found["end"] == "first" else range(layers - count, layers))
        else:
            ranges.append(range(int(found["from"]), int(found["to"] or found["from"]) + 1))
    return ranges


def _layer(name: str, layer_names: list[str]) -> int | None:
    return next((index for index, prefix in enumerate(layer_names) if name.startswith(prefix + ".")), None)


def _walked(target: Target, skeleton: Skeleton) -> bool:
    return target.layer is None or target.layer < skeleton.num_layers


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


def _reason(target: Target | None, deciding: list[Rule], skeleton: Skeleton) -> str:
    if target is None:
        return "not a target"
    if not _walked(target, skeleton):
        return "beyond model.max_layers"
    return " and ".join(map(str, deciding)) or (
        "no rule matches" if target.layer is not None else "no rule has its role"
    )


def _check_layers(rules: list[Rule], layers: int) -> None:
    """No rule is for layers that the model has not."""
    for rule in rules:
        if any(found.start < 0 or found.stop > layers for found in _ranges(rule, layers)):
            raise UserError(
                f"plan rule {str(rule)!r} is for layers beyond those of the model, which are 0 to {layers - 1}"
            )


def _check_rules(rules: list[Rule], targets: list[Target], deciding: Mapping[str, list[Rule]], layers: int) -> None:
    """Every rule that quantizes must decide about something; one that keeps may be a precaution.

    Rules of a preset need only something that they fit: the rules before them may take it.
    """
    used = {id(rule) for found in deciding.values() for rule in found}
    for rule in rules:
        if rule.keep or id(rule) in used:
            continue
        fitting = [target for target in targets if _fits(rule, target, layers)]
        if not fitting:
            raise UserError(_no_fit(rule, rules, targets, layers))
        if not rule.preset:
            raise UserError(
                f"plan rule {str(rule)!r} decides about nothing: earlier rules, such as "
                f"{str(deciding[fitting[0].name][0])!r}, take all that it matches; move it up, or remove it"
            )


def _no_fit(rule: Rule, rules: list[Rule], targets: list[Target], layers: int) -> str:
    """What to say of a rule, one of `rules`, that fits none of the targets."""
    without = rule.model_copy(update={"match": None})
    others = [target for target in targets if _fits(without, target, layers)]
    if rule.match and others:
        outside = [target for target in targets if target.layer is None and re.search(rule.match, target.name)]
        if outside:
            return (
                f"plan rule {str(rule)!r} matches no tensor that can be quantized by its name alone; "
                f"for {outside[0].name} add role: {outside[0].role}"
            )
        kinds = {re.sub(r"(?<=\.)\d+(?=\.)", "0", target.name) for target in others}
        near = difflib.get_close_matches(rule.match, sorted(kinds), n=3, cutoff=0)
        return (
            f"plan rule {str(rule)!r} matches no tensor that can be quantized; nearest are "
            f"{', '.join(near)}; mend the pattern, or remove the rule"
        )
    there = [t.role for t in targets if not rule.layers or any(t.layer in found for found in _ranges(rule, layers))]
    has = f"what can be quantized there is {_listed(there) or 'nothing'}"
    if rule.preset:
        mates = [mate for mate in rules if mate.preset and not any(_fits(mate, target, layers) for target in targets)]
        lacks = _listed(role for mate in mates if not mate.keep for role in mate.roles)
        return f"preset {rule.preset!r} is not for this model, which lacks its roles {lacks}; {has}"
    tied = "; its head is the embedding" if Role("head") in rule.roles and Role("embedding") in there else ""
    return f"plan rule {str(rule)!r} matches no tensor that can be quantized; {has}{tied}"


def _listed(roles: Iterable[Role]) -> str:
    return ", ".join(map(str, together(roles)))
