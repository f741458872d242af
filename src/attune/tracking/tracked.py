"""A run as its body sees it: what it logs goes to the outbox, and to the other tools that show it."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import numpy as np

from attune.files import digest
from attune.tracking import outbox as outboxes
from attune.tracking import patience
from attune.tracking import sender as senders
from attune.tracking import store as stores
from attune.tracking.labels import Tree, default_tags, pipeline_run, redact, sanitize_key, table_columns
from attune.tracking.reference import ENDING, large_output
from attune.tracking.system import Monitor
from attune.tracking.views import View, open_views

LOG, OFF = logging.getLogger("attune.tracking"), "tracking is off, the run goes on"
WAKE_POINTS, TAG_CHARS, THUMBNAIL = 200, 5000, (256, 256)
Target = str | Mapping[str, Any]
"""The run that a record is of, where it is another one: its id, or a pipeline's identity, name, start and tags."""
P = ParamSpec("P")


def _safe(method: Callable[Concatenate[Run, P], None]) -> Callable[Concatenate[Run, P], None]:
    """Makes a method of Run do nothing while tracking is off, and turns its errors into warnings."""

    @wraps(method)
    def attempt(self: Run, *args: P.args, **kwargs: P.kwargs) -> None:
        if self._outbox is None and method.__name__ != "_open":
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            fault = OFF if self._outbox is None else f"{method.__name__.strip('_')}: left something out"
            if fault not in self._warned:
                LOG.warning("%s: %s", fault, redact(error))
            self._warned.add(fault)

    return attempt


