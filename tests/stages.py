"""A small project in a folder of its own, and its stages run in this process by their own `main`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import params
from attune.config.resolve import load
from attune.stages import plan

ROOT = Path(__file__).parents[1]
PREFIXES = ("DVC_", "MLFLOW_", "ATTUNE_")

PROFILE = {
    "sampling": {"steps": 2, "eta": 0, "guidance_scale": 2, "batch_size": 24},
    "data": {
        "source": "world",
        "train_prompts": 6,
        "validation_prompts": 4,
        "test_prompts": 5,
        "pair_prompts": 4,
        "images_per_prompt": 2,
        "score_with": ["pickscore"],
        "temperature": 0.05,
    },
    "generate": {
        "prompts": 4,
        "images_per_prompt": 2,
        "sampling": {"steps": 2, "eta": 0, "guidance_scale": 2, "batch_size": 3},
    },
    "search": {},
}
"""What differs from the profile `short`: fewer prompts and steps, and two images of each test prompt."""


def write(folder: Path, runs: dict[str, Any], **changes: Any) -> Path:
    """The parameters of a project that is `short` but for PROFILE and `changes` (dotted key, `__` for a dot)."""
    given, profile = params.shipped("short")
    profile = params.changed({**profile, **PROFILE}, **changes)
    params.write(folder, given | {"runs": runs}, profile)
    (folder / "models").mkdir(exist_ok=True)
    if not (folder / "models/embedded").exists():
        (folder / "models/embedded").symlink_to(ROOT / "models/embedded")
    return folder


@contextmanager
def inside(folder: Path, tracking: str = "off") -> Iterator[None]:
    """Works in a folder, with no variables of DVC, MLflow or attune from outside."""
    before = dict(os.environ)
    for key in [key for key in os.environ if key.startswith(PREFIXES)]:
        del os.environ[key]
    os.environ["ATTUNE_TRACKING"] = tracking
    try:
        with chdir(folder):
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def call(name: str, *words: str, run: str | None = None) -> None:
    """Runs a stage's `main` as DVC would, in the working directory."""
    before = sys.argv
    sys.argv = [name, *(["--run", run] if run else []), *words]
    try:
        importlib.import_module(f"attune.stages.{name}").main()
    finally:
        sys.argv = before


def write_plans() -> None:
    """Writes the plans of all stages for the parameters in the working directory."""
    plan.write(load())
