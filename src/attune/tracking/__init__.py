"""Tracking: what a stage, a sweep or a trial did, as an MLflow run; a view that no work ever waits for.

What a run logs goes to a spool on disk (`spool.py`), and from there by a thread (`sender.py`) to the store
(`store.py`). A store that is away gets it later, each point once and at its time: docs/tracking.md. Truth is git,
dvc.lock and reports/. This package alone imports mlflow.
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
from typing import Any, Concatenate, ParamSpec

import numpy as np

from attune.files import digest
from attune.tracking import sender as senders
from attune.tracking import spool as spools
from attune.tracking import store as stores
from attune.tracking.labels import Tree, columns, flatten, own_tags, pipeline, plain, told

__all__ = ["OFF", "Run", "bury", "columns", "flatten", "replay", "run", "sweep", "told", "trial"]

LOG, OFF = logging.getLogger("attune.tracking"), "tracking is off, the run goes on"
WAKE_POINTS, TAG_CHARS, THUMBNAIL = 200, 5000, (256, 256)
P = ParamSpec("P")


@contextmanager
def run(
    stage: str, params: Tree, *, tags: Tree, uri: str | None = "default", root: Path | None = None
) -> Iterator[Run]:
    """Track the with-body as one run: FINISHED, FAILED on an exception, KILLED when told to stop.

    The Run's methods never raise on account of tracking.

    Args:
        stage: the run's name where DVC gives none ($DVC_STAGE).
        params: resolved parameters, nested; logged as `columns` names them.
        tags: profile, method and whatever else the run is to be found by; they override our own.
        uri: "default" is $MLFLOW_TRACKING_URI or else `<root>/mlflow.db`; None or ATTUNE_TRACKING=off is no
            tracking; anything else is MLflow's (`http://...`, `sqlite:///...`). Of several ranks, only 0 tracks.
        root: folder of store, artifacts, spools and lock; None is $DVC_ROOT or the cwd.
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
    """Track one trial of a sweep: FINISHED, FAILED on an exception, KILLED when told to stop.

    MLflow has no state for a pruned trial, and one that was stopped because others did better has not failed: an
    exception of a class named TrialPruned ends it FINISHED, with the tag `trial.state` = pruned. It passes on.
    `trial.state` is complete, pruned, failed or killed.

    Args:
        parent: `run_id` of the sweep's run, of whatever process.
    """
    with _tracked(name, params, {"kind": "trial", "tuned": "true", **tags}, uri, root, above=parent) as tracked:
        yield tracked


def bury(uri: str | None = "default", root: Path | None = None) -> None:
    """Ends the runs of processes of this host that died without a word: KILLED, with all that they had logged."""
    if not _is_on(uri):
        return
    where = _root(root)
    try:
        stores.prepare()
        store = stores.connect(stores.chosen(uri), where)
        senders.send_left(store, stores.chosen(uri), files=False)
        stores.bury(store)
    except Exception as error:
        LOG.warning("%s: %s", senders.AWAY, told(error))


def replay(root: Path | None = None) -> dict[str, Exception | None]:
    """Sends what stores that were away have not got yet; uid of each run -> None, or why it still waits."""
    return senders.replay(_root(root))


@contextmanager
def _tracked(name: str, params: Tree, tags: Tree, uri: str | None, root: Path | None, **place: Any) -> Iterator[Run]:
    tracked, end = Run(), {"status": "FAILED"}
    if _is_on(uri):
        tracked._open(name, params, tags, stores.chosen(uri), root, place)
    try:
        yield tracked
        end = {"status": "FINISHED", "state": "complete"}
    except (KeyboardInterrupt, SystemExit) as stop:
        end = {"status": "FINISHED" if isinstance(stop, SystemExit) and not stop.code else "KILLED"}
        raise
    except Exception as error:
        if type(error).__name__ == "TrialPruned":
            end = {"status": "FINISHED", "state": "pruned"}
        raise
    finally:
        tracked._end(kind=tags["kind"], **end)


def _is_on(uri: str | None) -> bool:
    env = os.environ.get
    return uri is not None and env("ATTUNE_TRACKING", "").lower() != "off" and env("RANK", "0") == "0"


def _root(root: Path | None) -> Path:
    return Path(root or os.environ.get("DVC_ROOT") or Path.cwd()).resolve()


def _safe(method: Callable[Concatenate[Run, P], None]) -> Callable[Concatenate[Run, P], None]:
    """Lets a method of Run do nothing while tracking is off, and fail without harm: that item alone is lost."""

    @wraps(method)
    def attempt(self: Run, *args: P.args, **kwargs: P.kwargs) -> None:
        if self._spool is None and method.__name__ != "_open":
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            fault = OFF if self._spool is None else f"{method.__name__}: left something out"
            if fault not in self._warned:
                LOG.warning("%s: %s", fault, told(error))
            self._warned.add(fault)

    return attempt


