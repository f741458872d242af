"""The plan of a search. A module of its own, as every worker process imports it and little else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from attune.config.search import Config
from attune.config.settings import MethodConfig, Model, Sampling, ScorerConfig


@dataclass(frozen=True)
class SweepPlan:
    """All that a search of a run's settings needs; nothing else of the parameters is read."""

    profile: str
    run: str  # the run whose settings are searched
    method: str  # its method, a file of attune/methods
    seed: int
    threads: int  # CPU threads of a worker
    model: Model
    config: MethodConfig  # the run's settings, an instance of the method's Config
    search: Config
    sampling: Sampling  # how validation images are sampled
    scorers: Mapping[str, tuple[str, ScorerConfig]]  # name -> plug-in, settings; objectives and those asked in training
    prepared: Path  # folder of the prepared data
    preference: Path | None  # folder of the preference model; None if the method does not use it
    start: Path | None  # model here that the training starts from
    report: Path  # folder of the results
    tracking: str | None
    inputs: Mapping[str, str]  # other local files and folders, and code -> digest
