"""Tracking: what a stage did, as an MLflow run; a view that may be lost without losing anything else.

One parent run per `dvc repro` or experiment, one child per stage. Truth is git, dvc.lock and reports/: a
failure in here is warned about once, turns tracking off and stops nothing. The only importer of mlflow.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import numpy as np
import psutil
from filelock import FileLock

from attune.hashing import digest, values_sha

LOG, OFF = logging.getLogger("attune.tracking"), "tracking is off, the run goes on"
EXPERIMENT, HOST = "attune", socket.gethostname()
FLUSH_POINTS, FLUSH_SECONDS, PARAM_CHARS = 200, 5.0, 500
KIND = {"mlflow.experimentKind": "custom_model_development"}  # else the UI opens on its pages for chat models
CODE = (":/src", ":/params.yaml", ":/dvc.yaml")  # what git.dirty is about: every repro changes dvc.lock
# Unless told otherwise MLflow phones home, and retries for minutes before it admits that a server is away.
ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_DISABLE_TELEMETRY": "1"}
ENVIRONMENT |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
# What was given is at fault, not the store: a missing file, a vector for a number, an unknown run.
CONTENT_ERRORS = (TypeError, ValueError, RuntimeError, FileNotFoundError)
CONTENT_CODES = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")
Tree = Mapping[str, Any]
P = ParamSpec("P")


@contextmanager
def run(
    stage: str, params: Tree, *, tags: Tree, uri: str | None = "default", root: Path | None = None
) -> Iterator[Run]:
    """Track the with-body as one run: FINISHED, FAILED on an exception, KILLED when told to stop.

    The Run's methods never raise on account of tracking.

    Args:
        stage: the run's name where DVC gives none ($DVC_STAGE).
        params: resolved parameters, nested; logged flat.
        tags: profile, method and whatever else the run is to be found by; they override our own.
        uri: "default" is $MLFLOW_TRACKING_URI or else `<root>/mlflow.db`; None or ATTUNE_TRACKING=off is no
            tracking; anything else is MLflow's (`http://...`, `sqlite:///...`).
        root: folder of store, artifacts and lock; None is $DVC_ROOT or the cwd.
    """
    tracked, status = Run(), "FAILED"
    tracked._on = uri is not None and os.environ.get("ATTUNE_TRACKING", "").lower() != "off"
    tracked._open(stage, params, tags, uri, root)
    try:
        yield tracked
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit) as stop:
        status = "FINISHED" if isinstance(stop, SystemExit) and not stop.code else "KILLED"
        raise
    finally:
        tracked._flush()
        # Even when off: a store that was away for a while need not show this run as running for ever.
        tracked._on = tracked._client is not None
        tracked._end(status)


def _safe(method: Callable[Concatenate[Run, P], None]) -> Callable[Concatenate[Run, P], None]:
    """Let a method of Run do nothing while tracking is off, and fail without harm: the one place for that.

    What is refused for its content costs that item alone; other trouble is the store's and turns tracking
    off, lest every later call waits for a time-out. Replay would start here: `_pending` is what was not sent.
    """

    @wraps(method)
    def attempt(self: Run, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            if self._on:
                method(self, *args, **kwargs)
        except Exception as error:
            refused = isinstance(error, CONTENT_ERRORS) or getattr(error, "error_code", "") in CONTENT_CODES
            # A run deleted in the UI refuses every batch: not the fault of its content.
            self._on = self._client is not None and refused and method.__name__ != "_flush"
            fault = f"{method.__name__}: left something out" if self._on else OFF
            if fault not in self._warned:
                LOG.warning("%s: %s: %s", fault, type(error).__name__, str(error)[:300])
            self._warned.add(fault)

    return attempt


@dataclass
class Run:
    """One run; does nothing while tracking is off. `run_id` is None if the run is in no store."""

    run_id: str | None = None
    _client: Any = None  # mlflow.MlflowClient
    _on: bool = False
    _pending: list[Any] = field(default_factory=list)  # of mlflow.entities.Metric
    _flushed: float = field(default_factory=time.monotonic)
    _step: int = 0
    _warned: set[str] = field(default_factory=set)

    @_safe
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add a point at `step` to each curve, sent in batches; NaN and inf go to the curve `nonfinite`."""
        self._step = int(step)
        self._pending += self._points(metrics)
        if len(self._pending) >= FLUSH_POINTS or time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self._flush()

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Log final scalars, at the last step logged."""
        self.log(metrics, self._step)
        self._flush()

    @_safe
    def note(self, run_id: str | None, metrics: Mapping[str, float]) -> None:
        """Write scores on another run too, for a training run's row to show them; None: on no run."""
        if run_id is not None:
            self._client.log_batch(run_id, metrics=self._points(metrics), synchronous=True)

    @_safe
    def image(self, key: str, image: Any, step: int) -> None:
        """Log a PIL image or an array (H, W, 3), uint8 or floats in [0, 1]; the UI shows a step slider."""
        if isinstance(image, np.ndarray) and image.dtype.kind == "f":
            image = np.nan_to_num(image).clip(0, 1)  # MLflow would stretch the range and so hide burnt pixels
        self._client.log_image(self.run_id, image, key=_name(key), step=int(step), synchronous=True)

    @_safe
    def dataset(self, path: str | Path, name: str, rows: int, context: str = "training") -> None:
        """Record a file or folder as input, with a digest of its content; context: training or eval."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source, profile = json.dumps({"uri": str(path)}), json.dumps({"num_rows": int(rows)})
        data = Dataset(name, digest(Path(path)), source_type="local", source=source, profile=profile)
        tagged = DatasetInput(data, [InputTag("mlflow.data.context", context)])
        self._client.log_inputs(self.run_id, datasets=[tagged])

    @_safe
    def artifact(self, path: str | Path) -> None:
        """Copy a file or folder to the run's artifacts."""
        self._client.log_artifact(self.run_id, str(path))

    @_safe
    def _open(self, stage: str, params: Tree, tags: Tree, uri: str, root: Path | None) -> None:
        where = Path(root or os.environ.get("DVC_ROOT") or Path.cwd()).resolve()
        labels = _labels(stage, params) | {key: str(value) for key, value in tags.items()}
        # One lock around all of it: processes that create one store at once break it for good.
        with FileLock(where / ".mlflow-init.lock", timeout=120):
            client, experiment = _connect(uri, where)
            _bury(client, experiment)
            labels |= _parent(client, experiment, labels)
        self.run_id = client.create_run(experiment, tags=labels, run_name=labels["dvc.stage"]).info.run_id
        self._client = client

        from mlflow.entities import Param

        flat = [Param(_name(key), text[:PARAM_CHARS]) for key, text in flatten(params).items()]
        for i in range(0, len(flat), 100):  # MLflow's limit per call, as are 1000 points
            self._client.log_batch(self.run_id, params=flat[i : i + 100], synchronous=True)

    def _points(self, metrics: Mapping[str, float]) -> list[Any]:
        from mlflow.entities import Metric

        values = {_name(key): float(value) for key, value in metrics.items()}
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        if len(finite) < len(values):  # MLflow would show inf as 1.8e308
            finite["nonfinite"] = len(values) - len(finite)
        return [Metric(key, value, int(time.time() * 1000), self._step) for key, value in finite.items()]

    @_safe
    def _flush(self) -> None:
        self._flushed = time.monotonic()
        while self._pending:
            self._client.log_batch(self.run_id, metrics=self._pending[:1000], synchronous=True)
            del self._pending[:1000]

    @_safe
    def _end(self, status: str) -> None:
        if OFF in self._warned:
            self._client.set_tag(self.run_id, "tracking", "incomplete")
        self._client.set_terminated(self.run_id, status)
        self._flush()


