"""Processes that run stages for this one, each the leader of a process group, so that all stop as in a terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import psutil

from attune.stop import handling

POLL = 0.2  # s
Leader = subprocess.Popen[Any]


class Groups:
    """Process groups that are all interrupted at Ctrl-C or SIGTERM, as the one of a terminal is."""

    def __init__(self) -> None:
        self.stopped = 0  # the signal that asked for it
        self._told: dict[Leader, set[int]] = {}  # leader -> its children that have been told, or ran before that

    def add(self, leader: Leader) -> None:
        self._told[leader] = set()

    def stop(self, signum: int, frame: FrameType | None = None) -> None:
        """Passes the wish to stop on: a training saves before it ends; asked again, it ends at once."""
        self.stopped = signum
        for leader in list(self._told):
            if leader.poll() is None:
                interrupt(leader)

    def watch(self, leader: Leader) -> None:
        """Notes the leader's children, and tells those to stop that were begun too late to have been told.

        The one before had just ended when it was told, and the leader went on. To be called several times a second.
        """
        children = _children(leader)
        if self.stopped and children - self._told[leader]:
            interrupt(leader)
        self._told[leader] = self._told[leader] | children if self.stopped else children

    def wait(self, leader: Leader) -> int:
        """The exit code of a leader, which is looked at until it ends."""
        self.add(leader)
        while leader.poll() is None:
            self.watch(leader)
            time.sleep(POLL)
        return leader.returncode

    def end(self, leader: Leader) -> None:
        """Forgets a leader that has died, and interrupts what it has left running."""
        del self._told[leader]
        interrupt(leader)
        leader.wait()

    @contextmanager
    def stopped_on_error(self) -> Iterator[None]:
        """Asks all to stop where the with-body fails: nobody would look after them any more."""
        try:
            yield
        except BaseException:
            self.stop(signal.SIGTERM)
            raise

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Stops the groups at either signal, during the with-body; in a script's background, too."""
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # which the groups would inherit
            signal.signal(signal.SIGINT, self.stop)
        with handling(self.stop):
            yield


def interrupt(leader: Leader) -> None:
    """Interrupts the leader of a process group and all that it has started, as Ctrl-C does."""
    with suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGINT)


def _children(leader: Leader) -> set[int]:
    """Ids of the processes that it runs as stages."""
    try:
        return {child.pid for child in psutil.Process(leader.pid).children()}
    except psutil.NoSuchProcess:
        return set()
