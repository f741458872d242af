"""A process in which `attune repro` runs DVC, one command after another: DVC is imported once, which takes 1.5 s.

A task is a line of JSON on stdin, its answer one on stdout:

    {"task": "graph"}                                      -> {"order": [...], "needs": {stage: [...]}}
    {"task": "dvc", "words": [...], "log": ..., "env": {}} -> {"code": of `dvc <words>`}
    {"task": "unchanged", "done": [...]}                   -> {"stages": [...]}
    {"task": "sort", "names": [...]}                       -> {}

The leader of a process group, which holds the stage that runs. It ends when its stdin does; if `attune repro` is
killed, it interrupts its stage, as Ctrl-C does, so that a training saves and none goes on unseen.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from attune.stop import end_with_parent

LOCK = "dvc.lock"
BARS = {"TQDM_MININTERVAL": "0.5"}  # s; ten times a second, a day's bars are 70 MB of log


def main() -> None:
    signal.signal(signal.SIGTERM, _interrupt_group)
    end_with_parent()
    for name, value in BARS.items():
        os.environ.setdefault(name, value)
    with suppress(KeyboardInterrupt, BrokenPipeError):
        tasks, answers = _own_pipes()
        for line in tasks:
            task = json.loads(line)
            answer = TASKS[task.pop("task")](**task)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def graph() -> dict[str, Any]:
    """The stages of dvc.yaml and all that they need, in the order of `dvc repro`; {} where DVC cannot read them."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            needs = {stage.addressing: [need.addressing for need in some] for stage, some in _steps(repo)}
    except DvcException:  # `dvc repro` says it better
        return {}
    return {"order": list(needs), "needs": needs}


def unchanged(done: list[str]) -> dict[str, Any]:
    """The stages that `dvc repro` would skip: with nothing changed in them, in what they need and in what they made.

    Args:
        done: stages that have just been looked after.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    found: list[str] = []
    with suppress(DvcException), Repo(_wait_for_lock=True) as repo, repo.lock:
        for stage, needs in _steps(repo):
            is_open = {need.addressing for need in needs} <= {*done, *found} and stage.addressing not in done
            if is_open and not stage.changed():
                found.append(stage.addressing)
    return {"stages": found}


def run_dvc(words: list[str], log: str, env: Mapping[str, str]) -> dict[str, Any]:
    """Runs a command of DVC with its output in `log`, and more variables in the environment of its stage."""
    from dvc.cli import main as dvc

    with _output_in(Path(log)), _environment(env):
        return {"code": dvc(words)}


def sort_lock(names: list[str]) -> dict[str, Any]:
    """Puts the entries of dvc.lock in an order; those that are not named stay before them."""
    from dvc.repo import Repo
    from dvc.utils.serialize import modify_yaml

    with Repo(_wait_for_lock=True) as repo, repo.lock:
        if not repo.fs.exists(LOCK):
            return {}
        with modify_yaml(LOCK, fs=repo.fs) as content:
            for name in names:
                if name in content["stages"]:
                    content["stages"].move_to_end(name)
    return {}


TASKS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "graph": graph,
    "dvc": run_dvc,
    "unchanged": unchanged,
    "sort": sort_lock,
}


def _steps(repo: Any) -> list[tuple[Any, list[Any]]]:
    """DVC's stages in the order of `dvc repro`, with those that each needs."""
    from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

    active = get_active_graph(repo.index.graph)
    return [(stage, list(active.successors(stage))) for stage in plan_repro(active, collect_stages(repo, ["dvc.yaml"]))]


def _own_pipes() -> tuple[Any, Any]:
    """Tasks and answers, out of the reach of stages: these have no stdin, and write to the log."""
    tasks, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    with open(os.devnull, "r+b") as null:
        os.dup2(null.fileno(), 0)
        os.dup2(null.fileno(), 1)
    return tasks, answers


@contextmanager
def _output_in(log: Path) -> Iterator[None]:
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


@contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _interrupt_group(signum: int, frame: FrameType | None) -> None:
    os.killpg(0, signal.SIGINT)


if __name__ == "__main__":
    main()
