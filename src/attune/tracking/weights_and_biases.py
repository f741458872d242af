"""A run in Weights & Biases, whose own environment variables say where it goes (WANDB_MODE, WANDB_BASE_URL)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Project:
    """An open run of a project. Its steps only grow, so one that goes on has its points once."""

    def __init__(self, project: str, root: Path, name: str, params: Mapping[str, str], part: str):
        import wandb

        folder = root / ".checkpoints"
        folder.mkdir(exist_ok=True)
        settings = wandb.Settings(console="off", silent=True)
        about = {"project": project, "name": name, "id": part, "resume": "allow", "config": dict(params)}
        self._wandb = wandb
        self._run = wandb.init(dir=str(folder), settings=settings, **about)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if step >= self._run.step:
            self._run.log(dict(metrics), step=step)
        elif step == 0:  # no curve but a fact that is known at the end, as what a stage cost
            self._run.summary.update(dict(metrics))

    def image(self, key: str, picture: Any, step: int) -> None:
        if step >= self._run.step:
            self._run.log({key: self._wandb.Image(picture)}, step=step)

    def close(self) -> None:
        self._run.finish()
