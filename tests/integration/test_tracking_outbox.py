"""Outboxes against stores in a file: many writers at once, torn records, and what is sent later or again."""

from __future__ import annotations

import os
import resource
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from attune import tracking
from attune.tracking import outbox as outboxes
from attune.tracking import sender as senders
from attune.tracking import store as stores
from tracked import (
    files_of,
    forget_environment,
    grey,
    left_in,
    points_of,
    runs_in,
    shorten_pauses,
    train,
    uid_of,
    wait_for,
    without_system,
)

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
WRITER = """
import logging
logging.basicConfig(format="%(name)s: %(message)s")
from attune import tracking
with tracking.run("train", {"seed": 1}, tags={}) as run:
    for step in range(300):
        run.log({"loss": 1 / (step + 1), "margin": step}, step)
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    forget_environment(monkeypatch)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def short_pauses(monkeypatch):
    shorten_pauses(monkeypatch)


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """A root with a store of its own, that is no server's."""
    folder = tmp_path_factory.mktemp("local")
    stores.prepare()
    stores.connect(stores.DEFAULT, folder)
    return folder


def test_eight_processes_share_a_fresh_store(tmp_path):
    """300 steps of 2 points by 8 processes, no store before: every point is there, and no warning was given."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "DVC_ROOT": str(tmp_path)}
    command = [sys.executable, "-c", WRITER]
    writers = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(8)]
    told = [writer.communicate(timeout=300)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 8, told
    assert not any("attune.tracking" in text for text in told), told  # MLflow says that it creates tables
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    runs = runs_in(uri)
    assert [run.info.status for run in runs] == ["FINISHED"] * 8
    for run in runs:
        assert points_of(uri, run.info.run_id, "loss") == [(step, 1 / (step + 1)) for step in range(300)]
        assert points_of(uri, run.info.run_id, "margin") == [(step, step) for step in range(300)]
    assert left_in(tmp_path) == []


def test_the_next_run_sends_what_the_last_has_left(tmp_path, short_pauses):
    """The first run's database cannot be opened; the second run, whose can, sends both."""
    (tmp_path / "mlflow.db").mkdir()
    with tracking.run("first", {}, tags={}, root=tmp_path) as first:
        first.log({"loss": 0.5}, 1)
    (tmp_path / "mlflow.db").rmdir()
    with tracking.run("second", {}, tags={}, root=tmp_path) as second:
        second.note(first.run_id, {"oracle": 0.7})
    (found,) = runs_in(f"sqlite:///{tmp_path}/mlflow.db", f"tags.`attune.uid` = '{first.run_id}'")
    assert without_system(found.data.metrics) == {"loss": 0.5, "oracle": 0.7}
    assert found.info.status == "FINISHED"
    assert left_in(tmp_path) == []


def test_sent_twice_is_stored_once(tmp_path, local):
    """An outbox whose progress is forgotten is sent all over again: the same run, points, images and data sets."""
    uri = f"sqlite:///{local}/mlflow.db"
    with tracking.run("align", {"seed": 1}, tags={}, root=local) as run:
        train(run, range(1100))
        run.image("samples/grid", grey(), 3)
        run.dataset(Path(__file__), "pairs", 7)
        uid = uid_of(uri, run.run_id)
        whole = shutil.ignore_patterns("*.part")  # files that are being written
        shutil.copytree(local / outboxes.OUTBOXES / uid, tmp_path / uid, ignore=whole)
    (tmp_path / uid / outboxes.STATE).unlink()
    (tmp_path / uid).rename(local / outboxes.OUTBOXES / uid)  # as if killed before its end, with nothing noted as sent
    assert tracking.replay(local) == {uid: None}
    (found,) = runs_in(uri, f"tags.`attune.uid` = '{uid}'")
    assert found.info.status == "KILLED"
    assert points_of(uri, run.run_id, "loss") == [(step, 1 / (step + 1)) for step in range(1100)]
    assert len(found.inputs.dataset_inputs) == 1
    assert len(files_of(uri, run.run_id, "images")) == 2


