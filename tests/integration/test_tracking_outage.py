"""Tracking against a real MLflow server that goes away and comes back, and against many writers at once."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from attune import tracking
from attune.tracking import outbox as outboxes
from attune.tracking import sender as senders
from attune.tracking import store as stores

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
    for key in [key for key in os.environ if key.startswith(("DVC_", "MLFLOW_", "ATTUNE_"))]:
        monkeypatch.delenv(key)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def short_pauses(monkeypatch):
    """Asks a store that is away five times a second, lest the tests wait."""
    monkeypatch.setattr(senders, "FLUSH_SECONDS", 0.2)
    monkeypatch.setattr(senders, "RETRY_SECONDS", (0.2, 0.2))


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    """A server's folder, whose database has its tables: they take seconds."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("server")
    MlflowClient(tracking_uri=f"sqlite:///{folder}/server.db").search_experiments()
    return folder


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """A root with a store of its own, that is no server's."""
    folder = tmp_path_factory.mktemp("local")
    stores.prepare()
    stores.connect(stores.DEFAULT, folder)
    return folder


@pytest.fixture
def address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def _start(folder: Path, address: str) -> subprocess.Popen:
    """The server in its lean form, once it answers."""
    words = ["--host", "127.0.0.1", "--port", address.rpartition(":")[2], "--workers", "1"]
    words += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "files")]
    lean = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.log").open("a") as log:
        command = [sys.executable, "-m", "mlflow", "server", *words]
        server = subprocess.Popen(command, env=os.environ | lean, stdout=log, stderr=log, start_new_session=True)
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=1):
                return server
        except OSError:
            assert server.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.1)
    raise TimeoutError((folder / "server.log").read_text())


def _stop(server: subprocess.Popen) -> None:
    os.killpg(server.pid, signal.SIGKILL)  # the workers too
    server.wait()


@contextmanager
def _server(folder: Path, address: str):
    server = _start(folder, address)
    try:
        yield server
    finally:
        _stop(server)


def _runs(uri: str, where: str = "") -> list:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("attune")
    return client.search_runs([experiment.experiment_id], where) if experiment else []


