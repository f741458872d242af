"""The tracking store: MLflow, which gets the records of the outboxes. Every call may fail, and may be repeated.

A record that is sent twice is stored once: runs are found by our own uid before they are created, a database identifies
a point by key, time, step and value, files are overwritten, and tags, parameters and data sets are sets.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from attune.files import sqlite_url
from attune.text import redact
from attune.tracking import outbox as outboxes
from attune.tracking import pipeline as pipelines
from attune.tracking.database import artifact_location, prepare_database
from attune.tracking.labels import HOST, is_alive

EXPERIMENT, PARAM_CHARS, POINTS, PARAMS = "attune", 500, 1000, 100  # the last two: MLflow's limits per call
PARTS = 100  # of a run: uids in its tag, each of 38 characters of MLflow's 8000
KIND = {"mlflow.experimentKind": "custom_model_development"}  # else the UI opens on its pages for chat models
# A shared view of the UI, `?viewStateShareKey=attune`: trainings and trials in one table by what was set and scored.
SHOWN = ["tags.`method`", "tags.`trial.state`", "tags.`round`", "params.`beta`", "params.`lr`"]
SHOWN += ["params.`batches`", "metrics.`score`"]
SHOWN += [f"metrics.`{s}`" for s in ("oracle", "pickscore", "hpsv2", "aesthetic", "imagereward", "clipscore")]
VIEW: dict[str, Any] = {"selectedColumns": SHOWN, "searchFilter": "tags.tuned = 'true'"}
VIEW |= {"orderByKey": "attributes.run_name", "orderByAsc": True}  # sorted by start, children are folded away
TAGS = KIND | {"mlflow.sharedViewState.attune": json.dumps(VIEW)}
DEFAULT = "sqlite:///mlflow.db"
# MLflow's defaults send telemetry, and retry for minutes before a call to a server that is away fails.
ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_DISABLE_TELEMETRY": "1"}
ENVIRONMENT |= {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}  # the address of a run, with the password in it
ENVIRONMENT |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
QUIET = ("mlflow.store.db.utils", "mlflow.store.tracking.sqlalchemy_store", "alembic", "sqlalchemy.pool")
REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")
ARTIFACT_SECONDS = (10, 600)  # for an artifact: to connect; for an answer, which a server gives once all is stored
STATES = {"FINISHED": "complete", "FAILED": "failed", "KILLED": "killed"}  # of a trial


class Pending(Exception):
    """A record refers to a run that has not reached the store yet."""


class DeletedError(RuntimeError):
    """The experiment has been deleted in the UI; the message says how to restore it."""


@dataclass(frozen=True)
class Store:
    """An open store. Client and ids are passed explicitly, so MLFLOW_RUN_ID or an active run has no effect."""

    client: Any  # mlflow.MlflowClient
    experiment: str
    root: Path


def resolve_uri(uri: str) -> str:
    """The URI, with "default" replaced by $MLFLOW_TRACKING_URI or a database in the root."""
    return os.environ.get("MLFLOW_TRACKING_URI", DEFAULT) if uri == "default" else uri


def prepare() -> None:
    """Sets MLflow's defaults and imports it; in the main thread, as two threads importing at once can break both."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import mlflow
    import mlflow.store.artifact.local_artifact_repo
    import mlflow.store.artifact.mlflow_artifacts_repo
    import mlflow.store.tracking.rest_store
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    from mlflow.store.artifact import http_artifact_repo as over_http

    for name in QUIET:  # each attempt would write dozens of lines, which `redact` has not seen; the sender says it once
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # MLflow has one time-out for points and for artifacts of gigabytes, set by the environment. This replaces the
    # function that only the transfer of artifacts calls.
    if not isinstance(over_http.http_request, partial):
        over_http.http_request = partial(over_http.http_request, timeout=ARTIFACT_SECONDS)


def absolute(uri: str, root: Path) -> str:
    """A sqlite path counts from the root, as an experiment's cwd is a temporary folder."""
    if not uri.startswith("sqlite:///"):
        return uri
    file, *options = uri.removeprefix("sqlite:///").split("?", 1)
    return "?".join([sqlite_url(root / file), *options])


