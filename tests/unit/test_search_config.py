"""The block `search.<run>`: what is refused, and by which key the message names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import params
from attune.config.resolve import Settings
from attune.config.resolve import load as load_settings
from attune.config.schema import ConfigError
from attune.planning.problems import Machine, problems

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def load(tmp_path: Path, run: str, **changes: Any) -> Settings:
    """The profile tiny with keys of one search changed; None takes a key out. What the plan says raises ConfigError."""
    given, profile = params.shipped()
    block = {**profile["search"][run], **changes}
    profile["search"][run] = {key: value for key, value in block.items() if value is not None}
    settings = load_settings(params.write(tmp_path, given, profile))
    if found := problems(settings, 0, Machine(0, 0, 0, 0)):
        raise ConfigError("\n".join(found))
    return settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"betta": {"low": 1, "high": 2}}}, r"search\.dpo\.space\.betta: no such key; known keys: .*beta"),
        (
            {"space": {"beta": {"low": 0, "high": 2}}},
            r"space\.beta: 0\.0 is not accepted: beta: .*greater",
        ),
        ({"space": {"beta": {"low": 2, "high": 1}}}, r"search\.dpo\.space\.beta: .*low must be less than high"),
        ({"space": {"beta": {"low": 2, "high": 2}}}, r"search\.dpo\.space\.beta: .*low must be less than high"),
        (
            {
                "space": {
                    "beta": {"choices": list(range(1, 400))},
                    "lr": {"choices": [i / 400 for i in range(1, 400)]},
                },
                "sampler": "grid",
            },
            r"space: a grid of 159,201 points; at most 100,000",
        ),
        ({"space": {"beta": {"low": 2}}}, r"search\.dpo\.space\.beta: .*either low and high, or choices"),
        ({"space": {"optimizer": {"low": 1, "high": 2}}}, r"space\.optimizer: only a number has a range"),
        ({"space": {"optimizer": {"choices": ["sgd"]}}}, r"space\.optimizer: 'sgd' is not accepted: optimizer"),
        ({"space": {"lora.rank": {"low": 0, "high": 8}}}, r"space\.lora\.rank: 0 is not accepted: lora\.rank"),
        ({"space": {"lora.size": {"low": 1, "high": 8}}}, r"space\.lora\.size: no such key; known keys: rank"),
        ({"fixed": {"batch": 3}}, r"search\.dpo\.fixed\.batch: 3 is not accepted: batch.*known keys"),
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
        assert load(tmp_path, "dpo", storage=address).search["dpo"].storage == address
