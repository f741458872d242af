"""The worker processes of `attune repro`: each runs one command of DVC at a time, and all stop together."""

from __future__ import annotations

import json
import selectors
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from attune.process_groups import Groups

Worker = subprocess.Popen[str]
Answer = Mapping[str, Any]
LOST: Answer = {}  # of a worker that has died


class Workers:
    """Processes that live as long as the pipeline runs. A worker has one task at a time."""

    def __init__(self, command: Sequence[str], groups: Groups, errors: Path, keep_open: int) -> None:
        """Starts none yet.

        Args:
            command: starts a worker.
            errors: file for what workers write before and between tasks.
            keep_open: a file descriptor that they inherit, so a lock on it lasts until the last of them has ended.
        """
        self._command, self._groups, self._errors, self._keep_open = list(command), groups, errors, keep_open
        self._selector = selectors.DefaultSelector()
        self._idle: list[Worker] = []
        self._busy: list[Worker] = []

    def start(self, count: int) -> None:
        """Starts workers until there are so many. To be called in the main thread: they end with the one that did."""
        while len(self._idle) + len(self._busy) < count:
            with self._errors.open("a") as errors:
                worker = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    start_new_session=True,
                    pass_fds=(self._keep_open,),
                )
            self._groups.add(worker)
            self._selector.register(worker.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
            self._idle.append(worker)

    def has_idle(self) -> bool:
        return bool(self._idle)

    def give(self, task: str, **values: Any) -> Worker:
        """Gives a task to an idle worker, and says which."""
        worker = self._idle.pop(0)
        self._busy.append(worker)
        with suppress(BrokenPipeError):  # it has died, which is seen where its answer is read
            worker.stdin.write(json.dumps({"task": task, **values}) + "\n")  # type: ignore[union-attr]
            worker.stdin.flush()  # type: ignore[union-attr]
        return worker

    def answers(self, timeout: float) -> Iterator[tuple[Worker, Answer]]:
        """The answers that arrive within so many seconds; LOST for a worker that has died at its task."""
        for busy in self._busy:
            self._groups.watch(busy)
        for key, _ in self._selector.select(timeout):
            worker = key.data
            line = worker.stdout.readline()
            had_task, is_whole = worker in self._busy, line.endswith("\n")
            (self._busy if had_task else self._idle).remove(worker)
            if is_whole:
                self._idle.append(worker)
            else:
                self._selector.unregister(worker.stdout)
                self._groups.end(worker)
            if had_task:
                yield worker, json.loads(line) if is_whole else LOST

    def ask(self, task: str, **values: Any) -> Answer:
        """The answer to a task while no other worker has one."""
        asked = self.give(task, **values)
        while True:
            for worker, answer in self.answers(1.0):
                if worker is asked:
                    return answer

    def close(self) -> None:
        """Ends the workers; those that have a task end it before."""
        for worker in (*self._idle, *self._busy):
            with suppress(BrokenPipeError):
                worker.stdin.close()  # type: ignore[union-attr]
            worker.wait()
            worker.stdout.close()  # type: ignore[union-attr]


@contextmanager
def workers(command: Sequence[str], groups: Groups, errors: Path, keep_open: int) -> Iterator[Workers]:
    """Workers for the with-body, during which Ctrl-C and SIGTERM stop them all."""
    made = Workers(command, groups, errors, keep_open)
    with groups.stoppable():
        try:
            yield made
        finally:
            made.close()
