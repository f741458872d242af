"""The outbox: what a run has logged, kept on disk until the tracking store has it.

One folder per run: `records.jsonl`, a JSON object per line in the order of the calls; `files/`, copies of images and
artifacts; `state.json`, how much of it has been sent and which artifacts are still missing; `lock`, held by the process
that writes or sends it, and released by the system when that process ends. This module does not know MLflow.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

OUTBOXES = Path(".checkpoints/tracking")
UID = "local-"  # begins our own id of a run, which is also its tag `attune.uid` in the store
RECORDS, STATE, FILES, LOCK = "records.jsonl", "state.json", "files", "lock"


class Outbox:
    """The folder of one run, locked by this process; `close` releases it, `remove` deletes it."""

    def __init__(self, folder: Path, lock: FileLock):
        self.folder, self._lock = folder, lock
        self._file = os.open(folder / RECORDS, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        state = _read_json(folder / STATE)
        self.run_id: str | None = state.get("run_id")
        self.offset: int = state.get("offset", 0)  # bytes of records.jsonl that need not be sent again
        self.ended: bool = state.get("ended", False)  # the store has the last record
        # offsets of the records of artifacts that are still to be sent
        self.pending_artifacts: list[int] = state.get("pending_artifacts", [])
        self.failed: dict[int, Exception] = {}  # pending artifacts that this process could not send
        self.reached: Mapping[str, int] = {}  # curve -> last step that the store has from earlier parts of the run
        self._copies, self._torn, self._writing = 0, False, threading.Lock()

    @property
    def uid(self) -> str:
        return self.folder.name

    @property
    def waits(self) -> bool:
        """Whether it has not been removed. The folder may still exist: another process may have opened its lock."""
        return (self.folder / RECORDS).exists()

    def append(self, op: str, **fields: Any) -> None:
        """Adds a record with the time in ms. Once this has returned, the record survives a kill of the process.

        Raises: OSError, on a full disk. A line that was cut off damages no other: the next record begins a new line.
        """
        record = {"op": op, "time": now_ms(), **fields}
        content = json.dumps(record).encode() + b"\n"
        with self._writing:  # the thread of the system metrics writes, too
            line = b"\n" * self._torn + content
            self._torn = True
            while line:
                line = line[os.write(self._file, line) :]
            self._torn = False

    def copy_in(self, path: Path) -> str:
        """Copies a file or folder into the outbox, as it may be gone when the store is back; path in the outbox."""
        self._copies += 1
        place = f"{FILES}/{self._copies}/{path.resolve().name}"
        (self.folder / place).parent.mkdir(parents=True)
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, self.folder / place)
        return place

    def reserve(self, name: str) -> tuple[Path, str]:
        """A path for a new file of this name, absolute and relative to the outbox."""
        self._copies += 1
        place = f"{FILES}/{self._copies}/{name}"
        (self.folder / place).parent.mkdir(parents=True)
        return self.folder / place, place

    def records(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Records not yet marked as sent, each with the offset behind it; {} for a line that was cut off."""
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

    @property
    def known_run_id(self) -> str:
        """The store's id of the run. Raises RuntimeError before the store has one."""
        if self.run_id is None:
            raise RuntimeError(f"{self.folder}: the store does not know the run yet")
        return self.run_id

    def set_run_id(self, run_id: str) -> None:
        """Notes the run's id in the store. A new id means a new run there, which needs all records again."""
        if run_id != self.run_id:
            self.run_id, self.offset, self.ended, self.pending_artifacts, self.failed = run_id, 0, False, [], {}
        self._save()

    def mark(self, offset: int, op: str | None) -> None:
        """Notes that all before `offset` is sent; the last record is an `op`. An artifact waits for `mark_sent`."""
        if op == "artifact":
            self.pending_artifacts.append(self.offset)
        self.offset, self.ended = offset, op == "end"
        self._save()

    def mark_sent(self, start: int) -> None:
        """Notes that the store has the artifact whose record begins here."""
        self.pending_artifacts.remove(start)
        self.failed.pop(start, None)
        self._save()

    def _save(self) -> None:
        draft = self.folder / f"{STATE}.part"
        state = {key: getattr(self, key) for key in ("run_id", "offset", "ended", "pending_artifacts")}
        draft.write_text(json.dumps(state))
        draft.replace(self.folder / STATE)

    def end_for_killed(self) -> None:
        """Adds the `end` that a killed process could not write: KILLED, at the time of its last record."""
        content = (self.folder / RECORDS).read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        last = _parse(complete.rstrip(b"\n").rpartition(b"\n")[2])
        if last.get("op") != "end":
            os.truncate(self._file, len(complete))
            kind = self.opening().get("tags", {}).get("kind")
            self.append("end", status="KILLED", at=last.get("time", now_ms()), kind=kind)

    def close(self) -> None:
        if not self._lock.is_locked:  # `remove` has closed it
            return
        os.close(self._file)
        self._lock.release()

    def remove(self) -> None:
        # the records go before the lock file: a process that then creates a new lock finds no records behind it
        (self.folder / RECORDS).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()


def create(root: Path) -> Outbox:
    """A new run's outbox. Raises OSError where nothing can be written."""
    folder = root / OUTBOXES / f"{UID}{uuid.uuid4().hex}"
    folder.mkdir(parents=True, mode=0o700)  # a uri may hold a password
    lock = _lock(folder)
    lock.acquire(timeout=0)
    return Outbox(folder, lock)


def orphaned(root: Path) -> Iterator[Outbox]:
    """Outboxes whose process is gone, oldest first, locked by this process; the caller closes or removes each."""
    folders = [path.parent for path in (root / OUTBOXES).glob(f"{UID}*/{RECORDS}")]
    for folder in sorted(folders, key=_start_ms):
        lock = _lock(folder)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):  # its process is alive, or another one has just sent it
            continue
        if not (folder / RECORDS).exists():
            lock.release()
            continue
        outbox = Outbox(folder, lock)
        outbox.end_for_killed()
        yield outbox


def is_waiting(root: Path, uid: str) -> bool:
    """Whether a run still has an outbox, so something that its store lacks."""
    return (root / OUTBOXES / uid / RECORDS).exists()


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def _lock(folder: Path) -> FileLock:
    return FileLock(folder / LOCK, thread_local=False)  # a thread sends what the main thread writes


def _start_ms(folder: Path) -> float:
    """Start of a run in ms; 0 if its outbox has been sent and removed meanwhile."""
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
