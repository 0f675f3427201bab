"""What a model card can tell of an export, read from its files, its run's, its original's and those of `gsq eval`.

Numbers are those of the stored tensors and files. What is not known is left out; `missing` says what that is, and
the remedy. How it is told is not known here.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import torch
import yaml
from huggingface_hub import constants

from gsq.calib.tokens import DATASETS, FILES
from gsq.errors import UserError
from gsq.eval.results import read_results
from gsq.export.base import format_of, open_model
from gsq.export.inspect import storage
from gsq.model.checkpoint import Checkpoint, fingerprint, read_json
from gsq.model.skeleton import Skeleton, aliases
from gsq.model.targets import sources
from gsq.plan.roles import Role, find_roles, role_of_unloaded
from gsq.run import PLAN, SOURCE, Run
from gsq.tracking import read_metrics
from gsq.train import export_folder

README = "README.md"
MARK = "<!-- written by gsq card -->"  # tells a card of ours from the original's, which exports carry along
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{40})$")  # where the hub's cache has a model
HUB_SECONDS = 10.0  # that the hub may take to tell a licence

STORED_AS = (  # labels of packed tensors, see `gsq inspect`, and what they say to people
    (r"uint(\d) g(\d+)", "{0}-bit integers, groups of {1}"),
    (r"affine(\d) g(\d+)", "{0}-bit affine, groups of {1}"),
    (r"tq(\d) g(\d+)", "{0}-bit Lloyd-Max, rotated groups of {1}"),
    (r"jangtq(\d)", "{0}-bit Lloyd-Max, rotated rows"),
)


@dataclass(frozen=True)
class Stored:
    """A tensor of the dense model as the folder stores it; `layer` None: in no decoder layer."""

    name: str
    role: Role
    layer: int | None
    label: str
    weights: int
    nbytes: int

    @property
    def kind(self) -> str:
        """How it is stored, for people."""
        found = ((re.fullmatch(pattern, self.label), words) for pattern, words in STORED_AS)
        return next((words.format(*match.groups()) for match, words in found if match), self.label)

    @property
    def bits(self) -> int | None:
        """Bits of a stored code; None if it is not quantized."""
        return None if self.kind == self.label else int(re.search(r"\d", self.label)[0])


@dataclass
class Card:
    """Everything that a card may tell.

    `base` is the original's id on the hub, `revision` its commit, `original` the front matter of its card; `name` is
    what this model is called on the hub.
    """

    folder: Path
    run: Run | None = None
    base: str | None = None
    revision: str | None = None
    original: dict = field(default_factory=dict)
    name: str | None = None
    results: list[dict] = field(default_factory=list)  # of `gsq eval` suites
    measured: list[dict] = field(default_factory=list)  # perplexity and divergence alone, each with its `label`

    @cached_property
    def model(self) -> Checkpoint:
        """The export as dense tensors."""
        return open_model(self.folder)

    @cached_property
    def format(self) -> str:
        """Its format; raises `UserError` if it has none."""
        if found := format_of(Checkpoint.open(self.folder)):
            return found
        raise UserError(f"{self.folder} is not quantized, so there is nothing to tell; give an export or its run")

    @cached_property
    def tensors(self) -> list[Stored]:
        """What it stores, each tensor with its role."""
        return stored_tensors(self.model)

    @cached_property
    def events(self) -> dict[str, list[dict]]:
        """Events of the run by kind."""
        events = defaultdict(list)
        for event in read_metrics(self.run.folder) if self.run else ():
            events[event["kind"]].append(event)
        return events

    @property
    def title(self) -> str:
        """What it is called: its own name, or that of its base and the format."""
        named = self.name or f"{self.base or self.source or self.folder.resolve().name}, {self.format}"
        return named.rpartition("/")[2]

    @property
    def source(self) -> str | None:
        """What the run's config calls the original, if it does not stand for the base's id."""
        return public_name(self.run.config.model.name) if self.run and not self.revision else None

    @property
    def path(self) -> str:
        """What commands call the folder."""
        return self.title if self.name else "."


def find(folder: Path, run: Path | None) -> tuple[Path, Path | None]:
    """Folders of the export and, if it is known, of its run, for an argument that may be either."""
    if not (folder / PLAN).exists():
        parent = folder.resolve().parent
        return folder, run or (parent if (parent / PLAN).exists() else None)
    export = export_folder(folder, Run.open(folder).config)
    if not export.exists():
        raise UserError(f"{folder} has no export in {export}; gsq export {folder} --out DIR, then gsq card DIR")
    return export, folder


def collect(
    folder: Path,
    run: Path | None = None,
    base: str | None = None,
    evaluations: Sequence[Path] = (),
    name: str | None = None,
) -> Card:
    """Gather what a card tells; raises `UserError` for what does not belong together."""
    card = Card(folder, run=run and Run.open(run), name=name)
    if card.format and card.run:
        check_run(card.run, card.tensors)
    card.base, card.revision = _base(card, base)
    card.original = _original(card)
    for path in evaluations:
        content = read_json(path)
        if "perplexity" in content:
            card.measured.append({**content, "label": path.stem})
        else:
            card.results.append(read_results(path))
    labels = Counter(result["model"]["label"] for result in card.results)
    if twice := [label for label, times in labels.items() if times > 1]:
        raise UserError(f"two of the results are of models called {twice[0]!r}; give one of them, or name them apart")
    return card


def stored_tensors(model: Checkpoint) -> list[Stored]:
    """All tensors of a model, or of an export seen as one, in stored order."""
    skeleton = Skeleton(model, torch.device("cpu"), torch.bfloat16)
    layers = skeleton.layer_names
    roles: dict[str, tuple[Role, int | None]] = {}
    for parameter, role in find_roles(skeleton.model, layers).items():
        shape = tuple(skeleton.model.get_parameter(parameter).shape)
        found = next(filter(None, (sources(alias, shape, model.tensors) for alias in aliases(parameter))), [])
        layer = next((i for i, prefix in enumerate(layers) if parameter.startswith(prefix + ".")), None)
        for name in found:
            roles.setdefault(name, (role, layer))
    return [
        Stored(name, *roles.get(name, (role_of_unloaded(name, layers), None)), label, model.tensors[name].numel, nbytes)
        for name, (label, nbytes) in storage(model).items()
    ]


def check_run(run: Run, tensors: Iterable[Stored]) -> None:
    """Raise `UserError` if a tensor that the run quantized is not packed in an export, which then is another run's.

    Compared by role and layer: formats name experts differently.
    """
    packed = {(tensor.role.family, tensor.layer) for tensor in tensors if tensor.bits}
    for entry in run.plan.targets():
        if (Role.read(entry.role).family, entry.layer) not in packed:
            raise UserError(f"{run.folder} quantized {entry.name}, but the export did not; give the run that made it")


def missing(card: Card) -> list[str]:
    """What the card had to leave out, and the remedy."""
    gaps = []
    if card.base is None:
        gaps.append("the base model is not known; give its id with --base org/model")
    if "license" not in card.original:
        gaps.append("the licence is not known; add that of the base model to the front matter")
    if card.run is None:
        gaps.append("how it was quantized is not known; give its run with --run")
    if not (card.results or card.measured or card.events.get("eval")):
        gaps.append("it was not measured; give results of gsq eval with --eval")
    fingerprints = {result["model"].get("fingerprint") for result in card.results}
    if card.results and fingerprint(Checkpoint.open(card.folder)) not in fingerprints:
        gaps.append("no result of the suite is of these very weights: the fingerprints differ")
    return gaps


def _base(card: Card, given: str | None) -> tuple[str | None, str | None]:
    """Id of the base model and its commit: as given, as the hub's cache names the run's source, as told before."""
    if card.run and (found := SNAPSHOT.search(str(_source_folder(card.run)))):
        name = found[1].replace("--", "/")
        if given in (None, name):
            return name, found[2]
    text = _text(card.folder / README)
    before = str(_parse(text).get("base_model")) if MARK in text else ""
    return given or (before if HUB_ID.fullmatch(before) else None), None


def _original(card: Card) -> dict:
    """Front matter of the original's card: the first that names a licence, of the source's, the export's, the hub's."""
    first: dict = {}
    for found in _original_cards(card):
        if "license" in found:
            return found
        first = first or found
    return first


def _original_cards(card: Card) -> Iterator[dict]:
    if card.run:
        yield _parse(_text(_source_folder(card.run) / README))
    yield _parse(_text(card.folder / README))
    if card.base:
        yield _hub_card(card.base)


def _source_folder(run: Run) -> Path:
    """Where the run found the original, which need not be there any more."""
    return Path(read_json(run.folder / SOURCE)["folder"])


def _hub_card(model: str) -> dict:
    """Front matter of a model's card on the hub; empty if the hub does not give it, for whatever reason."""
    if constants.HF_HUB_OFFLINE:
        return {}
    with (
        suppress(OSError, ValueError, HTTPException),
        urlopen(f"{constants.ENDPOINT}/api/models/{model}", timeout=HUB_SECONDS) as page,
    ):
        found = json.load(page).get("cardData")
        return found if isinstance(found, dict) else {}
    return {}


