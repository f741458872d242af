"""Requests to stop: Ctrl-C, and SIGTERM, which SLURM, Kubernetes and spot machines send before they take a machine.

A process that was asked to stop ends with 128 + the signal's number, 130 or 143, as shells expect.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

LOG = logging.getLogger("attune")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Stopped(SystemExit):
    """The process was asked to stop, and stops."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)


@contextmanager
def stoppable(what: str) -> Iterator[None]:
    """Ends the with-body at either signal: one line says so, its clean-up runs, and there is no traceback."""

    def stop(signum: int, frame: FrameType | None) -> None:
        LOG.warning("%s: stopped by %s", what, signal.Signals(signum).name)
        raise Stopped(signum)

    with handling(stop):
        yield


@contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """A function that says which signal has asked to stop, 0 for none; meanwhile work goes on.

    The same process is stopped at once by a second signal, as it would have been by the first outside of the
    with-body: whoever asks twice does not want to wait.
    """
    received = [0]

    def remember(signum: int, frame: FrameType | None) -> None:
        received[0] = signum
        note = f"\n{signal.Signals(signum).name}: stopping after this batch or accumulated step; again: at once\n"
        os.write(2, note.encode())  # print could not be entered a second time, and may be what was interrupted
        for number, handler in before.items():
            signal.signal(number, handler)

    with handling(remember) as before:
        yield lambda: received[0]


Handler = Callable[[int, FrameType | None], Any] | int | None  # as `signal.signal` takes and gives it


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[dict[signal.Signals, Handler]]:
    """Sets the handler of both signals, and puts back those that were there, which it gives.

    Python runs handlers in the main thread alone, and only there can they be set; elsewhere nothing is changed. A
    signal that is ignored (nohup, a background job of a shell without job control) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: old for number, old in before.items() if old is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield before
    finally:
        for number, old in before.items():
            if signal.getsignal(number) is handler:  # and not one that the with-body has set for good
                signal.signal(number, old)


def end_with_parent() -> None:
    """Lets the system stop this process, as SIGTERM does, when the one that has started it is gone (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