def test_only_rank_0_tracks(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with tracking.run("align", {}, tags={}, root=tmp_path) as run:
        run.log({"loss": 1.0}, 0)
    assert (run.run_id, list(tmp_path.iterdir())) == (None, [])


def test_a_torn_line_costs_that_line_alone(tmp_path, local):
    """A process killed in the middle of a write, and a disk that was full for a while."""
    outbox = outboxes.create(local)
    tags = {"kind": "stage", "dvc.stage": "x"}
    outbox.append("open", uid=outbox.uid, uri=stores.DEFAULT, name="x", tags=tags, resume=None)
    os.write(outbox._file, b'{"op": "log", "time": 1, "st\n')
    outbox.append("log", step=2, metrics={"loss": 0.5})
    os.write(outbox._file, b'{"op": "log", "ti')
    outbox.close()
    assert tracking.replay(local) == {outbox.uid: None}
    uri = f"sqlite:///{local}/mlflow.db"
    (found,) = runs_in(uri, f"tags.`attune.uid` = '{outbox.uid}'")
    assert (found.info.status, points_of(uri, found.info.run_id, "loss")) == ("KILLED", [(2, 0.5)])


def test_a_short_write_costs_that_record_alone(local):
    """A disk that is full after 20 more bytes: the torn line has no end, and the run's own end begins a new one."""
    outbox = outboxes.create(local)
    tags = {"kind": "stage", "dvc.stage": "x"}
    outbox.append("open", uid=outbox.uid, uri=stores.DEFAULT, name="x", tags=tags, resume=None)
    records, before = outbox.folder / outboxes.RECORDS, resource.getrlimit(resource.RLIMIT_FSIZE)
    size = records.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            outbox.append("log", step=1, metrics={"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert records.stat().st_size == size + 20
    outbox.append("end", status="FINISHED", kind="stage")
    outbox.close()
    assert tracking.replay(local) == {outbox.uid: None}
    (found,) = runs_in(f"sqlite:///{local}/mlflow.db", f"tags.`attune.uid` = '{outbox.uid}'")
    assert found.info.status == "FINISHED"


def test_an_artifact_that_cannot_be_stored_waits_alone(tmp_path, short_pauses, caplog):
    """The artifacts' folder is a file: all else of the run arrives, also the scores that a later run notes on it."""
    (tmp_path / "mlruns").write_text("in the way")
    with tracking.run("stuck", {}, tags={}, root=tmp_path) as stuck:
        stuck.artifact(Path(__file__))
        stuck.log({"loss": 0.5}, 0)
    with tracking.run("free", {}, tags={}, root=tmp_path) as free:
        free.note(stuck.run_id, {"oracle": 0.25})
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert [path.parent.name for path in left_in(tmp_path)] == [uid_of(uri, stuck.run_id)]
    assert [run.info.status for run in runs_in(uri)] == ["FINISHED"] * 2
    assert points_of(uri, stuck.run_id, "loss") == [(0, 0.5)]
    assert points_of(uri, stuck.run_id, "oracle") == [(0, 0.25)]
    told = [record.getMessage() for record in caplog.records if record.name == "attune.tracking"]
    assert told[0].startswith(f"{Path(__file__).name} cannot be stored")
    assert senders.INCOMPLETE in told[1:]  # perhaps after a second try by the thread that sends what others left
    (error,) = tracking.replay(tmp_path).values()
    assert isinstance(error, OSError)
    (tmp_path / "mlruns").unlink()
    assert set(tracking.replay(tmp_path).values()) == {None}
    assert files_of(uri, stuck.run_id) == [Path(__file__).name]
    assert left_in(tmp_path) == []


def test_a_run_deleted_in_the_ui_is_let_go(local, short_pauses, caplog):
    from mlflow import MlflowClient

    with tracking.run("align", {}, tags={}, root=local) as run:
        MlflowClient(tracking_uri=f"sqlite:///{local}/mlflow.db").delete_run(run.run_id)
        train(run, range(300))
        run.log({"loss": 1.0}, 2**70)
    assert left_in(local) == []
    assert len({record.getMessage() for record in caplog.records if record.name == "attune.tracking"}) == 3


def test_a_store_that_has_lost_the_run_gets_it_again(tmp_path, short_pauses):
    """Its tables are emptied in mid-training, as by a server that is set up anew or from an old backup."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with tracking.run("align", {"seed": 1}, tags={}, root=tmp_path) as run:
        first = run.run_id
        run.log({"loss": 1.0}, 0)
        wait_for(lambda: points_of(uri, first, "loss"))
        with closing(sqlite3.connect(tmp_path / "mlflow.db")) as db:
            for table in ("latest_metrics", "metrics", "params", "tags", "runs"):
                db.execute(f"delete from {table}")
            db.commit()
        run.log({"loss": 0.5}, 1)
    (found,) = runs_in(uri)
    assert found.info.run_id == run.run_id != first
    assert (found.info.status, found.data.params) == ("FINISHED", {"seed": "1"})
    assert points_of(uri, run.run_id, "loss") == [(0, 1.0), (1, 0.5)]
    assert left_in(tmp_path) == []
