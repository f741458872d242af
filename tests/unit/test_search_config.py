"""The block `search.<run>`: what is refused, and by which key the message names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from attune.config import check as config
from attune.config.schema import ConfigError

ROOT = Path(__file__).parents[2]


def load(tmp_path: Path, run: str, **changes: Any) -> config.Profile:
    """params.yaml's profile tiny, with keys of one search changed; None takes a key out."""
    values = YAML(typ="safe").load(ROOT / "params.yaml")
    block = {**values["profiles"]["tiny"]["search"][run], **changes}
    values["profiles"]["tiny"]["search"][run] = {key: value for key, value in block.items() if value is not None}
    with (tmp_path / "params.yaml").open("w") as file:
        YAML().dump(values, file)
    return config.load(tmp_path / "params.yaml")[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"betta": {"low": 1, "high": 2}}}, r"search\.dpo\.space\.betta: no such key; known keys: .*beta"),
        ({"space": {"beta": {"low": 0, "high": 2}}}, r"search\.dpo\.space\.beta: 0\.0 does not do: beta: .*greater"),
        ({"space": {"beta": {"low": 2, "high": 1}}}, r"search\.dpo\.space\.beta: .*low must be less than high"),
        ({"space": {"beta": {"low": 2}}}, r"search\.dpo\.space\.beta: .*either low and high, or choices"),
        ({"space": {"optimizer": {"low": 1, "high": 2}}}, r"space\.optimizer: only a number has a range"),
        ({"space": {"optimizer": {"choices": ["sgd"]}}}, r"space\.optimizer: 'sgd' does not do: optimizer"),
        ({"space": {"lora.rank": {"low": 0, "high": 8}}}, r"space\.lora\.rank: 0 does not do: lora\.rank"),
        ({"space": {"lora.size": {"low": 1, "high": 8}}}, r"space\.lora\.size: no such key; known keys: rank"),
        ({"fixed": {"batch": 3}}, r"search\.dpo\.fixed\.batch: 3 does not do: batch.*known keys"),
        ({"fixed": {"beta": 3}}, r"fixed\.beta: it is searched"),
        ({"objectives": ["taste"]}, r"search\.dpo\.objectives: 'taste' is not in scorers"),
        ({"objectives": ["oracle", "hpsv2"]}, r"pruner: with two objectives"),
        ({"sampler": "nsgaii"}, r"nsgaii needs two objectives"),
        ({"sampler": "grid"}, r"a grid needs choices for every key"),
        ({"trials": None}, r"trials: how many"),
        ({"fixed": {}}, r"finalists: without fixed"),
        ({"storage": "mysql://host/db"}, r"search\.dpo\.storage: "),
    ],
)
def test_a_mistake_is_named_by_its_key(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, "dpo", **changes)


@pytest.mark.parametrize(
    "address",
    [
        "postgresql+psycopg://me:s3cret@host/db",
        "postgresql://me:s3cret@host/db",  # of no known kind either
        "me:s3cret@host/db",
        "postgresql+psycopg://me:s3://cret@host/db",
        "postgresql+psycopg://me:s3/c@ret@host/db",
        "postgresql+psycopg://me@host/db?sslmode=require&Password=s3cret",
    ],
)
def test_a_password_is_refused_and_not_printed(tmp_path, address):
    """Nor where something else is wrong with the block, or with two of its keys together."""
    for changes in ({}, {"trials": "many"}, {"sampler": "nsgaii"}):
        with pytest.raises(ConfigError, match=r"search\.dpo\.storage: .*PGPASSWORD") as raised:
            load(tmp_path, "dpo", storage=address, **changes)
        assert "s3" not in str(raised.value)


def test_an_address_without_a_password_passes(tmp_path):
    for address in ("postgresql+psycopg://me@host:5432/db", "postgresql+psycopg:///db?host=/run", "sqlite:///x.db"):
        assert load(tmp_path, "dpo", storage=address).search["dpo"]["storage"] == address


def test_a_search_needs_a_block_of_its_run(tmp_path):
    values = YAML(typ="safe").load(ROOT / "params.yaml")
    values["profiles"]["tiny"]["search"]["dpo_2"] = values["profiles"]["tiny"]["search"]["dpo"]
    with (tmp_path / "params.yaml").open("w") as file:
        YAML().dump(values, file)
    with pytest.raises(ConfigError, match=r"search\.dpo_2: profiles\.tiny\.methods has no block of that name"):
        config.load(tmp_path / "params.yaml")


def test_apply_refuses_to_change_a_block_that_another_profile_shares(tmp_path):
    """`b` inherits a's methods: a value written there would be a's as well."""
    text = "profiles:\n  a: &a\n    methods: {dpo: {beta: 1}}\n  b:\n    <<: *a\n"
    file = tmp_path / "params.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"profiles\.b\.methods\.dpo\.beta: another block shares these"):
        config.update_params_file({"profiles.b.methods.dpo.beta": 2}, file)
    assert file.read_text() == text
