"""Stages that are forks of a process which has imported the libraries: they live and end as processes of their own."""

from __future__ import annotations

import json
import os
import signal
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


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    with serving(environment, tmp_path_factory.mktemp("served") / "errors") as found:
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


def ended(pid: int) -> bool:
    limit = time.monotonic() + SECONDS
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > limit:
            return False
        time.sleep(0.05)
    return True


def test_a_fork_has_what_its_process_was_started_with(asked, tmp_path):
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


def test_forks_end_with_the_server(tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(tmp_path)])}
    with serving(environment, tmp_path / "errors") as found:
        command, pipe = [sys.executable, "-m", "probe", "waits"], subprocess.PIPE
        process = subprocess.Popen(command, env=environment | found, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)
        fork = json.loads(process.stdout.readline())["pid"]
    _, error = process.communicate(timeout=SECONDS)
    assert ended(fork)
    assert process.returncode == 1
    assert "start again" in error


def test_without_a_server_a_stage_is_its_own_process(asked, tmp_path):
    process = asked("0", **{ADDRESS: str(tmp_path / "nobody")})
    found = json.loads(process.communicate(timeout=SECONDS)[0])
    assert found["pid"] == process.pid
    assert not found["torch"]
