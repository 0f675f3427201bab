"""The configuration of a run: typed sections, read from YAML, changed by `--set section.key=value`.

Every mistake is found here, before work starts. Settings marked `free` may differ when a run is
resumed; any other change would make its finished layers wrong, and is refused by `gsq.run`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from gsq.errors import UserError
from gsq.plan.presets import PRESETS
from gsq.plan.roles import ROLES, Role

FREE = {"free": True}  # json_schema_extra of settings that a resumed run may change
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Listed = Annotated[  # one thing, or a list of them
    tuple[str, ...], BeforeValidator(lambda v: [str(part) for part in (v if isinstance(v, list | tuple) else [v])])
]
WIDTHS = {  # bits by codebook
    "integer": range(2, 9),
    "affine": (2, 3, 4, 5, 6, 8),
    "lloyd": range(2, 5),
    "tq": range(2, 5),
    "jangtq": range(2, 5),
}
MEASURED = ("kurtosis", "sensitivity")  # what a rule may leave its bits to
LAYERS = re.compile(r"(?P<end>first|last) (?P<count>[1-9]\d*)|(?P<from>\d+)(-(?P<to>\d+))?")


class Section(BaseModel):
    """A section refuses keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Parsed = TypeVar("Parsed", bound=Section)


class Model(Section):
    """What to quantize."""

    name: str = Field(description="hub id, folder, or .gguf file")
    max_layers: Positive | None = Field(None, description="walk only the first layers; the rest stays as it is")


class Calib(Section):
    """The text that activations are taken from."""

    source: str = Field(
        "self", description="hub dataset, file or glob of text or JSONL, tokens of another run, or `self`"
    )
    windows: Positive = Field(128, description="windows of tokens, held-out ones included")
    length: int = Field(512, ge=2, description="tokens in a window")
    validation: Positive = Field(16, description="windows, of `windows`, held out to judge hard results")
    batch: Positive | Literal["auto"] = Field(
        8, description="windows pushed through a layer at once; `auto`: as many as the accelerator holds"
    )


