"""A sweep as a user runs it, in a project of its own: real DVC, MLflow, training and scoring on profile short."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from ruamel.yaml import YAML

pytestmark = [pytest.mark.integration, pytest.mark.pipeline]

ROOT = Path(__file__).parents[2]
CODE = ("params.yaml", "params", "dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config", "src", "sweeps")
CODE += ("models/embedded", "data/raw/README.md")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    for name in CODE:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, target)
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace("profile: tiny", "profile: short", 1))
    run(folder, "git", "init", "--quiet")
    return folder


def run(folder: Path, *words: str) -> str:
    """A command in the project, which must succeed; what it said."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "ATTUNE_", "PYTEST_", "GIT_"))}
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "PYTHONPATH": "src", "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stdout[-3000:]}{done.stderr[-6000:]}"
    return done.stdout + done.stderr


def test_a_sweep_through_dvc_is_applied_and_not_repeated(project):
    """dvc runs prepare, three trials, two at full length; then nothing more; apply changes one line of the profile."""
    target = "sweeps/dvc.yaml:sweep@sft"
    assert "sweep" not in run(project, "dvc", "stage", "list", "--all")
    said = run(project, sys.executable, "-m", "attune", "sweep", "--run", "sft")
    assert "Running stage 'prepare'" in said
    results = project / "reports" / "short" / "sweeps" / "sft"
    table = pd.read_csv(results / "trials.csv")
    assert table.state.tolist() == ["complete"] * 3
    assert table.hpsv2.is_unique
    assert (table.prompts == 6).all()
    pictures = {"history.png", "slice.png", "finals.png"}
    assert {file.name for file in results.iterdir()} == {"best_params.yaml", "trials.csv", "finals.csv", *pictures}
    finals = pd.read_csv(results / "finals.csv")
    assert finals.before.tolist() == [True, False]
    assert finals.lr.tolist() == [3e-4, table.lr[table.hpsv2.idxmax()]]
    best = YAML(typ="safe").load(results / "best_params.yaml")
    assert best["trial"] == finals.hpsv2.idxmax()
    assert best["params"] == {"lr": finals.lr[best["trial"]]}
    kept = [file for file in (project / ".checkpoints" / "search").glob("*/*/*.safetensors")]
    assert [file.parent.name for file in kept] == ["best", "best"]

    assert "didn't change, skipping" in run(project, "dvc", "repro", target)
    run(project, sys.executable, "-m", "attune.stages.sweep", "--run", "sft")
    assert len(pd.read_csv(results / "trials.csv")) == 3
    assert len(pd.read_csv(results / "finals.csv")) == 2
    check_tracking(project, pd.concat([table, finals]))

    before = (project / "params" / "short.yaml").read_text().splitlines()
    run(project, sys.executable, "-m", "attune.stages.sweep", "--run", "sft", "--apply")
    after = (project / "params" / "short.yaml").read_text().splitlines()
    changed = [new.strip() for old, new in zip(before, after, strict=True) if old != new]
    assert changed == [f"lr: {best['params']['lr']}"]


def check_tracking(project: Path, table: pd.DataFrame) -> None:
    """One sweep, resumed, not two; a run per trial below it, two at full length, with parameter and scores."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{project / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("attune").experiment_id])
    assert Counter(r.data.tags["kind"] for r in runs)["sweep"] == 1
    (parent,) = [r for r in runs if r.data.tags["kind"] == "sweep"]
    trials = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {(float(r.data.params["lr"]), round(r.data.metrics["score"], 6)) for r in trials} == {
        (lr, round(score, 6)) for lr, score in zip(table.lr, table.hpsv2, strict=True)
    }
    assert {r.info.status for r in runs} == {"FINISHED"}
    assert sorted(r.data.params["batches"] for r in trials) == ["1", "1", "1", "3", "3"]
    assert sorted(r.info.run_name for r in trials if "round" in r.data.tags) == ["sft full 0", "sft full 1"]
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {"best_params.yaml", "history.png"}