def flatten(params: Tree, prefix: str = "") -> dict[str, str]:
    """Nested parameters as {"a.b": text}: strings as they are, the rest as JSON (null, true, [1, 2])."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def _connect(uri: str, root: Path) -> tuple[Any, str]:
    """The client and the experiment's id; creates what is missing, so call it under the lock."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db") if uri == "default" else uri
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if uri.startswith("sqlite:///"):
        database = root / uri.removeprefix("sqlite:///")  # an experiment's cwd is a temporary folder
        uri = f"sqlite:///{database}"
        with closing(sqlite3.connect(database, timeout=20)) as connection:
            connection.execute("pragma journal_mode=wal")  # four writers: 15 ms a call instead of 60
    from mlflow import MlflowClient

    # Explicit client and run ids throughout: neither MLFLOW_RUN_ID nor an active run can hijack this one.
    client = MlflowClient(tracking_uri=uri)
    if experiment := client.get_experiment_by_name(EXPERIMENT):
        return client, experiment.experiment_id
    location = None if uri.startswith("http") else str(root / "mlruns")  # MLflow would take the creator's cwd
    return client, client.create_experiment(EXPERIMENT, artifact_location=location, tags=KIND)


def _bury(client: Any, experiment: str) -> None:
    """Set KILLED on runs left RUNNING by processes of this host that are gone (kill -9, power)."""
    processes = psutil.process_iter(["create_time", "status"])
    born = {p.pid: p.info["create_time"] for p in processes if p.info["status"] != psutil.STATUS_ZOMBIE}
    for found in client.search_runs([experiment], f"status = 'RUNNING' AND tags.host = '{HOST}'"):
        pid, created = int(found.data.tags["pid"]), float(found.data.tags["pid.created"])
        if abs(born.get(pid, 0.0) - created) > 2:  # s: pids are reused, clocks get adjusted
            client.set_terminated(found.info.run_id, "KILLED")


