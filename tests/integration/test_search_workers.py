"""The workers of a search: real processes on a real journal, SQLite and PostgreSQL, some of them killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

import searching
from attune import tracking
from attune.search import sweep, workers
from attune.search.study import RETRY_OF, SearchError, StudySpec, open_study

pytestmark = pytest.mark.integration

X = {"x": FloatDistribution(0, 10)}


@pytest.fixture(scope="module")
def database():
    programs = searching.postgres_programs()
    if programs is None:
        pytest.skip("needs PostgreSQL's initdb: apt-get install postgresql")
    with searching.postgres(programs) as address:
        yield address


@pytest.fixture(params=["journal", "sqlite", "postgresql"])
def storage(request, tmp_path) -> str:
    if request.param == "postgresql":
        return request.getfixturevalue("database")
    return str(tmp_path / "journal") if request.param == "journal" else f"sqlite:///{tmp_path / 'study.db'}"


def states(study: optuna.Study) -> Counter[TrialState]:
    return Counter(trial.state for trial in study.get_trials())


def begun(folder: Path) -> list[int]:
    return sorted(int(file.stem) for file in folder.glob("*.begun"))


def kill_two_at_work(spec: StudySpec, folder: Path, runner: threading.Thread) -> list[int]:
    """Kill -9 of two processes as soon as four are in mid-trial, before any goes on; the trials' numbers."""
    study = open_study(spec)
    while runner.is_alive() and len(begun(folder)) < 4:
        time.sleep(0.05)
    assert begun(folder) == [0, 1, 2, 3]
    for trial in study.get_trials()[1:3]:
        os.kill(trial.user_attrs["owner"]["pid"], signal.SIGKILL)
    (folder / "go").touch()
    return [1, 2]


def test_killed_workers_lose_and_repeat_nothing(storage, tmp_path):
    """12 trials by 4 workers, 2 of them killed: 12 complete, and 2 that failed, each done again with its parameters.

    A second session adds nothing.
    """
    spec = StudySpec("killed", storage, X, n_trials=12)
    objective = searching.Parabola(tmp_path, go="go")
    runner = threading.Thread(target=workers.run_workers, args=(spec, objective, [None] * 4))
    runner.start()
    killed = kill_two_at_work(spec, tmp_path, runner)
    runner.join(timeout=120)
    assert not runner.is_alive()
    study = open_study(spec)
    check_done_again(study, killed, tmp_path)
    workers.run_workers(spec, objective, [None])
    assert len(study.get_trials()) == 14


def check_done_again(study: optuna.Study, killed: list[int], folder: Path) -> None:
    trials = study.get_trials()
    assert states(study) == {TrialState.COMPLETE: 12, TrialState.FAIL: 2}
    assert begun(folder) == list(range(14))
    for number in killed:
        (retry,) = [trial for trial in trials if trial.user_attrs.get(RETRY_OF) == number]
        assert trials[number].state == TrialState.FAIL
        assert retry.params == trials[number].params


def test_killed_workers_in_mlflow(tmp_path, monkeypatch):
    """The same: 12 runs FINISHED and 2 KILLED below the sweep's."""
    monkeypatch.setenv("ATTUNE_TRACKING", "on")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    spec = StudySpec("killed", str(tmp_path / "journal"), X, n_trials=12)
    with tracking.sweep("sweep", {}, tags={}, uri=uri, root=tmp_path) as parent:
        objective = searching.Parabola(tmp_path, go="go", parent=parent.run_id, uri=uri)
        options = {"mark_killed": lambda: tracking.mark_killed(uri, tmp_path)}
        runner = threading.Thread(target=workers.run_workers, args=(spec, objective, [None] * 4), kwargs=options)
        runner.start()
        killed = kill_two_at_work(spec, tmp_path, runner)
        runner.join(timeout=240)
    check_done_again(open_study(spec), killed, tmp_path)
    assert mlflow_states(uri, parent.run_id) == {"FINISHED": 12, "KILLED": 2}


