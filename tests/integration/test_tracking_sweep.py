"""Sweeps and trials in a real store: how each ends, what its row shows, and that a sweep goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from attune import tracking
from attune.tracking import sender as senders

pytestmark = pytest.mark.integration

SRC = Path(__file__).parents[2] / "src"
DIE = """
import os, signal, sys
from attune import tracking
with tracking.trial("trial 4", {"beta": 4.0}, tags={}, parent=sys.argv[1]) as run:
    run.log({"score": 0.25}, 1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


class TrialPruned(Exception):
    """What Optuna raises, by the name that tracking knows it by."""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for key in [key for key in os.environ if key.startswith(("DVC_", "MLFLOW_", "ATTUNE_"))]:
        monkeypatch.delenv(key)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sweep")


def _client(root: Path):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")


def _children(root: Path, parent: str) -> dict[str, object]:
    client = _client(root)
    experiment = client.get_experiment_by_name("attune").experiment_id
    found = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    return {run.info.run_name: run for run in found}


def _try(root: Path, parent: str, number: int, error: BaseException | None) -> None:
    params = {"beta": float(number), "lr": 1e-4}
    with tracking.trial(f"trial {number}", params, tags={"method": "spo"}, parent=parent, root=root) as run:
        run.log({"score": number / 2, "oracle": 0.5}, 1)
        if error is not None:
            raise error


def test_every_end_of_a_trial_is_told_apart(root):
    with tracking.sweep("spo by oracle", {"budget": 4}, tags={"profile": "tiny"}, root=root) as parent:
        _try(root, parent.run_id, 0, None)
        for number, error in ((1, TrialPruned("worse")), (2, ValueError("boom")), (3, KeyboardInterrupt())):
            with pytest.raises(type(error)) as caught:
                _try(root, parent.run_id, number, error)
            assert caught.value is error
        environment = os.environ | {"PYTHONPATH": str(SRC), "DVC_ROOT": str(root)}
        worker = subprocess.run([sys.executable, "-c", DIE, parent.run_id], env=environment, timeout=60)
        assert worker.returncode == -signal.SIGKILL
        tracking.mark_killed(root=root)
        trials = _children(root, parent.run_id)
        states = {name: (run.info.status, run.data.tags["trial.state"]) for name, run in trials.items()}
        assert states == {
            "trial 0": ("FINISHED", "complete"),
            "trial 1": ("FINISHED", "pruned"),
            "trial 2": ("FAILED", "failed"),
            "trial 3": ("KILLED", "killed"),
            "trial 4": ("KILLED", "killed"),
        }
        assert {run.data.tags["kind"] for run in trials.values()} == {"trial"}
        assert trials["trial 2"].data.params == {"beta": "2", "lr": "0.0001"}
        assert trials["trial 2"].data.metrics == {"score": 1.0, "oracle": 0.5}
        assert trials["trial 4"].data.metrics == {"score": 0.25}  # logged just before it was killed
    found = _client(root).get_run(parent.run_id)
    assert (found.info.status, found.data.tags["kind"]) == ("FINISHED", "sweep")


def test_a_sweep_goes_on_in_its_run(root):
    with tracking.sweep("s", {"budget": 1}, tags={}, root=root) as first:
        first.log({"best": 0.1}, 0)
    with tracking.sweep("s", {"budget": 2}, tags={}, root=root, run_id=first.run_id) as again:
        assert again.run_id == first.run_id
        assert _client(root).get_run(first.run_id).info.status == "RUNNING"
        again.log({"best": 0.2}, 1)
    found = _client(root).get_run(first.run_id)
    assert (found.info.status, found.data.params["budget"]) == ("FINISHED", "1")  # MLflow's parameters are for good
    assert [point.value for point in _client(root).get_metric_history(first.run_id, "best")] == [0.1, 0.2]
    with tracking.sweep("s", {}, tags={}, root=root, run_id="0" * 32) as new:
        pass
    assert _client(root).get_run(new.run_id).info.status == "FINISHED"


def test_trials_find_a_parent_that_had_no_store(root, tmp_path, monkeypatch):
    """Sweep and trial without a store, then a replay: the trial lies below the sweep."""
    monkeypatch.setattr(senders, "RETRY_SECONDS", (30.0, 30.0))
    (tmp_path / "mlflow.db").mkdir()
    with tracking.sweep("s", {}, tags={}, root=tmp_path) as parent:
        _try(tmp_path, parent.run_id, 1, None)
    (tmp_path / "mlflow.db").rmdir()
    assert set(tracking.replay(tmp_path).values()) == {None}
    client = _client(tmp_path)
    experiment = client.get_experiment_by_name("attune").experiment_id
    (sweep,) = client.search_runs([experiment], "tags.kind = 'sweep'")
    assert list(_children(tmp_path, sweep.info.run_id)) == ["trial 1"]


def test_a_stage_and_a_trial_fill_the_same_columns():
    """`methods.spo.beta` of whatever profile is `beta`; two methods in one tree keep their names apart."""
    stage = {"seed": 0, "model": {"path": "x"}, "methods": {"spo": {"beta": 10.0, "lora": {"rank": 8}}}}
    assert tracking.table_columns(stage) == {"seed": "0", "model.path": "x", "beta": "10", "lora.rank": "8"}
    assert tracking.table_columns({"profiles.tiny.methods.spo.beta": 10.0, "lr": 1e-4}) == {
        "beta": "10",
        "lr": "0.0001",
    }
    both = {"methods": {"spo": {"beta": 10.0}, "dpo": {"beta": 500.0, "snr": 1}}}
    assert tracking.table_columns(both) == {"methods.spo.beta": "10", "methods.dpo.beta": "500", "snr": "1"}


def test_trainings_and_trials_are_the_rows_of_one_view(root):
    """Of a stage that tunes, one that does not, a sweep and a trial, the view's filter finds the first and the last."""
    import json

    with tracking.run("align", {"methods": {"spo": {"beta": 10}}}, tags={}, root=root):
        pass
    with tracking.run("evaluate", {"scorers": {}}, tags={}, root=root):
        pass
    with tracking.sweep("view", {}, tags={}, root=root) as parent:
        _try(root, parent.run_id, 7, None)
    experiment = _client(root).get_experiment_by_name("attune")
    view = json.loads(experiment.tags["mlflow.sharedViewState.attune"])
    found = _client(root).search_runs([experiment.experiment_id], view["searchFilter"])
    names = {run.info.run_name for run in found}
    assert {"align", "trial 7"} <= names
    assert not {"evaluate", "view"} & names
    assert {"params.`beta`", "params.`lr`", "metrics.`oracle`"} <= set(view["selectedColumns"])
