"""Sending spools to the store: one's own while it is written, by a thread, and those that others left behind."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from attune.tracking import spool as spools
from attune.tracking import store as stores
from attune.tracking.labels import told
from attune.tracking.spool import Spool
from attune.tracking.store import Pending, Store

Warn = Callable[[str, str, Exception], None]
LOG = logging.getLogger("attune.tracking")
AWAY = "the store is away; the run goes on, and what it logs is kept and sent later"
LEFT = "the store has not got all of this run; the next run sends the rest, or `make replay`"
FLUSH_SECONDS = 5.0
RETRY_SECONDS = (2.0, 30.0)  # first and longest pause before a store that is away is asked again
START_SECONDS = 10.0  # how long a run waits for its store at its start...
DRAIN_SECONDS = 60.0  # ...and at its end, from the last sign that it takes what it is sent; an answer has 10 s


class Sender(threading.Thread):
    """Sends one spool while its run goes on, and removes it when the store has all of it.

    A daemon: a store that hangs must not keep a process from ending. The spool then stays for the next sender.
    """

    def __init__(self, spool: Spool, uri: str, root: Path):
        super().__init__(name=f"tracking {spool.uid}", daemon=True)
        self.spool, self.uri, self.root = spool, uri, root
        self.attempted, self._wake, self._ending = threading.Event(), threading.Event(), threading.Event()
        self._store: Store | None = None
        self._carrier: threading.Thread | None = None
        self._warned: set[str] = set()
        self._progress, self._pause = time.monotonic(), RETRY_SECONDS[0]

    def run(self) -> None:
        while True:
            ending = self._ending.is_set()  # asked before sending: so all there is has been seen
            known = self._store is not None
            there = self._attempt(ending) or (
                known and self._attempt(ending)
            )  # stale connections and lost runs need a new start
            self.attempted.set()
            if not self.spool.waits:
                return
            if ending:
                self.spool.close()
                return
            if there:
                self._wake.wait(FLUSH_SECONDS)
                self._wake.clear()
            else:
                self._ending.wait(self._pause)
                self._pause = min(2 * self._pause, RETRY_SECONDS[1])

    def wake(self) -> None:
        """Something that should not wait has been logged."""
        self._wake.set()

    def finish(self) -> None:
        """Sends what is left, for as long as the store takes it."""
        self._progress = time.monotonic()
        self._ending.set()
        self._wake.set()
        while (self.is_alive() or self._is_carrying()) and time.monotonic() - self._progress < DRAIN_SECONDS:
            self.join(0.2)
        if self.spool.waits:
            self._warn_once("left", LEFT)

    def _attempt(self, ending: bool) -> bool:
        """Sends what there is; whether the store took it. Artifacts that failed are tried again at the end."""
        try:
            if self._store is None:
                store = stores.connect(self.uri, self.root)
                with suppress(Pending):  # goes on with a run that is among those left
                    _reopen(store, self.spool)
                self.attempted.set()
                send_left(store, self.uri, files=False)
                _reopen(store, self.spool)
                self._store, self._pause = store, RETRY_SECONDS[0]
            for _ in send(self._store, self.spool, self._warn):
                self._progress = time.monotonic()
            self._carry()
            for _ in send_files(self._store, self.spool, self._warn, again=ending):
                self._progress = time.monotonic()
        except Exception as error:
            self._store = None
            self._warn_once("away", "%s: %s", AWAY, told(error))
            return False
        return True

    def _carry(self) -> None:
        """Sends the artifacts that others left behind, once, beside our own points: one may take minutes."""
        if self._carrier is None:
            self._carrier = threading.Thread(target=_send_left_quietly, args=(self._store, self.uri), daemon=True)
            self._carrier.start()

    def _is_carrying(self) -> bool:
        return self._carrier is not None and self._carrier.is_alive()

    def _warn(self, fault: str, what: str, error: Exception) -> None:
        self._warn_once(fault, "%s: %s", what, told(error))

    def _warn_once(self, key: str, text: str, *args: Any) -> None:
        if key not in self._warned:
            self._warned.add(key)
            LOG.warning(text, *args)


def send(store: Store, spool: Spool, warn: Warn) -> Iterator[None]:
    """Sends a spool's records in order, points in batches, a yield after each; artifacts are `send_files`'.

    Args:
        warn: called with a kind of fault, what came of it, and the error. Where the content is at fault, that item
            alone is lost.

    Raises:
        Exception: the store's, which is away.
    """
    for batch, offset in _batches(spool):
        op = batch[-1].get("op")
        if op != "artifact":
            _send_batch(store, spool, batch, warn)
        spool.mark(offset, op)
        yield


def send_files(store: Store, spool: Spool, warn: Warn, *, again: bool) -> Iterator[None]:
    """Sends the artifacts that the store lacks, a yield after each, and removes a spool that has ended and owes none.

    What holds artifacts may be full, or denied to us, while the store answers: such a one waits.

    Args:
        again: whether to try those too that this process has tried before.

    Raises:
        Exception: the store's, which is away or has lost the run.
    """
    for start in [start for start in spool.owed if again or start not in spool.failed]:
        record = spool.at(start)
        try:
            _send_batch(store, spool, [record], warn)
        except Exception as error:
            if stores.is_refusal(error) or not stores.answers(store):
                raise
            spool.failed[start] = error
            warn("waiting", f"{Path(record['file']).name} cannot be stored and is kept, the rest goes on", error)
            continue
        spool.settle(start)
        yield
    if spool.ended and not spool.owed:
        spool.remove()


def send_left(store: Store, uri: str, *, files: bool) -> dict[str, Exception | None]:
    """Sends what ended or killed processes left behind for this store, oldest first; artifacts only with `files`.

    What goes wrong with one does not keep the others, as long as the store answers.

    Returns:
        uid -> None, or why it could not be sent.
    """
    done: dict[str, Exception | None] = {}
    for spool in spools.left(store.root):
        opening = spool.opening()
        try:
            if not opening:  # its process died before it wrote one whole line
                spool.remove()
            elif opening["uri"] == uri:
                done[spool.uid] = _send_one(store, spool, files)
        except Exception as error:
            if not stores.answers(store):
                raise
            done[spool.uid] = error
        finally:
            if spool.folder.exists():
                spool.close()
    return done


def replay(root: Path) -> dict[str, Exception | None]:
    """Sends all that is left in a root to the stores it was meant for; uid -> None, or why it stays."""
    stores.prepare()
    done: dict[str, Exception | None] = {}
    meant: dict[str, list[str]] = {}
    for spool in spools.left(root):
        meant.setdefault(spool.opening().get("uri", stores.DEFAULT), []).append(spool.uid)
        spool.close()
    for uri, uids in meant.items():
        try:
            done |= send_left(stores.connect(uri, root), uri, files=True)
        except Exception as error:
            done |= {uid: error for uid in uids if spools.waiting(root, uid)}
    return done


def _reopen(store: Store, spool: Spool) -> None:
    """Finds or creates the spool's run; a store that has lost it since gets all of it again."""
    spool.begin(stores.open_run(store, spool.opening()))