class Run:
    """One run; does nothing while tracking is off. Its methods write to disk and return: none waits for a store."""

    def __init__(self) -> None:
        self._spool: spools.Spool | None = None
        self._sender: senders.Sender | None = None
        self._step = self._points = 0
        self._warned: set[str] = set()

    @property
    def run_id(self) -> str | None:
        """The store's id, or what stands for it as long as the store is away (`note` and `parent` take both).

        None if nothing is tracked.
        """
        return self._spool and (self._spool.run_id or self._spool.uid)

    @_safe
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add a point at `step` to each curve; NaN and inf go to the curve `nonfinite`."""
        self._step, points = _whole(step), _points(metrics)
        self._spool.append("log", step=self._step, metrics=points)
        self._points += len(points)
        if self._points >= WAKE_POINTS:
            self._points = 0
            self._sender.wake()

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Log final scalars, at the last step logged."""
        self.log(metrics, self._step)

    @_safe
    def note(self, run_id: str | None, metrics: Mapping[str, float]) -> None:
        """Write scores on another run too, for a training run's row to show them; None: on no run."""
        if run_id is not None:
            self._spool.append("note", run=run_id, step=self._step, metrics=_points(metrics))

    @_safe
    def image(self, key: str, image: Any, step: int) -> None:
        """Log a PIL image or an array (H, W, 3), uint8 or floats in [0, 1]; the UI shows a step slider.

        The files are named as MLflow's `log_image` does, which would give them another name each time they are sent.
        """
        picture = _picture(image)
        stem = plain(key).replace("/", "~")
        stem += f"+step+{int(step)}+timestamp+{spools.now_ms()}+{self._spool.uid.removeprefix(spools.UID)}"
        small = picture.copy()
        small.thumbnail(THUMBNAIL)
        for part, name in ((picture, f"{stem}.png"), (small, f"{stem}+compressed.webp")):
            path, place = self._spool.room(name)
            part.save(path)
            self._spool.append("artifact", file=place, to="images")
        self._spool.append("tags", tags={"mlflow.loggedImages": "True"})

    @_safe
    def dataset(self, path: str | Path, name: str, rows: int, context: str = "training") -> None:
        """Record a file or folder as input, with a digest of its content; context: training or eval."""
        source, profile = json.dumps({"uri": str(path)}), json.dumps({"num_rows": int(rows)})
        about = {"name": name, "digest": digest(Path(path)), "source": source, "profile": profile}
        self._spool.append("dataset", context=context, **about)

    @_safe
    def artifact(self, path: str | Path) -> None:
        """Copy a file or folder to the run's artifacts."""
        self._spool.append("artifact", file=self._spool.keep(Path(path)))

    @_safe
    def _open(self, name: str, params: Tree, tags: Tree, uri: str, root: Path | None, place: Tree) -> None:
        """Begins the spool and its sender, which gets a while to find the store before the body starts."""
        stores.prepare()
        root = _root(root)
        known = own_tags(name, params) | {key: str(value) for key, value in tags.items()}
        is_stage = known["kind"] == "stage"
        above = pipeline(known) if is_stage else place.get("above")
        spool = spools.create(root)
        about = {"name": known["dvc.stage"] if is_stage else name, "resume": place.get("resume")}
        about["tags"] = {key: text[:TAG_CHARS] for key, text in known.items()}
        spool.append("open", uid=spool.uid, uri=uri, **about)
        spool.append("params", params=columns(params))
        if above:
            spool.append("parent", above=above)
        self._spool, self._sender = spool, senders.Sender(spool, uri, root)
        self._sender.start()
        self._sender.attempted.wait(senders.START_SECONDS)

    @_safe
    def _end(self, kind: str, status: str, state: str | None = None) -> None:
        if kind == "trial" and state:
            self._spool.append("tags", tags={"trial.state": state})
        self._spool.append("end", status=status, kind=kind)
        self._sender.finish()


def _whole(step: int) -> int:
    """A step that every database can hold; one that it cannot would be tried again for ever."""
    if not -(2**63) <= int(step) < 2**63:
        raise ValueError(f"step {step} does not fit into 64 bits")
    return int(step)


def _points(metrics: Mapping[str, float]) -> dict[str, float]:
    values = {plain(key): float(value) for key, value in metrics.items()}
    finite = {key: value for key, value in values.items() if math.isfinite(value)}
    if len(finite) < len(values):  # MLflow would show inf as 1.8e308
        finite["nonfinite"] = len(values) - len(finite)
    return finite


def _picture(image: Any) -> Any:
    """A PIL image; floats are clipped, not stretched over the range, which would hide burnt pixels."""
    from PIL import Image

    if not isinstance(image, np.ndarray):
        return image.convert("RGB") if image.mode not in ("RGB", "RGBA", "L") else image
    if image.dtype.kind == "f":
        image = (np.nan_to_num(image).clip(0, 1) * 255).astype(np.uint8)
    return Image.fromarray(image)
