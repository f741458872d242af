"""The plan of a search. A module of its own, as every worker process imports it and little else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from attune.config.plan import Plugin, RunPlan
from attune.config.search import Config
from attune.config.settings import MethodConfig, Sampling
from attune.paths import Paths


@dataclass(frozen=True)
class SweepPlan:
    """All that a search of a run's settings needs; nothing else of the parameters is read."""

    training: RunPlan  # the run whose settings are searched
    threads: int  # CPU threads of a worker
    search: Config
    sampling: Sampling  # how validation images are sampled
    objectives: Mapping[str, Plugin]  # the scorers that the search goes by
    report: Path  # folder of the results
    tracking: str | None
    inputs: Mapping[str, str]  # local files and folders that trials read, and are no outputs of stages -> digest

    @property
    def profile(self) -> str:
        return self.training.profile

    @property
    def run(self) -> str:
        return self.training.run

    @property
    def method(self) -> str:
        """A file of attune/methods."""
        return self.training.trained_method.name

    @property
    def seed(self) -> int:
        return self.training.seed

    @property
    def config(self) -> MethodConfig:
        """The run's settings now, an instance of the method's Config."""
        return self.training.trained_method.config

    @property
    def scorers(self) -> dict[str, Plugin]:
        """The objectives, and the scorers asked while training."""
        return {**self.training.scorers, **self.objectives}

    @property
    def prepared(self) -> Path:
        return Paths(self.profile).prepared

    @property
    def made_before(self) -> list[Path]:
        """What other stages have made and trials read, besides the prepared data."""
        paths, plan = Paths(self.profile), self.training
        return [
            *([paths.preference] if plan.needs_preference else []),
            *([paths.model(plan.after)] if plan.after else []),
        ]
