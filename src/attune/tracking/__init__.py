"""Tracking: a stage, a sweep or a trial as an MLflow run. No work waits for the store.

What a run logs goes to an outbox on disk (`outbox.py`), and from there by a thread (`sender.py`) to the store
(`store.py`). A store that is away gets it later, each point once and with its own time: docs/tracking.md. The record of
a project is git, dvc.lock and reports/. This package alone imports mlflow.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeGuard

import numpy as np

from attune.files import digest
from attune.stop import SIGNALS
from attune.tracking import outbox as outboxes
from attune.tracking import patience
from attune.tracking import sender as senders
from attune.tracking import store as stores
from attune.tracking.labels import Tree, default_tags, flatten, pipeline_run, redact, sanitize_key, table_columns

__all__ = ["OFF", "Run", "flatten", "mark_killed", "redact", "replay", "run", "sweep", "table_columns", "trial"]

LOG, OFF = logging.getLogger("attune.tracking"), "tracking is off, the run goes on"
WAKE_POINTS, TAG_CHARS, THUMBNAIL = 200, 5000, (256, 256)
STOPPED = tuple(128 + signum for signum in SIGNALS)  # exit codes
P = ParamSpec("P")


@contextmanager
def run(
    stage: str, params: Tree, *, tags: Tree, uri: str | None = "default", root: Path | None = None
) -> Iterator[Run]:
    """Track the with-body as one run: FINISHED, FAILED on an exception, KILLED on an interrupt.

    The Run's methods never raise on account of tracking.

    Args:
        stage: the run's name where DVC gives none ($DVC_STAGE).
        params: resolved parameters, nested; logged as `table_columns` names them.
        tags: profile, method and others; they override the default tags.
        uri: "default" is $MLFLOW_TRACKING_URI or else `<root>/mlflow.db`; None or ATTUNE_TRACKING=off is no
            tracking; anything else is MLflow's (`http://...`, `sqlite:///...`). Of several ranks, only 0 tracks.
        root: folder of store, artifacts, outboxes and lock; None is $DVC_ROOT or the cwd.
    """
    with _tracked(stage, params, {"kind": "stage", **tags}, uri, root) as tracked:
        yield tracked


@contextmanager
def sweep(
    name: str,
    params: Tree,
    *,
    tags: Tree,
    uri: str | None = "default",
    root: Path | None = None,
    run_id: str | None = None,
) -> Iterator[Run]:
    """Track a search as one run, the parent of its trials; ends as `run` does.

    Args:
        run_id: the `run_id` of an earlier part of this sweep, to go on in its run; a new one where the store
            knows it no more.
    """
    with _tracked(name, params, {"kind": "sweep", **tags}, uri, root, resume=run_id) as tracked:
        yield tracked


@contextmanager
def trial(
    name: str, params: Tree, *, tags: Tree, parent: str | None, uri: str | None = "default", root: Path | None = None
) -> Iterator[Run]:
    """Track one trial of a sweep: FINISHED, FAILED on an exception, KILLED on an interrupt.

    MLflow has no state for a pruned trial, which has not failed either: an exception of a class named TrialPruned ends
    the run FINISHED, with the tag `trial.state` = pruned, and is raised again.
    `trial.state` is complete, pruned, failed or killed.

    Args:
        parent: `run_id` of the sweep's run, which another process may own.
    """
    with _tracked(name, params, {"kind": "trial", "tuned": "true", **tags}, uri, root, parent=parent) as tracked:
        yield tracked


def mark_killed(uri: str | None = "default", root: Path | None = None) -> None:
    """Ends the runs of killed processes of this host as KILLED, and sends all that they had logged."""
    if not _is_on(uri):
        return
    where = _root(root)
    try:
        stores.prepare()
        store = stores.connect(stores.resolve_uri(uri), where)
        senders.send_orphaned(store, stores.resolve_uri(uri), files=False)
        stores.mark_killed(store)
    except Exception as error:
        LOG.warning("%s: %s", senders.AWAY, redact(error))


def replay(root: Path | None = None) -> dict[str, Exception | None]:
    """Sends the outboxes of processes that have ended; uid of each run -> None, or the error that keeps it."""
    return senders.replay(_root(root))


@contextmanager
def _tracked(name: str, params: Tree, tags: Tree, uri: str | None, root: Path | None, **place: Any) -> Iterator[Run]:
    tracked, end = Run(), {"status": "FAILED"}
    if _is_on(uri):
        tracked._open(name, params, tags, stores.resolve_uri(uri), root, place)
    try:
        yield tracked
        end = {"status": "FINISHED", "state": "complete"}
    except (KeyboardInterrupt, SystemExit) as stop:
        end = {"status": _status(stop)}
        raise
    except Exception as error:
        if type(error).__name__ == "TrialPruned":
            end = {"status": "FINISHED", "state": "pruned"}
        raise
    finally:
        tracked._end(kind=tags["kind"], **end)


def _status(stop: KeyboardInterrupt | SystemExit) -> str:
    """How a run ends that was told to stop (KILLED), or that ends by itself with an exit code or a message."""
    if isinstance(stop, KeyboardInterrupt) or stop.code in STOPPED:
        return "KILLED"
    return "FAILED" if stop.code else "FINISHED"


def _is_on(uri: str | None) -> TypeGuard[str]:
    env = os.environ.get
    return uri is not None and env("ATTUNE_TRACKING", "").lower() != "off" and env("RANK", "0") == "0"


def _root(root: Path | None) -> Path:
    return Path(root or os.environ.get("DVC_ROOT") or Path.cwd()).resolve()


def _safe(method: Callable[Concatenate[Run, P], None]) -> Callable[Concatenate[Run, P], None]:
    """Makes a method of Run do nothing while tracking is off, and turns its errors into warnings."""

    @wraps(method)
    def attempt(self: Run, *args: P.args, **kwargs: P.kwargs) -> None:
        if self._outbox is None and method.__name__ != "_open":
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            fault = OFF if self._outbox is None else f"{method.__name__}: left something out"
            if fault not in self._warned:
                LOG.warning("%s: %s", fault, redact(error))
            self._warned.add(fault)

    return attempt


class Run:
    """One run; does nothing while tracking is off. Its methods write to disk and never wait for the store."""

    def __init__(self) -> None:
        self._outbox: outboxes.Outbox | None = None
        self._sender: senders.Sender | None = None
        self._step = self._points = 0
        self._warned: set[str] = set()

    @property
    def run_id(self) -> str | None:
        """The store's id, or our uid while the store has not answered yet; `note` and `parent` take both.

        None if tracking is off.
        """
        return None if self._outbox is None else self._outbox.run_id or self._outbox.uid

    @property
    def _out(self) -> outboxes.Outbox:
        """The outbox, for methods that are `_safe`: they do nothing while there is none."""
        if self._outbox is None:
            raise RuntimeError(OFF)
        return self._outbox

    @_safe
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add a point at `step` to each curve; NaN and inf go to the curve `nonfinite`."""
        self._step, points = _int64(step), _points(metrics)
        self._out.append("log", step=self._step, metrics=points)
        self._points += len(points)
        if self._points >= WAKE_POINTS and self._sender is not None:
            self._points = 0
            self._sender.wake()

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Log final scalars, at the last step logged."""
        self.log(metrics, self._step)

    @_safe
    def note(self, run_id: str | None, metrics: Mapping[str, float]) -> None:
        """Log scores on another run, so that a training's row shows them; None: on no run."""
        if run_id is not None:
            self._out.append("note", run=run_id, step=self._step, metrics=_points(metrics))

    @_safe
    def image(self, key: str, image: Any, step: int) -> None:
        """Log a PIL image or an array (H, W, 3), uint8 or floats in [0, 1]; the UI shows a step slider.

        The files are named as MLflow's `log_image` names them. That function would choose another name each time they
        are sent.
        """
        picture = _picture(image)
        stem = sanitize_key(key).replace("/", "~")
        stem += f"+step+{int(step)}+timestamp+{outboxes.now_ms()}+{self._out.uid.removeprefix(outboxes.UID)}"
        small = picture.copy()
        small.thumbnail(THUMBNAIL)
        for part, name in ((picture, f"{stem}.png"), (small, f"{stem}+compressed.webp")):
            path, place = self._out.reserve(name)
            part.save(path)
            self._out.append("artifact", file=place, to="images")
        self._out.append("tags", tags={"mlflow.loggedImages": "True"})

    @_safe
    def dataset(self, path: str | Path, name: str, rows: int, context: str = "training") -> None:
        """Record a file or folder as input, with a digest of its content; context: training or eval."""
        source, profile = json.dumps({"uri": str(path)}), json.dumps({"num_rows": int(rows)})
        about = {"name": name, "digest": digest(Path(path)), "source": source, "profile": profile}
        self._out.append("dataset", context=context, **about)

    @_safe
    def artifact(self, path: str | Path) -> None:
        """Copy a file or folder to the run's artifacts."""
        self._out.append("artifact", file=self._out.copy_in(Path(path)))

    @_safe
    def _open(self, name: str, params: Tree, tags: Tree, uri: str, root: Path | None, place: Tree) -> None:
        """Creates the outbox and starts its sender, with a few seconds to find the store before the body starts."""
        stores.prepare()
        root = _root(root)
        known = default_tags(name, params) | {key: str(value) for key, value in tags.items()}
        is_stage = known["kind"] == "stage"
        parent = pipeline_run(known) if is_stage else place.get("parent")
        outbox = outboxes.create(root)
        about = {"name": known["dvc.stage"] if is_stage else name, "resume": place.get("resume")}
        about["tags"] = {key: text[:TAG_CHARS] for key, text in known.items()}
        outbox.append("open", uid=outbox.uid, uri=uri, **about)
        outbox.append("params", params=table_columns(params))
        if parent:
            outbox.append("parent", parent=parent)
        pipeline = parent["id"] if isinstance(parent, Mapping) else str(parent or "")
        self._outbox, self._sender = outbox, senders.Sender(outbox, uri, root, patience.read(root, uri, pipeline))
        self._sender.begin()

    @_safe
    def _end(self, kind: str, status: str, state: str | None = None) -> None:
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