def _text(path: Path) -> str:
    """What is in a text file; nothing if there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _parse(readme: str) -> dict:
    """The front matter of a README; empty if it has none that is valid."""
    found = re.match(r"---\r?\n(.*?)\r?\n---", readme, re.DOTALL)
    with suppress(yaml.YAMLError):
        fields = yaml.safe_load(found[1]) if found else None
        return fields if isinstance(fields, dict) else {}
    return {}


def replaceable(path: Path, run: Run | None) -> bool:
    """Whether a README is a card of ours, or the original's, which the export copied from the run's source."""
    text = _text(path)
    return MARK in text or (run is not None and text == _text(_source_folder(run) / README))


def measured_by_run(card: Card) -> Iterator[dict]:
    """What the run measured of its own export, the last of each label."""
    if card.run is None:
        return
    own = export_folder(card.run.folder, card.run.config)
    same = own.exists() and own.samefile(card.folder)
    for event in {event.get("label"): event for event in card.events.get("eval", ())}.values():
        of = "this" if same else f"the run's export in format {card.run.config.export.format}"
        text = f", {Path(card.run.config.eval.text).name}" if card.run.config.eval.text else ""
        yield event | {"label": of + text}


def public_name(source: str) -> str:
    """What a setting names, without the path to it on this machine."""
    local = Path(source).suffix in FILES | {".safetensors", ".gguf"} or not (
        source == "self" or source in DATASETS or HUB_ID.fullmatch(source)
    )
    return Path(source).name if local else source
