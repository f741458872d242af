"""Sends outboxes to the store: this process's own from a thread, and those that ended processes left behind."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from attune.tracking import outbox as outboxes
from attune.tracking import store as stores
from attune.tracking.labels import redact
from attune.tracking.outbox import Outbox
from attune.tracking.patience import Patience
from attune.tracking.store import DeletedError, Pending, Store

Warn = Callable[[str, str, Exception], None]
LOG = logging.getLogger("attune.tracking")
AWAY = "the store is away; the run goes on, and what it logs is kept and sent later"
KEPT = "the run goes on, and what it logs is kept"
INCOMPLETE = "the store has not got all of this run; the next run sends the rest, or `make replay`"
FLUSH_SECONDS = 5.0
RETRY_SECONDS = (2.0, 30.0)  # first and longest pause before a store that is away is asked again
START_SECONDS = 8.0  # how long a run waits for its store at its start
DRAIN_SECONDS = 12.0  # and at its end, without any progress; a single answer may take 10 s


class Sender(threading.Thread):
    """Sends one outbox while its run goes on, and removes it when the store has all of it.

    A daemon thread, so that a store that hangs does not keep the process from ending. The outbox then stays for the
    next sender.
    """

    def __init__(self, outbox: Outbox, uri: str, root: Path, patience: Patience):
        super().__init__(name=f"tracking {outbox.uid}", daemon=True)
        self.outbox, self.uri, self.root = outbox, uri, root
        self.attempted, self._wake, self._ending = threading.Event(), threading.Event(), threading.Event()
        self._store: Store | None = None
        self._orphan_sender: threading.Thread | None = None
        self._warned: set[str] = set()
        self._progress, self._pause = time.monotonic(), RETRY_SECONDS[0]
        self._patience, self._waited = patience, 0.0

    def begin(self) -> None:
        """Starts, with a few seconds to find the store before the run's work starts."""
        self.start()
        began = time.monotonic()
        self.attempted.wait(min(START_SECONDS, self._patience.left))
        self._waited = time.monotonic() - began

    def run(self) -> None:
        while True:
            ending = self._ending.is_set()  # read before sending, so that this round sends the last record too
            known = self._store is not None
            there = self._attempt(ending)
            if known and not there:  # a stale connection, or a run that the store has lost, needs a new start
                there = self._attempt(ending)
            self.attempted.set()
            if not self.outbox.waits:
                return
            if ending:
                self.outbox.close()
                return
            if there:
                self._wake.wait(FLUSH_SECONDS)
                self._wake.clear()
            else:
                self._ending.wait(self._pause)
                self._pause = min(2 * self._pause, RETRY_SECONDS[1])

    def wake(self) -> None:
        """Sends now, without waiting for the next flush."""
        self._wake.set()

    def drain(self) -> None:
        """Sends the rest, for as long as the store accepts it."""
        self._progress = time.monotonic()
        self._ending.set()
        self._wake.set()
        limit = min(DRAIN_SECONDS, max(0.2, self._patience.left - self._waited))
        while (self.is_alive() or self._is_uploading()) and time.monotonic() - self._progress < limit:
            self.join(0.2)
        if self.outbox.waits:
            self._patience.spend(self._waited + time.monotonic() - self._progress)
            self._warn_once("incomplete", INCOMPLETE)
        elif self._patience.is_known_away:
            self._patience.forget()

    def _attempt(self, ending: bool) -> bool:
        """Sends all records so far; whether that worked. Artifacts that failed are tried again at the end."""
        try:
            if self._store is None:
                store = stores.connect(self.uri, self.root)
                with suppress(Pending):  # the run to go on with is itself in an orphaned outbox
                    _reopen(store, self.outbox)
                self.attempted.set()
                send_orphaned(store, self.uri, files=False)
                _reopen(store, self.outbox)
                self._store, self._pause = store, RETRY_SECONDS[0]
            for _ in send(self._store, self.outbox, self._warn):
                self._progress = time.monotonic()
            self._upload_orphans()
            for _ in send_files(self._store, self.outbox, self._warn, again=ending):
                self._progress = time.monotonic()
        except Exception as error:
            self._store = None
            self._warn_once("away", "%s: %s", KEPT if isinstance(error, DeletedError) else AWAY, redact(error))
            return False
        return True

    def _upload_orphans(self) -> None:
        """Sends the artifacts of orphaned outboxes, once, in another thread: a single one may take minutes."""
        if self._orphan_sender is None:
            args = (self._store, self.uri)
            self._orphan_sender = threading.Thread(target=_send_orphaned_quietly, args=args, daemon=True)
            self._orphan_sender.start()

    def _is_uploading(self) -> bool:
        return self._orphan_sender is not None and self._orphan_sender.is_alive()

    def _warn(self, fault: str, what: str, error: Exception) -> None:
        self._warn_once(fault, "%s: %s", what, redact(error))

    def _warn_once(self, key: str, text: str, *args: Any) -> None:
        is_old_news = key in ("away", "incomplete") and self._patience.is_known_away  # an earlier stage has said it
        if key not in self._warned and not is_old_news:
            LOG.warning(text, *args)
        self._warned.add(key)


