"""Clones of this repository in folders of their own, and what is asked of them."""

from __future__ import annotations

import io
import json
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
    "params",
    "dvc.yaml",
    "sweeps/dvc.yaml",
    "sweeps/asked.yaml",
    ".dvcignore",
    ".gitignore",
    ".dvc/config",
    ".dvc/plots",
    "src",
    "models/embedded",
    "data/raw/README.md",
)
JUNK = shutil.ignore_patterns("__pycache__", ".ruff_cache")
PARAMS = YAML(typ="safe").load(ROOT / "params.yaml")
METHODS = ["dpo", "spo"]  # one learns from pairs, one from its own images; more would only cost minutes
RUNS = ["base", *METHODS]
PROFILE = YAML(typ="safe").load(ROOT / "params" / "short.yaml")
SCORERS = list(PROFILE["scorers"])
PROMPTS = PROFILE["generate"]["prompts"]
ADAPTER = "pytorch_lora_weights.safetensors"
STAGES = ["prepare", "train_preference", "report"]
STAGES += [f"{stage}@{run}" for stage in ("align", "generate", "evaluate") for run in RUNS]  # and plan, every time

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
        """Reproduces; the stages that really ran, in order, without `plan`, which always does."""
        return ran_of(self.dvc("repro", tracking=tracking))

    def side_by_side(self, tracking: str = "off") -> list[str]:
        """The same by `attune repro`, two stages at a time."""
        words = ("-m", "attune.stages.repro", "--jobs", "2")
        return ran_of(self.run("env", "PYTHONPATH=src", sys.executable, *words, tracking=tracking))

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()

    def lock(self) -> dict[str, Any]:
        return YAML(typ="safe").load(self.folder / "dvc.lock")["stages"]

    def hashes(self) -> dict[str, str]:
        """Path of every output -> its hash, as DVC recorded it; but for the page, which also tells what stages cost."""
        stages = {name: stage for name, stage in self.lock().items() if name != "plan"}
        found = {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"]}
        return {path: md5 for path, md5 in found.items() if not path.endswith("report.html")}

    def prepared(self) -> dict[str, Any]:
        """What the prepared data hold: tables' bytes and, in their order, rows and hashes of the tensors in each file.

        A file of tensors is named by all that it was made from, the code included, and so may be called otherwise.
        """
        folder = self.folder / "data/short/prepared"
        listed = json.loads((folder / "shards.json").read_text())
        held = {kind: [(file["rows"], file["sha256"]) for file in files] for kind, files in listed.items()}
        return held | {table.name: table.read_bytes() for table in sorted(folder.glob("*.parquet"))}

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

    def params(self, dotted: str, value: Any, name: str = "params/short.yaml") -> str:
        """The text of a parameter file with one value changed."""
        yaml, stream = YAML(), io.StringIO()
        values = block = yaml.load(self.folder / name)
        *sections, key = dotted.split(".")
        for section in sections:
            block = block.setdefault(section, {})
        block[key] = value
        yaml.dump(values, stream)
        return stream.getvalue()


def ran_of(said: str) -> list[str]:
    ran = re.findall(r"Running stage '([^']+)'", said)
    assert ran[0] == "plan"
    return ran[1:]


def tracked_runs(project: Project) -> list[Any]:
    """All runs of the clone's store, oldest first."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{project.folder}/mlflow.db")
    experiment = client.get_experiment_by_name("attune")
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"], max_results=500)
