"""Tracking against real MLflow stores: what arrives, how runs group, and that no failure stops a stage."""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from attune import tracking
from attune.files import values_sha
from attune.tracking import labels
from attune.tracking import sender as senders
from attune.tracking import store as stores
from tracked import without_system

pytestmark = pytest.mark.integration

SRC = Path(__file__).parents[2] / "src"
PREFIXES = ("DVC_", "MLFLOW_", "ATTUNE_")
BODY = """
import os, signal, sys
from attune import tracking
with tracking.run("train", {"seed": 1}, tags={"profile": "tiny"}) as run:
    for step in range(50):
        run.log({"loss": 1 / (step + 1), "margin": step}, step)
    if "die" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def _environment(root: Path, **extra: str) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(PREFIXES)}
    return clean | {"PYTHONPATH": str(SRC), "DVC_ROOT": str(root)} | extra


def _start(root: Path, *words: str, **extra: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BODY, *words]
    return subprocess.Popen(command, env=_environment(root, **extra), stderr=subprocess.PIPE, text=True)


def _client(root: Path):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")


def _runs(root: Path, **tags: str) -> list:
    client = _client(root)
    where = " AND ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    return client.search_runs([client.get_experiment_by_name("attune").experiment_id], where)


def _points(root: Path, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in _client(root).get_metric_history(run_id, key))


def _outboxes(root: Path) -> list[str]:
    return sorted(path.parent.name for path in (root / ".checkpoints/tracking").glob("*/records.jsonl"))


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "attune.tracking"]


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """No tracking variables from outside, and those that tracking sets are gone afterwards."""
    before = dict(os.environ)
    for key in [key for key in os.environ if key.startswith(PREFIXES)]:
        del os.environ[key]
    monkeypatch.chdir(tmp_path)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """One store for most tests, made before: its tables take seconds. A space in the path is common."""
    folder = tmp_path_factory.mktemp("my repo")
    stores.prepare()
    stores.connect(stores.DEFAULT, folder)
    return folder


def test_flatten_and_hash_of_params():
    params = {"a": {"b": None, "c": [1, 2], "d": {}}, "lr": 1e-5, "name": "spo", "on": True}
    flat = {"a.b": "null", "a.c": "[1, 2]", "a.d": "{}", "lr": "1e-05", "name": "spo", "on": "true"}
    assert tracking.flatten(params) == flat
    assert values_sha({"a": 1, "b": 2}) == values_sha({"b": 2, "a": 1})
    canonical = hashlib.sha256(b'{"a":1,"b":2}').hexdigest()
    assert values_sha({"b": 2, "a": 1}) == canonical[:12]


def test_all_of_a_run_arrives(root, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("DVC_STAGE", "align@spo")
    monkeypatch.setenv("MLFLOW_RUN_ID", "0123456789abcdef0123456789abcdef")
    monkeypatch.setattr(labels, "CODE", ("code.py",))
    commit = _repository(tmp_path)
    params = {"method": {"beta": 10.0, "none": None}, "long": "x" * 9000, "odd@key": {}}
    params |= {f"p{i}": i for i in range(120)}
    (tmp_path / "pairs.parquet").write_bytes(b"pairs")
    with tracking.run("align", params, tags={"profile": "tiny", "method": "spo"}, root=root) as run:
        for step in range(1205):
            run.log({"loss": step / 2, "grad_norm": np.float32(step)}, step)
        run.log({"loss": float("nan"), "margin": float("inf"), "reward@1/clip": 2.0}, 1300)
        run.dataset("pairs.parquet", "pairs", 7)
        run.artifact(tmp_path / "pairs.parquet")
        run.summary({"pickscore": 21.5})
    found = _client(root).get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "align@spo"
    assert run.run_id != os.environ["MLFLOW_RUN_ID"]
    expected = {"kind": "stage", "dvc.stage": "align@spo", "profile": "tiny", "method": "spo"}
    expected |= {"git.commit": commit, "git.dirty": "true", "params.sha": values_sha(params)}
    assert expected.items() <= found.data.tags.items()
    assert len(found.data.params) == 124
    assert found.data.params["method.beta"] == "10"
    assert found.data.params["method.none"] == "null"
    assert found.data.params["long"] == "x" * 500
    assert found.data.params["odd_key"] == "{}"
    assert _points(root, run.run_id, "loss") == [(step, step / 2) for step in range(1205)]
    assert len(_points(root, run.run_id, "grad_norm")) == 1205
    assert _points(root, run.run_id, "reward_1/clip") == [(1300, 2.0)]
    assert _points(root, run.run_id, "nonfinite") == [(1300, 2.0)]
    assert _points(root, run.run_id, "pickscore") == [(1300, 21.5)]
    assert "margin" not in found.data.metrics
    (data,) = found.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("pairs", hashlib.sha256(b"pairs").hexdigest()[:16])
    assert [(tag.key, tag.value) for tag in data.tags] == [("mlflow.data.context", "training")]
    assert (root / "mlruns" / run.run_id / "artifacts" / "pairs.parquet").read_bytes() == b"pairs"
    assert _warnings(caplog) == []


def _repository(folder: Path) -> str:
    """A repository of one commit whose `code.py` has changed since; returns the commit."""
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-C", str(folder)]
    (folder / "code.py").write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    (folder / "code.py").write_text("2")
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


def test_images_have_steps(root):
    bright = np.full((4, 4, 3), 1.5)
    bright[0] = 0.5
    with tracking.run("align", {}, tags={}, root=root) as run:
        run.image("samples/grid", bright, 10)
        run.image("samples/grid", Image.new("RGB", (4, 4)), 20)
    names = {path.name for path in (root / "mlruns" / run.run_id / "artifacts" / "images").glob("*.png")}
    assert sorted(name.split("+timestamp")[0] for name in names) == [
        "samples~grid+step+10",
        "samples~grid+step+20",
    ]
    first = next(name for name in names if "+step+10+" in name)
    pixels = np.asarray(Image.open(root / "mlruns" / run.run_id / "artifacts" / "images" / first))
    assert (pixels[0].max(), pixels[1].min()) == (127, 255)  # clipped, not stretched
    assert _client(root).get_run(run.run_id).data.tags["mlflow.loggedImages"] == "True"


def test_note_puts_scores_on_another_run(root, caplog):
    with tracking.run("align", {}, tags={}, root=root) as training:
        pass
    with tracking.run("evaluate", {}, tags={}, root=root) as run:
        run.note(None, {"pickscore": 1.0})
        run.note("0" * 32, {"pickscore": 1.0})
        run.note(training.run_id, {"pickscore": 21.5})
        run.log({"after": 1.0}, 0)
    found = _client(root).get_run(training.run_id)
    assert (without_system(found.data.metrics), found.info.status) == ({"pickscore": 21.5}, "FINISHED")
    assert _points(root, run.run_id, "after") == [(0, 1.0)]
    assert len(_warnings(caplog)) == 1  # the run that is not in this store


def test_bad_content_is_left_out_and_the_rest_arrives(root, caplog):
    with tracking.run("align", {}, tags={}, root=root) as run:
        for step in range(3):
            run.image("grid", np.zeros((4, 4, 7)), step)
            run.log({"loss": "many"}, step)
            run.artifact("no/such/file")
        run.log({"loss": 1.0}, 3)
    assert _points(root, run.run_id, "loss") == [(3, 1.0)]
    assert len(_warnings(caplog)) == 3


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("x"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
        (SystemExit(130), "KILLED"),
        (SystemExit(1), "FAILED"),
        (SystemExit("data.path is not there"), "FAILED"),
        (SystemExit(None), "FINISHED"),
        (SystemExit(0), "FINISHED"),
    ],
)
def test_an_exception_sets_the_status_and_goes_on(root, error, status):
    runs = []

    def body() -> None:
        with tracking.run("align", {}, tags={}, root=root) as run:
            runs.append(run.run_id)
            run.log({"loss": 1.0}, 0)
            raise error

    with pytest.raises(type(error)) as caught:
        body()
    assert caught.value is error
    assert _client(root).get_run(runs[0]).info.status == status
    assert _points(root, runs[0], "loss") == [(0, 1.0)]


def test_one_experiment_is_one_parent_and_the_dead_are_buried(root):
    """Two stages of one experiment; the second is killed, and the next start of any sends the rest of it.

    One after the other: at once, the first may already find the second dead.
    """
    extra = {"DVC_EXP_NAME": "bold-move", "DVC_EXP_BASELINE_REV": "abc"}
    ended = _start(root, DVC_STAGE="align@spo", **extra)
    errors = [ended.communicate(timeout=60)[1]]
    killed = _start(root, "die", DVC_STAGE="evaluate@spo", **extra)
    errors.append(killed.communicate(timeout=60)[1])
    assert (killed.returncode, ended.returncode) == (-9, 0), errors
    (parent,) = _runs(root, **{"dvc.exp": "bold-move", "kind": "pipeline"})
    assert (parent.info.run_name, parent.info.status) == ("bold-move", "FINISHED")
    assert parent.data.tags["pipeline.id"] == "bold-move-abc"
    (left,) = _runs(root, **{"dvc.stage": "evaluate@spo"})
    assert left.info.status == "RUNNING"
    assert _outboxes(root) == [left.data.tags["attune.uid"]]
    run_began = int(time.time() * 1000)
    with tracking.run("report", {}, tags={}, root=root) as run:
        assert "mlflow.parentRunId" not in _client(root).get_run(run.run_id).data.tags
        with tracking.run("alive", {}, tags={}, root=root):
            pass
        assert _client(root).get_run(run.run_id).info.status == "RUNNING"  # this process is alive
    children = {run.data.tags["dvc.stage"]: run for run in _runs(root, **{"mlflow.parentRunId": parent.info.run_id})}
    assert set(children) == {"align@spo", "evaluate@spo"}
    assert children["align@spo"].info.status == "FINISHED"
    buried = children["evaluate@spo"]
    assert buried.info.status == "KILLED"
    assert buried.info.end_time < run_began  # when it was last heard of
    assert _points(root, buried.info.run_id, "margin") == [(step, step) for step in range(50)]
    assert _outboxes(root) == []


def test_a_run_that_ends_while_the_dead_are_looked_for_keeps_its_end(root, monkeypatch):
    """The store had it as RUNNING when it was asked; its outbox was sent, and is gone, before the run is looked at."""
    with tracking.run("align", {}, tags={}, root=root):
        pass
    store = stores.connect("sqlite:///mlflow.db", root)
    tags = {"host": labels.HOST, "pid": "1", "pid.created": "0"}
    run_id = store.client.create_run(store.experiment, tags=tags).info.run_id
    asked = store.client.search_runs([store.experiment], "status = 'RUNNING'")
    assert [run.info.run_id for run in asked] == [run_id]
    store.client.set_terminated(run_id, "FINISHED", end_time=5)
    monkeypatch.setattr(store.client, "search_runs", lambda *_: asked)
    stores.mark_killed(store)
    assert (store.client.get_run(run_id).info.status, store.client.get_run(run_id).info.end_time) == ("FINISHED", 5)


def test_four_processes_below_one_dvc_create_one_store(tmp_path):
    """A script named dvc forks four stages at once, mlflow imported, on a store that does not exist yet."""
    fork = "import os, mlflow\nchildren = []\nfor _ in range(4):\n    children.append(os.fork())\n"
    fork += "    if children[-1] == 0:\n        break\nelse:\n"
    fork += "    os._exit(max(os.waitpid(child, 0)[1] for child in children) > 0)\n"
    (tmp_path / "dvc").write_text(fork + BODY)
    environment = _environment(tmp_path, MLFLOW_RUN_ID="0123456789abcdef0123456789abcdef")
    command = [sys.executable, str(tmp_path / "dvc"), "repro"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert tracking.OFF not in done.stderr
    (parent,) = _runs(tmp_path, kind="pipeline")
    assert parent.info.run_name.startswith("repro ")
    children = _runs(tmp_path, kind="stage")
    assert len(children) == 4
    for child in children:
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert _points(tmp_path, child.info.run_id, "margin") == [(step, step) for step in range(50)]
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        assert connection.execute("pragma journal_mode").fetchone() == ("wal",)


def _use_everything(run: tracking.Run, file: Path) -> str:
    for step in range(500):
        run.log({"loss": 1.0}, step)
    run.image("grid", np.zeros((4, 4, 3)), 1)
    run.dataset(file, "pairs", 1)
    run.artifact(file)
    run.note("0" * 32, {"x": 1.0})
    run.summary({"x": 1.0})
    return "to the end"


@pytest.mark.parametrize("trouble", ["corrupt", "no such folder"])
def test_a_store_that_cannot_be_opened_stops_nothing(tmp_path, caplog, trouble):
    """Where even the outbox cannot be written, tracking is off."""
    (tmp_path / "mlflow.db").write_bytes(b"this is no database" * 1000)
    root = tmp_path if trouble == "corrupt" else Path("/proc/no/such/folder")
    with tracking.run("align", {}, tags={}, root=root) as run:
        assert _use_everything(run, Path(__file__)) == "to the end"
    told = [senders.AWAY, senders.INCOMPLETE] if trouble == "corrupt" else [tracking.OFF]
    assert [message.partition(":")[0] for message in _warnings(caplog)] == told
    assert _outboxes(tmp_path) == ([run.run_id] if trouble == "corrupt" else [])
    assert (run.run_id is None) == (trouble != "corrupt")


def test_a_store_lost_on_the_way_loses_nothing(root, tmp_path, caplog, monkeypatch):
    """Tables disappear in the middle of a run and are back at its end."""
    monkeypatch.setattr(senders, "FLUSH_SECONDS", 0.1)
    with sqlite3.connect(root / "mlflow.db") as full, sqlite3.connect(tmp_path / "mlflow.db") as copy:
        full.backup(copy)
    with (
        tracking.run("align", {}, tags={}, root=tmp_path) as run,
        sqlite3.connect(tmp_path / "mlflow.db") as db,
    ):
        db.execute("alter table metrics rename to away")
        db.commit()
        assert _use_everything(run, Path(__file__)) == "to the end"
        _wait_for(lambda: _warnings(caplog))
        db.execute("alter table away rename to metrics")
        db.commit()
    lost, refused = _warnings(caplog)
    assert lost.startswith(senders.AWAY)
    assert refused.startswith("note: left something out")  # the run that no store knows
    assert _client(tmp_path).get_run(run.run_id).info.status == "FINISHED"
    assert _points(tmp_path, run.run_id, "loss") == [(step, 1.0) for step in range(500)]
    assert _points(tmp_path, run.run_id, "x") == [(499, 1.0)]


def _wait_for(happened) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_off_never_imports_mlflow(tmp_path):
    code = """
    import sys
    from attune import tracking
    for uri in ("default", None):
        with tracking.run("align", {}, tags={}, uri=uri) as run:
            run.log({"loss": 1.0}, 0)
            run.summary({"x": 1.0})
            assert run.run_id is None
    assert "mlflow" not in sys.modules
    """
    environment = _environment(tmp_path, ATTUNE_TRACKING="off")
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, check=True, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_none_is_off(tmp_path, caplog):
    caplog.set_level(logging.INFO, "attune.tracking")
    with tracking.run("align", {}, tags={}, uri=None, root=tmp_path) as run:
        assert _use_everything(run, Path("no/such/file")) == "to the end"
    assert (run.run_id, _warnings(caplog), list(tmp_path.iterdir())) == (None, [], [])


def test_off_asks_nobody(tmp_path, monkeypatch):
    """No git is run: the one that would be found first writes down that it was called."""
    (tmp_path / "git").write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name, value in (("ATTUNE_TRACKING", "off"), ("RANK", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with tracking.run("align", {}, tags={}, root=tmp_path), tracking.sweep("s", {}, tags={}, root=tmp_path):
                pass
    assert not (tmp_path / "called").exists()
    labels.default_tags("align", {})
    assert (tmp_path / "called").exists()


def test_an_ancestor_that_has_ended_is_no_dvc():
    child = subprocess.Popen(["sleep", "60"])
    process = labels.psutil.Process(child.pid)
    child.kill()
    child.wait()
    assert labels._runs_pipeline(process) is False
