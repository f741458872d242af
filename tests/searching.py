"""Objectives that a search's worker processes import, and a real PostgreSQL."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import optuna

from attune import tracking


@dataclass(frozen=True)
class Parabola:
    """-(x - 3)^2; notes each trial it begins, refuses to begin one twice, and goes no further without `go`."""

    folder: Path
    seconds: float = 0.0
    go: str = "."  # a file or folder, in `folder`
    parent: str | None = None
    uri: str | None = None

    def __call__(self, trial: optuna.Trial) -> list[float]:
        with tracking.trial(
            f"trial {trial.number}", trial.params, tags={}, parent=self.parent, uri=self.uri, root=self.folder
        ):
            (self.folder / f"{trial.number}.begun").touch(exist_ok=False)
            time.sleep(self.seconds)
            while not (self.folder / self.go).exists():
                time.sleep(0.05)
            return [-((trial.params["x"] - 3) ** 2)]


def fails_above_5(trial: optuna.Trial) -> list[float]:
    """RuntimeError, what torch.OutOfMemoryError is one of, where x > 5."""
    if trial.params["x"] > 5:
        raise RuntimeError("out of memory")
    return [trial.params["x"]]


def always_fails(trial: optuna.Trial) -> list[float]:
    raise ArithmeticError("loss is nan")


def is_mistaken(trial: optuna.Trial) -> list[float]:
    raise KeyError("no such scorer")


@contextmanager
def postgres(programs: Path) -> Iterator[str]:
    """The address of a new database, reached by a socket in a folder of its own and gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="attune-pg-"))
    user = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}  # it refuses to run as root
    if user:
        shutil.chown(folder, "postgres", "postgres")

    def call(program: str, *words: str) -> None:
        subprocess.run([programs / program, *words], cwd=folder, check=True, stdout=subprocess.DEVNULL, **user)

    call("initdb", "-D", "data", "-U", "postgres", "--auth=trust", "--no-sync")
    options = f"-c listen_addresses='' -k {folder} -c fsync=off"
    call("pg_ctl", "-D", "data", "-l", "log", "-w", "-o", options, "start")
    try:
        yield f"postgresql+psycopg://postgres@/postgres?host={folder}"
    finally:
        call("pg_ctl", "-D", "data", "-m", "immediate", "stop")
        shutil.rmtree(folder)


def stop_for(seconds: float, programs: Path, address: str) -> None:
    """An outage of the PostgreSQL at this address."""
    folder = address.partition("host=")[2]
    user = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
    options = {"cwd": folder, "check": True, "stdout": subprocess.DEVNULL, **user}
    subprocess.run([programs / "pg_ctl", "-D", "data", "-m", "immediate", "stop"], **options)
    time.sleep(seconds)
    subprocess.run([programs / "pg_ctl", "-D", "data", "-l", "log", "-w", "restart"], **options)


def postgres_programs() -> Path | None:
    """The folder of PostgreSQL's programs; None if it is not installed."""
    known = shutil.which("initdb") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), None)
    return Path(known).resolve().parent if known else None