def connect(uri: str, root: Path) -> Store:
    """Opens the store, creates what is missing, and ends the runs of dead processes.

    Raises:
        DeletedError: the experiment has been deleted.
    """
    from mlflow import MlflowClient

    # Under a lock: processes that create the same store at once leave it broken.
    with FileLock(root / ".mlflow-init.lock", timeout=120):
        place = absolute(uri, root)
        if place.startswith("sqlite:///"):
            prepare_database(root / uri.removeprefix("sqlite:///").partition("?")[0], root)
        client = MlflowClient(tracking_uri=place)
        found = client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            # A server has its own artifact location; for a database MLflow would use the creator's cwd.
            location = None if place.startswith("http") else artifact_location(root / "mlruns")
            store = Store(client, client.create_experiment(EXPERIMENT, artifact_location=location, tags=TAGS), root)
        else:
            store = Store(client, found.experiment_id, root)
            _check_not_deleted(store)
            for key in [key for key, text in TAGS.items() if found.tags.get(key) != text]:
                client.set_experiment_tag(store.experiment, key, TAGS[key])
        mark_killed(store)
    return store


def _check_not_deleted(store: Store) -> None:
    if store.client.get_experiment(store.experiment).lifecycle_stage == "deleted":
        uri = shlex.quote(redact(store.client.tracking_uri))
        raise DeletedError(
            f"the experiment {EXPERIMENT} has been deleted; MLFLOW_TRACKING_URI={uri} mlflow experiments restore "
            f"-x {store.experiment} brings it back, and `make replay` then sends what waits"
        )


def mark_killed(store: Store) -> None:
    """Sets KILLED on runs left RUNNING by processes of this host that are gone, except those with an outbox."""
    for found in store.client.search_runs([store.experiment], f"status = 'RUNNING' AND tags.host = '{HOST}'"):
        tags = found.data.tags
        if any(outboxes.is_waiting(store.root, uid) for uid in tags.get("attune.uid", "").split()):
            continue
        if is_alive(int(tags["pid"]), float(tags["pid.created"])):
            continue
        if store.client.get_run(found.info.run_id).info.status == "RUNNING":  # its outbox may have been sent meanwhile
            _end(store, found.info.run_id, "KILLED", None, tags.get("kind"))


def open_run(store: Store, opening: Mapping[str, Any]) -> str:
    """The run's id in the store: resumed, found by its uid, or created."""
    if opening.get("resume") and (known := _resumed(store, opening)):
        return known
    if found := _find(store, opening["uid"]):
        return found
    tags = {**opening["tags"], "attune.uid": opening["uid"]}
    run = store.client.create_run(store.experiment, start_time=opening["time"], tags=tags, run_name=opening["name"])
    return run.info.run_id


def deliver(store: Store, run_id: str, record: Mapping[str, Any], folder: Path) -> None:
    """Sends one record of a run, or of the one that it names. Without a known `op` it was cut off, and is skipped."""
    client, run_id = store.client, _whose(store, record.get("run", run_id))
    match record.get("op"):
        case "log" | "note":
            send_points(store, run_id, [record])
        case "params":
            _send_params(store, run_id, record["params"])
        case "tags":
            for key, value in record["tags"].items():
                client.set_tag(run_id, key, value)
        case "parent":
            client.set_tag(run_id, "mlflow.parentRunId", _whose(store, record["parent"]))
        case "description":
            pipelines.describe(store, run_id, record)
        case "artifact":
            client.log_artifact(run_id, str(folder / record["file"]), record.get("to"))
        case "dataset":
            client.log_inputs(run_id, datasets=[_dataset(record)])
        case "end":
            _end(store, run_id, record["status"], record.get("at", record["time"]), record.get("kind"))


def _whose(store: Store, run: str | Mapping[str, Any]) -> str:
    """The store's id of a run, given as in `resolve`, or as a pipeline, which is created if it is not there."""
    return resolve(store, run) if isinstance(run, str) else pipelines.find_or_create(store, run)


