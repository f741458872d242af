"""`attune repro` on small pipelines of real DVC: side by side as one by one, stopped, failed and killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

import stages

pytestmark = pytest.mark.integration

PROGRAM = """
import json, os, signal, sys, time
name, seconds, *how = sys.argv[1:]
started = time.monotonic()
told = []
def note():
    with open(f"events/{name}.json", "w") as file:
        json.dump({"began": started, "ended": time.monotonic(), "told": told, "pid": os.getpid(),
                   "processes": os.environ.get("ATTUNE_PROCESSES", "")}, file)
def remember(signum, frame):
    told.append(signum)
    note()
    if "slow" not in how or len(told) > 1:
        sys.exit(128 + signum)
signal.signal(signal.SIGINT, remember)
note()
while time.monotonic() < started + float(seconds):
    print("work: 50%|#####     | 1/2 [00:01<00:01,  1.00it/s]", end="\\r", file=sys.stderr)
    time.sleep(0.05)
if "fails" in how:
    raise RuntimeError("a loss that is NaN")
print(f"{name} says hello")
with open(f"{name}.txt", "w") as file:
    file.write(name)
note()
"""


class Small:
    """A pipeline `first -> (a, b) -> last` in a folder of its own; `kept` is an output that git keeps."""

    def __init__(self, folder: Path):
        self.folder = stages.write(folder, {"base": {"after": "data"}})
        self.events = folder / "events"
        self.events.mkdir()
        (folder / "work.py").write_text(PROGRAM)
        (folder / ".dvc").mkdir()
        (folder / ".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
        self.write({})

    def write(self, words: dict[str, str], first: str = "prepare") -> None:
        """dvc.yaml, with what each stage's program is given: seconds, and how it behaves."""
        needs = {first: [], "a": [first], "b": [first], "last": ["a", "b"]}
        made = {
            name: {
                "cmd": f"{sys.executable} work.py {name} {words.get(name, '0')}",
                "deps": ["work.py", *(f"{need}.txt" for need in some)],
                "outs": [{f"{name}.txt": {"cache": False}} if name == "b" else f"{name}.txt"],
            }
            for name, some in needs.items()
        }
        with (self.folder / "dvc.yaml").open("w") as file:
            YAML().dump({"stages": made}, file)

    def start(self, *words: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
        env = {key: value for key, value in os.environ.items() if not key.startswith(stages.PREFIXES)}
        env |= {"PYTHONPATH": str(stages.ROOT / "src"), "DVC_SITE_CACHE_DIR": f"{self.folder}.site"}
        env |= {"TERM": "xterm", "COLUMNS": "100"}
        pipes = {"stdout": stdout, "stderr": subprocess.STDOUT}
        return subprocess.Popen([sys.executable, "-m", *words], cwd=self.folder, env=env, text=True, **pipes)

    def run(self, *words: str, code: int = 0) -> str:
        process = self.start(*words)
        said = process.communicate(timeout=120)[0]
        assert process.returncode == code, said
        return said

    def repro(self, *words: str, code: int = 0) -> str:
        return self.run("attune.stages.repro", *(words or ("--jobs", "2")), code=code)

    def event(self, name: str) -> dict:
        return json.loads((self.events / f"{name}.json").read_text())

    def lock(self) -> bytes:
        return (self.folder / "dvc.lock").read_bytes()

    def rwlock(self) -> dict:
        return json.loads((self.folder / ".dvc/tmp/rwlock").read_text())

    def wait_for(self, *names: str) -> list[psutil.Process]:
        """The processes of stages, once all of them have begun."""
        end = time.monotonic() + 60
        while not all((self.events / f"{name}.json").exists() for name in names):
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(0.3)
        return [psutil.Process(self.event(name)["pid"]) for name in names]


@pytest.fixture
def small(tmp_path) -> Small:
    return Small(tmp_path / "small")


def test_side_by_side_leaves_what_one_by_one_leaves(small, tmp_path):
    """The lock to the byte, though b ends before a; a stage alone has all cores; then DVC finds nothing to do."""
    serial = Small(tmp_path / "serial")
    for each in (small, serial):
        each.write({"a": "1.5"})
    said = small.repro()
    alone = serial.repro("--jobs", "1")
    a, b = small.event("a"), small.event("b")
    assert b["began"] < a["ended"]
    assert b["ended"] < a["ended"]
    assert small.lock() == serial.lock()
    assert [small.event(name)["processes"] for name in ("prepare", "a", "b", "last")] == ["2", "", "", ""]
    assert serial.event("prepare")["processes"] == ""
    runs = [sorted(p.name for p in (each.folder / ".dvc/cache/runs").rglob("*")) for each in (small, serial)]
    assert runs[0] == runs[1] != []
    kept = [file.read_text() for file in (small.folder / ".dvc/cache/files").rglob("*") if file.is_file()]
    assert sorted(kept) == ["a", "last", "prepare"], "b is not DVC's to keep"
    assert small.rwlock() == {}
    for text in (said, alone):
        assert re.search(r"^\[4 of 4\] last: ran, \d+ s$", text, flags=re.MULTILINE), text
        assert re.search(r"^a \| a says hello$", text, flags=re.MULTILINE)
        assert "50%" not in text
    assert "a says hello" in (small.folder / ".checkpoints/logs/a.log").read_text()
    assert small.run("dvc", "status").strip() == "Data and pipelines are up to date."
    assert "Running" not in small.run("dvc", "repro")
    said = small.repro("--dry", "a")
    assert said.startswith("Stage 'prepare' didn't change, skipping\n"), "words that are DVC's go to DVC"
    assert "[4 of 4]" not in said
    assert set(json.loads((small.folder / ".checkpoints/seconds.json").read_text())) == {"prepare", "a", "b", "last"}


def test_a_terminal_shows_what_runs_and_keeps_the_lines(small):
    small.write({"a": "1", "b": "1"})
    ours, theirs = os.openpty()
    running = small.start("attune.stages.repro", "--jobs", "2", stdout=theirs)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # EIO: the last one that had it open has ended
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    assert running.wait(timeout=60) == 0
    cleared = shown.decode().replace("\r", "").replace("\x1b[2K", "\n")  # what is written next is a line of its own
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", cleared)
    assert "stages 2 and 3 of 4" in text
    assert re.search(r"^  a +[━╸╺]+ +50 %  \d s  work 1/2", text, flags=re.MULTILINE)
    assert re.search(r"^a \| a says hello$", text, flags=re.MULTILINE)
    assert re.search(r"\n4 of 4 stages ran, in \d+ s; their output is in .checkpoints/logs\s*$", text)


def test_after_a_failure_what_runs_ends_and_nothing_is_begun(small, tmp_path):
    small.write({"a": "0.3 fails", "b": "1.5"})
    said = small.repro(code=255)
    assert (small.folder / "b.txt").read_text() == "b", "it ran on to its end"
    assert not (small.events / "last.json").exists()
    end = said[said.index("\na failed; the end of .checkpoints/logs/a.log:") :]
    shown = re.findall(r"^  (.*)$", end, flags=re.MULTILINE)
    whole = shown[shown.index("Traceback (most recent call last):") :]
    assert whole[-2:] == ["RuntimeError: a loss that is NaN", shown[-1]]
    assert end.endswith("failed: a\nnot run: last\n`make repro` goes on from there\n")
    small.write({"b": "1.5"})
    said = small.repro()
    assert "b | Running" not in said
    assert "a | Running" in said
    serial = Small(tmp_path / "serial")
    serial.write({"b": "1.5"})
    serial.run("dvc", "repro")
    assert small.lock() == serial.lock(), "in the order of `dvc repro`, also after two parts"


def test_stages_that_are_defined_anew_are_not_begun(small):
    """They would be a mixture. A log that is removed meanwhile does no harm; a file that DVC tracks is a stage, too."""
    (small.folder / "raw").mkdir()
    (small.folder / "raw/one.txt").write_text("one")
    small.run("dvc", "add", "raw/one.txt")
    small.write({"a": "2", "b": "2"})
    text = (small.folder / "dvc.yaml").read_text()
    (small.folder / "dvc.yaml").write_text(text.replace("- work.py\n", "- work.py\n    - raw/one.txt\n", 1))
    running = small.start("attune.stages.repro", "--jobs", "2")
    small.wait_for("a", "b")
    (small.folder / ".checkpoints/logs/a.log").unlink()
    params = small.folder / "params.yaml"
    params.write_text(params.read_text().replace("profile: short", "profile: other"))
    said = running.communicate(timeout=60)[0]
    assert running.returncode == 1, said
    assert said.count("params.yaml has changed") == 1
    assert "[4 of 5]" in said
    assert "not run: last\n" in said
    assert (small.folder / "a.txt").read_text() == "a", "it ran on to its end"


def test_stages_are_stopped_when_nobody_reads_the_output(small):
    small.write({"a": "60", "b": "60"})
    running = small.start("attune.stages.repro", "--jobs", "2")
    processes = small.wait_for("a", "b")
    running.stdout.close()
    processes[0].parent().kill()  # so that there is something to say
    assert running.wait(timeout=30) == 1
    assert psutil.wait_procs(processes, timeout=10)[1] == []
    assert small.event("b")["told"] == [2]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_wish_to_stop_reaches_each_stage_once_and_again_at_once(small, signum):
    small.write({"a": "60", "b": "60 slow"})
    running = small.start("attune.stages.repro", "--jobs", "2")
    processes = [*small.wait_for("a", "b"), *psutil.Process(running.pid).children(recursive=True)]
    running.send_signal(signum)
    psutil.wait_procs(processes[:1], timeout=30)
    time.sleep(0.5)
    assert (small.event("a")["told"], small.event("b")["told"]) == ([2], [2])
    assert running.poll() is None
    running.send_signal(signum)
    said = running.communicate(timeout=60)[0]
    assert running.returncode == 128 + signum, said
    assert small.event("b")["told"] == [2, 2]
    assert "stopped: a, b\nnot run: last\n" in said
    assert psutil.wait_procs(processes, timeout=10)[1] == []
    assert small.rwlock() == {}


def test_a_killed_repro_takes_its_stages_with_it(small):
    """Each is told once, as by Ctrl-C; the next `attune repro` waits for their end, and runs them once."""
    small.write({"a": "60", "b": "60 slow"})
    running = small.start("attune.stages.repro", "--jobs", "2")
    a, b = small.wait_for("a", "b")
    os.kill(running.pid, signal.SIGKILL)
    running.communicate()
    psutil.wait_procs([a], timeout=30)
    time.sleep(0.3)
    assert (small.event("a")["told"], small.event("b")["told"]) == ([2], [2])
    assert b.is_running()
    small.write({})
    following = small.start("attune.stages.repro", "--jobs", "2")
    line = following.stdout.readline()
    assert line == "another `make repro` is running here, or its stages are ending: this one waits for that\n"
    b.send_signal(signal.SIGINT)
    said = following.communicate(timeout=120)[0]
    assert following.returncode == 0, said
    assert small.rwlock() == {}


def test_a_worker_that_is_killed_is_a_stage_that_failed(small):
    small.write({"a": "60", "b": "2"})
    running = small.start("attune.stages.repro", "--jobs", "2")
    a, _ = small.wait_for("a", "b")
    next(one for one in a.parents() if one.ppid() == running.pid).kill()  # not the shell between, where there is one
    said = running.communicate(timeout=60)[0]
    assert running.returncode == 1, said
    assert "a | the process that ran DVC for it is gone (exit code -9)" in said
    assert "failed: a\nnot run: last\n" in said
    assert psutil.wait_procs([a], timeout=10)[1] == []
    assert (small.folder / "b.txt").exists()
