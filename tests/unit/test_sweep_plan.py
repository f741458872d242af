"""From a plan to a study and to the settings of its trials; what makes another study."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attune.config.settings import Sampling
from attune.paths import Paths
from attune.search import study, sweep
from attune.search.plan import SweepPlan
from attune.search.trial import Trial
from searching import sweep_plan


def name(plan: SweepPlan) -> str:
    return sweep.study_spec(plan, Path("root")).name


def test_the_environment_overrides_the_storage_and_is_not_printed(tmp_path, monkeypatch):
    plan = sweep_plan(tmp_path, {"storage": "sqlite:///x.db"})
    assert sweep.study_spec(plan, tmp_path).storage == f"sqlite:///{tmp_path}/x.db"
    monkeypatch.setenv("ATTUNE_STORAGE", "postgresql+psycopg://me:s3cret@host/db")
    spec = sweep.study_spec(plan, tmp_path)
    assert spec.storage == "postgresql+psycopg://me:s3cret@host/db"
    assert "s3cret" not in f"{spec} {study.how_to_reset(spec)}"
    monkeypatch.setenv("ATTUNE_STORAGE", "postgres://me:s3cret@host/db")
    with pytest.raises(study.SearchError, match="must begin with sqlite:///") as raised:
        sweep.study_spec(plan, tmp_path)
    assert "s3cret" not in str(raised.value)


def test_what_changes_scores_makes_another_study(tmp_path):
    same = name(sweep_plan(tmp_path))
    session = {"trials": 99, "finalists": 1, "workers": 7, "minutes": 3, "storage": "sqlite:///x.db"}
    assert name(sweep_plan(tmp_path, session)) == same
    searches = [{"prompts": 59}, {"fixed": {"batches": 61}}, {"pruner": "none"}, {"objectives": ["oracle"]}]
    searches.append({"space": {"beta": {"low": 100, "high": 5001}}})
    changes: list[dict[str, Any]] = [{"seed": 1}, {"inputs": {"base": "5678"}}]
    changes.append({"settings": {"batch_size": 3}})
    others = [sweep_plan(tmp_path, search) for search in searches] + [
        sweep_plan(tmp_path, **change) for change in changes
    ]
    sampling = plan_sampling(eta=0.5)
    others.append(replace(sweep_plan(tmp_path), sampling=sampling))
    assert len({same, *map(name, others)}) == 1 + len(others)


def plan_sampling(**changes: Any) -> Sampling:
    return Sampling(**{"steps": 10, "eta": 0.0, "guidance_scale": 5.0, "batch_size": 8, **changes})


def test_a_study_stays_the_same_when_its_result_is_applied(tmp_path):
    """Also where a searched key is inside a block: lora.rank."""
    space = {"space": {"lr": {"low": 3e-5, "high": 1e-3}, "lora.rank": {"choices": [4, 8]}}}

    def tuned(rank: int) -> str:
        return name(sweep_plan(tmp_path, space, {"lr": 1e-3 / rank, "lora": {"rank": rank}}))

    assert tuned(4) == tuned(8)


def test_other_contents_of_data_and_models_make_another_study(tmp_path, monkeypatch):
    """Of the prepared tables, the preference model and the model that training starts from."""
    monkeypatch.chdir(tmp_path)
    paths = Paths("tiny")
    files = [paths.prepared / "pairs.parquet", paths.preference / "weights", paths.model("sft") / "weights"]
    for file in files:
        file.parent.mkdir(parents=True)
        file.touch()
    plan = sweep_plan(tmp_path, needs_preference=True, after="sft")
    names = [name(plan)]
    assert name(plan) == names[0]
    for file in files:
        file.write_text("others")
        names.append(name(plan))
    assert len(set(names)) == 4


def test_a_missing_model_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(study.SearchError, match="models/tiny/nowhere"):
        name(sweep_plan(tmp_path, after="nowhere"))


def test_the_first_report_is_that_of_the_shortest_trial(tmp_path):
    """Batches from 40 to 200 and no `every`: reports from a quarter of 40 on, to 200."""
    search = {"space": {"batches": {"choices": [200, 40]}}, "fixed": None, "finalists": None}
    assert sweep.study_spec(sweep_plan(tmp_path, search), tmp_path).resource == (10, 200)


def test_a_trial_has_the_fixed_and_the_drawn_settings_and_the_pruners_validation(tmp_path):
    objective = Trial(sweep_plan(tmp_path), tmp_path)
    config = objective.config({"beta": 700.0})
    assert (config.beta, config.batches, config.lr) == (700.0, 60, 1e-4)
    assert (config.validation.scorer, config.validation.prompts, config.validation.every) == ("hpsv2", 60, 15)
    full = objective.at_full_length("study").config({"beta": 700.0})
    assert (full.beta, full.batches, full.validation) == (700.0, 200, None)


def test_settings_that_do_not_go_together_are_the_trials_own_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"do not go together: dpo\.beta"):
        Trial(sweep_plan(tmp_path), tmp_path).config({"beta": -1.0})


def test_the_objective_can_be_sent_to_a_process(tmp_path):
    objective = Trial(sweep_plan(tmp_path), tmp_path)
    assert pickle.loads(pickle.dumps(objective)) == objective
    assert replace(objective, parent="x") != objective
