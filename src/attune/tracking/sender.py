"""Sending spools to the store: one's own while it is written, by a thread, and those that others left behind."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from attune.tracking import spool as spools
from attune.tracking import store as stores
from attune.tracking.spool import Spool
from attune.tracking.store import Pending, Store

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
        self._warned: set[str] = set()
        self._progress, self._pause = time.monotonic(), RETRY_SECONDS[0]

    def run(self) -> None:
        while True:
            ending = self._ending.is_set()  # asked before sending: so all there is has been seen
            known = self._store is not None
            there = self._attempt() or (known and self._attempt())  # stale connections and lost runs need a new start
            self.attempted.set()
            if not self.spool.folder.exists():
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
        while self.is_alive() and time.monotonic() - self._progress < DRAIN_SECONDS:
            self.join(0.2)
        if (self.spool.folder / spools.RECORDS).exists():
            self._warn_once("left", LEFT)

    def _attempt(self) -> bool:
        """Sends what there is; whether the store took it."""
        try:
            if self._store is None:
                store = stores.connect(self.uri, self.root)
                with suppress(Pending):  # goes on with a run that is among those left
                    _reopen(store, self.spool)
                self.attempted.set()
                send_left(store, self.uri)
                _reopen(store, self.spool)
                self._store, self._pause = store, RETRY_SECONDS[0]
            for _ in send(self._store, self.spool, self._warn):
                self._progress = time.monotonic()
        except Exception as error:
            self._store = None
            self._warn_once("away", "%s: %s: %s", AWAY, type(error).__name__, str(error)[:300])
            return False
        return True

    def _warn(self, fault: str, error: Exception) -> None:
        self._warn_once(fault, "%s: left something out: %s: %s", fault, type(error).__name__, str(error)[:300])

    def _warn_once(self, key: str, text: str, *args: Any) -> None:
        if key not in self._warned:
            self._warned.add(key)
            LOG.warning(text, *args)


def send(store: Store, spool: Spool, refused: Any) -> Iterator[None]:
    """Sends a spool's records in order, points in batches, a yield after each; removes it once its end is sent.

    Args:
        refused: called with a record's op and the error, where the content is at fault: that item alone is lost.

    Raises:
        Exception: the store's, which is away.
    """
    for batch, offset in _batches(spool):
        _send_batch(store, spool, batch, refused)
        spool.mark(spool.run_id, offset)
        yield
        if batch[-1].get("op") == "end":
            spool.remove()
            return


def send_left(store: Store, uri: str) -> dict[str, Exception | None]:
    """Sends what ended or killed processes left behind for this store, oldest first.

    What goes wrong with one does not keep the others, as long as the store answers.

    Returns:
        uid -> None, or why it could not be sent.
    """
    done: dict[str, Exception | None] = {}
    for spool in spools.left(store.root):
        opening, sent = spool.opening(), False
        try:
            if not opening:  # its process died before it wrote one whole line
                spool.remove()
                sent = True
            elif opening["uri"] == uri:
                _reopen(store, spool)
                for _ in send(store, spool, _tell):
                    pass
                sent = True
                done[spool.uid] = None
        except Exception as error:
            if not stores.answers(store):
                raise
            done[spool.uid] = error
        finally:
            if not sent:
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
            done |= send_left(stores.connect(uri, root), uri)
        except Exception as error:
            done |= {uid: error for uid in uids if spools.waiting(root, uid)}
    return done


def _reopen(store: Store, spool: Spool) -> None:
    """Finds or creates the spool's run; a store that has lost it since gets all of it again."""
    run_id = stores.open_run(store, spool.opening())
    spool.mark(run_id, spool.offset if run_id == spool.run_id else 0)


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


def _send_batch(store: Store, spool: Spool, batch: list[Mapping[str, Any]], refused: Any) -> None:
    try:
        if len(batch) > 1:
            stores.send_points(store, spool.run_id, batch)
        else:
            stores.deliver(store, spool.run_id, batch[0], spool.folder)
    except Exception as error:
        if not stores.is_refusal(error):
            raise
        if stores.is_deleted(store, spool.run_id) or len(batch) == 1:
            refused(str(batch[0].get("op")), error)
            return
        for record in batch:  # one bad point must not cost its neighbours
            _send_batch(store, spool, [record], refused)


def _tell(fault: str, error: Exception) -> None:
    LOG.warning("replay: %s: left something out: %s: %s", fault, type(error).__name__, str(error)[:300])
