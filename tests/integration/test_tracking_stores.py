"""Stores in trouble, as processes meet them: killed while they make one, deleted, locked, mute, behind a password."""

from __future__ import annotations

import base64
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from attune import tracking
from attune.tracking import patience
from attune.tracking import store as stores
from tracked import forget_environment, left_in, runs_in

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
STAGE = """
import logging, sys, time
logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
from attune import tracking
from attune.tracking import store
store.prepare()  # MLflow's import is no waiting
began = time.monotonic()
with tracking.run(sys.argv[2], {"seed": 1}, tags={}, uri=sys.argv[1]) as run:
    inside = time.monotonic()
    for step in range(5):
        run.log({"loss": 1 / (step + 1)}, step)
    inside = time.monotonic() - inside
print("waited", time.monotonic() - began - inside)
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    forget_environment(monkeypatch)
    monkeypatch.chdir(tmp_path)


def command(root: Path, *words: str) -> tuple[list[str], dict[str, str]]:
    return [sys.executable, *words], os.environ | {"PYTHONPATH": str(ROOT / "src"), "DVC_ROOT": str(root)}


def stage(root: Path, uri: str, name: str = "align") -> subprocess.CompletedProcess[str]:
    """A stage-like process of its own, to its end."""
    words, env = command(root, "-c", STAGE, uri, name)
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done


def replay(root: Path) -> subprocess.CompletedProcess[str]:
    words, env = command(root, "-m", "attune.stages.replay")
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=200)


def waited(done: subprocess.CompletedProcess[str]) -> float:
    return float(done.stdout.split("waited")[1])


# --- made whole ---------------------------------------------------------------------------------------------


MAKE = """
import resource, signal, sys
from pathlib import Path
from attune.tracking import store
if len(sys.argv) > 1:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
store.prepare()
print("go", flush=True)
store.connect("sqlite:///mlflow.db", Path.cwd())
"""


def test_a_database_is_made_whole_or_not_at_all(tmp_path):
    """Ten processes killed while they make it: each leaves none, or one that works; the next start works."""
    moments = random.Random(0)
    for i in range(10):
        home = tmp_path / str(i)
        home.mkdir()
        words, env = command(home, "-c", MAKE)
        with subprocess.Popen(words, env=env, cwd=home, stdout=subprocess.PIPE, text=True) as making:
            assert making.stdout.readline() == "go\n"
            time.sleep(moments.uniform(0.02, 2.5))
            making.send_signal(signal.SIGKILL)
        if (home / "mlflow.db").exists():
            with closing(sqlite3.connect(home / "mlflow.db")) as database:
                assert database.execute("pragma integrity_check").fetchone() == ("ok",)
                assert database.execute("select count(*) from alembic_version").fetchone() == (1,)
    for i in (0, 4, 9):
        with tracking.run("align", {}, tags={}, root=tmp_path / str(i)):
            pass
        assert [run.info.status for run in runs_in(f"sqlite:///{tmp_path / str(i)}/mlflow.db")] == ["FINISHED"]
        assert not list((tmp_path / str(i)).glob(".mlflow.db*"))


def test_a_full_disk_leaves_no_half_database(tmp_path):
    for size in ("50000", "200000"):
        words, env = command(tmp_path, "-c", MAKE, size)
        done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=100)
        assert done.returncode == 1
        assert not list(tmp_path.glob("*mlflow.db*")) + list(tmp_path.glob(".mlflow.db*"))
    with tracking.run("align", {}, tags={}, root=tmp_path):
        pass
    assert len(runs_in(f"sqlite:///{tmp_path}/mlflow.db")) == 1


@pytest.mark.parametrize("place", ["x y ü%3F?#z", "a%b", "q?x=1&y=2"])
def test_a_checkout_may_be_anywhere(place, tmp_path):
    """The database, the artifacts and a relative store are in the folder, and nowhere else."""
    home = tmp_path / place
    home.mkdir()
    (home / "adapter.bin").write_bytes(b"weights")
    for uri, name in (("default", "mlflow.db"), ("sqlite:///other.db", "other.db")):
        with tracking.run("align", {}, tags={}, uri=uri, root=home) as run:
            run.log({"loss": 1.0}, 0)
            run.artifact(home / "adapter.bin")
        assert left_in(home) == []
        with closing(sqlite3.connect(home / name)) as database:
            assert database.execute("select status from runs").fetchall() == [("FINISHED",)]
        assert (home / "mlruns" / run.run_id / "artifacts" / "adapter.bin").read_bytes() == b"weights"
    assert [path.name for path in tmp_path.iterdir()] == [place]


# --- deleted ------------------------------------------------------------------------------------------------


def test_a_deleted_experiment_keeps_what_is_logged_until_it_is_restored(tmp_path):
    """Also one that is deleted while a run goes on. The way back is told once, and nothing is lost."""
    from mlflow import MlflowClient

    stage(tmp_path, "default")
    with tracking.run("align", {}, tags={}, root=tmp_path) as run:
        run.log({"loss": 1.0}, 0)
        client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
        number = client.get_experiment_by_name("attune").experiment_id
        client.delete_experiment(number)
        run.log({"loss": 0.5}, 1)
    told = [stage(tmp_path, "default").stderr for _ in range(2)]
    again = replay(tmp_path)
    assert again.returncode == 1
    restore = f"MLFLOW_TRACKING_URI=sqlite:///{tmp_path}/mlflow.db mlflow experiments restore -x {number}"
    assert restore in again.stderr
    assert told == ["", ""]  # the run in this process has said it
    assert len(left_in(tmp_path)) == 3
    client.restore_experiment(number)
    assert replay(tmp_path).returncode == 0
    assert len(runs_in(f"sqlite:///{tmp_path}/mlflow.db", "status = 'FINISHED'")) == 4
    assert len(client.get_metric_history(run.run_id, "loss")) == 2


def test_a_run_deleted_in_the_ui_is_not_created_again(tmp_path):
    """Its process was killed, so the next one sends the rest, and finds the run among the deleted ones."""
    from mlflow import MlflowClient

    words, env = command(tmp_path, "-c", KILLED)
    assert subprocess.run(words, env=env, timeout=100, check=False).returncode == -signal.SIGKILL
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    (run,) = runs_in(uri)
    MlflowClient(tracking_uri=uri).delete_run(run.info.run_id)
    assert len(left_in(tmp_path)) == 1
    assert replay(tmp_path).returncode == 0
    assert (runs_in(uri), left_in(tmp_path)) == ([], [])


KILLED = """
import os, signal
from attune import tracking
from attune.tracking import sender
sender.START_SECONDS = 60
with tracking.run("align", {}, tags={}) as run:
    assert not run.run_id.startswith("local-")
    run.log({"loss": 1.0}, 0)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_waits_for_another_store_is_not_sent_to_this_one(tmp_path):
    stage(tmp_path, "http://127.0.0.1:9", "elsewhere")
    stage(tmp_path, "default", "here")
    assert [run.info.run_name for run in runs_in(f"sqlite:///{tmp_path}/mlflow.db")] == ["here"]
    assert len(left_in(tmp_path)) == 1