class Rule(Section):
    """Tensors that meet all conditions given are quantized, or kept.

    Conditions: one of these roles, one of these layers, a name that matches (a regular expression, searched).
    """

    role: Listed | None = None
    layers: Listed | None = None
    match: str | None = None
    keep: bool = False
    bits: Literal[2, 3, 4, 5, 6, 7, 8, "kurtosis", "sensitivity"] | None = None
    ternary: bool = False
    codebook: Literal["integer", "affine", "lloyd", "tq", "jangtq"] = "integer"
    group_size: Positive = 128
    _preset: str | None = PrivateAttr(None)

    def model_post_init(self, context: Any) -> None:
        """A rule holds somewhere, and says exactly one thing."""
        if not (self.role or self.layers or self.match is not None):
            raise ValueError("a rule needs role, layers or match, to say what it is for")
        for text in self.role or ():
            if not Role.read(text).known:
                raise ValueError(_unknown_role(text))
        for text in self.layers or ():
            _check_layers(text)
        try:
            re.compile(self.match or "")
        except re.error as error:
            raise ValueError(f"{self.match!r} is no regular expression: {error}") from None
        if self.keep + self.ternary + (self.bits is not None) != 1:
            raise ValueError(
                "a rule needs exactly one of: keep: true, bits: N, ternary: true; N may be kurtosis or sensitivity"
            )
        if self.codebook != "integer" and self.bits not in (*self.widths, *MEASURED):
            words = ", ".join(map(str, [*self.widths, *MEASURED]))
            raise ValueError(f"codebook {self.codebook} needs bits: one of {words}")
        if self.codebook == "jangtq" and "group_size" in self.model_fields_set:
            raise ValueError("codebook jangtq has one norm per row, so it takes no group_size; remove it")

    @model_serializer(mode="wrap")
    def _readable(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A rule that can be read back: without what is not given, and the default that its codebook does not take."""
        fields = {key: value for key, value in serialize(self).items() if value is not None}
        if self.codebook == "jangtq":
            del fields["group_size"]
        return fields

    @property
    def widths(self) -> Collection[int]:
        """Bits that the codebook can have."""
        return WIDTHS[self.codebook]

    @property
    def roles(self) -> list[Role]:
        """The roles that it is for, if it names any."""
        return [Role.read(text) for text in self.role or ()]

    @property
    def preset(self) -> str | None:
        """The preset that it comes from."""
        return self._preset

    @property
    def outcome(self) -> tuple | None:
        """What it makes of a tensor; None: keeps it."""
        return None if self.keep else (self.bits, self.ternary, self.codebook, self.group_size)

    def __str__(self) -> str:
        layers = self.layers and f"layers {', '.join(self.layers)}"
        conditions = " · ".join(filter(None, [", ".join(self.role or ()), layers, self.match]))
        return f"{self.preset}: {conditions}" if self.preset else conditions


class Kurtosis(Section):
    """What a rule that says `bits: kurtosis` gives a tensor: the fewest bits whose limit its kurtosis is below.

    From the last limit on, a tensor is kept.
    """

    three_bits: float = Field(4.0, gt=0, description="kurtosis (a Gaussian has 3) below which a tensor gets 3 bits")
    four_bits: float = Field(8.0, gt=0, description="the same for 4 bits")
    five_bits: float = Field(15.0, gt=0, description="the same for 5 bits, where the codebook has them")

    def model_post_init(self, context: Any) -> None:
        """Each width has room."""
        if not self.three_bits < self.four_bits < self.five_bits:
            raise ValueError(
                f"three_bits, four_bits and five_bits must ascend, got {self.three_bits:g}, {self.four_bits:g}, "
                f"{self.five_bits:g}"
            )

    def limits(self) -> dict[int, float]:
        """Limit of the kurtosis by bits, ascending."""
        return {3: self.three_bits, 4: self.four_bits, 5: self.five_bits}


class Sensitivity(Section):
    """What `bits: sensitivity` chooses from, and how it is measured; the text is that of `calib.source`."""

    widths: list[Positive] = Field(
        [2, 3, 4, 5, 6, 8], min_length=1, description="bits to choose from, where codebook and format have them"
    )
    windows: Positive = Field(8, description="windows of text to measure the model's KL on")
    length: int = Field(256, ge=2, description="tokens of a window")


class Plan(Section):
    """Which tensors are quantized, and how: the first rule that matches a tensor decides; others are kept."""

    preset: str | None = Field(None, description="published rules, which follow those of `plan.rules`")
    rules: list[Rule] = []
    kurtosis: Kurtosis = Kurtosis()
    sensitivity: Sensitivity = Sensitivity()
    target_bpw: float | None = Field(None, gt=0, description="bits per quantized weight that `bits: sensitivity` meets")
    target_size: float | None = Field(None, gt=0, description="the same as the model's size on disk, in GB (1e9 bytes)")

    def model_post_init(self, context: Any) -> None:
        """There is something to do."""
        if self.preset is not None and self.preset not in PRESETS:
            near = difflib.get_close_matches(self.preset, PRESETS, n=1)
            advice = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown preset {self.preset!r}; {advice}presets are {', '.join(PRESETS)}")
        if not self.all_rules:
            raise ValueError("nothing says what to quantize; give rules, or a preset")
        targets = (self.target_bpw is not None) + (self.target_size is not None)
        if targets != any(rule.bits == "sensitivity" for rule in self.rules):
            raise ValueError("bits: sensitivity in a rule goes with one of target_bpw and target_size")

    @property
    def all_rules(self) -> list[Rule]:
        """Its rules, then those of its preset."""
        preset = [Rule(**fields) for fields in PRESETS.get(self.preset, ())]
        for rule in preset:
            rule._preset = self.preset
        return self.rules + preset


class Init(Section):
    """The start of refinement."""

    method: Literal["gptq", "rtn"] = Field("gptq", description="GPTQ, or round to nearest with searched scales")
    damping: float = Field(0.02, gt=0, description="added to the Hessian, as a fraction of its mean diagonal")
    polish: int = Field(2, ge=0, description="rounds of coordinate descent and least-squares scales; 0 for none")
    answer_original: bool = Field(True, description="aim at the original model's outputs, not only the layer's")
    expert_prior: float = Field(64.0, ge=0, description="tokens at which an expert's own Hessian weighs as the mean's")


class Refine(Section):
    """Gumbel-Softmax refinement of codes and scales."""

    enabled: bool = Field(True, description="false: keep the init")
    objective: Literal["output", "hessian", "both"] = Field(
        "output",
        description="output of the stage, quadratic model of each Linear, or the second and then the first",
    )
    target: Literal["stream", "layer"] = Field(
        "stream",
        description="reproduce the original model's hidden states, or the original layer on the quantized prefix",
    )
    stage: Literal["layer", "module"] = Field(
        "layer", description="refine a layer's targets together or module by module"
    )
    steps: Positive = Field(64, description="optimizer steps of a stage, for each objective")
    windows: Positive = Field(8, description="calibration windows per step")
    lr: float = Field(0.001, gt=0, description="of logits")
    scale_lr: float = Field(0.004, ge=0, description="of scales, relative to their size")
    weight_decay: float = Field(0.0, ge=0, description="of logits")
    betas: tuple[Share, Share] = Field((0.9, 0.95), description="Lion's momentum factors")
    tau: tuple[PositiveFloat, PositiveFloat] = Field(
        (0.5, 0.05), description="softmax temperature, first to last step, geometric"
    )
    kappa: tuple[PositiveFloat, PositiveFloat] = Field(
        (100.0, 500.0), description="gain of the logits, first to last step, linear"
    )
    gap: float = Field(
        0.06, gt=0, description="starting logit of a level one scale away from the wanted weight, negated"
    )
    noise: float = Field(0.0, ge=0, description="amplitude of the Gumbel noise; 1 is the textbook's")
    checks: Positive = Field(4, description="times that the hard result is judged during a stage")
    logits: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of logits and momentum; bfloat16 takes half the memory, and rounds at random"
    )


class Export(Section):
    """What is written when all layers are done."""

    format: Literal["humming", "tq", "jangtq", "mlx", "compressed-tensors", "compressed-tensors-wide"] | None = Field(
        "humming", description="null: none", json_schema_extra=FREE
    )
    out: str | None = Field(None, description="default: `export` in the run folder", json_schema_extra=FREE)


class Eval(Section):
    """Measured on the export, if `text` is given."""

    text: str | None = Field(None, description="text file to measure on", json_schema_extra=FREE)
    windows: Positive = Field(20, description="windows of that text", json_schema_extra=FREE)
    length: Positive = Field(1024, description="tokens in a window", json_schema_extra=FREE)


class Memory(Section):
    """What a run may take; hidden states and the like that do not fit lie in files.

    No result depends on it, if `calib.batch` is a number.
    """

    device_gb: float | None = Field(
        None, gt=0, description="GB (1e9 bytes) of each accelerator; default: nine tenths of it", json_schema_extra=FREE
    )
    host_gb: float | None = Field(
        None, gt=0, description="GB of each machine's memory; default: nine tenths of what is free at the start",
        json_schema_extra=FREE,
    )  # fmt: skip
    disk_dir: str | None = Field(
        None, description="folder of those files, on a fast disk; default: `scratch` in the run folder",
        json_schema_extra=FREE,
    )  # fmt: skip


class Processes(Section):
    """The processes of a run, where a launcher starts more than one."""

    patience: float = Field(
        30, gt=0, description="minutes that they wait for one of them before they give up", json_schema_extra=FREE
    )


class Tracking(Section):
    """Weights & Biases."""

    wandb: Annotated[Literal["online", "offline", "off"], BeforeValidator(lambda v: "off" if v is False else v)] = (
        Field("off", description="where a run is logged besides its folder", json_schema_extra=FREE)
    )  # YAML reads a bare `off` as false
    project: str = Field("gsq", description="project there", json_schema_extra=FREE)
    name: str | None = Field(None, description="name there; default: the run folder's", json_schema_extra=FREE)


class Config(Section):
    """A whole recipe."""

    model: Model
    plan: Plan
    calib: Calib = Calib()
    init: Init = Init()
    refine: Refine = Refine()
    export: Export = Export()
    eval: Eval = Eval()
    tracking: Tracking = Tracking()
    memory: Memory = Memory()
    processes: Processes = Processes()
    run: str | None = Field(
        None, description="run folder; default: runs/<name of the config file>", json_schema_extra=FREE
    )
    seed: int = Field(0, ge=0, lt=2**31, description="of sampled tokens, order of windows, noise")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of activations; auto: bfloat16 where the processor multiplies it natively"
    )

    def model_post_init(self, context: Any) -> None:
        """What one section says about another."""
        if self.calib.validation >= self.calib.windows:
            raise ValueError(
                f"calib.validation ({self.calib.validation}) must be below calib.windows ({self.calib.windows})"
            )

    def to_yaml(self) -> str:
        """The whole configuration, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def fixed(self) -> dict[str, Any]:
        """Settings by dotted key that a resumed run must not change."""
        return dict(_fixed(self, ""))


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and apply overrides such as `refine.steps=64`; raises `UserError` for any mistake."""
    path = Path(path)
    content = read_yaml(path, "config file", "sections such as model, calib and plan")
    for override in overrides or []:
        _override(content, override)
    content.setdefault("run", f"runs/{path.stem}")
    return parse_config(content, str(path))


def read_yaml(path: Path, kind: str, content: str) -> dict:
    """The mapping in a YAML file; errors call the file a `kind` that must hold `content`."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {kind} {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold {content}")
    return found


