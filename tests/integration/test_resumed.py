"""A training that is killed and goes on from its checkpoint: one run in the store with one curve, and one account."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import stages
from attune.costs import read_costs
from tracked import files_of, points_of, runs_in

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
ALIGN = [sys.executable, "-m", "attune.stages.align", "--run", "sft"]
BATCHES = 150
CHANGES = {"methods__sft__batches": BATCHES, "methods__sft__batch_size": 2, "checkpoint_seconds": 1}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A project whose data is prepared, with a training of some ten seconds to come."""
    folder = stages.write(tmp_path_factory.mktemp("killed"), {"base": {"after": "data"}, "sft": RUN}, **CHANGES)
    with stages.inside(folder):
        stages.write_plans()
        stages.call("prepare")
    return folder


RUN = {"method": "sft", "after": "data"}


def environment(folder: Path) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(stages.PREFIXES)}
    return clean | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def ended(folder: Path, signum: int | None = None) -> tuple[int, str]:
    """The training's exit code and what it said; given a signal, once it has logged ten steps after a checkpoint."""
    process = subprocess.Popen(
        ALIGN, cwd=folder, env=environment(folder), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    if signum is not None:
        wait_for_a_checkpoint(folder, process)
        process.send_signal(signum)
    _, said = process.communicate(timeout=300)
    return process.returncode, said


def wait_for_a_checkpoint(folder: Path, process: subprocess.Popen[str]) -> None:
    """Until this process has saved one and gone on for a moment, so that a kill loses steps that were logged."""
    began, deadline = time.time(), time.monotonic() + 200
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        saved = [state.stat().st_mtime for state in folder.glob(".checkpoints/align-*/state.pt")]
        if saved and saved[0] > began and time.time() - saved[0] > 0.4:
            return
        time.sleep(0.02)
    raise AssertionError("no checkpoint")


def logged(folder: Path) -> Iterator[dict]:
    for records in folder.glob(".checkpoints/tracking/*/records.jsonl"):
        yield from map(json.loads, records.read_text().splitlines())


def test_a_killed_training_goes_on_in_its_run(prepared):
    """kill -9, then SIGTERM, then to the end: the steps after the first checkpoint are made twice, and shown once."""
    store = f"sqlite:///{prepared}/mlflow.db"
    assert ended(prepared, signal.SIGKILL)[0] == -signal.SIGKILL
    (first,) = [run for run in runs_in(store) if run.info.run_name == "align@sft"]
    assert first.info.status == "RUNNING"
    assert len(list(logged(prepared))) > 10
    assert ended(prepared, signal.SIGTERM)[0] == 128 + signal.SIGTERM
    (second,) = [run for run in runs_in(store) if run.info.run_name == "align@sft"]
    assert second.info.status == "KILLED"
    with stages.inside(prepared):
        stopped = read_costs("short")["align@sft"]
    code, said = ended(prepared)
    assert code == 0, said
    (run,) = [run for run in runs_in(store) if run.info.run_name == "align@sft"]
    assert (run.info.run_id, run.info.status) == (first.info.run_id, "FINISHED")
    for key in ("loss", "lr", "grad_norm"):
        assert [step for step, _ in points_of(store, run.info.run_id, key)] == list(range(1, BATCHES + 1))
    images = [name for name in files_of(store, run.info.run_id, "images") if name.endswith(".png")]
    assert sorted(int(name.split("+step+")[1].split("+")[0]) for name in images) == [0, 30, 60, 90, 120, 150]
    times = [point.step for point in history(store, run.info.run_id, "system/cpu_utilization_percentage")]
    assert times == sorted(times)
    assert len(times) >= 6, "three parts, a point at the start and the end of each"
    assert not list((prepared / ".checkpoints/tracking").glob("*/records.jsonl"))
    with stages.inside(prepared):
        cost = read_costs("short")["align@sft"]
        assert cost.seconds > stopped.seconds + 1
        assert cost.denoiser_samples > 2 * BATCHES, "more than without the kill: some steps were made twice"
        assert json.loads(Path(".checkpoints/seconds.json").read_text())["align@sft"] == pytest.approx(
            cost.seconds, 0.1
        )
    assert run.data.metrics["stage_cost/denoiser_samples"] == cost.denoiser_samples


def history(store: str, run_id: str, key: str) -> list:
    from mlflow import MlflowClient

    return sorted(MlflowClient(tracking_uri=store).get_metric_history(run_id, key), key=lambda point: point.timestamp)
