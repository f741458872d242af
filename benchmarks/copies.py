"""Runs the whole pipeline in a copy of the repository, with other parameters: what the benchmarks here share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("src", "params.yaml", "dvc.yaml", ".dvcignore", ".gitignore", "models/embedded", "data/raw/README.md")


def repro_in_copy(home: Path, changes: Mapping[str, Any], cache: Path | None = None, tracked: bool = False) -> None:
    """Copies the repository to `home`, changes params.yaml and runs `dvc repro`; its output goes to `<home>.log`.

    A copy that has come to its end is left as it is.

    Args:
        changes: dotted key -> value; `${profile}` in a key is the active profile.
        cache: a DVC cache that copies share, so that equal stages run once.
        tracked: whether runs land in this repository's MLflow store.

    Raises:
        subprocess.CalledProcessError: a stage failed; the log says why.
    """
    if (home / "reports" / "summary.json").exists():
        return
    shutil.rmtree(home, ignore_errors=True)
    for name in NEEDED:
        target = home / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, target)
    yaml = YAML()
    params = yaml.load(home / "params.yaml")
    for key, value in changes.items():
        *path, last = key.replace("${profile}", params["profile"]).split(".")
        block = params
        for part in path:
            block = block[part]
        block[last] = value
    yaml.dump(params, home / "params.yaml")
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    env |= {"DVC_NO_ANALYTICS": "1"}
    env |= {"MLFLOW_TRACKING_URI": f"sqlite:///{ROOT / 'mlflow.db'}"} if tracked else {"ATTUNE_TRACKING": "off"}
    commands = [["git", "init", "-q"], ["dvc", "init", "-q"], ["dvc", "repro"]]
    if cache is not None:
        commands.insert(2, ["dvc", "cache", "dir", "--local", str(cache)])
    with home.with_suffix(".log").open("w") as log:
        for command in commands:
            subprocess.run(command, cwd=home, env=env, stdout=log, stderr=log, check=True)
