"""Checkpoints: written whole or not at all, outside DVC's outputs, found again only by the very same run.

The folder's name holds a hash of everything the run depends on, so changed parameters never resume a stale
model. It is removed when the run succeeds.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from attune.files import digest, values_sha

SAVE_TIME_FACTOR = 20  # a save is followed by 20 times its own duration without one: at most 1/20 of the time is spent


class Checkpoint:
    """One resumable run's folder, held under a lock so that an orphaned process cannot write beside us.

    Of several processes that train together one holds and `writes` it, and all of them read it.
    """

    def __init__(self, root: Path, stage: str, key: str, every_seconds: float = 60.0, writes: bool = True):
        """`key` identifies the run: a hash of its parameters and inputs, and not of how many processes train."""
        self.folder = root / f"{stage.replace('@', '-')}-{key}"
        self.file = self.folder / "state.pt"
        self.every_seconds, self._saved_at, self._took, self._writes = every_seconds, time.monotonic(), 0.0, writes
        if not self._writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder.with_suffix(".lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RuntimeError(f"another process is already running {stage}: it holds {self._lock.lock_file}") from None

    def restore(
        self, parameters: list[Tensor], optimizer: torch.optim.Optimizer, default: dict[str, Any]
    ) -> dict[str, Any]:
        """Puts saved weights and optimizer state back and returns the saved progress, or `default`."""
        if not self.file.exists():
            return default
        state = torch.load(self.file, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for weight, saved in zip(parameters, state["parameters"], strict=True):
                weight.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        return state["progress"]

    def maybe_save(
        self, parameters: list[Tensor], optimizer: torch.optim.Optimizer, progress: dict[str, Any], last: bool
    ) -> None:
        """Saves at the end, and if `every_seconds` have passed since the last time; later, if saving takes long."""
        wait = max(self.every_seconds, SAVE_TIME_FACTOR * self._took) if self.every_seconds else 0
        began = time.monotonic()
        if not self._writes or (not last and began - self._saved_at < wait):
            return
        state = {
            "parameters": [weight.detach() for weight in parameters],
            "optimizer": optimizer.state_dict(),
            "progress": progress,
        }
        partial = self.file.with_suffix(".part")
        with partial.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(self.file)
        self._saved_at = time.monotonic()
        self._took = self._saved_at - began

    def discard(self) -> None:
        """Removes the folder: the run succeeded and its outputs are in place."""
        if not self._writes:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)


@contextmanager
def resumable(
    root: Path, stage: str, values: Sequence[Any], inputs: Sequence[Path], writes: bool = True
) -> Iterator[Checkpoint]:
    """A checkpoint that only a run with the same values and the same content of `inputs` finds again.

    Removed on success.
    """
    digests = {str(path): digest(path) for path in inputs}
    checkpoint = Checkpoint(root / ".checkpoints", stage, values_sha([*values, digests]), writes=writes)
    yield checkpoint
    checkpoint.discard()
