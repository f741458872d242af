"""run_methods: a run has any name, its method's settings, and another run's model to start from."""

import json
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

import tiny
from attune.build import load_learner
from attune.config import check as config
from attune.config.profile import Profile
from attune.config.schema import ConfigError
from attune.finetune import seed_of
from attune.stages.report import trained_on
from attune.training.loop import epoch_rows

ROOT = Path(__file__).parents[2]
COMMIT = "0" * 40


@pytest.fixture
def values(tmp_path, monkeypatch):
    """The repository's settings, with three runs: dpo, one with another beta, and one that goes on from dpo."""
    monkeypatch.chdir(tmp_path)
    values = YAML(typ="safe").load(ROOT / "params.yaml") | {"profile": "tiny"}
    methods = values["profiles"]["tiny"]["methods"]
    methods["dpo_beta100"] = methods["dpo"] | {"beta": 100}
    methods["again"] = methods["dpo"] | {"start": "models/dpo"}
    also = {"code": "src/attune/data", "reads": "model"}
    values["run_methods"] = {
        "dpo": {"method": "dpo", "needs": "data/prepared", **also},
        "dpo_beta100": {"method": "dpo", "needs": "data/prepared", **also},
        "again": {"method": "dpo", "needs": "models/dpo", **also},
    }
    return values


def load(values):
    YAML().dump(values, Path("params.yaml"))
    return config.load()


def refusal(values):
    with pytest.raises(ConfigError) as error:
        load(values)
    return str(error.value)


def block(values, run):
    return values["profiles"]["tiny"]["methods"][run]


def test_any_name_will_do_and_its_block_is_checked_as_its_methods(values):
    params, profile = load(values)
    assert {name: config.method_of(name, params) for name in params.run_methods} == dict.fromkeys(
        params.run_methods, "dpo"
    )
    assert profile.methods["dpo_beta100"]["beta"] == 100
    block(values, "again")["betta"] = 1
    assert refusal(values).startswith("profiles.tiny.methods.again.betta: Extra inputs are not permitted; known keys: ")


def test_a_block_that_is_not_run_belongs_to_the_method_its_name_begins_with(values):
    del values["run_methods"]["dpo_beta100"]
    params, _ = load(values)
    assert config.method_of("dpo_beta100", params) == "dpo"
    block(values, "dpo_beta100")["beta"] = "x"
    assert refusal(values).startswith("profiles.tiny.methods.dpo_beta100.beta: Input should be a valid number")
    block(values, "dpo_beta100")["beta"] = 100
    del values["run_methods"]["again"]
    assert refusal(values).startswith("profiles.tiny.methods.again: no methods plug-in named 'again'")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("method", "ppo", "run_methods.again.method: no methods plug-in named 'ppo'; there are "),
        ("method", None, "run_methods.again.method: Input should be a valid string"),
        ("needs", "a b; c", "run_methods.again.needs: String should match pattern"),
        ("needs", "data/prepared", "run_methods.again.needs: must be models/dpo, where the run starts"),
        (
            "needs",
            "models/dpo_beta100",
            "methods.again.start: must be models/dpo_beta100, which run_methods.again stands",
        ),
    ],
)
def test_a_wrong_run_is_named(values, key, value, says):
    values["run_methods"]["again"][key] = value
    assert says in refusal(values)


@pytest.mark.parametrize("name", config.RESERVED)
def test_names_of_other_models_are_taken(values, name):
    values["run_methods"] = {name: values["run_methods"]["dpo"]}
    values["profiles"]["tiny"]["methods"] = {name: block(values, "dpo")}
    assert refusal(values) == f"run_methods.{name}: the name is taken"


def test_a_name_with_a_dot_would_be_lost_in_dvcs_keys(values):
    values["run_methods"]["dpo_0.5"] = values["run_methods"]["dpo"]
    assert "run_methods.dpo_0.5" in refusal(values)


