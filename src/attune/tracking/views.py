"""Other tools that show a run's curves, images and parameters: TensorBoard and Weights & Biases, off by default.

They see what the main process logs, and nothing waits in an outbox for them. docs/adr/0010 says why accelerate's
trackers, which write to the same tools, are not used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from attune.tracking.labels import redact

LOG = logging.getLogger("attune.tracking")


class Tool(Protocol):
    """An open run of such a tool."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Adds a point to each curve."""

    def image(self, key: str, picture: Any, step: int) -> None:
        """Shows a PIL image."""

    def close(self) -> None:
        """Ends the run."""


class View:
    """A tool that cannot stop a training: after its first failure, of which one line tells, it is left alone."""

    def __init__(self, name: str, open_tool: Callable[[], Tool]):
        self._name = name
        self._tool: Tool | None = None
        with self._guarded():
            self._tool = open_tool()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        with self._guarded():
            if self._tool is not None:
                self._tool.log(metrics, step)

    def image(self, key: str, picture: Callable[[], Any], step: int) -> None:
        with self._guarded():
            if self._tool is not None:
                self._tool.image(key, picture(), step)

    def close(self) -> None:
        with self._guarded():
            if self._tool is not None:
                self._tool.close()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            LOG.warning("%s shows no more of this run, which goes on: %s", self._name, redact(error))
            self._tool = None


def open_views(tools: Mapping[str, Any], name: str, params: Mapping[str, str], root: Path, part: str) -> list[View]:
    """The tools that the settings ask for, each with the run open.

    Args:
        tools: `tensorboard` (true) and `wandb` (a project), where they are wanted.
        params: flat, as text.
        part: identifies the run; the same of all parts of a training that goes on from a checkpoint.
    """
    found = []
    if tools.get("tensorboard"):
        from attune.tracking import tensorboard

        found.append(View("tensorboard", lambda: tensorboard.TensorBoard(root, name, params, part)))
    if tools.get("wandb"):
        from attune.tracking import weights_and_biases

        found.append(View("wandb", lambda: weights_and_biases.Project(tools["wandb"], root, name, params, part)))
    return found
