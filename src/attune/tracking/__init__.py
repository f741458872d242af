"""Tracking: a stage, a sweep or a trial as an MLflow run. No work waits for the store.

What a run logs goes to an outbox on disk (`outbox.py`), and from there by a thread (`sender.py`) to the store
(`store.py`). A store that is away gets it later, each point once and with its own time: docs/tracking.md. The record of
a project is git, dvc.lock and reports/. This package alone imports mlflow.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

from attune.stop import SIGNALS
from attune.tracking import sender as senders
from attune.tracking import store as stores
from attune.tracking.labels import Tree, flatten, redact, table_columns
from attune.tracking.tracked import LOG, OFF, Run

__all__ = ["OFF", "Run", "flatten", "mark_killed", "redact", "replay", "run", "sweep", "table_columns", "trial"]

STOPPED = tuple(128 + signum for signum in SIGNALS)  # exit codes


@contextmanager
def run(
    stage: str,
    params: Tree,
    *,
    tags: Tree,
    uri: str | None = "default",
    root: Path | None = None,
    resume: Mapping[str, Any] | None = None,
    tools: Mapping[str, Any] = {},
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
        resume: the `handle` of an earlier part of the same work, to go on in its run: points at steps that it has are
            not added again. A new run where the store knows it no more.
        tools: what else shows it, `tensorboard` (true) and `wandb` (a project); also where `uri` is None.
    """
    with _tracked(stage, params, {"kind": "stage", **tags}, uri, root, resume=resume, tools=tools) as tracked:
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
    with _tracked(name, params, {"kind": "sweep", **tags}, uri, root, resume=run_id and {"run": run_id}) as tracked:
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
    tracked, end, tools = Run(), {"status": "FAILED"}, place.pop("tools", {})
    tracked._go_on(place.get("resume"))
    if _is_on(uri):
        tracked._open(name, params, tags, stores.resolve_uri(uri), _root(root), place)
    if tools and _is_on("default"):
        tracked._show(tools, name, table_columns(params), _root(root))
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
