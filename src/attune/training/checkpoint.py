"""Checkpoints: written whole or not at all, outside DVC's outputs, found again only by the very same run.

The folder's name holds a hash of everything the run depends on, so changed parameters never resume a stale
model. It is removed when the run succeeds.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from attune.config.plan import StagePlan
from attune.distributed import ALONE, Shard
from attune.files import digest, values_sha, write_atomically
from attune.fsdp import is_sharded
from attune.paths import CHECKPOINTS
from attune.training import pieces
from attune.training.guard import assert_finite
from attune.versions import versions

LOG = logging.getLogger("attune.checkpoint")
SAVE_TIME_FACTOR = 20  # a save is followed by 20 times its own duration without one: at most 1/20 of the time is spent
FIRST_SAVE = 5.0  # seconds


class Checkpoint:
    """One resumable run's folder, held under a lock so that an orphaned process cannot write beside us.

    Of several processes that train together one holds and `writes` it, and all of them read it. Of sharded weights each
    process writes its pieces (`pieces`), in the place of the one file that holds whole weights.
    """

    def __init__(self, root: Path, stage: str, key: str, every_seconds: float = 60.0, writes: bool = True):
        """`key` identifies the run: a hash of its parameters and inputs, and not of how many processes train."""
        self.folder = root / f"{stage.replace('@', '-')}-{key}"
        self.file, self.pieces = self.folder / "state.pt", self.folder / pieces.POINTER
        self.every_seconds, self._writes = every_seconds, writes
        self._began = self._saved_at = time.monotonic()
        self._took = 0.0
        if not self._writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder.with_suffix(".lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RuntimeError(f"another process is already running {stage}: it holds {self._lock.lock_file}") from None

    @property
    def is_resumed(self) -> bool:
        """Whether there is a state to go on from."""
        return self.saved is not None

    @property
    def saved(self) -> Path | None:
        """What a training would go on from; None if nothing is saved."""
        return next((file for file in (self.pieces, self.file) if file.exists()), None)

    def set_aside_if_damaged(self) -> None:
        """Renames a state that cannot be read, and says so; without one the training starts from the beginning.

        The main process calls this before any process restores.
        """
        said = "%s is damaged (%s): the training starts from the beginning; the file is now %s"
        if self.pieces.exists() and (fault := pieces.damage(self.pieces)) is not None:
            LOG.warning(said, self.pieces, fault, pieces.set_aside(self.pieces) / pieces.POINTER)
        if self.file.exists() and (fault := damage(self.file)) is not None:
            aside = self.folder / f"damaged-{time.time_ns()}.pt"
            self.file.rename(aside)
            LOG.warning(said, self.file, fault, aside)

    def restore(
        self, parameters: list[Tensor], optimizer: torch.optim.Optimizer, default: dict[str, Any]
    ) -> dict[str, Any]:
        """Puts saved weights and optimizer state back and returns the saved progress, or `default`."""
        if self.saved is None:
            return default
        if self.saved == self.pieces:
            return pieces.restore(self.pieces, parameters, optimizer)
        sharded = is_sharded(parameters)  # then no process needs more of the file than its pieces
        state = torch.load(self.file, map_location="cpu", weights_only=True, mmap=sharded)
        state = pieces.cut_whole_state(state, parameters) if sharded else state
        with torch.no_grad():
            for weight, saved in zip(parameters, state["parameters"], strict=True):
                weight.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        return state["progress"]

    def maybe_save(
        self,
        parameters: list[Tensor],
        optimizer: torch.optim.Optimizer,
        progress: dict[str, Any],
        now: bool = False,
        shard: Shard = ALONE,
    ) -> None:
        """Saves if it is time, or `now`. Where weights are sharded, the main process tells the others when it is time.

        It is time every `every_seconds`; in the beginning earlier, as soon as the training has run twice as long as
        at the last save, so that what is stopped again and again gets on; and later, if saving takes long.

        Raises:
            NonFiniteError: a weight is NaN or infinite; what was saved before is intact.
        """
        began, sharded = time.monotonic(), is_sharded(parameters)
        due = now or began - self._saved_at >= self._wait()
        if not (shard.broadcast_from_main(lambda: due) if sharded else due and self._writes):
            return
        assert_finite(parameters)
        try:
            if sharded:
                pieces.save(self.folder, parameters, optimizer, progress, shard)
            else:
                self._save_whole(parameters, optimizer, progress)
        except OSError as error:
            if self._writes:
                free = shutil.disk_usage(self.folder).free / 1e6
                LOG.warning(
                    "%s could not be saved (%s), %.0f MB are free there; the training goes on, and if it is stopped "
                    "now, it loses what it did since the last save", self.pieces if sharded else self.file,
                    str(error).splitlines()[0], free,
                )  # fmt: skip
        else:
            self._remove_the_other(sharded)
        self._saved_at = time.monotonic()
        self._took = self._saved_at - began

    def _save_whole(self, parameters: list[Tensor], optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
        """Saves weights of which this process has all. Raises OSError if they could not be written."""
        state = {
            "parameters": [weight.detach() for weight in parameters],
            "optimizer": optimizer.state_dict(),
            "progress": progress,
        }
        try:
            save(state, self.file)
        except RuntimeError as error:  # torch reports a full disk as one
            raise OSError(str(error)) from None

    def _remove_the_other(self, sharded: bool) -> None:
        """Removes what was saved when the weights were sharded and now are not, or the other way round."""
        if sharded and self._writes:
            self.file.unlink(missing_ok=True)
        elif not sharded:
            pieces.remove(self.folder)

    def _wait(self) -> float:
        """Seconds from the last save to the next."""
        early = max(FIRST_SAVE, self._saved_at - self._began)
        return max(min(self.every_seconds, early), SAVE_TIME_FACTOR * self._took) if self.every_seconds else 0

    def discard(self) -> None:
        """Removes the folder: the run succeeded and its outputs are in place."""
        if not self._writes:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)


def save(state: dict[str, Any], file: Path) -> None:
    """Replaces `file` in one step; if that fails, the old one stays and nothing else is left."""
    partial = file.with_suffix(".part")
    try:
        with partial.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def damage(file: Path) -> str | None:
    """What is wrong with a saved state; None if it is as it was written.

    torch.save writes a zip archive with a CRC-32 of every tensor, which torch.load does not look at.
    """
    if not file.is_file():
        return "it is no file"
    try:
        with zipfile.ZipFile(file) as archive:
            if (member := archive.testzip()) is not None:
                return f"the checksum of {member} is wrong"
        found = sorted(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # a damaged archive raises nearly anything
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    expected = sorted(("parameters", "optimizer", "progress"))
    return None if found == expected else f"it holds {found[:5]}, not {expected}"


@contextmanager
def resumable(
    root: Path,
    stage: str,
    plan: StagePlan,
    inputs: Sequence[Path],
    *,
    every_seconds: float = 60.0,
    writes: bool = True,
) -> Iterator[Checkpoint]:
    """A checkpoint that only a run with the same plan, library versions and content of `inputs` finds again.

    It is removed when the with-body has succeeded, so the body must contain all that a finished training still has to
    do: a run that is killed before that goes on from its last batch.

    Args:
        root: the repository.
        plan: its settings, the digests of its code and of the local files it reads.
        inputs: outputs of other stages.
    """
    values = [plan.model_dump(mode="json"), versions(), {str(path): digest(path) for path in inputs}]
    checkpoint = Checkpoint(root / CHECKPOINTS, stage, values_sha(values), every_seconds, writes)
    if writes:
        about = {"stage": stage, "profile": plan.profile, "plan": values_sha(values[0])}
        write_atomically(checkpoint.folder / "about.json", json.dumps(about).encode() + b"\n")
    yield checkpoint
    checkpoint.discard()
