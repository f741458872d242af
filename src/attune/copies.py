"""Copies of the checkout in which the whole pipeline runs with other settings: of another seed, or of a benchmark.

A copy has code and settings of its own, so that edits in the checkout do not reach a run that has begun. All else that
a setting may name by a relative path is linked to the checkout, whether git knows it or not. The copy is a DVC project
without git, and has the checkout's DVC cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from attune.config.edit import write_yaml
from attune.config.resolve import LOCAL, PARAMS, PROFILES, merged, read_yaml
from attune.config.schema import set_path

COPIED = ("src", "params", "sweeps", "dvc.yaml", "params.yaml", ".dvcignore", ".gitignore")
OWN = ("plan", "reports", "packages", "mlruns", "dvc.lock", "params.local.yaml")  # what a copy makes by itself
SHARED = ("data", "models")  # real folders: with links beside the copy's own <profile>
JUNK = shutil.ignore_patterns("__pycache__")


def copy_checkout(
    root: Path, home: Path, values: Mapping[str, Any], given: Mapping[str, Any] | None = None, cache: Path | None = None
) -> None:
    """Makes a copy, or brings one up to date; what has been made in it stays, so DVC goes on from there.

    Args:
        root: the checkout. Its params.local.yaml counts; in the copy its values are those of the profile's file.
        home: the copy.
        values: dotted key -> value, in the file of the profile.
        given: profile, runs or tracking instead of what params.yaml says.
        cache: DVC's cache; None: one of the copy's own.
    """
    home.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        _copy(root / name, home / name)
    params = {**read_yaml(root / PARAMS), **(given or {})}
    profile = params["profile"]
    for place in _linked(root, profile):
        _link(root / place, home / place)
    file = PROFILES / f"{profile}.yaml"
    local = read_yaml(root / LOCAL) if (root / LOCAL).exists() else {}
    settings = merged(read_yaml(root / file), local.get(profile) or {})
    settings = reduce(lambda changed, item: set_path(changed, *item), values.items(), settings)
    write_yaml(anchored(settings, root), home / file)
    write_yaml(anchored(params, root), home / PARAMS)
    _dvc_project(root, home, cache)


def anchored(value: Any, root: Path) -> Any:
    """Values with the relative paths that lead out of the checkout made absolute: a copy is at another place."""
    if isinstance(value, Mapping):
        return {key: anchored(item, root) for key, item in value.items()}
    if isinstance(value, list):
        return [anchored(item, root) for item in value]
    if isinstance(value, str) and value.split("/")[0] == ".." and (root / value).exists():
        return str((root / value).resolve())
    return value


def dvc_cache(root: Path) -> Path:
    """The DVC cache of a checkout, wherever its configuration puts it."""
    command = [sys.executable, "-m", "dvc", "cache", "dir"]
    said = subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True, check=True)
    return Path(said.stdout.strip())


def environment(tracked: bool = True) -> dict[str, str]:
    """The environment of a `dvc repro` of its own, without what DVC tells the stages of another one."""
    told = ("DVC_ROOT", "DVC_STAGE", "DVC_EXP")
    env = {key: value for key, value in os.environ.items() if not key.startswith(told)}
    env |= {"PATH": os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")]), "DVC_NO_ANALYTICS": "1"}
    return env if tracked else env | {"ATTUNE_TRACKING": "off"}


def start_repro(home: Path, log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Starts `dvc repro` in a folder, its output in `log`; in a process group of its own, to be told when to stop."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "dvc", "repro"],
            cwd=home,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, ignore=JUNK)
    elif source.exists():
        shutil.copy2(source, target)


def _linked(root: Path, profile: str) -> Iterator[Path]:
    """What lies in the checkout and is neither copied nor made by a run, relative to it."""
    hidden = (".git", ".dvc", ".checkpoints", ".venv", ".mlflow", "mlflow.db")
    for entry in sorted(root.iterdir()):
        if entry.name in SHARED:
            yield from (Path(entry.name, inner.name) for inner in sorted(entry.iterdir()) if inner.name != profile)
        elif entry.name not in (*COPIED, *OWN) and not entry.name.startswith(hidden):
            yield Path(entry.name)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink():
        target.unlink()
    if not target.exists():
        target.symlink_to(source.resolve())


def _dvc_project(root: Path, home: Path, cache: Path | None) -> None:
    folder = home / ".dvc"
    folder.mkdir(exist_ok=True)
    _copy(root / ".dvc" / "config", folder / "config")
    place = "" if cache is None else f"[cache]\n    dir = {cache}\n"
    (folder / "config.local").write_text(f"[core]\n    no_scm = true\n{place}")
