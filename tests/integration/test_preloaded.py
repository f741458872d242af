"""Stages that are forks of a process which has imported the libraries: they live and end as processes of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from attune.stages.preloaded import ADDRESS, serving

ROOT = Path(__file__).parents[2]
SECONDS = 120  # the server first imports all libraries
PROBE = """
import json, os, signal, sys, time
from attune.stages.preloaded import hand_over
hand_over()
print(json.dumps({"pid": os.getpid(), "words": sys.argv[1:], "folder": os.getcwd(), "told": os.environ.get("TOLD"),
                  "sockets": sum("socket:" in os.path.realpath(f"/proc/self/fd/{n}") for n in range(64)),
                  "torch": "torch" in sys.modules, "address": os.environ.get("ATTUNE_PRELOADED")}), flush=True)
what = sys.argv[1]
if what == "fails":
    raise ValueError("as it should")
if what == "says":
    sys.exit("one line")
if what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "stops":
    def stop(signum, frame):
        sys.exit(40 + signum)
    signal.signal(signal.SIGTERM, stop)
    print("ready", flush=True)
if what in ("stops", "waits"):
    time.sleep(600)
sys.exit(int(what))
"""
STARTS = """
import json, os, time
from pathlib import Path
from attune.stages.preloaded import serving
with serving(os.environ, Path("errors")) as found:
    print(json.dumps(found), flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    with serving(environment, tmp_path_factory.mktemp("served") / "errors") as found:
        wait_for(found[ADDRESS])
        yield environment | found


@pytest.fixture
def asked(served, tmp_path):
    """Starts a process that asks to be forked."""
    (tmp_path / "probe.py").write_text(PROBE)
    begun = []

    def ask(*words: str, **more: str) -> subprocess.Popen[str]:
        environment = served | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(tmp_path)])} | more
        command = [sys.executable, "-m", "probe", *words]
        pipe = subprocess.PIPE
        begun.append(subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True))
        return begun[-1]

    yield ask
    for process in begun:
        process.kill()
        process.communicate()


def wait_for(address: str) -> None:
    """Until the server listens, or nearly: before that a stage runs by itself."""
    limit = time.monotonic() + SECONDS
    while not Path(address).exists() and time.monotonic() < limit:
        time.sleep(0.05)


def ended(pid: int) -> bool:
    limit = time.monotonic() + SECONDS
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > limit:
            return False
        time.sleep(0.05)
    return True


def test_a_fork_has_what_its_process_was_started_with(asked, tmp_path):
    assert asked("waits").stdout.readline(), "another one runs beside it"
    process = asked("7", "--run", "a b", TOLD="yes")
    out, error = process.communicate(timeout=SECONDS)
    found = json.loads(out)
    assert found.pop("pid") != process.pid
    assert found == {
        "words": ["7", "--run", "a b"],
        "folder": str(tmp_path),
        "told": "yes",
        "torch": True,
        "address": None,
        "sockets": 1,
    }
    assert process.returncode == 7
    assert not error


@pytest.mark.parametrize(
    ("word", "code", "said"),
    [("0", 0, ""), ("fails", 1, "ValueError: as it should"), ("says", 1, "one line"), ("killed", -signal.SIGKILL, "")],
)
def test_it_ends_as_its_fork_does(word, code, said, asked):
    process = asked(word)
    _, error = process.communicate(timeout=SECONDS)
    assert process.returncode == code
    assert said in error
    assert bool(said) == bool(error)


def test_a_signal_reaches_the_fork(asked):
    process = asked("stops")
    assert process.stdout.readline()
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    process.communicate(timeout=SECONDS)
    assert process.returncode == 40 + signal.SIGTERM


def test_a_fork_ends_with_the_process_that_asked_for_it(asked):
    process = asked("waits")
    fork = json.loads(process.stdout.readline())["pid"]
    process.kill()
    assert ended(fork)


def test_the_server_outlives_who_asks_wrongly_and_who_is_killed(asked, served):
    """A question that breaks off; a fork and the process that asked for it, of whose ends it hears together."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(served[ADDRESS])
    process = asked("waits")
    fork = psutil.Process(json.loads(process.stdout.readline())["pid"])
    server = fork.parent()
    server.suspend()
    fork.kill()
    process.kill()
    process.wait()
    server.resume()
    process = asked("0")
    assert json.loads(process.communicate(timeout=SECONDS)[0])["pid"] != process.pid
    assert server.is_running()


def test_forks_end_with_the_server(asked, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    with serving(environment, tmp_path / "errors") as found:
        wait_for(found[ADDRESS])
        process = asked("waits", **found)
        fork = json.loads(process.stdout.readline())["pid"]
        psutil.Process(fork).parent().kill()
        _, error = process.communicate(timeout=SECONDS)
    assert ended(fork)
    assert process.returncode == 1
    assert "start again" in error


def test_a_server_whose_parent_is_gone_before_it_looks_out_for_that_ends(tmp_path):
    command = [sys.executable, "-m", "attune.stages.preloaded", str(tmp_path / "folder/socket"), str(os.getppid())]
    (tmp_path / "folder").mkdir()
    assert subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, timeout=SECONDS).returncode == 0
    assert not (tmp_path / "folder").exists()


def test_a_stage_is_not_told_to_stop_by_the_end_of_attune_repro(asked, tmp_path):
    """A worker tells it, once: a second signal would end a training before it has saved."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen([sys.executable, "-c", STARTS], cwd=tmp_path, env=environment, stdout=subprocess.PIPE) as one:
        found = json.loads(one.stdout.readline())
        wait_for(found[ADDRESS])  # else the stage would run by itself
        process = asked("stops", **found)
        fork = psutil.Process(json.loads(process.stdout.readline())["pid"])
        server = fork.ppid()
        assert process.stdout.readline() == "ready\n"
        one.kill()
    time.sleep(0.5)
    assert fork.is_running()
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=SECONDS)
    assert process.returncode == 40 + signal.SIGTERM
    assert ended(server)
    assert not Path(found[ADDRESS]).parent.exists()


def test_where_the_server_cannot_import_a_stage_is_its_own_process(asked, tmp_path):
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(2)\nraise ImportError('a library that is missing')\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])}
    with serving(environment, tmp_path / "errors") as found:
        wait_for(found[ADDRESS])
        process = asked("3", **found)
        out, error = process.communicate(timeout=SECONDS)
    assert json.loads(out)["pid"] == process.pid
    assert (process.returncode, error) == (3, "")
    assert "a library that is missing" in (tmp_path / "errors").read_text()


def test_without_a_server_a_stage_is_its_own_process(asked, tmp_path):
    process = asked("0", **{ADDRESS: str(tmp_path / "nobody")})
    found = json.loads(process.communicate(timeout=SECONDS)[0])
    assert found["pid"] == process.pid
    assert not found["torch"]
