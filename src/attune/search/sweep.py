"""A whole search: from the block `search.<run>` of a profile to files in reports/sweeps/<run>."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from attune import tracking
from attune.config import plugins
from attune.config.check import method_of
from attune.config.plugins import plugin_config
from attune.config.profile import Params, Profile
from attune.config.search import Config
from attune.evaluation.protocol import scorer_identity
from attune.files import digest, values_sha
from attune.paths import PREFERENCE, PREPARED, REPORTS, project_root
from attune.search import finals
from attune.search.figures import draw
from attune.search.results import write
from attune.search.space import cells, distributions, in_use, settings, unsearched
from attune.search.study import Plan, SearchError, create, fresh_start, located, remaining
from attune.search.trial import Trial, interval
from attune.search.workers import run as run_workers

SESSION = ("trials", "finalists", "minutes", "workers", "storage")  # may change from one session of a study to the next
STORAGE = "ATTUNE_STORAGE"  # environment variable, before the block's `storage`; may hold a password
TRACKED_AS = "run"  # attribute of the study: the sweep's tracking run

Work = Callable[[Plan, Trial], tuple[optuna.Study, str]]
"""One session's work on a study: what it is then, and what is left to do in words."""


def sweep(name: str, params: Params, profile: Profile, report: Path | None = None) -> optuna.Study:
    """Searches the settings of a run, or goes on where the last session stopped; a finished search adds nothing.

    Args:
        report: folder of the results; None is reports/sweeps/<run>.

    Raises:
        SearchError: no trial got to its end, a mistake would have met them all, or, with what there is so far written,
            trials are left to do.
    """
    search, uses, root = Config.model_validate(profile.search[name]), method_of(name, params), project_root()
    report = report or REPORTS / "sweeps" / name
    os.environ.setdefault("OMP_NUM_THREADS", str(profile.threads))  # in the workers
    plan = planned(name, params, profile, root)
    deadline = time.time() + 60 * search.minutes if search.minutes else float("inf")
    tags = {"profile": params.profile, "method": name, "uses": uses, "study": plan.study}
    study = create(plan)
    known = study.user_attrs.get(TRACKED_AS)
    told = {"search": {key: value for key, value in profile.search[name].items() if key != "storage"}}
    with tracking.sweep(f"sweep {name}", told, tags=tags, uri=params.tracking, root=root, run_id=known) as tracked:
        objective = Trial(
            name, uses, profile, search, root / ".checkpoints" / "search" / plan.study,
            tags=tags, parent=tracked.run_id, tracking=params.tracking, root=root,
        )  # fmt: skip
        study.set_user_attr(TRACKED_AS, tracked.run_id)
        if finals.BEFORE not in study.user_attrs:
            study.set_user_attr(
                finals.BEFORE, in_use(search.space, plugin_config("methods", uses, profile.methods[name], name))
            )
        work = partial(_work, workers=slots(search.workers), deadline=deadline)
        found, rest = _rounds(plan, objective, work, report)
        tracked.summary({f"best/{key}": value for key, value in zip(plan.objectives, found.values, strict=True)})
        for file in sorted(report.iterdir()):
            tracked.artifact(file)
    if rest:  # else DVC would think that it is done
        raise SearchError(rest)
    return study


def _rounds(plan: Plan, objective: Trial, work: Work, report: Path) -> tuple[FrozenTrial, str]:
    """The search, then its finalists in full if there are to be any: the best trial, and what is left to do in words.

    Raises:
        SearchError: no trial, or no finalist, got to its end.
    """
    names = {"profile": objective.tags["profile"], "run": objective.run}
    study, rest = work(plan, objective)
    n = objective.search.finalists
    more = {"provisional": "the best of short trials; the last round is not over"} if n else {}
    found = write(study, plan, names, report, **more)
    draw(study, plan, report)
    if found is None:
        raise SearchError(f"no trial got to its end: {report / 'trials.csv'}; {rest or fresh_start(plan)}")
    if rest or not n:
        return found, rest
    last = finals.planned(plan, study, n, objective.profile.methods[objective.run])
    ended, rest = work(last, objective.in_full(last.study))
    best = finals.write(ended, last, study.user_attrs[finals.BEFORE], names, report)
    if best is None and not rest:
        raise SearchError(f"no finalist got to its end: {report / 'finals.csv'}; {fresh_start(last)}")
    return best or found, f"the last round: {rest}" if rest else ""