@pytest.mark.parametrize(
    ("start", "needs", "says"),
    [
        (None, "models/dpo", "start: must be models/dpo, which run_methods.again stands on"),
        ("models/again", "models/again", "start: models/again is neither here nor another run's model"),
        ("mine.safetensors", "mine.safetensors", "start: mine.safetensors is neither here nor another run's model"),
        ("mine.safetensors", "data/prepared", "run_methods.again.needs: must be mine.safetensors"),
        ("owner/name@main", "data/prepared", "start: String should match pattern"),
    ],
)
def test_a_start_that_dvc_would_not_see_or_nobody_makes_is_refused(values, start, needs, says):
    block(values, "again")["start"] = start
    values["run_methods"]["again"]["needs"] = needs
    assert says in refusal(values)


def test_a_start_may_be_here_or_on_the_hub(values):
    values["run_methods"]["again"]["needs"] = "mine.safetensors"
    block(values, "again")["start"] = "mine.safetensors"
    Path("mine.safetensors").touch()
    load(values)
    values["run_methods"]["again"]["needs"] = "data/prepared"
    block(values, "again")["start"] = f"owner/name/file.safetensors@{COMMIT}"
    load(values)


def test_a_run_that_needs_something_else_as_well_names_its_start_under_code(values):
    values["run_methods"]["again"] |= {"needs": "models/preference", "code": "models/dpo"}
    load(values)


@pytest.mark.parametrize("full", [False, True])
def test_a_learner_begins_where_its_run_says(tmp_path, tiny_folder, new_policy, full):
    """What the align stage trains: the model of another run, and the same again, frozen, to compare with."""
    saved = new_policy(adapter=not full, moved=0.1)
    if full:
        saved.unfreeze()
        tiny.move(saved, 0.01)
    saved.save(tmp_path / "first")
    block = {"lora": None if full else {"rank": 2}, "lr": 1e-4, "batches": 1, "batch_size": 1}
    values = config.read_params(ROOT / "params.yaml")["profiles"]["tiny"]
    values |= {"model": {"backbone": "sd", "path": tiny_folder}}
    values["methods"] = {"fresh": block, "again": block | {"start": str(tmp_path / "first")}}
    profile = config.check(Profile, values)
    fresh, again = (load_learner(name, profile, "sft") for name in ("fresh", "again"))
    assert fresh.parameters()
    for expected, found in zip(saved.parameters(), again.parameters(), strict=True):
        assert torch.equal(expected, found)
    assert not all(torch.equal(*both) for both in zip(fresh.parameters(), again.parameters(), strict=True))
    kept = dict(again.reference_model.named_parameters())
    assert all(torch.equal(kept[name], weight) for name, weight in again.denoiser.named_parameters())


def test_what_goes_on_sees_other_batches_and_other_noise():
    """One seed of the profile makes them all: that of a fresh run stays what it is."""
    seeds = [seed_of(7, start) for start in (None, "models/a", "models/b")] + [seed_of(8, "models/a")]
    assert seeds[0] == 7
    assert len(set(seeds)) == 4
    assert seed_of(7, "models/a") == seeds[1]
    assert not torch.equal(*(epoch_rows(50, 50, 0, seed) for seed in seeds[:2]))


def test_scorers_seen_before_the_start_are_not_held_out_either(tmp_path, monkeypatch):
    """b went on from a, which saw pickscore; c from b by way of a method that saw hpsv2; d from elsewhere."""
    monkeypatch.chdir(tmp_path)
    facts = {
        "a": {"trained_on": ["pickscore"], "start": None},
        "b": {"trained_on": [], "start": "models/a"},
        "c": {"trained_on": ["hpsv2", "pickscore"], "start": "models/b"},
        "d": {"trained_on": [], "start": "released/a"},
        "e": {"trained_on": ["hpsv2"]},
    }
    folder = Path("reports/train")
    folder.mkdir(parents=True)
    for name, record in facts.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    seen = trained_on(["base", *facts])
    assert seen == {"a": ["pickscore"], "b": ["pickscore"], "c": ["pickscore", "hpsv2"], "d": [], "e": ["hpsv2"]}
