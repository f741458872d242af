"""Runs the whole pipeline in a copy of the repository, with other settings: shared by several benchmarks."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from attune.config.edit import write_yaml
from attune.config.resolve import PARAMS, PROFILES, read_yaml
from attune.config.schema import set_path
from attune.copies import copy_checkout, environment, start_repro
from attune.paths import Paths

ROOT = Path(__file__).resolve().parents[1]
copy_repository = partial(copy_checkout, ROOT)
"""`copy_repository(home, values, given)`, see `attune.copies`."""


def active_profile() -> tuple[str, dict[str, Any]]:
    """The name of the profile in params.yaml, and what its file says."""
    name = read_yaml(ROOT / PARAMS)["profile"]
    return name, read_yaml(ROOT / PROFILES / f"{name}.yaml")


def rewrite(file: Path, changes: Mapping[str, Any]) -> None:
    """Sets values of a YAML file by dotted key; its comments are lost."""
    values = read_yaml(file)
    for key, value in changes.items():
        values = set_path(values, key, value)
    write_yaml(values, file)


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
        home: where the copy is made, or brought up to date.
        values: dotted key -> value, in the file of the active profile.
        runs: instead of the runs in params.yaml.
        cache: a DVC cache that copies share, so that equal stages run once.
        tracked: whether runs are tracked in this repository's MLflow store.

    Raises:
        subprocess.CalledProcessError: a stage failed; the log says why.
    """
    reports = home / Paths(active_profile()[0]).reports
    if (reports / "summary.json").exists():
        return reports
    copy_repository(home, values, None if runs is None else {"runs": runs}, cache)
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{ROOT / 'mlflow.db'}"} if tracked else {}
    process = start_repro(home, home.with_suffix(".log"), {**environment(tracked), "OMP_NUM_THREADS": "1", **store})
    if code := process.wait():
        raise subprocess.CalledProcessError(code, process.args)
    return reports
