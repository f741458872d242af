"""The plan: what every stage is to do, worked out before any work and written as plan/<stage>[-<run>].json.

A stage reads its plan and nothing else of the parameter files. The plan holds exactly the settings that the stage
reads, what identifies the local files it reads besides DVC's own, and the digests of the code it runs; so DVC runs a
stage again when one of these changes, and only then. Plans are kept in git: they are the record of what was run.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from attune.config import plugins
from attune.config.profile import Generate
from attune.config.schema import StrictModel, check
from attune.config.settings import Model, Sampling, Seed

FOLDER = Path("plan")
PluginKind = Literal["methods", "rewards", "sources"]


class Plugin(StrictModel):
    """A plug-in with its settings, all defaults filled in; it can be written as JSON."""

    kind: PluginKind
    name: str
    settings: Mapping[str, Any]

    @property
    def config(self) -> Any:
        """The settings as the plug-in's own Config."""
        return check(plugins.config_class(self.kind, self.name), self.settings, self.name)


class StagePlan(StrictModel):
    """What identifies the work of a stage besides its settings."""

    profile: str
    files: Mapping[str, str] = {}  # local files and folders that are no outputs of other stages -> digest
    code: Mapping[str, str] = {}  # module -> digest
    parts: Mapping[str, str] = {}  # parts of the work that are kept for themselves -> what identifies each


class PreparePlan(StagePlan):
    """prepare: prompts and pairs, checked, their encodings."""

    seed: Seed
    model: Model
    sampling: Sampling
    source: Plugin
    score_with: Mapping[str, Plugin]


class PreferencePlan(StagePlan):
    """train_preference; without settings, as no run comes after it, nothing is trained."""

    seed: Seed
    model: Model
    settings: Mapping[str, Any] | None


class RunPlan(StagePlan):
    """align@<run>: a training, or a model that is there already."""

    run: str
    seed: Seed
    model: Model
    method: Plugin | None  # None: nothing is trained
    released: str | None  # where a released model is
    after: str | None  # the run whose model the training starts from
    needs_preference: bool
    scorers: Mapping[str, Plugin]  # asked while training: as rewards, or for validation

    @property
    def trained_method(self) -> Plugin:
        """The method of a run that is trained. Raises ValueError of one that is not."""
        if self.method is None:
            raise ValueError(f"run {self.run}: nothing is trained")
        return self.method


class GeneratePlan(StagePlan):
    """generate@<run>: images of test prompts."""

    run: str
    seed: Seed
    model: Model
    generate: Generate


class EvaluatePlan(StagePlan):
    """evaluate@<run>: their scores."""

    run: str
    scorers: Mapping[str, Plugin]


class RunFacts(StrictModel):
    """What the report says of a run besides its scores."""

    method: str | None  # None: nothing is trained
    paper: str | None  # its number at arXiv
    starts_from: str | None  # another run, or a released model
    changed: list[tuple[str, Any, Any]]  # settings that are not the paper's: dotted key, value, default


class Origin(StrictModel):
    """What the runs of a report have in common."""

    base: str
    base_license: str | None
    source: str
    data_path: str | None
    data_license: str | None


class ReportPlan(StagePlan):
    """report: the comparison."""

    seed: Seed
    runs: list[str]
    trained_on: Mapping[str, list[str]]
    selected_by: Mapping[str, list[str]]
    origin: Origin
    facts: Mapping[str, RunFacts]
    settings: str | None  # identifies those of the stages before, but for the seed; None without other seeds' summaries


class SearchPlan(StagePlan):
    """sweep@<run>: a search of the run's settings."""

    run: RunPlan
    search: Mapping[str, Any] | None  # None: the profile has no search of this run
    objectives: Mapping[str, Plugin]
    sampling: Sampling


class Session(StrictModel):
    """What changes no result, so nothing depends on it."""

    profile: str
    tracking: str | None  # MLflow's store
    tools: Mapping[str, bool | str] = {}  # what else shows runs
    threads: int
    checkpoint_seconds: float
    samples: Sampling  # of the images that show a training's progress
    trained_on: Mapping[str, list[str]]  # run -> scorers, for the notes beside models and curves
    data_license: str | None
    wanted: Mapping[str, int]  # `prompts/<split>`, `pairs/<split>` -> the fewest that prepare must find


P = TypeVar("P", bound=StrictModel)


class PlanError(RuntimeError):
    """A plan is missing or is not of this code; the message says what to run."""


def plan_file(stage: str, run: str | None = None) -> Path:
    """Where the plan of a stage is."""
    return FOLDER / (f"{stage}-{run}.json" if run else f"{stage}.json")


def read(kind: type[P], stage: str, run: str | None = None) -> P:
    """The plan of a stage.

    Raises:
        PlanError: there is none, or the code has changed since it was made.
    """
    file = plan_file(stage, run)
    try:
        return kind.model_validate_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(f"{file} is not there: `make plan` writes it, and `dvc repro` does so by itself") from None
    except ValidationError as error:
        raise PlanError(f"{file} was made by other code ({error.errors()[0]['loc']}): `make plan` writes it") from None


def run_of_stage() -> str:
    """The run that this process works for: `--run <name>`, else what DVC says (`align@spo`).

    It does not stand in dvc.yaml's commands, so that no value of the parameters ever passes through a shell.
    """
    if "--run" in sys.argv[:-1]:
        return sys.argv[sys.argv.index("--run") + 1]
    name = os.environ.get("DVC_STAGE", "").rpartition("@")[2]
    if not name:
        raise PlanError("which run? Say --run <name>, or use `dvc repro <stage>@<run>`")
    return name


def to_json(plan: StrictModel) -> str:
    """The plan as a file holds it. Keys stay in their order: the first scorer of a profile is the report's headline."""
    return json.dumps(plan.model_dump(mode="json", by_alias=True), indent=1, ensure_ascii=False) + "\n"