def send(store: Store, outbox: Outbox, warn: Warn) -> Iterator[None]:
    """Sends an outbox's records in order, points in batches, a yield after each; artifacts are `send_files`'.

    Args:
        warn: called with a kind of fault, its consequence, and the error. A record that the store refuses is left out.

    Raises:
        Exception: the store's, where it is away.
    """
    for batch, offset in _batches(outbox):
        op = batch[-1].get("op")
        if op != "artifact":
            _send_batch(store, outbox, batch, warn)
        outbox.mark(offset, op)
        yield


def send_files(store: Store, outbox: Outbox, warn: Warn, *, again: bool) -> Iterator[None]:
    """Sends the artifacts that the store lacks, a yield after each, and removes an outbox that is sent.

    The store may answer while its artifact storage is full or refuses access: that artifact then stays pending.

    Args:
        again: whether to include those that this process has failed to send before.

    Raises:
        Exception: the store's, where it is away or has lost the run.
    """
    for start in [start for start in outbox.pending_artifacts if again or start not in outbox.failed]:
        record = outbox.at(start)
        try:
            _send_batch(store, outbox, [record], warn)
        except Exception as error:
            if stores.is_refusal(error) or not stores.is_reachable(store):
                raise
            outbox.failed[start] = error
            warn("waiting", f"{Path(record['file']).name} cannot be stored and is kept, the rest goes on", error)
            continue
        outbox.mark_sent(start)
        yield
    if outbox.ended and not outbox.pending_artifacts:
        outbox.remove()


def send_orphaned(store: Store, uri: str, *, files: bool) -> dict[str, Exception | None]:
    """Sends what ended or killed processes left behind for this store, oldest first; artifacts only with `files`.

    An error with one does not stop the others, as long as the store answers.

    Returns:
        uid -> None, or why it could not be sent.
    """
    done: dict[str, Exception | None] = {}
    for outbox in outboxes.orphaned(store.root):
        opening = outbox.opening()
        try:
            if not opening:  # its process died before it wrote one whole line
                outbox.remove()
            elif opening["uri"] == uri:
                done[outbox.uid] = _send_one(store, outbox, files)
        except Exception as error:
            if not stores.is_reachable(store):
                raise
            done[outbox.uid] = error
        finally:
            if outbox.folder.exists():
                outbox.close()
    return done


def replay(root: Path) -> dict[str, Exception | None]:
    """Sends all orphaned outboxes of a root to their stores; uid -> None, or why it stays."""
    stores.prepare()
    done: dict[str, Exception | None] = {}
    by_uri: dict[str, list[str]] = {}
    for outbox in outboxes.orphaned(root):
        by_uri.setdefault(outbox.opening().get("uri", stores.DEFAULT), []).append(outbox.uid)
        outbox.close()
    for uri, uids in by_uri.items():
        try:
            done |= send_orphaned(stores.connect(uri, root), uri, files=True)
        except Exception as error:
            done |= {uid: error for uid in uids if outboxes.is_waiting(root, uid)}
    return done


def _reopen(store: Store, outbox: Outbox) -> None:
    """Finds or creates the outbox's run. Where the store has lost the run, all records are sent again."""
    opening = outbox.opening()
    outbox.set_run_id(stores.open_run(store, opening))
    outbox.reached = stores.reached(store, opening, outbox.known_run_id)


def _send_one(store: Store, outbox: Outbox, files: bool) -> Exception | None:
    """Sends an orphaned outbox; the error of an artifact that stays pending, or None."""
    _reopen(store, outbox)
    for _ in send(store, outbox, _warn_replay):
        pass
    if files or not outbox.pending_artifacts:
        for _ in send_files(store, outbox, _warn_replay, again=True):
            pass
    return next(iter(outbox.failed.values()), None)


def _send_orphaned_quietly(store: Store, uri: str) -> None:
    with suppress(Exception):  # where the store is away, the run's own sender warns
        send_orphaned(store, uri, files=True)


def _batches(outbox: Outbox) -> Iterator[tuple[list[Mapping[str, Any]], int]]:
    """Records one by one, but points of one run together up to MLflow's limit; each with the offset behind it."""
    logs: list[Mapping[str, Any]] = []
    points, end = 0, outbox.offset
    for record, offset in outbox.records():
        is_log = record.get("op") == "log" and "run" not in record
        if is_log and outbox.reached:
            new = {k: v for k, v in record["metrics"].items() if record["step"] > outbox.reached.get(k, -(2**63))}
            record = {**record, "metrics": new}
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


def _send_batch(store: Store, outbox: Outbox, batch: list[Mapping[str, Any]], warn: Warn) -> None:
    run_id = outbox.known_run_id
    try:
        if len(batch) > 1:
            stores.send_points(store, run_id, batch)
        else:
            stores.deliver(store, run_id, batch[0], outbox.folder)
    except Exception as error:
        if not stores.is_refusal(error):
            raise
        if stores.is_deleted(store, run_id) or len(batch) == 1:
            op = str(batch[0].get("op"))
            warn(op, f"{op}: left something out", error)
            return
        for record in batch:  # so that a bad point costs no other point
            _send_batch(store, outbox, [record], warn)


def _warn_replay(fault: str, what: str, error: Exception) -> None:
    LOG.warning("replay: %s: %s", what, redact(error))