def send_points(store: Store, run_id: str, records: Iterable[Mapping[str, Any]]) -> None:
    """All points of some `log` records, in as few calls as MLflow allows."""
    from mlflow.entities import Metric

    points = [Metric(k, v, record["time"], record["step"]) for record in records for k, v in record["metrics"].items()]
    for some in _chunks(points, POINTS):
        store.client.log_batch(run_id, metrics=some, synchronous=True)


def resolve(store: Store, run: str) -> str:
    """The store's id of a run, given that id or our uid.

    Raises:
        Pending: it is still in an outbox.
        ValueError: neither the store nor an outbox has it.
    """
    if not run.startswith(outboxes.UID):
        return run
    if found := _find(store, run):
        return found
    if outboxes.is_waiting(store.root, run):
        raise Pending(f"run {run} is not in the store yet")
    raise ValueError(f"no run {run} in the store")


def is_refusal(error: Exception) -> bool:
    """Whether the record is at fault and not the store: an unknown run, a bad value, a missing file."""
    if isinstance(error, json.JSONDecodeError):  # the answer was not a tracking server's
        return False
    wrong = isinstance(error, TypeError | ValueError | LookupError | AttributeError | FileNotFoundError)
    return wrong or getattr(error, "error_code", "") in REFUSALS


def is_deleted(store: Store, run_id: str) -> bool:
    """Whether the run has been deleted in the UI: the store then refuses every record of it.

    Raises:
        MlflowException: the store has lost the run; the caller then opens it anew.
        DeletedError: the whole experiment has been deleted, and may be restored.
    """
    _check_not_deleted(store)
    return store.client.get_run(run_id).info.lifecycle_stage == "deleted"


def is_reachable(store: Store) -> bool:
    """Whether the store answers."""
    try:
        store.client.get_experiment(store.experiment)
    except Exception:
        return False
    return True


def _find(store: Store, uid: str) -> str | None:
    from mlflow.entities import ViewType

    where = f"tags.`attune.uid` LIKE '%{uid}%'"  # a run that went on has the uids of all its parts
    found = store.client.search_runs([store.experiment], where, run_view_type=ViewType.ALL, max_results=1)
    return found[0].info.run_id if found else None


def _resumed(store: Store, opening: Mapping[str, Any]) -> str | None:
    """The run to go on with, set RUNNING with this process as its owner; None if the store does not have it."""
    try:
        run_id = resolve(store, opening["resume"])
        store.client.update_run(run_id, status="RUNNING")
        uids = store.client.get_run(run_id).data.tags.get("attune.uid", "").split()
    except Exception as error:
        if is_refusal(error):
            return None
        raise
    for key in ("host", "pid", "pid.created"):
        store.client.set_tag(run_id, key, opening["tags"][key])
    parts = dict.fromkeys([*uids, opening["uid"]])
    store.client.set_tag(run_id, "attune.uid", " ".join([*parts][-PARTS:]))
    return run_id


def reached(store: Store, opening: Mapping[str, Any], run_id: str) -> dict[str, int]:
    """Curve -> last step that the store has of a run that goes on; {} of one that adds each point that it logs.

    A training that goes on from its checkpoint logs again what it had logged before, and repeats the steps after the
    checkpoint. The points of a curve come in the order of their steps, so those up to the last one are there.
    """
    if not (opening.get("resume") and opening.get("once")):
        return {}
    return {point.key: point.step for point in store.client.get_run(run_id).data._metric_objs}  # as MLflow itself does


def _send_params(store: Store, run_id: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    for some in _chunks([Param(key, text[:PARAM_CHARS]) for key, text in params.items()], PARAMS):
        store.client.log_batch(run_id, params=some, synchronous=True)


def _dataset(record: Mapping[str, Any]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    fields = {key: record[key] for key in ("name", "digest", "source", "profile")}
    return DatasetInput(Dataset(source_type="local", **fields), [InputTag("mlflow.data.context", record["context"])])


def _end(store: Store, run_id: str, status: str, at: int | None, kind: str | None) -> None:
    if kind == "trial" and status != "FINISHED":
        store.client.set_tag(run_id, "trial.state", STATES[status])
    store.client.set_terminated(run_id, status, end_time=at)
    pipelines.extend(store, run_id)


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))