# --- locked, mute -------------------------------------------------------------------------------------------


@contextmanager
def locked(root: Path) -> Iterator[str]:
    """A database that another process writes to all the time."""
    with closing(sqlite3.connect(root / "mlflow.db", isolation_level=None)) as held:
        held.execute("begin exclusive")
        yield "default"
        held.execute("rollback")


@contextmanager
def mute(root: Path) -> Iterator[str]:
    """A server that accepts and never answers."""
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(50)
        yield f"http://127.0.0.1:{hole.getsockname()[1]}"


@pytest.mark.parametrize("trouble", [locked, mute])
def test_a_store_in_trouble_costs_a_pipeline_twenty_seconds(trouble, tmp_path):
    """Four stages, of which the first alone says what is wrong, in few lines; nothing is lost."""
    stage(tmp_path, "default", "first")
    with trouble(tmp_path) as uri:
        done = [stage(tmp_path, uri, name) for name in ("prepare", "align", "evaluate", "report")]
    assert sum(map(waited, done)) < patience.BUDGET + 3  # 0.2 s and a little a stage, once the budget is used up
    assert waited(done[-1]) < 2
    assert [len(each.stderr.strip().splitlines()) for each in done][1:] == [0, 0, 0]
    assert 1 <= len(done[0].stderr.strip().splitlines()) <= 3
    assert len(left_in(tmp_path)) == 4
    if trouble is locked:
        assert replay(tmp_path).returncode == 0
        assert len(runs_in(f"sqlite:///{tmp_path}/mlflow.db", "status = 'FINISHED'")) == 5


def test_a_store_that_is_back_is_waited_for_again(tmp_path):
    stage(tmp_path, "default")
    known = patience.read(tmp_path, stores.DEFAULT, "one")
    known.spend(12.0)
    assert patience.read(tmp_path, stores.DEFAULT, "one").left == 8.0
    assert patience.read(tmp_path, stores.DEFAULT, "another").left == 8.0  # a moment ago
    assert patience.read(tmp_path, "http://other", "one").left == patience.BUDGET
    stage(tmp_path, "default")
    assert patience.read(tmp_path, stores.DEFAULT, "one").left == patience.BUDGET


# --- passwords ----------------------------------------------------------------------------------------------


@contextmanager
def proxy(target: str, user: str) -> Iterator[str]:
    """A server that asks for a password and passes the rest on; its address, without the password."""
    import requests

    class Proxy(BaseHTTPRequestHandler):
        def _pass_on(self):
            wanted = "Basic " + base64.b64encode(user.encode()).decode()
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != wanted:
                self.send_response(401)
                self.end_headers()
                return
            headers = {"Content-Type": self.headers.get("Content-Type", "application/json")}
            answer = requests.request(self.command, target + self.path, data=body, headers=headers, timeout=30)
            self.send_response(answer.status_code)
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        do_GET = do_POST = do_PUT = do_PATCH = _pass_on

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


@pytest.fixture
def server(tmp_path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        str(tmp_path / "files"),
    ]
    env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (tmp_path / "server.log").open("w") as log:
        running = subprocess.Popen([sys.executable, *words], env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            with closing(socket.socket()) as asked:
                if asked.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()


def test_a_password_is_nowhere_in_what_is_printed(tmp_path, server):
    """A run, a run that its server refuses, one without a server, and `make replay` of what waits."""
    said = []
    with proxy(server, "me:s3cret") as place:
        for uri in (f"http://me:s3cret@{place}", f"http://me:wr0ngs3cret@{place}", "http://me:s3cret@127.0.0.1:9"):
            done = stage(tmp_path, uri)
            said.append(done.stdout + done.stderr)
        done = replay(tmp_path)
        assert done.returncode == 1
        said.append(done.stdout + done.stderr)
    assert len(runs_in(server, "status = 'FINISHED'")) == 1
    assert not [text for text in said if "s3cret" in text]
    assert "//***@127.0.0.1:9" in said[2] + said[3]
    folders = list((tmp_path / ".checkpoints/tracking").glob("local-*"))
    assert folders
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}
