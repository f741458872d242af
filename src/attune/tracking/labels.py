"""Names of a run: its tags, the pipeline it belongs to, and its columns in the UI's table."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from attune import text
from attune.files import values_sha
from attune.text import cut, printable

HOST = socket.gethostname()
CODE = (":/src", ":/params.yaml", ":/params", ":/dvc.yaml")  # of git.dirty; every repro changes dvc.lock
BLOCK = re.compile(r"(profiles\.[^.]+\.)?methods\.[^.]+\.")  # `methods.spo.beta` and a trial's `beta`: one column
Tree = Mapping[str, Any]


def default_tags(stage: str, params: Tree) -> dict[str, str]:
    """Tags of a run: what ran, on which code and parameters, as which process of which host."""
    commit, changes = _git("rev-parse", "--verify", "HEAD"), _git("status", "--porcelain", "--", *CODE)
    env = os.environ.get
    tuned = (
        "true" if any(map(BLOCK.match, flatten(params))) else None
    )  # the run has a method's settings, so it is a row of the shared view
    known = {"tuned": tuned, "kind": "stage", "dvc.stage": env("DVC_STAGE", stage), "dvc.exp": env("DVC_EXP_NAME")}
    known |= {"git.commit": commit, "git.dirty": {None: None, "": "false"}.get(changes, "true")}
    known |= {"params.sha": values_sha(params), "mlflow.user": env("USER"), **process()}
    known |= {"mlflow.source.git.commit": commit, "mlflow.source.name": known["dvc.stage"]}
    return {key: value for key, value in known.items() if value is not None}


def redact(error: BaseException) -> str:
    """An error as one line for the log, with user and password hidden in the addresses that it quotes."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return cut(printable(text.redact(line)), 300)


def process() -> dict[str, str]:
    """Tags by which another process can check whether the process of a run is alive."""
    me = psutil.Process()
    return {"host": HOST, "pid": str(me.pid), "pid.created": str(me.create_time())}


def is_alive(pid: int, born: float) -> bool:
    """Whether the process of this host with that id, born at `born` (s since the epoch), is still running."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        same = abs(process.create_time() - born) <= 2  # s: ids are used again, clocks get adjusted
        return same and process.status() != psutil.STATUS_ZOMBIE
    return False


def pipeline_run(tags: Mapping[str, str]) -> dict[str, Any] | None:
    """Identity, name, start (ms) and tags of the run that groups the stages of one `dvc repro`; None outside of DVC."""
    name = os.environ.get("DVC_EXP_NAME")
    identity = sanitize_key(f"{name}-{os.environ.get('DVC_EXP_BASELINE_REV', '')}") if name else _pipeline_process()
    if identity is None:
        return None
    shared = {key: tags[key] for key in tags.keys() & {"git.commit", "git.dirty", "profile", "dvc.exp"}}
    tags = shared | {"kind": "pipeline", "pipeline.id": identity}
    name = name or time.strftime("repro %Y-%m-%d %H:%M:%S")
    began = int(psutil.Process().create_time() * 1000)  # before the run of its first stage, which is the child
    return {"id": identity, "name": name, "start": began, "tags": tags}


def table_columns(params: Tree) -> dict[str, str]:
    """Nested parameters as columns of the table: flat, and `beta` for `methods.<run>.beta` of every run.

    Where two methods' settings are in one tree, the full keys are kept.
    """
    flat = flatten(params)
    short = {key: BLOCK.sub("", key, count=1) if BLOCK.match(key) else key for key in flat}
    names = list(short.values())
    return {sanitize_key(short[key] if names.count(short[key]) == 1 else key): text for key, text in flat.items()}


def flatten(params: Tree, prefix: str = "") -> dict[str, str]:
    """Nested parameters as {"a.b": text}: strings as they are, the rest as JSON (null, true, [1, 2]); 10.0 is 10."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            value = int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else value
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def sanitize_key(name: str) -> str:
    """The name with all that MLflow does not accept in names of metrics, params and images replaced."""
    return os.path.normpath(re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII)).lstrip("/.")[:250] or "_"


def _pipeline_process() -> str | None:
    """Identity of the process that runs the pipeline: host, pid, start in s; None without one."""
    with suppress(psutil.Error):
        for ancestor in psutil.Process().parents():
            if _runs_pipeline(ancestor):
                return f"{HOST}-{ancestor.pid}-{ancestor.create_time():.0f}"
    return None


def _runs_pipeline(process: psutil.Process) -> bool:
    """Whether a process is dvc, or `attune repro`, whose workers run DVC; False if it has ended meanwhile."""
    try:
        words = [Path(word).name for word in process.as_dict(["cmdline"], ad_value=[])["cmdline"][:3]]
    except psutil.NoSuchProcess:
        return False
    programs = {"dvc", "attune.stages.repro"}
    return bool(words) and (words[0] == "dvc" or (words[0].startswith("python") and bool(programs & set(words))))


def _git(*words: str) -> str | None:
    """Git's output in the cwd, which in a DVC experiment is its own checkout; None without git or a repository."""
    command = ["git", "--no-optional-locks", *words]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    return None
