"""The checkpoints and shards of stages that did not end: what can still be gone on from, and what nothing will read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from attune.files import values_sha
from attune.paths import CHECKPOINTS

ABOUT = "about.json"  # in a folder of checkpoints or shards: whose they are, and whether their stage has ended

State = Literal["running", "resumable", "stale", "of another profile"]


@dataclass(frozen=True)
class SavedTraining:
    """The checkpoint folder of a training."""

    folder: Path
    size: int  # bytes
    state: State

    def __str__(self) -> str:
        return f"{self.folder.name}: {self.size / 1e6:.1f} MB, {self.state}"


def saved_trainings(root: Path, profile: str, plans: Mapping[Path, str]) -> Iterator[SavedTraining]:
    """The checkpoint folders below `root`, in the order of their names.

    Args:
        root: the repository.
        profile: the one that is in force.
        plans: file -> text of the plans as they are now. A training whose plan is among them can be resumed, unless
            the outputs of stages before it have changed.
    """
    given = [json.loads(text) for text in plans.values()]
    current = {values_sha(plan) for plan in given} | {part for plan in given for part in plan.get("parts", {}).values()}
    for folder in sorted((root / CHECKPOINTS).glob("*/")):
        if not any(folder.glob(ABOUT)) and not any(folder.glob("*.pt")) and not any(folder.glob("pieces.json")):
            continue  # other things are kept here as well, say the ids of tracked runs
        if is_done(folder):
            continue  # the next stage removes it
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        yield SavedTraining(folder, size, _state(folder, profile, current))


def remove(training: SavedTraining) -> bool:
    """Removes a checkpoint, also where its folder is a link to another disk; not if its training runs now."""
    try:
        with FileLock(training.folder.with_suffix(".lock"), timeout=0):
            _remove(training.folder)
    except Timeout:
        return False
    training.folder.with_suffix(".lock").unlink(missing_ok=True)
    return True


def is_done(folder: Path) -> bool:
    """Whether a folder holds the shards of a stage that has ended."""
    try:
        return bool(json.loads((folder / ABOUT).read_text()).get("done"))
    except (OSError, ValueError, AttributeError):
        return False


def remove_done(root: Path) -> None:
    """Removes the shards of stages that have ended; by now DVC has stored what they went into.

    Not those that a stage holds, this process's or one that runs beside it: it may be about to take them up again.
    """
    for about in (root / CHECKPOINTS).glob(f"*/{ABOUT}"):
        folder = about.parent
        if is_done(folder):
            with suppress(Timeout), FileLock(folder.with_suffix(".lock"), timeout=0):
                if is_done(folder):  # still, now that no stage can begin with it
                    _remove(folder)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder.resolve(), ignore_errors=True)
    if folder.is_symlink():
        folder.unlink()


def _state(folder: Path, profile: str, current: set[str]) -> State:
    lock = folder.with_suffix(".lock")
    try:
        if lock.exists():  # asking would make it
            with FileLock(lock, timeout=0):
                pass
    except Timeout:
        return "running"
    try:
        about = json.loads((folder / ABOUT).read_text())
        if about["profile"] != profile:
            return "of another profile"
        return "resumable" if current & {about["plan"], *about.get("parts", ())} else "stale"
    except (OSError, ValueError, TypeError, LookupError):  # there is none, or it is damaged
        return "stale"