class Run:
    """One run; does nothing while tracking is off. Its methods write to disk and never wait for the store."""

    def __init__(self) -> None:
        self._outbox: outboxes.Outbox | None = None
        self._sender: senders.Sender | None = None
        self._views: list[View] = []
        self._monitor: Monitor | None = None
        self._target: Target | None = None
        self._parent: Target | None = None
        self._step = self._points = 0
        self._began = outboxes.now_ms()  # of the first part
        self._first: str | None = None  # what the first part of a run that goes on was known by
        self._warned: set[str] = set()
        self._has_own = False  # whether a metric of its own has been logged
        self._waiting: deque[tuple[int, dict[str, float]]] = deque()  # steps and points of the system's

    @property
    def run_id(self) -> str | None:
        """The store's id, or our uid while the store has not answered yet; `note` and `parent` take both.

        None if tracking is off.
        """
        return None if self._outbox is None else self._outbox.run_id or self._outbox.uid

    @property
    def handle(self) -> dict[str, Any] | None:
        """What a later part of the same work gives `tracking.run` as `resume`; None if tracking is off."""
        if self._outbox is None and not self._views:
            return None
        return {"run": self.run_id, "first": self._part, "began": self._began}

    @property
    def _part(self) -> str:
        """Identifies the run in names of files; the same in all its parts."""
        return self._first or (self._outbox.uid if self._outbox else f"{outboxes.UID}{self._began}")

    @property
    def pipeline(self) -> Run:
        """The run that groups the stages of one `dvc repro`, written to through this one; does nothing without it."""
        other = copy.copy(self) if isinstance(self._parent, Mapping) else Run()
        other._target, other._views, other._step, other._waiting = self._parent, [], 0, deque()
        return other

    @property
    def _out(self) -> outboxes.Outbox:
        """The outbox, for methods that are `_safe`: they do nothing while there is none."""
        if self._outbox is None:
            raise RuntimeError(OFF)
        return self._outbox

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add a point at `step` to each curve; NaN and inf go to the curve `nonfinite`."""
        self._step = step
        for view in self._views:
            view.log(metrics, step)
        self._log(metrics, step)

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Log final scalars, at the last step logged."""
        self.log(metrics, self._step)

    def image(self, key: str, image: Any, step: int) -> None:
        """Log a PIL image or an array (H, W, 3), uint8 or floats in [0, 1]; the UI shows a step slider.

        The slider stands at step 0 at first, and shows nothing where there is no image of step 0.
        """
        for view in self._views:
            view.image(key, lambda: _picture(image), step)
        self._image(key, image, step)

    @_safe
    def note(self, run_id: str | None, metrics: Mapping[str, float]) -> None:
        """Log scores on another run, so that a training's row shows them; None: on no run."""
        if run_id is not None:
            self._out.append("note", run=run_id, step=self._step, metrics=_points(metrics))

    @_safe
    def describe(self, text: str, headline: str) -> None:
        """Sets the description, Markdown; of a pipeline, `headline` is said on the UI's first pages, too."""
        self._append("description", text=text[:TAG_CHARS], headline=headline)

    @_safe
    def dataset(self, path: str | Path, name: str, rows: int, context: str = "training") -> None:
        """Record a file or folder as input, with a digest of its content; context: training or eval."""
        source, profile = json.dumps({"uri": str(path)}), json.dumps({"num_rows": int(rows)})
        about = {"name": name, "digest": digest(Path(path)), "source": source, "profile": profile}
        self._append("dataset", context=context, **about)

    @_safe
    def artifact(self, path: str | Path, dvc_keeps_it: bool = False) -> None:
        """Copy a file or folder to the run's artifacts.

        Args:
            dvc_keeps_it: whether it is an output of a DVC stage. A large one is not copied then: the run gets a small
                file and a tag that say where it is and how to get it.
        """
        large = large_output(Path(path)) if dvc_keeps_it else None
        if large is None:
            self._append("artifact", file=self._out.copy_in(Path(path)))
            return
        name = Path(large.path).name
        file, place = self._out.reserve(name + ENDING)
        file.write_text(large.to_json())
        self._append("artifact", file=place)
        self._append("tags", tags={f"artifact.{sanitize_key(name)}": str(large)})

    def _append(self, op: str, **fields: Any) -> None:
        self._out.append(op, **fields, **({} if self._target is None else {"run": self._target}))

    @_safe
    def _log(self, metrics: Mapping[str, float], step: int) -> None:
        points = _points(metrics)
        self._append("log", step=_int64(step), metrics=points)
        self._has_own = True
        self._log_waiting()
        self._points += len(points)
        if self._points >= WAKE_POINTS and self._sender is not None:
            self._points = 0
            self._sender.wake()

    @_safe
    def _log_system(self, metrics: Mapping[str, float]) -> None:
        """Adds to the curves of the tab System metrics; their steps are seconds since the run began.

        They wait for the run's first own metric, as the UI's page of comparison opens on the metric that came first.
        """
        self._waiting.append(((outboxes.now_ms() - self._began) // 1000, _points(metrics)))
        if self._has_own:
            self._log_waiting()

    def _log_waiting(self) -> None:
        with suppress(IndexError):  # none is left; the monitor's thread takes from here too
            while True:
                step, points = self._waiting.popleft()
                self._append("log", step=step, metrics=points)

    @_safe
    def _image(self, key: str, image: Any, step: int) -> None:
        """The files are named as MLflow's `log_image` names them, but for the time, which is the run's start.

        So an image has one name however often it is sent, and the same again from a training that goes on from a
        checkpoint and makes it anew: stored once.
        """
        picture = _picture(image)
        stem = sanitize_key(key).replace("/", "~")
        stem += f"+step+{int(step)}+timestamp+{self._began}+{self._part.removeprefix(outboxes.UID)}"
        small = picture.copy()
        small.thumbnail(THUMBNAIL)
        for each, name in ((picture, f"{stem}.png"), (small, f"{stem}+compressed.webp")):
            path, place = self._out.reserve(name)
            each.save(path)
            self._append("artifact", file=place, to="images")
        self._append("tags", tags={"mlflow.loggedImages": "True"})

    @_safe
    def _open(self, name: str, params: Tree, tags: Tree, uri: str, root: Path, place: Tree) -> None:
        """Creates the outbox and starts its sender, with a few seconds to find the store before the body starts."""
        stores.prepare()
        known = default_tags(name, params) | {key: str(value) for key, value in tags.items()}
        is_stage = known["kind"] == "stage"
        parent = pipeline_run(known) if is_stage else place.get("parent")
        outbox = outboxes.create(root)
        resumed = (place.get("resume") or {}).get("run")
        about = {"name": known["dvc.stage"] if is_stage else name, "resume": resumed, "once": is_stage}
        about["tags"] = {key: text[:TAG_CHARS] for key, text in known.items()}
        outbox.append("open", uid=outbox.uid, uri=uri, **about)
        outbox.append("params", params=table_columns(params))
        if parent:
            outbox.append("parent", parent=parent)
        pipeline = parent["id"] if isinstance(parent, Mapping) else str(parent or "")
        self._outbox, self._sender = outbox, senders.Sender(outbox, uri, root, patience.read(root, uri, pipeline))
        self._parent = parent
        self._sender.begin()
        if known["kind"] != "trial":  # trials run beside one another, and the sweep has the machine's curves
            self._monitor = Monitor.start(self._log_system)

    def _go_on(self, earlier: Mapping[str, Any] | None) -> None:
        """Takes over what an earlier part's `handle` says."""
        if earlier is not None:
            self._first, self._began = earlier.get("first"), earlier.get("began", self._began)

    def _show(self, tools: Mapping[str, Any], name: str, params: Mapping[str, str], root: Path) -> None:
        self._views = open_views(tools, name, params, root, self._part)

    def _end(self, kind: str, status: str, state: str | None = None) -> None:
        if self._monitor is not None:
            self._monitor.stop()
        for view in self._views:
            view.close()
        self._finish(kind, status, state)

    @_safe
    def _finish(self, kind: str, status: str, state: str | None) -> None:
        self._log_waiting()
        if kind == "trial" and state:
            self._out.append("tags", tags={"trial.state": state})
        self._out.append("end", status=status, kind=kind)
        if self._sender is not None:
            self._sender.drain()


def _int64(step: int) -> int:
    """The step as an integer of 64 bits; a database fails on a larger one, and the record would be sent for ever."""
    if not -(2**63) <= int(step) < 2**63:
        raise ValueError(f"step {step} does not fit into 64 bits")
    return int(step)


def _points(metrics: Mapping[str, float]) -> dict[str, float]:
    values = {sanitize_key(key): float(value) for key, value in metrics.items()}
    finite = {key: value for key, value in values.items() if math.isfinite(value)}
    if len(finite) < len(values):  # MLflow would show inf as 1.8e308
        finite["nonfinite"] = len(values) - len(finite)
    return finite


def _picture(image: Any) -> Any:
    """A PIL image; floats are clipped to [0, 1] and not rescaled, which would hide overexposed pixels."""
    from PIL import Image

    if not isinstance(image, np.ndarray):
        return image.convert("RGB") if image.mode not in ("RGB", "RGBA", "L") else image
    if image.dtype.kind == "f":
        image = (np.nan_to_num(image).clip(0, 1) * 255).astype(np.uint8)
    return Image.fromarray(image)