def _points(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    return sorted((m.step, m.value) for m in MlflowClient(tracking_uri=uri).get_metric_history(run_id, key))


def _files(uri: str, run_id: str, folder: str | None = None) -> list[str]:
    from mlflow import MlflowClient

    return sorted(info.path for info in MlflowClient(tracking_uri=uri).list_artifacts(run_id, folder))


def _left(root: Path) -> list[Path]:
    return list((root / outboxes.OUTBOXES).glob("*/records.jsonl"))


def _train(run: tracking.Run, steps: range, pause: float = 0.0) -> None:
    for step in steps:
        run.log({"loss": 1 / (step + 1), "margin": step}, step)
        time.sleep(pause)


def test_eight_processes_share_a_fresh_store(tmp_path):
    """300 steps of 2 points by 8 processes, no store before: every point is there, and no warning was given."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "DVC_ROOT": str(tmp_path)}
    command = [sys.executable, "-c", WRITER]
    writers = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(8)]
    told = [writer.communicate(timeout=300)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 8, told
    assert not any("attune.tracking" in text for text in told), told  # MLflow says that it creates tables
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    runs = _runs(uri)
    assert [run.info.status for run in runs] == ["FINISHED"] * 8
    for run in runs:
        assert _points(uri, run.info.run_id, "loss") == [(step, 1 / (step + 1)) for step in range(300)]
        assert _points(uri, run.info.run_id, "margin") == [(step, step) for step in range(300)]
    assert _left(tmp_path) == []


def test_a_server_that_goes_and_comes_back_gets_every_point_once(tmp_path, database, address, short_pauses):
    """The server is killed after 100 of 300 steps and started again after 200; the training never waits."""
    server = _start(database, address)
    (tmp_path / "adapter.bin").write_bytes(b"weights")
    waited = []
    try:
        with tracking.run("align", {"seed": 1}, tags={}, uri=address, root=tmp_path) as run:
            known = run.run_id
            _train(run, range(100), 0.005)
            _stop(server)
            begun = time.monotonic()
            _train(run, range(100, 200), 0.005)
            run.artifact(tmp_path / "adapter.bin")
            waited.append(time.monotonic() - begun)
            (tmp_path / "adapter.bin").unlink()
            server = _start(database, address)
            _train(run, range(200, 300), 0.005)
        assert run.run_id == known
        assert waited[0] < 2  # 100 pauses of 5 ms, and no time-out
        (found,) = _runs(address, f"tags.`attune.uid` = '{_uid(address, known)}'")
        assert found.info.status == "FINISHED"
        assert _points(address, known, "loss") == [(step, 1 / (step + 1)) for step in range(300)]
        assert _points(address, known, "margin") == [(step, step) for step in range(300)]
        assert _files(address, known) == ["adapter.bin"]
        assert (database / "files").exists()  # the artifact went through the server
        assert not (tmp_path / "mlruns").exists()
        assert _left(tmp_path) == []
    finally:
        _stop(server)


def _uid(uri: str, run_id: str) -> str:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri).get_run(run_id).data.tags["attune.uid"]


def test_a_server_away_for_the_whole_run_gets_it_by_replay(tmp_path, database, address):
    """Training, and evaluation that notes scores on its row, without a server; then `make replay`, twice."""
    begun = time.time() * 1000
    with tracking.run("align", {"methods": {"spo": {"beta": 10.0}}}, tags={}, uri=address, root=tmp_path) as training:
        _train(training, range(20))
        training.image("samples", _grey(), 3)
        training.dataset(Path(__file__), "pairs", 7)
    assert training.run_id.startswith(outboxes.UID)
    with tracking.run("evaluate", {}, tags={}, uri=address, root=tmp_path) as run:
        run.note(training.run_id, {"oracle": 0.7})
    ended = time.time() * 1000
    assert len(_left(tmp_path)) == 2
    command = [sys.executable, "-m", "attune.stages.replay"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "DVC_ROOT": str(tmp_path)}
    away = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert away.returncode == 1
    assert "0 runs sent, 2 wait" in away.stderr
    with _server(database, address):
        for sent in (2, 0):
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            assert f"{sent} runs sent, 0 wait" in done.stderr
        (found,) = _runs(address, f"tags.`attune.uid` = '{training.run_id}'")
        assert (found.info.status, found.data.params["beta"]) == ("FINISHED", "10")
        assert begun - 1 <= found.info.start_time <= found.info.end_time <= ended + 1  # its own times, not the replay's
        assert found.data.metrics["oracle"] == 0.7
        assert _points(address, found.info.run_id, "margin") == [(step, step) for step in range(20)]
        assert len(_files(address, found.info.run_id, "images")) == 2
        assert len(found.inputs.dataset_inputs) == 1
    assert _left(tmp_path) == []


def _grey():
    import numpy as np

    return np.full((4, 4, 3), 0.5)


def test_the_next_run_sends_what_the_last_has_left(tmp_path, short_pauses):
    """The first run's database cannot be opened; the second run, whose can, sends both."""
    (tmp_path / "mlflow.db").mkdir()
    with tracking.run("first", {}, tags={}, root=tmp_path) as first:
        first.log({"loss": 0.5}, 1)
    (tmp_path / "mlflow.db").rmdir()
    with tracking.run("second", {}, tags={}, root=tmp_path) as second:
        second.note(first.run_id, {"oracle": 0.7})
    (found,) = _runs(f"sqlite:///{tmp_path}/mlflow.db", f"tags.`attune.uid` = '{first.run_id}'")
    assert found.data.metrics == {"loss": 0.5, "oracle": 0.7}
    assert found.info.status == "FINISHED"
    assert _left(tmp_path) == []


def test_sent_twice_is_stored_once(tmp_path, local):
    """An outbox whose progress is forgotten is sent all over again: the same run, points, images and data sets."""
    uri = f"sqlite:///{local}/mlflow.db"
    with tracking.run("align", {"seed": 1}, tags={}, root=local) as run:
        _train(run, range(1100))
        run.image("samples/grid", _grey(), 3)
        run.dataset(Path(__file__), "pairs", 7)
        uid = _uid(uri, run.run_id)
        shutil.copytree(local / outboxes.OUTBOXES / uid, tmp_path / uid)
    (tmp_path / uid / outboxes.STATE).unlink()
    (tmp_path / uid).rename(local / outboxes.OUTBOXES / uid)  # as if killed before its end, with nothing noted as sent
    assert tracking.replay(local) == {uid: None}
    (found,) = _runs(uri, f"tags.`attune.uid` = '{uid}'")
    assert found.info.status == "KILLED"
    assert _points(uri, run.run_id, "loss") == [(step, 1 / (step + 1)) for step in range(1100)]
    assert len(found.inputs.dataset_inputs) == 1
    assert len(_files(uri, run.run_id, "images")) == 2


def test_a_server_that_accepts_and_never_answers_costs_a_bounded_time(tmp_path, monkeypatch):
    """A socket that nobody reads: a second at the start, one at the end, none between."""
    monkeypatch.setattr(senders, "START_SECONDS", 1.0)
    monkeypatch.setattr(senders, "DRAIN_SECONDS", 1.0)
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen()
        stores.prepare()
        begun = time.monotonic()
        with tracking.run("align", {}, tags={}, uri=f"http://127.0.0.1:{hole.getsockname()[1]}", root=tmp_path) as run:
            inside = time.monotonic()
            _train(run, range(1000))
            inside = time.monotonic() - inside
    assert inside < 0.5
    assert time.monotonic() - begun < 6
    assert len(_left(tmp_path)) == 1
    for thread in threading.enumerate():
        if thread.name.startswith("tracking "):
            thread.join(30)


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
    (found,) = _runs(uri, f"tags.`attune.uid` = '{outbox.uid}'")
    assert (found.info.status, _points(uri, found.info.run_id, "loss")) == ("KILLED", [(2, 0.5)])


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
    (found,) = _runs(f"sqlite:///{local}/mlflow.db", f"tags.`attune.uid` = '{outbox.uid}'")
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
    assert [path.parent.name for path in _left(tmp_path)] == [_uid(uri, stuck.run_id)]
    assert [run.info.status for run in _runs(uri)] == ["FINISHED"] * 2
    assert _points(uri, stuck.run_id, "loss") == [(0, 0.5)]
    assert _points(uri, stuck.run_id, "oracle") == [(0, 0.25)]
    told = [record.getMessage() for record in caplog.records if record.name == "attune.tracking"]
    assert told[0].startswith(f"{Path(__file__).name} cannot be stored")
    assert told[1] == senders.INCOMPLETE
    (error,) = tracking.replay(tmp_path).values()
    assert isinstance(error, OSError)
    (tmp_path / "mlruns").unlink()
    assert set(tracking.replay(tmp_path).values()) == {None}
    assert _files(uri, stuck.run_id) == [Path(__file__).name]
    assert _left(tmp_path) == []


def test_artifacts_have_a_time_out_of_their_own(monkeypatch):
    """A proxy that takes 2 s over each PUT, where a point has 1 s: the artifact arrives all the same."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    stores.prepare()

    class Slow(BaseHTTPRequestHandler):
        def do_PUT(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(2)
            self.send_response(200)
            self.end_headers()

        def do_GET(self):
            time.sleep(2)

        def log_message(self, *words):
            pass

    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
    from mlflow.tracking import MlflowClient

    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://127.0.0.1:{server.server_port}"
    HttpArtifactRepository(uri).log_artifact(__file__)
    with pytest.raises(MlflowException, match=r"timeout|timed out"):
        MlflowClient(tracking_uri=uri).get_experiment("0")
    server.shutdown()


def test_no_password_is_told(tmp_path, caplog):
    """One that holds "@" and "/"; what the log quotes of an address is its host."""
    assert tracking.redact(ValueError("no http://me:s@c/ret@host/x")) == "ValueError: no http://***@host/x"
    asked = tracking.redact(ValueError("postgresql://me@host/x?sslmode=require&Password=s3cret&x=1"))
    assert asked == "ValueError: postgresql://***@host/x?sslmode=require&Password=***&x=1"
    assert (
        tracking.redact(ValueError("host=x password='s3 cret' dbname=y")) == "ValueError: host=x password=*** dbname=y"
    )
    with tracking.run("align", {}, tags={}, uri="nonsense://me:secret@host/x", root=tmp_path):
        pass
    told = [record.getMessage() for record in caplog.records]
    assert any("//***@host" in text for text in told), told
    assert not any("secret" in text for text in told), told


def test_a_run_deleted_in_the_ui_is_let_go(local, short_pauses, caplog):
    from mlflow import MlflowClient

    with tracking.run("align", {}, tags={}, root=local) as run:
        MlflowClient(tracking_uri=f"sqlite:///{local}/mlflow.db").delete_run(run.run_id)
        _train(run, range(300))
        run.log({"loss": 1.0}, 2**70)
    assert _left(local) == []
    assert len({record.getMessage() for record in caplog.records if record.name == "attune.tracking"}) == 3


def test_a_store_that_has_lost_the_run_gets_it_again(tmp_path, short_pauses):
    """Its tables are emptied in mid-training, as by a server that is set up anew or from an old backup."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with tracking.run("align", {"seed": 1}, tags={}, root=tmp_path) as run:
        first = run.run_id
        run.log({"loss": 1.0}, 0)
        _wait_for(lambda: _points(uri, first, "loss"))
        with closing(sqlite3.connect(tmp_path / "mlflow.db")) as db:
            for table in ("latest_metrics", "metrics", "params", "tags", "runs"):
                db.execute(f"delete from {table}")
            db.commit()
        run.log({"loss": 0.5}, 1)
    (found,) = _runs(uri)
    assert found.info.run_id == run.run_id != first
    assert (found.info.status, found.data.params) == ("FINISHED", {"seed": "1"})
    assert _points(uri, run.run_id, "loss") == [(0, 1.0), (1, 0.5)]
    assert _left(tmp_path) == []


def _wait_for(happened) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
