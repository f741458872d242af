"""The spool: what a run wants to tell the tracking store, on disk until the store has taken it.

One folder per run: `records.jsonl`, a JSON object per line in the order of the calls; `files/`, copies of images and
artifacts; `state.json`, how far the store has got and which artifacts it still lacks; `lock`, held by whoever writes or
sends it, and free as soon as that process is dead. Knows nothing of MLflow.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

SPOOLS = Path(".checkpoints/tracking")
UID = "local-"  # a run's name before a store has given it one, and forever in the tag `attune.uid`
RECORDS, STATE, FILES, LOCK = "records.jsonl", "state.json", "files", "lock"


class Spool:
    """The folder of one run, held by this process; `close` lets go of it, `remove` deletes it."""

    def __init__(self, folder: Path, lock: FileLock):
        self.folder, self._lock = folder, lock
        self._file = os.open(folder / RECORDS, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        state = _read_json(folder / STATE)
        self.run_id: str | None = state.get("run_id")
        self.offset: int = state.get("offset", 0)  # bytes of records.jsonl that need not be sent again
        self.ended: bool = state.get("ended", False)  # the store has the last record
        self.owed: list[int] = state.get("owed", [])  # where the records of artifacts begin that are still to be sent
        self.failed: dict[int, Exception] = {}  # those of them that this process has tried
        self._copies, self._torn = 0, False

    @property
    def uid(self) -> str:
        return self.folder.name

    @property
    def waits(self) -> bool:
        """Whether it has not been removed; the folder may outlive it, by a lock that another process looks for."""
        return (self.folder / RECORDS).exists()

    def append(self, op: str, **fields: Any) -> None:
        """Adds a record, stamped with the time in ms; once it returns, a killed process loses it no more.

        Raises: OSError, on a full disk. What it has torn costs the next record nothing: that begins a new line.
        """
        record = {"op": op, "time": now_ms(), **fields}
        line = b"\n" * self._torn + json.dumps(record).encode() + b"\n"
        self._torn = True
        while line:
            line = line[os.write(self._file, line) :]
        self._torn = False

    def keep(self, path: Path) -> str:
        """Copies a file or folder into the spool, as it may be gone when the store is back; its place in there."""
        self._copies += 1
        place = f"{FILES}/{self._copies}/{path.resolve().name}"
        (self.folder / place).parent.mkdir(parents=True)
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, self.folder / place)
        return place

    def room(self, name: str) -> tuple[Path, str]:
        """Where to write a new file of this name, and its place in the spool."""
        self._copies += 1
        place = f"{FILES}/{self._copies}/{name}"
        (self.folder / place).parent.mkdir(parents=True)
        return self.folder / place, place

    def records(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Records not yet marked as sent, each with the offset behind it; {} for a line that disk-full has torn."""
        with (self.folder / RECORDS).open("rb") as file:
            file.seek(self.offset)
            offset = self.offset
            for line in file:
                if not line.endswith(b"\n"):
                    return  # still being written
                offset += len(line)
                yield _parse(line), offset

    def at(self, start: int) -> dict[str, Any]:
        """The record that begins at this byte."""
        with (self.folder / RECORDS).open("rb") as file:
            file.seek(start)
            return _parse(file.readline())

    def opening(self) -> dict[str, Any]:
        """The first record: uri, name and tags of the run; {} if its process died before it was written."""
        with (self.folder / RECORDS).open("rb") as file:
            line = file.readline()
        return _parse(line) if line.endswith(b"\n") else {}

    def begin(self, run_id: str) -> None:
        """Notes the run's id in the store; another one than before has got nothing yet."""
        if run_id != self.run_id:
            self.run_id, self.offset, self.ended, self.owed, self.failed = run_id, 0, False, [], {}
        self._save()

    def mark(self, offset: int, op: str | None) -> None:
        """Notes that all before `offset` is dealt with, by the `op` of the last; an artifact is owed until `settle`."""
        if op == "artifact":
            self.owed.append(self.offset)
        self.offset, self.ended = offset, op == "end"
        self._save()

    def settle(self, start: int) -> None:
        """Notes that the store has the artifact whose record begins here."""
        self.owed.remove(start)
        self.failed.pop(start, None)
        self._save()

    def _save(self) -> None:
        draft = self.folder / f"{STATE}.part"
        state = {"run_id": self.run_id, "offset": self.offset, "ended": self.ended, "owed": self.owed}
        draft.write_text(json.dumps(state))
        draft.replace(self.folder / STATE)

    def close_for_the_dead(self) -> None:
        """Ends the records of a process that did not do so itself: KILLED, when it was last heard of."""
        content = (self.folder / RECORDS).read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        last = _parse(whole.rstrip(b"\n").rpartition(b"\n")[2])
        if last.get("op") != "end":
            os.truncate(self._file, len(whole))
            kind = self.opening().get("tags", {}).get("kind")
            self.append("end", status="KILLED", at=last.get("time", now_ms()), kind=kind)

    def close(self) -> None:
        if not self._lock.is_locked:  # what is removed is closed
            return
        os.close(self._file)
        self._lock.release()

    def remove(self) -> None:
        # before the lock file goes: who then locks a new one finds none
        (self.folder / RECORDS).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()


def create(root: Path) -> Spool:
    """A new run's spool. Raises OSError where nothing can be written."""
    folder = root / SPOOLS / f"{UID}{uuid.uuid4().hex}"
    folder.mkdir(parents=True, mode=0o700)  # a uri may hold a password
    lock = _lock(folder)
    lock.acquire(timeout=0)
    return Spool(folder, lock)


def left(root: Path) -> Iterator[Spool]:
    """Spools whose process is gone, oldest first, each held by this process; the taker closes or removes it."""
    folders = [path.parent for path in (root / SPOOLS).glob(f"{UID}*/{RECORDS}")]
    for folder in sorted(folders, key=_born):
        lock = _lock(folder)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):  # alive, or another process has just sent it
            continue
        if not (folder / RECORDS).exists():
            lock.release()
            continue
        spool = Spool(folder, lock)
        spool.close_for_the_dead()
        yield spool


def waiting(root: Path, uid: str) -> bool:
    """Whether a run has something that no store has taken yet."""
    return (root / SPOOLS / uid / RECORDS).exists()


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def _lock(folder: Path) -> FileLock:
    return FileLock(folder / LOCK, thread_local=False)  # a thread sends what the main thread writes


def _born(folder: Path) -> float:
    """When a run began, ms; 0 if it has been sent and removed meanwhile."""
    try:
        with (folder / RECORDS).open("rb") as file:
            return float(_parse(file.readline()).get("time", 0))
    except OSError:
        return 0.0


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _read_json(path: Path) -> Mapping[str, Any]:
    return _parse(path.read_bytes()) if path.exists() else {}