def _send_one(store: Store, spool: Spool, files: bool) -> Exception | None:
    """Sends a spool that another process has left; why an artifact of it waits, or None."""
    _reopen(store, spool)
    for _ in send(store, spool, _tell):
        pass
    if files or not spool.owed:
        for _ in send_files(store, spool, _tell, again=True):
            pass
    return next(iter(spool.failed.values()), None)


def _send_left_quietly(store: Store, uri: str) -> None:
    with suppress(Exception):  # a store that is away: the run's own sender says so
        send_left(store, uri, files=True)


def _batches(spool: Spool) -> Iterator[tuple[list[Mapping[str, Any]], int]]:
    """Records one by one, but points of one run together up to MLflow's limit; each with the offset behind it."""
    logs: list[Mapping[str, Any]] = []
    points, end = 0, spool.offset
    for record, offset in spool.records():
        is_log = record.get("op") == "log"
        if logs and (not is_log or points + len(record["metrics"]) > stores.POINTS):
            yield logs, end
            logs, points = [], 0
        if is_log:
            logs.append(record)
            points += len(record["metrics"])
        else:
            yield [record], offset
        end = offset
    if logs:
        yield logs, end


def _send_batch(store: Store, spool: Spool, batch: list[Mapping[str, Any]], warn: Warn) -> None:
    try:
        if len(batch) > 1:
            stores.send_points(store, spool.run_id, batch)
        else:
            stores.deliver(store, spool.run_id, batch[0], spool.folder)
    except Exception as error:
        if not stores.is_refusal(error):
            raise
        if stores.is_deleted(store, spool.run_id) or len(batch) == 1:
            op = str(batch[0].get("op"))
            warn(op, f"{op}: left something out", error)
            return
        for record in batch:  # one bad point must not cost its neighbours
            _send_batch(store, spool, [record], warn)


def _tell(fault: str, what: str, error: Exception) -> None:
    LOG.warning("replay: %s: %s", what, told(error))
