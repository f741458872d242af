"""Clones of this repository in folders of their own, and what is asked of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
CODE = (
    "params.yaml",
    "dvc.yaml",
    ".dvcignore",
    ".gitignore",
    ".dvc/config",
    "src",
    "models/embedded",
    "data/raw/README.md",
)
JUNK = shutil.ignore_patterns("__pycache__", ".ruff_cache")
PARAMS = YAML(typ="safe").load(ROOT / "params.yaml")
METHODS = ["dpo", "spo"]  # one learns from files, one from its own pictures; more would only cost minutes
PROFILE = PARAMS["profiles"]["short"]
SCORERS = list(PROFILE["scorers"])
PROMPTS = PROFILE["generate"]["prompts"]
ADAPTER = "pytorch_lora_weights.safetensors"
STAGES = ["prepare", "train_preference", "generate_base", "evaluate_base", "report"]
STAGES += [f"{stage}@{method}" for stage in ("align", "generate", "evaluate") for method in METHODS]

# Python imports this by itself from PYTHONPATH=src: every stage notes which of our files it really loaded.
TRACER = """
import atexit, os, sys
from pathlib import Path

@atexit.register
def note():
    files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
    ours = sorted({os.path.relpath(file) for file in files if "/src/attune/" in file})
    if ours and os.environ.get("DVC_STAGE"):
        Path(os.environ["LOADED"], os.environ["DVC_STAGE"]).write_text("\\n".join(ours))
"""


@dataclass(frozen=True)
class Project:
    """A clone of this repository in a folder of its own."""

    folder: Path
    loaded: Path

    def run(self, *words: str, fails: bool = False, tracking: str = "") -> str:
        """A command in the clone; its stdout and stderr."""
        done = subprocess.run(
            words, cwd=self.folder, env=self.env(tracking), capture_output=True, text=True, timeout=900
        )
        said = done.stdout + done.stderr
        assert (done.returncode != 0) is fails, f"{' '.join(words)}: {done.returncode}\n{said[-6000:]}"
        return said

    def env(self, tracking: str = "") -> dict[str, str]:
        """What a user's shell has, and where this machine's Python is."""
        strip = ("DVC_", "MLFLOW_", "ATTUNE_", "PYTHONPATH", "PYTEST_", "GIT_")
        env = {key: value for key, value in os.environ.items() if not key.startswith(strip)}
        env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "LOADED": str(self.loaded)}
        env |= {
            "DVC_NO_ANALYTICS": "1",
            "ATTUNE_TRACKING": tracking,
            "DVC_SITE_CACHE_DIR": f"{self.folder}.site",
        }
        return env

    def dvc(self, *words: str, **options: Any) -> str:
        return self.run(sys.executable, "-m", "dvc", *words, **options)

    def repro(self, tracking: str = "off") -> list[str]:
        """Reproduces; the stages that really ran, in order."""
        return re.findall(r"Running stage '([^']+)'", self.dvc("repro", tracking=tracking))

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()

    def lock(self) -> dict[str, Any]:
        return YAML(typ="safe").load(self.folder / "dvc.lock")["stages"]

    def hashes(self) -> dict[str, str]:
        """Path of every output -> its hash, as DVC recorded it."""
        return {out["path"]: out["md5"] for stage in self.lock().values() for out in stage["outs"]}

    @contextmanager
    def changed(self, name: str, text: str) -> Iterator[None]:
        """The project with another text in a file."""
        path = self.folder / name
        before = path.read_text()
        path.write_text(text)
        try:
            yield
        finally:
            path.write_text(before)

    def params(self, dotted: str, value: Any) -> str:
        """The text of params.yaml with one value changed."""
        yaml, path = YAML(), self.folder / "params.yaml"
        values = block = yaml.load(path)
        *sections, key = dotted.split(".")
        for section in sections:
            block = block[section]
        block[key] = value
        copy = self.folder / ".params.tmp"
        yaml.dump(values, copy)
        text = copy.read_text()
        copy.unlink()
        return text


def tracked_runs(project: Project) -> list[Any]:
    """All runs of the clone's store, oldest first."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{project.folder}/mlflow.db")
    experiment = client.get_experiment_by_name("attune")
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"], max_results=500)
