"""A study's storage in trouble, draws that repeat, retries that end, and few prompts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from attune.search import full_length, results, storage, study, sweep, workers
from attune.search.study import SearchError, StudySpec
from searching import sweep_plan

X = {"x": FloatDistribution(0, 10)}


def spec_of(folder: Path, **changes) -> StudySpec:
    return StudySpec(**{"name": "s", "storage": str(folder / "s.journal"), "space": X, "n_trials": 20, **changes})


@pytest.fixture
def journal(tmp_path) -> Path:
    """A journal of two complete trials."""
    spec = spec_of(tmp_path)
    made = study.open_study(spec)
    for value in (1.0, 2.0):
        asked = study.claim_trial(spec, made, workers.ownership())
        made.tell(asked, value)
    return Path(spec.storage)


@pytest.mark.parametrize("damage", ["torn", "zeros", "half"])
def test_a_broken_journal_names_its_file_and_the_way_out(journal, tmp_path, damage):
    """The command that the message gives keeps the trials before the break."""
    lines = journal.read_bytes().splitlines(keepends=True)
    broken = {"torn": [*lines, b'{"op_code": 4, "wor'], "zeros": [*lines, b"\0" * 300 + b"\n"]}
    broken["half"] = [*lines, lines[-1][:20] + lines[-1]]  # what was written behind a torn line
    journal.write_bytes(b"".join(broken[damage]))
    with pytest.raises(SearchError) as caught:
        study.open_study(spec_of(tmp_path))
    said = str(caught.value)
    assert said.startswith(f"{journal}: line {len(lines) + 1} of the study's journal is broken")
    assert "\n" not in said
    command = said.partition("before it: ")[2].partition("; for a fresh start")[0]
    subprocess.run(command, shell=True, check=True)
    assert [trial.value for trial in study.open_study(spec_of(tmp_path)).get_trials()] == [1.0, 2.0]


def test_a_journal_that_breaks_while_trials_run_is_named(journal, tmp_path):
    made = study.open_study(spec_of(tmp_path))
    with journal.open("ab") as file:
        file.write(b'{"op_code"\n')
    with pytest.raises(SearchError, match="is broken"), study.told(spec_of(tmp_path)):
        study.claim_trial(spec_of(tmp_path), made, workers.ownership())


@pytest.mark.parametrize("address", ["sqlite:///{}/none/x.db", "postgresql+psycopg://me:s3cret@127.0.0.1:9/x"])
def test_a_database_that_is_not_there_is_one_line_without_a_password(address, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "study_lock", lambda spec: study.warnings.catch_warnings())  # which needs it as well
    with pytest.raises(SearchError, match="database is away, locked or gone") as caught:
        study.open_study(spec_of(tmp_path, storage=address.format(tmp_path)))
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_the_storages(tmp_path):
    assert storage.fault("sqlite:///x", ValueError("x")) is None
    with pytest.raises(json.JSONDecodeError), study.told(spec_of(tmp_path, storage="sqlite:///x")):
        json.loads("{")


def test_a_sqlite_study_may_be_in_any_folder(tmp_path):
    home = tmp_path / "x y ü%3F?#z"
    home.mkdir()
    for given in ("sqlite:///x.db", None):
        spec = spec_of(tmp_path, storage=study.storage_url(given, "s", home))
        made = study.open_study(spec)
        made.tell(study.claim_trial(spec, made, workers.ownership()), 1.0)
    assert (home / "x.db").stat().st_size > 0
    assert (home / ".checkpoints" / "search" / "s.journal").exists()
    assert [path.name for path in tmp_path.iterdir()] == [home.name]


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_every_trial_has_a_draw_of_its_own(sampler, tmp_path):
    """And the same one in another search of that seed."""
    drawn = []
    for folder in ("a", "b"):
        spec = spec_of(tmp_path / folder, sampler=sampler)
        made = study.open_study(spec)
        drawn.append([study.claim_trial(spec, made, workers.ownership()).params["x"] for _ in range(5)])
    assert len(set(drawn[0])) == 5
    assert drawn[0] == drawn[1]


def test_a_retry_that_is_killed_is_not_tried_again(tmp_path):
    spec = spec_of(tmp_path)
    made = study.open_study(spec)
    study.claim_trial(spec, made, {})  # without an owner, so it counts as killed
    assert workers.reap(spec, made) == [0]
    study.claim_trial(spec, made, {})
    assert workers.reap(spec, made) == [1]
    assert [trial.state for trial in made.get_trials()] == [TrialState.FAIL] * 2
    assert workers.reap(spec, made) == []


def test_objectives_of_different_spans_count_alike():
    """Scaled, the middle wins with 1.2 against 1; unscaled, the trial that is best by the wide one would."""
    made = optuna.create_study(directions=["maximize"] * 2)
    for values in ([0.0, 1000.0], [0.9, 300.0], [1.0, 0.0]):
        made.add_trial(create_trial(params={"x": 1.0}, distributions=X, values=values))
    spec = StudySpec("s", "", X, 3, objectives=("a", "b"))
    assert results.ranked(made, spec)[0].number == 1


def test_fewer_prompts_than_asked_are_said(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    plan = sweep_plan(tmp_path)
    plan.prepared.mkdir(parents=True)
    table = pd.DataFrame({"prompt": [f"p{i}" for i in range(70)], "split": ["validation"] * 59 + ["train"] * 11})
    table.to_parquet(plan.prepared / "prompts.parquet")
    assert sweep._fewer_prompts(plan) == {"prompts_asked": 60, "prompts": 59}
    assert "search.dpo.prompts: 60 are asked for, and there are 59" in caplog.text
    pd.concat([table, table]).to_parquet(plan.prepared / "prompts.parquet")
    assert sweep._fewer_prompts(plan) == {}


@pytest.mark.parametrize("n", [1, 2])
def test_a_single_prompt_has_no_interval(n, tmp_path):
    spec = spec_of(tmp_path, space={"x": FloatDistribution(1, 10)}, objectives=("taste",), n_trials=2)
    made = study.open_study(spec)
    for x, score in ((2.0, 0.0), (4.0, 1.0)):
        scores = (np.arange(n) + score * (np.arange(n) + 1)).tolist()
        attrs = {"scores": {"taste": scores}}
        trial = create_trial(params={"x": x}, distributions=spec.space, value=float(np.mean(scores)), user_attrs=attrs)
        made.add_trial(trial)
    names = {"profile": "tiny", "run": "dpo"}
    full_length.write(made, spec, {"x": 2.0}, names, tmp_path)
    finals = pd.read_csv(tmp_path / "finals.csv")
    assert finals.difference.notna().tolist() == [False, True]
    assert finals.ci95_low.notna().tolist() == [False, n > 1]
    assert ("ci95" in (tmp_path / "best_params.yaml").read_text()) == (n > 1)
    assert (tmp_path / "finals.png").exists()
