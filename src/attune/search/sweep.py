"""A whole search: from the block `search.<run>` of a profile to files in reports/sweeps/<run>."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import optuna

from attune import plugins, tracking
from attune.blocks import Params, Profile
from attune.config import method_of
from attune.hashing import digest, values_sha
from attune.places import PREPARED, REPORTS, project_root
from attune.search.figures import draw
from attune.search.results import write
from attune.search.settings import Config
from attune.search.space import cells, distributions, settings
from attune.search.study import Plan, SearchError, create, located
from attune.search.trial import Trial, quarter
from attune.search.workers import run as run_workers

SESSION = ("trials", "minutes", "workers", "storage")  # may change from one session of a study to the next
TRACKED_AS = "run"  # attribute of the study: the sweep's tracking run


def sweep(name: str, params: Params, profile: Profile, report: Path | None = None) -> optuna.Study:
    """Searches the settings of a run, or goes on where the last session stopped; a finished search adds nothing.

    Args:
        report: folder of the results; None is reports/sweeps/<run>.

    Raises:
        SearchError: no trial got to its end, or a mistake would have met them all.
    """
    search, uses, root = Config.model_validate(profile.search[name]), method_of(name, params), project_root()
    report = report or REPORTS / "sweeps" / name
    os.environ.setdefault("OMP_NUM_THREADS", str(profile.threads))  # in the workers
    plan = planned(name, params, profile, root)
    deadline = time.time() + 60 * search.minutes if search.minutes else float("inf")
    tags = {"profile": params.profile, "method": name, "uses": uses, "study": plan.study}
    known = create(plan).user_attrs.get(TRACKED_AS)
    told = {"search": dict(profile.search[name])}
    with tracking.sweep(f"sweep {name}", told, tags=tags, uri=params.tracking, root=root, run_id=known) as tracked:
        objective = Trial(
            name, uses, profile, search, root / ".checkpoints" / "search" / plan.study,
            tags=tags, parent=tracked.run_id, tracking=params.tracking, root=root,
        )  # fmt: skip
        objective.folder.mkdir(parents=True, exist_ok=True)
        study = create(plan)
        study.set_user_attr(TRACKED_AS, tracked.run_id)
        run_workers(
            plan, objective, slots(search.workers), deadline=deadline,
            bury=lambda: tracking.bury(params.tracking, root),
        )  # fmt: skip
        _forget_models(objective.folder, study)
        found = write(study, plan, {"profile": params.profile, "run": name}, report)
        if found is None:
            raise SearchError(f"no trial got to its end: {report / 'trials.csv'}")
        tracked.summary({f"best/{key}": value for key, value in zip(plan.objectives, found.values, strict=True)})
        for file in [report / "trials.csv", report / "best_params.yaml", *draw(study, plan, report)]:
            tracked.artifact(file)
    return study


def planned(name: str, params: Params, profile: Profile, root: Path) -> Plan:
    """The study of a run. Its name tells it from one whose scores would mean something else."""
    search, uses = Config.model_validate(profile.search[name]), method_of(name, params)
    block = settings(profile.methods[name], search.fixed, {})
    grid = cells(search.space) if search.sampler == "grid" else []
    trials = min(search.trials or len(grid), len(grid)) if grid else search.trials
    study = f"{params.profile}-{name}-{identity(name, profile, search)[:8]}"
    every = search.every or quarter(block["batches"])
    return Plan(
        study=study,
        storage=located(search.storage, study, root),
        space=distributions(search.space, plugins.config_class("methods", uses)),
        trials=trials,
        objectives=tuple(search.objectives),
        cells=tuple(grid),
        sampler=search.sampler,
        pruner=search.pruner,
        resource=(every, block["batches"]),
        seed=profile.seed,
    )


def identity(name: str, profile: Profile, search: Config) -> str:
    """Changes with everything that a trial's score depends on, or that decides which trials there are."""
    block = settings(profile.methods[name], search.fixed, {})
    kept = {key: value for key, value in block.items() if key not in search.space}
    decided = search.model_dump(exclude=set(SESSION))
    scorers = {scorer: profile.scorers[scorer] for scorer in search.objectives}
    data = [digest(file) for file in sorted(PREPARED.glob("*.parquet"))]
    profile_parts = [profile.seed, profile.model.model_dump(), profile.generate.sampling.model_dump()]
    return values_sha([name, kept, decided, scorers, data, *profile_parts])


def slots(workers: int | None) -> list[str | None]:
    """The GPU of each worker on this host, shared where there are more workers than GPUs; None without any."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        import torch

        gpus = [str(number) for number in range(torch.cuda.device_count())]
    else:
        gpus = [gpu for gpu in given.split(",") if gpu]
    return [gpus[i % len(gpus)] if gpus else None for i in range(workers or len(gpus) or 1)]


def _forget_models(folder: Path, study: optuna.Study) -> None:
    """Removes what trials that were killed left behind; the best stays, and what another session works on."""
    running = {str(t.number) for t in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING])}
    for left in folder.iterdir():
        if left.name.isdigit() and left.name not in running:
            shutil.rmtree(left, ignore_errors=True)


def found(study: optuna.Study) -> dict[str, Any]:
    """For a last word on the command line: how many trials ended how."""
    states = [trial.state.name.lower() for trial in study.get_trials(deepcopy=False)]
    return {state: states.count(state) for state in sorted(set(states))}