def parse_config(content: dict, origin: str = "config") -> Config:
    """A validated `Config` of parsed YAML."""
    return validated(Config, content, origin)


def validated(section: type[Parsed], content: Any, origin: str) -> Parsed:
    """`content` as this section; raises `UserError` with every mistake in it."""
    try:
        return section.model_validate(content)
    except ValidationError as error:
        lines = [_explain(detail, section) for detail in error.errors()]
        raise UserError(f"{origin}: " + "; ".join(lines)) from None


def _unknown_role(text: str) -> str:
    names = [*ROLES, *(f"{family} {part}" for family, parts in ROLES.items() for part in parts)]
    near = difflib.get_close_matches(text, names, n=1)
    advice = f"did you mean {near[0]!r}? " if near else ""
    listed = ", ".join(f"{family} ({' '.join(parts)})" if parts else family for family, parts in ROLES.items())
    return f"unknown role {text!r}; {advice}roles, with their parts, are {listed}"


def _check_layers(text: str) -> None:
    found = LAYERS.fullmatch(text)
    if not found or (found["to"] and int(found["from"]) > int(found["to"])):
        raise ValueError(f"{text!r} names no layers; write `first 2`, `last 2`, `3-10`, or a number (the first is 0)")


def _override(content: dict, override: str) -> None:
    key, separator, value = override.partition("=")
    *sections, leaf = key.strip().split(".")
    if not separator or not leaf:
        raise UserError(f"--set takes section.key=value, got {override!r}")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise UserError(f"--set {override}: {section} is no section")
    try:
        content[leaf] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--set {override}: {value!r} is not valid YAML; quote it") from None


def _explain(detail: Any, root: type[Section]) -> str:
    """One line for one mistake; an unknown key gets the nearest known one."""
    place = ".".join(str(part) for part in detail["loc"]) or "config"
    if detail["type"] != "extra_forbidden":
        message = detail["msg"].removeprefix("Value error, ")
        given = f" (got {detail['input']!r})" if not isinstance(detail["input"], dict | Section) else ""
        return f"{place}: {message}{given}"
    known = sorted(_section_at(root, detail["loc"][:-1]).model_fields)
    near = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1, cutoff=0.5)
    advice = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {place}; {advice}"


def _section_at(section: type[Section], location: tuple) -> type[Section]:
    for part in location:
        if isinstance(part, int):
            section = Rule  # the only sections that come in a list
        elif part != "rules":
            section = section.model_fields[part].annotation
    return section


def _fixed(section: Section, prefix: str):
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _fixed(value, f"{prefix}{name}.")
        elif not (info.json_schema_extra or {}).get("free"):
            yield prefix + name, value