def _work(plan: Plan, objective: Trial, workers: list[str | None], deadline: float) -> tuple[optuna.Study, str]:
    """One session of a study: it, and what is left to do in words."""
    objective.folder.mkdir(parents=True, exist_ok=True)
    study = run_workers(
        plan, objective, workers, deadline=deadline, bury=lambda: tracking.bury(objective.tracking, objective.root)
    )
    _forget_models(objective.folder, study)
    return study, remaining(plan, study.get_trials(deepcopy=False))


def planned(name: str, params: Params, profile: Profile, root: Path) -> Plan:
    """The study of a run. Its name tells it from one whose scores would mean something else."""
    search, uses = Config.model_validate(profile.search[name]), method_of(name, params)
    block = settings(profile.methods[name], search.fixed, {})
    grid = cells(search.space) if search.sampler == "grid" else []
    trials = min(search.trials or len(grid), len(grid)) if grid else search.trials
    study = f"{params.profile}-{name}-{identity(name, uses, profile, search)[:8]}"
    shortest, longest = _batches(search, block["batches"])
    return Plan(
        study=study,
        storage=located(os.environ.get(STORAGE) or search.storage, study, root),
        space=distributions(search.space, plugins.config_class("methods", uses)),
        trials=trials,
        objectives=tuple(search.objectives),
        cells=tuple(grid),
        sampler=search.sampler,
        pruner=search.pruner,
        resource=(interval(search, shortest), longest),
        seed=profile.seed,
    )


def _batches(search: Config, batches: int) -> tuple[int, int]:
    """Batches of the shortest and the longest trial."""
    searched = search.space.get("batches")
    lengths = [batches] if searched is None else searched.choices or [searched.low, searched.high]
    return int(min(lengths)), int(max(lengths))


def identity(name: str, uses: str, profile: Profile, search: Config) -> str:
    """Changes with everything that a trial's score depends on, or that decides which trials there are.

    Raises:
        SearchError: weights that trials need are not there.
    """
    block = settings(profile.methods[name], search.fixed, {}) | {"validation": None}  # trials have their own
    kept = unsearched(block, search.space)
    decided = search.model_dump(exclude=set(SESSION))
    asked = dict.fromkeys([*search.objectives, *block.get("rewards", ())])
    values = [profile.seed, profile.model.model_dump(), profile.generate.sampling.model_dump()]
    try:
        scorers = [scorer_identity(it, plugin_config("rewards", it, profile.scorers[it], it)) for it in asked]
        needed = {str(path): digest(path) for path in _needed(uses, profile, block)}
    except FileNotFoundError as error:
        raise SearchError(str(error)) from None
    return values_sha([name, kept, decided, scorers, needed, *values])


def _needed(uses: str, profile: Profile, block: Mapping[str, Any]) -> list[Path]:
    """Files and folders here that a training reads. What is on the Hub is named by its commit, in the settings."""
    method = plugins.load("methods", uses).Method
    preference = [PREFERENCE] if "preference_model" in method.needs else []
    places = [place for place in (profile.model.path, profile.model.vae, block.get("start")) if place]
    return [
        *sorted(PREPARED.glob("*.parquet")),
        *preference,
        *(Path(place) for place in places if Path(place).exists()),
    ]


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


def counts(study: optuna.Study) -> dict[str, Any]:
    """For a last word on the command line: how many trials ended how."""
    states = [trial.state.name.lower() for trial in study.get_trials(deepcopy=False)]
    return {state: states.count(state) for state in sorted(set(states))}
