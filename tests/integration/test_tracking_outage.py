"""Tracking against MLflow servers: one that goes away and comes back, one that never answers, and slow artifacts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from attune import tracking
from attune.tracking import outbox as outboxes
from attune.tracking import sender as senders
from attune.tracking import store as stores
from tracked import files_of, forget_environment, grey, left_in, points_of, runs_in, shorten_pauses, train, uid_of

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    forget_environment(monkeypatch)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def short_pauses(monkeypatch):
    shorten_pauses(monkeypatch)


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    """A server's folder, whose database has its tables: they take seconds."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("server")
    MlflowClient(tracking_uri=f"sqlite:///{folder}/server.db").search_experiments()
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


def test_a_server_that_goes_and_comes_back_gets_every_point_once(tmp_path, database, address, short_pauses):
    """The server is killed after 100 of 300 steps and started again after 200; the training never waits."""
    server = _start(database, address)
    (tmp_path / "adapter.bin").write_bytes(b"weights")
    waited = []
    try:
        with tracking.run("align", {"seed": 1}, tags={}, uri=address, root=tmp_path) as run:
            known = run.run_id
            train(run, range(100), 0.005)
            _stop(server)
            begun = time.monotonic()
            train(run, range(100, 200), 0.005)
            run.artifact(tmp_path / "adapter.bin")
            waited.append(time.monotonic() - begun)
            (tmp_path / "adapter.bin").unlink()
            server = _start(database, address)
            train(run, range(200, 300), 0.005)
        assert run.run_id == known
        assert waited[0] < 2  # 100 pauses of 5 ms, and no time-out
        (found,) = runs_in(address, f"tags.`attune.uid` = '{uid_of(address, known)}'")
        assert found.info.status == "FINISHED"
        assert points_of(address, known, "loss") == [(step, 1 / (step + 1)) for step in range(300)]
        assert points_of(address, known, "margin") == [(step, step) for step in range(300)]
        assert files_of(address, known) == ["adapter.bin"]
        assert (database / "files").exists()  # the artifact went through the server
        assert not (tmp_path / "mlruns").exists()
        assert left_in(tmp_path) == []
    finally:
        _stop(server)


def test_a_server_away_for_the_whole_run_gets_it_by_replay(tmp_path, database, address):
    """Training, and evaluation that notes scores on its row, without a server; then `make replay`, twice."""
    begun = time.time() * 1000
    with tracking.run("align", {"methods": {"spo": {"beta": 10.0}}}, tags={}, uri=address, root=tmp_path) as training:
        train(training, range(20))
        training.image("samples", grey(), 3)
        training.dataset(Path(__file__), "pairs", 7)
    assert training.run_id.startswith(outboxes.UID)
    with tracking.run("evaluate", {}, tags={}, uri=address, root=tmp_path) as run:
        run.note(training.run_id, {"oracle": 0.7})
    ended = time.time() * 1000
    assert len(left_in(tmp_path)) == 2
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
        (found,) = runs_in(address, f"tags.`attune.uid` = '{training.run_id}'")
        assert (found.info.status, found.data.params["beta"]) == ("FINISHED", "10")
        assert begun - 1 <= found.info.start_time <= found.info.end_time <= ended + 1  # its own times, not the replay's
        assert found.data.metrics["oracle"] == 0.7
        assert points_of(address, found.info.run_id, "margin") == [(step, step) for step in range(20)]
        assert len(files_of(address, found.info.run_id, "images")) == 2
        assert len(found.inputs.dataset_inputs) == 1
    assert left_in(tmp_path) == []


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
            train(run, range(1000))
            inside = time.monotonic() - inside
    assert inside < 0.5
    assert time.monotonic() - begun < 6
    assert len(left_in(tmp_path)) == 1
    for thread in threading.enumerate():
        if thread.name.startswith("tracking "):
            thread.join(30)


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
