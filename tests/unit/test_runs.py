"""Runs: any name, its method's settings, and another run's model to start from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import params as files
import tiny
from attune.build import load_learner
from attune.config import plugins
from attune.config.resolve import Settings, load
from attune.config.schema import ConfigError
from attune.config.settings import Model
from attune.finetune import seed_of
from attune.planning.make import trained_on
from attune.training.loop import epoch_rows

ROOT = Path(__file__).parents[2]
COMMIT = "0" * 40


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """The shipped settings with two runs more: dpo with another beta, and one of another name; and changes."""
    monkeypatch.chdir(ROOT)

    def made(runs: dict | None = None, **changes) -> Settings:
        params, values = files.shipped()
        dpo = values["methods"]["dpo"]
        more = {
            "runs__dpo_beta100": {"method": "dpo", "after": "data"},
            "runs__again": {"method": "dpo", "after": "dpo"},
        }
        blocks = {"methods__dpo_beta100": dpo | {"beta": 100}, "methods__again": dpo}
        params = files.changed(params, **(more | (runs or {})))
        return load(files.write(tmp_path, params, files.changed(files.changed(values, **blocks), **changes)))

    return made


def test_any_name_will_do_and_its_block_is_checked_as_its_methods(settings):
    found = settings()
    assert {found.method_of(name) for name in ("dpo", "dpo_beta100", "again")} == {"dpo"}
    assert (found.methods["dpo_beta100"].beta, found.methods["again"].beta) == (100, 500)
    with pytest.raises(ConfigError, match=r"methods\.again\.betta: Extra inputs are not permitted; known keys: "):
        settings(methods__again__betta=1)


def test_a_block_that_is_not_run_belongs_to_the_method_its_name_begins_with(settings):
    unused = {"runs__dpo_beta100": ...}
    assert settings(unused).method_of("dpo_beta100") == "dpo"
    with pytest.raises(ConfigError, match=r"methods\.dpo_beta100\.beta: Input should be a valid number"):
        settings(unused, methods__dpo_beta100__beta="x")
    with pytest.raises(ConfigError, match=r"methods\.again: no methods plug-in named 'again'"):
        settings({"runs__again": ...})


@pytest.mark.parametrize("name", ["dpo_0.5", "2nd", "a b", ""])
def test_a_name_must_do_for_a_folder_and_a_stage_of_dvc(tmp_path, name):
    params, profile = files.shipped()
    params["runs"] = params["runs"] | {name: {"method": "dpo", "after": "data"}}
    with pytest.raises(ConfigError, match="runs"):
        load(files.write(tmp_path, params, profile))


def test_a_start_may_be_here_or_on_the_hub_if_it_is_pinned(settings):
    for start in ("/disk/loras/mine.safetensors", f"owner/name/file.safetensors@{COMMIT}"):
        assert settings(methods__again__start=start).methods["again"].start == start
    with pytest.raises(ConfigError, match=r"methods\.again\.start: "):
        settings(methods__again__start="owner/name@main")


@pytest.mark.parametrize("full", [False, True])
def test_a_learner_begins_where_its_run_says(tmp_path, tiny_folder, new_policy, full):
    """What the align stage trains: the model of another run, and the same again, frozen, to compare with."""
    saved = new_policy(adapter=not full, moved=0.1)
    if full:
        saved.unfreeze()
        tiny.move(saved, 0.01)
    saved.save(tmp_path / "first")
    block = {"lora": None if full else {"rank": 2}, "lr": 1e-4, "batches": 1, "batch_size": 1}
    config = plugins.plugin_config("methods", "sft", block, "methods.sft")
    model = Model(backbone="sd", path=tiny_folder)
    fresh, again = (load_learner(config, model, 0, start) for start in (None, str(tmp_path / "first")))
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


def test_scorers_seen_before_the_start_are_not_held_out_either(settings):
    """b goes on from a, whose labels pickscore gave; c from b, with hpsv2 as labeller; d starts elsewhere."""
    after = {"a": "data", "b": "a", "c": "b", "d": "data"}
    runs = {f"runs__{name}": {"method": "dpo", "after": before} for name, before in after.items()}
    blocks = {f"methods__{name}": {} for name in after}
    blocks |= {
        "methods__a": {"ai_feedback": {"scorer": "pickscore"}},
        "methods__c": {"ai_feedback": {"scorer": "hpsv2"}},
    }
    found = settings(runs, **blocks)
    seen = {name: trained_on(name, found) for name in after}
    assert seen == {"a": ["pickscore"], "b": ["pickscore"], "c": ["pickscore", "hpsv2"], "d": []}
