"""Runs the whole pipeline in a copy of the repository, with other settings: shared by seeds.py and spo_ablations.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attune.config.edit import update_params_file
from attune.config.resolve import PARAMS, PROFILES, read_yaml
from attune.paths import Paths

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("src", "params.yaml", "params", "dvc.yaml", ".dvcignore", ".gitignore", "models/embedded", "data/raw")


def active_profile() -> tuple[str, dict[str, Any]]:
    """The name of the profile in params.yaml, and what its file says."""
    name = read_yaml(ROOT / PARAMS)["profile"]
    return name, read_yaml(ROOT / PROFILES / f"{name}.yaml")


def copy_repository(home: Path, values: Mapping[str, Any], runs: Mapping[str, Any] | None = None) -> None:
    """A copy of the code and the settings, in which some settings differ; params.local.yaml is not copied.

    Args:
        values: dotted key -> value, in the file of the active profile.
        runs: instead of the runs in params.yaml.
    """
    for name in NEEDED:
        target = home / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, target)
    update_params_file(values, home / PROFILES / f"{active_profile()[0]}.yaml")
    if runs is not None:
        update_params_file({"runs": dict(runs)}, home / PARAMS)


def repro_in_copy(
    home: Path,
    values: Mapping[str, Any],
    runs: Mapping[str, Any] | None = None,
    cache: Path | None = None,
    tracked: bool = False,
) -> Path:
    """Runs `dvc repro` in a copy of the repository; its output goes to `<home>.log`. Returns the folder of reports.

    A copy that has come to its end is left as it is.

    Args:
        home: where the copy is made.
        values: see `copy_repository`.
        runs: see `copy_repository`.
        cache: a DVC cache that copies share, so that equal stages run once.
        tracked: whether runs are tracked in this repository's MLflow store.

    Raises:
        subprocess.CalledProcessError: a stage failed; the log says why.
    """
    reports = home / Paths(active_profile()[0]).reports
    if (reports / "summary.json").exists():
        return reports
    shutil.rmtree(home, ignore_errors=True)
    copy_repository(home, values, runs)
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    env |= {"DVC_NO_ANALYTICS": "1"}
    env |= {"MLFLOW_TRACKING_URI": f"sqlite:///{ROOT / 'mlflow.db'}"} if tracked else {"ATTUNE_TRACKING": "off"}
    commands = [["git", "init", "-q"], ["dvc", "init", "-q"], ["dvc", "repro"]]
    if cache is not None:
        commands.insert(2, ["dvc", "cache", "dir", "--local", str(cache)])
    with home.with_suffix(".log").open("w") as log:
        for command in commands:
            subprocess.run(command, cwd=home, env=env, stdout=log, stderr=log, check=True)
    return reports
