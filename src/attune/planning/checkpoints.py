"""The checkpoints of trainings that did not end: which can still be resumed, and which nothing will ever read again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from attune.files import values_sha
from attune.paths import CHECKPOINTS

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
    current = {values_sha(json.loads(text)) for text in plans.values()}
    for folder in sorted((root / CHECKPOINTS).glob("*/")):
        if not (folder / "about.json").exists() and not (folder / "state.pt").exists():
            continue  # other things are kept here as well, say the ids of tracked runs
        size = sum(file.stat().st_size for file in folder.iterdir())
        yield SavedTraining(folder, size, _state(folder, profile, current))


def _state(folder: Path, profile: str, current: set[str]) -> State:
    try:
        with FileLock(folder.with_suffix(".lock"), timeout=0):
            pass
    except Timeout:
        return "running"
    try:
        about = json.loads((folder / "about.json").read_text())
    except (OSError, ValueError):
        return "stale"
    if about["profile"] != profile:
        return "of another profile"
    return "resumable" if about["plan"] in current else "stale"
