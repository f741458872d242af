"""DVC experiments, stages side by side and a remote, as docs/experiments.md tells users to run them.

In a git clone of the project that the other pipeline tests use, which shares its DVC cache. What trains is real.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import pytest
from clones import ADAPTER, METHODS, PROFILE, Project, tracked_runs

pytestmark = [pytest.mark.integration, pytest.mark.pipeline]

COLUMNS = 120
BETA = PROFILE["methods"]["dpo"]["beta"]


def commit(project: Project, message: str) -> None:
    project.run("git", "add", "--all")
    project.run("git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "-m", message)


@pytest.fixture(scope="module")
def home(project, tmp_path_factory) -> Project:
    """A clone with results that are committed: what `dvc exp` starts from."""
    folder = tmp_path_factory.mktemp("home") / "attune"
    project.run("git", "clone", "--quiet", ".", str(folder))
    made = replace(project, folder=folder, loaded=tmp_path_factory.mktemp("loaded"))
    for name in project.run("git", "ls-files", "--others", "--exclude-standard").split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((project.folder / name).read_bytes())
    for key in ("user.name", "user.email"):
        made.run("git", "config", key, "t@localhost")
    commit(made, "results")
    made.dvc("cache", "dir", "--local", str(project.folder / ".dvc" / "cache"))
    made.dvc("checkout")
    assert made.repro() == []
    return made


def children(project: Project, name: str) -> dict[str, str]:
    """Stage -> status of the tracked runs below the parent of an experiment."""
    runs = tracked_runs(project)
    parents = [run.info.run_id for run in runs if run.data.tags["kind"] == "pipeline" and run.info.run_name == name]
    assert len(parents) == 1
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0]]
    return {run.data.tags["dvc.stage"]: run.info.status for run in below}


def experiments(project: Project) -> dict[str, dict]:
    """Name -> what `dvc exp show` tells of an experiment."""
    shown = json.loads(project.dvc("exp", "show", "--json", "--no-pager"))
    found = [one for baseline in shown for one in baseline.get("experiments") or []]
    return {one["name"]: one["revs"][0]["data"] for one in found}


def test_one_value_is_tried_with_exp_run(home):
    """`-S` changes that value alone; the stages it touches run, and land below one parent in MLflow."""
    setting = f"params/short.yaml:methods.dpo.beta={2 * BETA}"
    said = home.dvc("exp", "run", "--name", "strong", "-S", setting, tracking="")
    changed = home.run("git", "diff", "--numstat", "--", "params.yaml", "params")
    assert changed.split() == ["1", "1", "params/short.yaml"], "that line alone"
    assert "Running stage 'align@dpo'" in said
    assert "Running stage 'align@spo'" not in said
    ran = children(home, "strong")
    assert {"align@dpo", "generate@dpo", "report"} <= set(ran)
    assert set(ran.values()) == {"FINISHED"}
    data = experiments(home)["strong"]
    assert data["params"]["params/short.yaml"]["data"]["methods"]["dpo"]["beta"] == 2 * BETA
    figures = data["metrics"]["reports/short/metrics.json"]["data"]
    assert {"base", *METHODS, *(f"{method} 95%" for method in METHODS)} <= set(figures)
    shown_in_a_terminal(home)
    home.run("git", "checkout", "--quiet", ".")
    home.dvc("checkout", "--force")


def shown_in_a_terminal(home: Project) -> None:
    """What DVC prints of an experiment that is in the workspace fits 120 columns, and no plot is missing."""
    shown = {
        "metrics show": terminal(home, "metrics", "show"),
        "metrics diff": terminal(home, "metrics", "diff"),
        "status": terminal(home, "status"),
        "plots show": terminal(home, "plots", "show"),
        "plots diff": terminal(home, "plots", "diff"),
        "make compare": terminal(home, "exp", "show", "--no-pager", "--only-changed", "--drop", ".*/|Created"),
    }
    for command, lines in shown.items():
        assert max(map(len, lines)) <= COLUMNS, command
        assert not re.search("fail|error|warning", "\n".join(lines), re.IGNORECASE), command
    assert shown["metrics show"][0].split()[:2] == ["Path", "base"]
    assert sum("methods.dpo.beta" in line and "strong" not in line for line in shown["make compare"]) == 1
    assert sum("[strong]" in line for line in shown["make compare"]) == 1
    page = home.read("dvc_plots/index.html")
    specs = [json.loads(found) for found in re.findall(r"var spec = (\{.*?\});\n", page)]
    drawn = {spec["title"].split(",")[0] for spec in specs if spec}
    assert len(specs) <= 6
    assert drawn == {
        "Loss of each training",
        "Mean paired difference to the base",
        "Preference model",
    }, "and no held-out scores, as no training was validated"
    assert {row["rev"] for spec in specs if spec for row in spec["data"]["values"]} == {"HEAD", "workspace"}
    assert "<DVC_METRIC" not in page


def terminal(project: Project, *words: str) -> list[str]:
    """The lines that `dvc` prints in a terminal of COLUMNS columns, both streams, without colours and progress bars."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    env = project.env() | {"COLUMNS": str(COLUMNS), "TERM": "xterm-256color", "DVC_PAGER": "cat"}
    running = subprocess.Popen(
        [sys.executable, "-m", "dvc", *words], cwd=project.folder, env=env, stdin=child, stdout=child, stderr=child
    )
    os.close(child)
    said = b""
    try:
        while read := os.read(parent, 65536):
            said += read
    except OSError:  # how Linux tells that the other end is closed
        pass
    os.close(parent)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())
    assert running.wait(timeout=120) == 0, text
    return [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n")]


def test_a_typo_is_no_experiment(home):
    said = home.dvc("exp", "run", "-S", "params/short.yaml:methods.dpo.betta=1", fails=True)
    assert "betta" in said


def test_queued_experiments_run_side_by_side_and_land_in_the_one_store(home):
    """Each runs in a temporary checkout of its own; store, artifacts and checkpoints stay in the repository's root."""
    home.dvc("exp", "run", "--queue", "-S", "params/short.yaml:methods.dpo.lr=1e-4,1e-3", "align@dpo")
    home.dvc("queue", "start", "-j", "2")
    end = time.monotonic() + 400
    while {line.split()[-1] for line in queue(home)} - {"Success", "Failed"}:
        assert time.monotonic() < end, home.dvc("queue", "status")
        time.sleep(2)
    lines = queue(home)
    assert [line.split()[-1] for line in lines] == ["Success"] * 2, home.dvc("queue", "logs", lines[0].split()[0])
    found = {name: data for name, data in experiments(home).items() if name != "strong"}
    rates = {data["params"]["params/short.yaml"]["data"]["methods"]["dpo"]["lr"] for data in found.values()}
    assert rates == {1e-4, 1e-3}
    for name in found:
        assert children(home, name) == {"align@dpo": "FINISHED"}
    trained = [run for run in tracked_runs(home) if run.data.tags.get("dvc.exp") in found]
    adapters = [Path(run.info.artifact_uri.removeprefix("file://")) for run in trained if "dvc.stage" in run.data.tags]
    files = [next(folder.rglob(ADAPTER)) for folder in adapters]
    assert len({file.read_bytes() for file in files}) == 2
    assert all(file.is_relative_to(home.folder / "mlruns") for file in files)
    assert home.run("git", "status", "--porcelain") == ""


def queue(project: Project) -> list[str]:
    """The lines of `dvc queue status`, a line per task."""
    table = project.dvc("queue", "status")
    return [line for line in table.splitlines() if line[:1].isalnum() and not line.startswith(("Task", "Worker", "No"))]


def test_two_stages_train_side_by_side(home):
    """`dvc repro -s` twice at once: both succeed, dvc.lock keeps both, and what is left runs afterwards."""
    for method in METHODS:
        text = home.params(f"methods.{method}.lr", 7e-4)
        (home.folder / "params/short.yaml").write_text(text)
    home.dvc("repro", "plan")
    words = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "-s"]  # on a busy machine 3 s are too short
    running = [
        subprocess.Popen(
            [*words, f"align@{m}"], cwd=home.folder, env=home.env(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for m in METHODS
    ]
    said = [process.communicate(timeout=400)[0].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    assert not any(f"align@{m}" in home.dvc("status") for m in METHODS)
    for method in METHODS:
        assert json.loads(home.read(f"models/short/{method}/run.json"))["settings"]["lr"] == 7e-4
    home.run("git", "checkout", "--quiet", ".")
    home.dvc("checkout", "--force")


def test_a_remote_gives_a_colleague_everything(home, tmp_path):
    """A local folder as remote: pushed, cloned, pulled; nothing has to run, and nothing is missing."""
    home.dvc("remote", "add", "--local", "--default", "store", str(tmp_path / "store"))
    home.dvc("push")
    theirs = replace(home, folder=tmp_path / "colleague")
    home.run("git", "clone", "--quiet", ".", str(theirs.folder))
    theirs.dvc("remote", "add", "--local", "--default", "store", str(tmp_path / "store"))
    theirs.dvc("pull")
    assert theirs.dvc("status").split() == ["plan:", "always", "changed"]
    assert theirs.repro() == []
    name = f"models/short/spo/{ADAPTER}"
    assert (theirs.folder / name).read_bytes() == (home.folder / name).read_bytes()
