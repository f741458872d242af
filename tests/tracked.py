"""Runs that are tracked for tests, and what a store of MLflow holds of them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from attune import tracking
from attune.tracking import outbox as outboxes
from attune.tracking import sender as senders


def forget_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variables of DVC, MLflow or attune from outside."""
    for key in [key for key in os.environ if key.startswith(("DVC_", "MLFLOW_", "ATTUNE_"))]:
        monkeypatch.delenv(key)


def shorten_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks a store that is away five times a second, lest the tests wait."""
    monkeypatch.setattr(senders, "FLUSH_SECONDS", 0.2)
    monkeypatch.setattr(senders, "RETRY_SECONDS", (0.2, 0.2))


def runs_in(uri: str, where: str = "") -> list:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("attune")
    return client.search_runs([experiment.experiment_id], where) if experiment else []


def points_of(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    return sorted((m.step, m.value) for m in MlflowClient(tracking_uri=uri).get_metric_history(run_id, key))


def without_system(metrics: dict[str, float]) -> dict[str, float]:
    """What a run logged itself, and not the machine's use or what the stage cost."""
    return {key: value for key, value in metrics.items() if not key.startswith(("system/", "stage_cost/"))}


def files_of(uri: str, run_id: str, folder: str | None = None) -> list[str]:
    from mlflow import MlflowClient

    return sorted(info.path for info in MlflowClient(tracking_uri=uri).list_artifacts(run_id, folder))


def left_in(root: Path) -> list[Path]:
    return list((root / outboxes.OUTBOXES).glob("*/records.jsonl"))


def train(run: tracking.Run, steps: range, pause: float = 0.0) -> None:
    for step in steps:
        run.log({"loss": 1 / (step + 1), "margin": step}, step)
        time.sleep(pause)


def uid_of(uri: str, run_id: str) -> str:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri).get_run(run_id).data.tags["attune.uid"]


def grey():
    import numpy as np

    return np.full((4, 4, 3), 0.5)


def wait_for(happened) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