def mlflow_states(uri: str, parent: str) -> Counter[str]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found = client.search_runs([client.get_run(parent).info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    return Counter(run.info.status for run in found)


def test_two_hosts_start_one_study_at_once(database, tmp_path):
    """Two coordinators meet in an empty database: 8 trials wanted, 8 done, none by two."""
    spec = StudySpec("two hosts", database, X, n_trials=8)
    errors: list[BaseException] = []

    def session() -> None:
        try:
            workers.run_workers(spec, searching.Parabola(tmp_path, 0.2), [None] * 2)
        except BaseException as error:
            errors.append(error)

    hosts = [threading.Thread(target=session) for _ in range(2)]
    for host in hosts:
        host.start()
    for host in hosts:
        host.join(timeout=120)
    assert not errors
    assert states(open_study(spec)) == {TrialState.COMPLETE: 8}
    assert begun(tmp_path) == list(range(8))


def test_a_grid_has_each_cell_once(storage, tmp_path):
    """3 workers, 2 x 3 points: Optuna's own GridSampler gave 14 trials for 12 points."""
    space = {"x": CategoricalDistribution([1.0, 2.0]), "y": CategoricalDistribution(["a", "b", None])}
    points = tuple({"x": x, "y": y} for x in (1.0, 2.0) for y in ("a", "b", None))
    spec = StudySpec("grid", storage, space, n_trials=6, grid_points=points, sampler="grid")
    study = workers.run_workers(spec, searching.Parabola(tmp_path, 0.1), [None] * 3)
    done = Counter(json.dumps(trial.params, sort_keys=True) for trial in study.get_trials())
    assert done == {json.dumps(point, sort_keys=True): 1 for point in points}
    assert states(study) == {TrialState.COMPLETE: 6}
    assert states(workers.run_workers(spec, searching.Parabola(tmp_path), [None])) == {TrialState.COMPLETE: 6}


def test_more_trials_may_be_asked_for_later(tmp_path):
    objective, storage = searching.Parabola(tmp_path), str(tmp_path / "journal")
    assert len(workers.run_workers(StudySpec("s", storage, X, n_trials=2), objective, [None]).get_trials()) == 2
    assert len(workers.run_workers(StudySpec("s", storage, X, n_trials=5), objective, [None] * 3).get_trials()) == 5


def test_one_worker_repeats_exactly(tmp_path):
    """Trial n's numbers come from seed and n alone."""

    def drawn(name: str, seed: int) -> list[float]:
        (tmp_path / name).mkdir()
        spec = StudySpec("s", str(tmp_path / name / "journal"), X, n_trials=8, seed=seed)
        study = workers.run_workers(spec, searching.Parabola(tmp_path / name), [None])
        return [trial.params["x"] for trial in study.get_trials()]

    first = drawn("a", 0)
    assert first == drawn("b", 0)
    assert first != drawn("c", 1)


def test_a_trial_that_fails_of_itself_does_not_end_its_worker(tmp_path):
    """Its turn is over: 8 trials in all, by one process."""
    spec = StudySpec("s", str(tmp_path / "journal"), X, n_trials=8)
    study = workers.run_workers(spec, searching.fails_above_5, [None])
    found = study.get_trials()
    assert len(found) == 8
    assert len({trial.user_attrs["owner"]["pid"] for trial in found}) == 1
    for trial in found:
        failed = trial.params["x"] > 5
        assert trial.state == (TrialState.FAIL if failed else TrialState.COMPLETE)
        assert trial.user_attrs.get("error") == ("RuntimeError: out of memory" if failed else None)
    assert 0 < states(study)[TrialState.FAIL] < 8


def test_where_all_fail_the_search_ends_and_says_why(tmp_path):
    spec = StudySpec("s", str(tmp_path / "journal"), X, n_trials=100)
    with pytest.raises(SearchError, match=r"first 3 trials have all failed.*ArithmeticError: loss is nan"):
        workers.run_workers(spec, searching.always_fails, [None])


def test_a_mistake_ends_the_search_at_once(tmp_path):
    spec = StudySpec("s", str(tmp_path / "journal"), X, n_trials=100)
    with pytest.raises(SearchError, match="KeyError: 'no such scorer'"):
        workers.run_workers(spec, searching.is_mistaken, [None] * 2)
    assert len(open_study(spec).get_trials()) <= 2


def test_no_trial_starts_after_the_deadline(tmp_path):
    spec = StudySpec("s", str(tmp_path / "journal"), X, n_trials=100)
    study = workers.run_workers(spec, searching.Parabola(tmp_path), [None], deadline=time.time() - 1)
    assert study.get_trials() == []


def test_a_short_outage_of_the_database_ends_no_search(database, tmp_path):
    """PostgreSQL is away for three seconds while trial 0 is at work: its result arrives, as do the other two."""
    spec = StudySpec("outage", database, X, n_trials=3)
    runner = threading.Thread(target=workers.run_workers, args=(spec, searching.Parabola(tmp_path, go="go"), [None]))
    runner.start()
    while runner.is_alive() and not begun(tmp_path):
        time.sleep(0.05)
    threading.Timer(1.0, (tmp_path / "go").touch).start()
    searching.stop_for(3.0, searching.postgres_programs(), database)
    runner.join(timeout=120)
    assert not runner.is_alive()
    assert states(open_study(spec)) == {TrialState.COMPLETE: 3}


def test_a_session_that_leaves_trials_pending_writes_results_and_fails(tmp_path, monkeypatch):
    """One of 12 trials is done and there is no time for more: an error, so that DVC runs the stage again."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    plan = searching.sweep_plan(tmp_path, {"minutes": 1e-9})
    spec = sweep.study_spec(plan, tmp_path)
    study = open_study(spec)
    study.tell(study.ask(spec.space), 0.5)
    with pytest.raises(SearchError, match="1 of 12 trials are done; the same command goes on"):
        sweep.sweep(plan)
    assert {"trials.csv", "best_params.yaml"} <= {file.name for file in plan.report.iterdir()}
