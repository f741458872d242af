"""docs/settings.md and docs/schema are what the Configs say, and editors accept the shipped files by them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from attune.config import reference

ROOT = Path(__file__).parents[2]
REMEDY = "run `make settings`"


def test_the_page_is_what_the_configs_say():
    assert (ROOT / reference.PAGE).read_text(encoding="utf-8") == reference.page(), REMEDY


def test_the_schemas_are_what_the_configs_say():
    written = {file.name: file.read_text(encoding="utf-8") for file in (ROOT / reference.SCHEMAS).iterdir()}
    assert written == reference.schemas(), REMEDY


def test_every_key_has_a_meaning():
    assert not [line for line in reference.page().splitlines() if line.endswith("|  |")]


@pytest.mark.parametrize("profile", sorted(path.stem for path in (ROOT / "params").glob("*.yaml")))
def test_the_schema_accepts_the_shipped_profiles_and_no_mistake(profile):
    checks = Draft202012Validator(json.loads(reference.schemas()["profile.json"]))
    values = YAML(typ="safe").load(ROOT / "params" / f"{profile}.yaml")
    assert [error.message for error in checks.iter_errors(values)] == []
    assert not checks.is_valid(values | {"sede": 1})
    assert not checks.is_valid(values | {"seed": "one"})


def test_the_schema_accepts_params_yaml():
    checks = Draft202012Validator(json.loads(reference.schemas()["params.json"]))
    values = YAML(typ="safe").load(ROOT / "params.yaml")
    assert checks.is_valid(values)
    assert not checks.is_valid(values | {"runs": {"dpo": {"methode": "dpo"}}})
