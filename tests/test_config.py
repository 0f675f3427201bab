"""A recipe with a mistake is refused before any work, in words that mend it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gsq.config import Config, load_config, parse_config
from gsq.errors import UserError

ROOT = Path(__file__).parent.parent
RULES = [{"match": "_proj", "bits": 2}]
MINIMAL = {"model": {"name": "org/model"}, "plan": {"rules": RULES}}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_published_recipe_loads(path: Path):
    config = load_config(path)
    assert config.run == f"runs/{path.stem}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (MINIMAL | {"refin": {"steps": 2}}, "unknown key refin; did you mean 'refine'?"),
        (MINIMAL | {"refine": {"step": 2}}, "unknown key refine.step; did you mean 'steps'?"),
        (MINIMAL | {"calib": {"zzzzz": 2}}, "unknown key calib.zzzzz; known keys: batch, length"),
        (
            MINIMAL | {"plan": {"rules": [{"match": "a", "bits": 2, "groupsize": 64}]}},
            "unknown key plan.rules.0.groupsize; did you mean 'group_size'?",
        ),
        (MINIMAL | {"refine": {"steps": "many"}}, "refine.steps: Input should be a valid integer"),
        (MINIMAL | {"refine": {"steps": 0}}, r"refine.steps: .* greater than 0 \(got 0\)"),
        (MINIMAL | {"model": {"name": 7}}, r"model.name: Input should be a valid string \(got 7\)"),
        (MINIMAL | {"calib": [1]}, "calib: Input should be a valid dictionary"),
        (MINIMAL | {"init": {"method": "magic"}}, "init.method: Input should be 'gptq' or 'rtn'"),
        ({"model": {"name": "m"}}, "plan: Field required"),
        (
            {"model": {"name": "m"}, "plan": {"rules": []}},
            "plan: nothing says what to quantize; give rules, or a preset",
        ),
        (MINIMAL | {"plan": {"preset": "gsq3"}}, "plan: unknown preset 'gsq3'; did you mean 'gsq2'"),
        (MINIMAL | {"plan": {"preset": "none"}}, "plan: unknown preset 'none'; presets are gsq2, config-i, apex2"),
        (MINIMAL | {"calib": {"windows": 8, "validation": 8}}, r"calib.validation \(8\) must be below calib.windows"),
    ],
)
def test_mistakes_are_named(content: dict, message: str):
    with pytest.raises(UserError, match=f"^config: .*{message}"):
        parse_config(content)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, "exactly one of: keep: true, bits: N, ternary: true"),
        ({"bits": 2, "keep": True}, "exactly one of"),
        ({"bits": 2, "ternary": True}, "exactly one of"),
        ({"bits": 9}, "plan.rules.0.bits: Input should be 2, 3"),
        ({"bits": 2, "match": "("}, r"'\(' is no regular expression"),
        ({"bits": 2, "group_size": 0}, "greater than 0"),
        ({"bits": 2, "match": None}, "a rule needs role, layers or match"),
        ({"bits": 2, "role": "atention q"}, "unknown role 'atention q'; did you mean 'attention q'"),
        ({"bits": 2, "role": ["mlp", "mlp left"]}, r"unknown role 'mlp left'; .*mlp \(gate up down\), .*router"),
        ({"bits": 2, "layers": "5-3"}, "'5-3' names no layers; write `first 2`"),
        ({"bits": 2, "layers": [0, "first 0"]}, "'first 0' names no layers"),
        ({"bits": 2, "layers": -1}, "'-1' names no layers"),
        ({"bits": 7, "codebook": "affine"}, "codebook affine needs bits: one of 2, 3, 4, 5, 6, 8, kurtosis"),
    ],
)
def test_rules(rule: dict, message: str):
    with pytest.raises(UserError, match=message):
        parse_config(MINIMAL | {"plan": {"rules": [{"match": "_proj"} | rule]}})


def test_overrides(recipe: Path):
    settings = ["refine.steps=64", "refine.lr=1e-4", "export.format=null", "calib.source=a=b.txt", "model.name=x"]
    config = load_config(recipe, [*settings, "plan.rules=[{match: q, ternary: true}]"])
    assert (config.refine.steps, config.refine.lr, config.export.format) == (64, 1e-4, None)
    assert (config.calib.source, config.model.name) == ("a=b.txt", "x")
    assert config.plan.rules[0].ternary


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("refine.steps", "--set takes section.key=value, got 'refine.steps'"),
        ("=5", "--set takes section.key=value"),
        ("refine.stesp=5", "unknown key refine.stesp; did you mean 'steps'?"),
        ("refine.steps=[", r"'\[' is not valid YAML"),
        ("refine.steps=some", "refine.steps: .* valid integer"),
        ("model.name.first=5", "name is no section"),
        ("plan.rules.0.bits=3", "rules is no section"),
    ],
)
def test_bad_overrides(recipe: Path, override: str, message: str):
    with pytest.raises(UserError, match=message):
        load_config(recipe, [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: [", "is not valid YAML"),
        ("- a\n- b", "must hold sections such as model"),
        ("", "must hold sections"),
        (b"\xff\xfe\x00", "is not valid YAML"),
    ],
)
def test_broken_files(tmp_path: Path, content: str | bytes, message: str):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        load_config(path)


@pytest.mark.parametrize(("name", "reason"), [("none.yaml", "No such file"), ("", "Is a directory")])
def test_files_that_cannot_be_read(tmp_path: Path, name: str, reason: str):
    with pytest.raises(UserError, match=f"cannot read config file .*: {reason}"):
        load_config(tmp_path / name)


def test_yaml_round_trip(recipe: Path):
    config = load_config(
        recipe, ["refine.tau=[1, 0.1]", "plan.rules=[{match: 'a|\\d', keep: true}, {match: b, bits: 3}]"]
    )
    assert parse_config(yaml.safe_load(config.to_yaml())) == config


def test_a_rule_without_groups_is_read_back(recipe: Path):
    config = load_config(recipe, ["plan.rules=[{match: a, bits: 2, codebook: jangtq}]"])
    again = parse_config(yaml.safe_load(config.to_yaml()))
    assert again.fixed() == config.fixed()


def test_roles_layers_and_a_preset_are_read_back(recipe: Path):
    rule = "{role: [mlp down, head], layers: [0, first 2], bits: 3, codebook: affine}"
    config = load_config(recipe, [f"plan.rules=[{rule}]", "plan.preset=gsq2"])
    again = parse_config(yaml.safe_load(config.to_yaml()))
    assert again == config
    assert [str(rule) for rule in again.plan.all_rules] == ["mlp down, head · layers 0, first 2", "gsq2: expert"]
    assert {"plan.rules", "plan.preset"} <= again.fixed().keys()


def test_fixed_settings_are_those_that_change_the_layers(recipe: Path):
    fixed = load_config(recipe).fixed()
    assert {"model.name", "plan.rules", "calib.windows", "refine.steps", "seed", "dtype"} <= fixed.keys()
    free = {"run", *(f"{section}.{key}" for section in ("export", "eval", "tracking") for key in _keys(section))}
    assert free.isdisjoint(fixed)
    changed = load_config(recipe, ["refine.steps=7", "eval.windows=3", "run=elsewhere"]).fixed()
    assert {key for key in fixed if fixed[key] != changed[key]} == {"refine.steps"}


def _keys(section: str) -> set[str]:
    return set(Config.model_fields[section].annotation.model_fields)
