"""What the documents say must be so: settings and defaults, commands, files."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic_core import PydanticUndefined

from gsq.cli import app
from gsq.config import Config, Section

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def settings(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, object, str | None]]:
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from settings(info.annotation, f"{prefix}{name}.")
        elif name != "rules":
            yield prefix + name, info.default, info.description


def shown(default: object) -> str:
    if default is PydanticUndefined:
        return "required"
    if default is None:
        return "–"
    return str(list(default)) if isinstance(default, tuple) else str(default).lower()


def test_every_setting_is_listed_with_its_default_and_meaning():
    listed = (ROOT / "docs" / "config.md").read_text()
    for name, default, meaning in settings():
        assert f"| `{name}` | {shown(default)} | {meaning} |" in listed


def test_no_setting_is_listed_that_is_gone():
    listed = re.findall(r"^\| `([\w.]+)` \|", (ROOT / "docs" / "config.md").read_text(), re.MULTILINE)
    assert listed == [name for name, *_ in settings()]


def test_every_command_is_in_the_readme():
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    named = set(re.findall(r"^\| `gsq (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert named == commands


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document: Path):
    text = document.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    named = re.findall(r"\b((?:configs|scripts|bench|docs)/[\w/.-]+\.\w+)", text)
    for path in {document.parent / link for link in links} | {ROOT / name for name in named}:
        assert path.exists(), path
