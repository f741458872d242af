"""What every stage shares: checked parameters, an MLflow run, and for the trainings, several processes."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from attune import tracking
from attune.config.check import load
from attune.config.profile import Params, Profile
from attune.config.schema import ConfigError
from attune.paths import RUNS

BASE = "base"


@contextmanager
def stage(name: str, *sections: str, **tags: str) -> Iterator[tuple[Profile, tracking.Run]]:
    """Opens a stage: reads params.yaml, sets threads, and starts its run.

    Args:
        sections: the parts of the profile this stage depends on, as in dvc.yaml; logged as its parameters.
        tags: what its run is to be found by, besides the profile.

    Mistakes in params.yaml end the process with one message and no traceback, before torch is imported.
    """
    params, profile = _checked_params()
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    os.environ.setdefault("OMP_NUM_THREADS", str(profile.threads))
    values = {section: _lookup(profile.model_dump(), section) for section in ("seed", *sections)}
    with tracking.run(name, values, tags={"profile": params.profile, **tags}, uri=params.tracking) as run:
        yield profile, run


def launch(module: str) -> None:
    """Becomes several processes that train together, where the environment asks for them (docs/several_gpus.md).

    ATTUNE_PROCESSES=2 starts so many on this machine; ATTUNE_LAUNCH is any launcher's command line, which is given
    `-m <module> <arguments>`. Does nothing in a process that a launcher has started, which RANK tells.
    """
    env = os.environ
    processes, launcher = env.get("ATTUNE_PROCESSES", ""), shlex.split(env.get("ATTUNE_LAUNCH", ""))
    if "RANK" in env or (processes in ("", "1") and not launcher):
        return
    if env.get("ATTUNE_LAUNCHED"):
        sys.exit(f"ATTUNE_LAUNCH: {launcher[0]!r} has started a single process that is not told its RANK; {_HINT}")
    if not launcher and not (processes.isdecimal() and int(processes) > 0):
        sys.exit(f"ATTUNE_PROCESSES: a number of processes is wanted, not {processes!r}")
    if not launcher:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    _, profile = _checked_params()
    env.setdefault("OMP_NUM_THREADS", str(profile.threads))
    env["ATTUNE_LAUNCHED"] = "1"
    try:
        os.execvp(launcher[0], [*launcher, "-m", module, *sys.argv[1:]])
    except OSError as error:
        sys.exit(f"ATTUNE_LAUNCH: {launcher[0]}: {error.strerror}")


_HINT = "`accelerate launch --cpu` does so whatever number it is given, and ATTUNE_PROCESSES is the way instead"


def is_first() -> bool:
    """Whether this process is the one that writes; the only one, unless several train together."""
    return os.environ.get("RANK", "0") == "0"


def _checked_params() -> tuple[Params, Profile]:
    try:
        return load()
    except ConfigError as error:
        sys.exit(f"params.yaml: {error}")


def remember_run(name: str, run_id: str | None) -> None:
    """Notes which tracking run trained a method, so that evaluation can put its scores on the same row."""
    if run_id:
        RUNS.mkdir(parents=True, exist_ok=True)
        (RUNS / name).write_text(run_id + "\n")


def _lookup(values: Mapping[str, Any], dotted: str) -> Any:
    for part in dotted.split("."):
        values = values[part]
    return values
