"""A run in Weights & Biases, whose own environment variables say where it goes (WANDB_MODE, WANDB_BASE_URL)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Project:
    """An open run of a project. One that goes on has its points once: wandb itself drops steps that it has."""

    def __init__(self, project: str, root: Path, name: str, params: Mapping[str, str], part: str):
        import wandb

        folder = root / ".checkpoints"
        folder.mkdir(exist_ok=True)
        settings = wandb.Settings(console="off", silent=True)
        about = {"project": project, "name": name, "id": part, "resume": "allow", "config": dict(params)}
        self._wandb = wandb
        self._run = wandb.init(dir=str(folder), settings=settings, **about)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def image(self, key: str, picture: Any, step: int) -> None:
        self._run.log({key: self._wandb.Image(picture)}, step=step)

    def close(self) -> None:
        self._run.finish()
