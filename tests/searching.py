"""Objectives that a search's worker processes import, a plan of a sweep, and a real PostgreSQL."""

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
from typing import Any

import optuna

from attune import tracking
from attune.config import plugins
from attune.config.plan import Plugin, RunPlan
from attune.config.search import Config
from attune.config.settings import Model, Sampling
from attune.search.plan import SweepPlan

SETTINGS = {"lora": {"rank": 4}, "lr": 1e-4, "batches": 200, "batch_size": 2, "beta": 500}
SEARCH = {
    "space": {"beta": {"low": 100, "high": 5000, "log": True}, "lr": {"low": 3e-5, "high": 1e-3, "log": True}},
    "objectives": ["hpsv2"],
    "prompts": 60,
    "pruner": "median",
    "trials": 12,
    "fixed": {"batches": 60},
    "finalists": 3,
}


def sweep_plan(
    folder: Path,
    search: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    inputs: dict[str, str] | None = None,
    **changes: Any,
) -> SweepPlan:
    """The plan of a search of dpo's settings; the prepared data need not exist.

    Args:
        search: changes of the block `search.dpo`; None takes a key out.
        settings: changes of SETTINGS.
        inputs: instead of the ones here.
        changes: fields of the run's plan.
    """
    block = {key: value for key, value in {**SEARCH, **(search or {})}.items() if value is not None}
    config = plugins.config_class("methods", "dpo").model_validate({**SETTINGS, **(settings or {})})
    run = {
        "profile": "tiny",
        "run": "dpo",
        "seed": 0,
        "model": Model(backbone="sd", path="base"),
        "method": Plugin(kind="methods", name="dpo", settings=config.model_dump()),
        "released": None,
        "after": None,
        "needs_preference": False,
        "scorers": {},
        "files": {},
        "code": {},
    }
    oracle = Plugin(kind="rewards", name="oracle", settings={})
    return SweepPlan(
        training=RunPlan(**{**run, **changes}),
        threads=1,
        search=Config.model_validate(block),
        sampling=Sampling(steps=10, eta=0.0, guidance_scale=5.0, batch_size=8),
        objectives=dict.fromkeys(block["objectives"], oracle),
        report=folder / "reports" / "sweeps" / "dpo",
        tracking=None,
        inputs=inputs or {"base": "1234"},
    )


@dataclass(frozen=True)
class Parabola:
    """-(x - 3)^2; writes a file when a trial begins, fails if it is there already, and waits for the file `go`."""

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