def _parent(client: Any, experiment: str, labels: Mapping[str, str]) -> dict[str, str]:
    """The tag that puts a run below its pipeline's, which is found or created; empty outside of DVC."""
    name = os.environ.get("DVC_EXP_NAME")
    pipeline = _name(f"{name}-{os.environ.get('DVC_EXP_BASELINE_REV', '')}") if name else _repro()
    if pipeline is None:
        return {}
    found = client.search_runs([experiment], f"tags.`pipeline.id` = '{pipeline}'", max_results=1)
    if not found:
        shared = labels.keys() & {"git.commit", "git.dirty", "profile", "dvc.exp"}
        tags = {key: labels[key] for key in shared} | {"kind": "pipeline", "pipeline.id": pipeline}
        name = name or time.strftime("repro %Y-%m-%d %H:%M:%S")
        found = [client.create_run(experiment, tags=tags, run_name=name)]
        client.set_terminated(found[0].info.run_id)  # nobody is there to do it when the last stage ends
    return {"mlflow.parentRunId": found[0].info.run_id}


def _repro() -> str | None:
    """Identity of the dvc process that runs this one: host, pid, time of birth in s; None without one."""
    for process in psutil.Process().parents():
        words = [Path(word).name for word in process.as_dict(["cmdline"], ad_value=[])["cmdline"][:3]]
        if words and (words[0] == "dvc" or (words[0].startswith("python") and "dvc" in words)):
            return f"{HOST}-{process.pid}-{process.create_time():.0f}"
    return None


def _labels(stage: str, params: Tree) -> dict[str, str]:
    commit, changes = _git("rev-parse", "--verify", "HEAD"), _git("status", "--porcelain", "--", *CODE)
    env, me = os.environ.get, psutil.Process()
    known = {"kind": "stage", "dvc.stage": env("DVC_STAGE", stage), "dvc.exp": env("DVC_EXP_NAME")}
    known |= {"git.commit": commit, "git.dirty": {None: None, "": "false"}.get(changes, "true")}
    known |= {"params.sha": values_sha(params), "host": HOST, "pid": str(me.pid)}
    known |= {"pid.created": str(me.create_time()), "mlflow.user": env("USER")}
    known |= {"mlflow.source.git.commit": commit, "mlflow.source.name": known["dvc.stage"]}
    return {key: value for key, value in known.items() if value is not None}


def _git(*words: str) -> str | None:
    """What git says about the cwd, an experiment's own checkout; None without git or a repository."""
    command = ["git", "--no-optional-locks", *words]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    return None


def _name(text: str) -> str:
    """A name that MLflow accepts for metrics, params and images."""
    return os.path.normpath(re.sub(r"[^\w\-./ ]", "_", text, flags=re.ASCII)).lstrip("/.")[:250] or "_"
