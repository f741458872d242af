"""A whole search: from a plan to the files in reports/sweeps/<run>."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from attune import tracking
from attune.config.search import Config
from attune.files import digest, values_sha
from attune.paths import project_root
from attune.search import full_length
from attune.search.figures import draw
from attune.search.plan import SweepPlan
from attune.search.results import write
from attune.search.space import current_settings, distributions, fixed_settings, grid_points, with_values
from attune.search.study import SearchError, StudySpec, how_to_reset, open_study, pending, storage_url, told
from attune.search.trial import Trial, count_prompts, validation_interval
from attune.search.workers import run_workers

LOG = logging.getLogger("attune.search")
SESSION_ONLY = {"trials", "finalists", "minutes", "workers", "storage"}  # may change between sessions of a study
STORAGE = "ATTUNE_STORAGE"  # environment variable, before the block's `storage`; may hold a password
TRACKED_AS = "run"  # attribute of the study: the sweep's tracking run


Work = Callable[[StudySpec, Trial], tuple[optuna.Study, str]]
"""One session's work on a study; returns it, and what is pending as a sentence."""


def sweep(plan: SweepPlan) -> optuna.Study:
    """Searches the settings of a run, or resumes an earlier session; a finished search adds nothing.

    Raises:
        SearchError: no trial ended well; an error would meet every trial; or trials are pending, with the results so
            far written.
    """
    root = project_root()
    os.environ.setdefault("OMP_NUM_THREADS", str(plan.threads))  # in the workers
    spec = study_spec(plan, root)
    deadline = time.time() + 60 * plan.search.minutes if plan.search.minutes else float("inf")
    tags = {"profile": plan.profile, "method": plan.run, "uses": plan.method, "study": spec.name}
    params = {"search": plan.search.model_dump(exclude={"storage"}, exclude_defaults=True)}
    study = open_study(spec)
    known = study.user_attrs.get(TRACKED_AS)
    with tracking.sweep(f"sweep {plan.run}", params, tags=tags, uri=plan.tracking, root=root, run_id=known) as tracked:
        study.set_user_attr(TRACKED_AS, tracked.run_id)
        if full_length.INCUMBENT not in study.user_attrs:
            study.set_user_attr(full_length.INCUMBENT, current_settings(plan.search.space, plan.config))
        objective = Trial(plan, root / ".checkpoints" / "search" / spec.name, tags, tracked.run_id, root)
        with told(spec):
            best, rest = _search_and_rerun(spec, objective, partial(_work, deadline=deadline))
        tracked.summary({f"best/{key}": value for key, value in zip(spec.objectives, best.values, strict=True)})
        for file in sorted(plan.report.iterdir()):
            tracked.artifact(file)
    if rest:  # an error, so that DVC runs the stage again
        raise SearchError(rest)
    return study


def _search_and_rerun(spec: StudySpec, objective: Trial, work: Work) -> tuple[FrozenTrial, str]:
    """The search, then its finalists at full length if there are any; the best trial, and what is pending.

    Raises:
        SearchError: no trial, or no finalist, ended well.
    """
    plan = objective.plan
    names = {"profile": plan.profile, "run": plan.run}
    study, rest = work(spec, objective)
    n = plan.search.finalists
    notes = {"provisional": "the best of short trials; the full-length rerun is not over"} if n else {}
    best = write(study, spec, names, plan.report, **notes, **_fewer_prompts(plan))
    draw(study, spec, plan.report)
    if best is None:
        raise SearchError(f"no trial got to its end: {plan.report / 'trials.csv'}; {rest or how_to_reset(spec)}")
    if rest or not n:
        return best, rest
    rerun = full_length.rerun_spec(spec, study, n, plan.config.model_dump())
    trained, rest = work(rerun, objective.at_full_length(rerun.name))
    winner = full_length.write(trained, rerun, study.user_attrs[full_length.INCUMBENT], names, plan.report)
    if winner is None and not rest:
        raise SearchError(f"no finalist got to its end: {plan.report / 'finals.csv'}; {how_to_reset(rerun)}")
    return winner or best, f"the full-length rerun: {rest}" if rest else ""


def _fewer_prompts(plan: SweepPlan) -> dict[str, int]:
    """How many validation prompts there are, if fewer than the search asks for; it is also said in the log."""
    asked, there = plan.search.prompts, count_prompts(plan)
    if there is None or there >= asked:
        return {}
    LOG.warning(
        "search.%s.prompts: %d are asked for, and there are %d; all scores rest on these", plan.run, asked, there
    )
    return {"prompts_asked": asked, "prompts": there}


def _work(spec: StudySpec, objective: Trial, deadline: float) -> tuple[optuna.Study, str]:
    """One session of a study; returns it, and what is pending as a sentence."""
    objective.folder.mkdir(parents=True, exist_ok=True)
    mark_killed = partial(tracking.mark_killed, objective.plan.tracking, objective.root)
    gpus = worker_gpus(objective.plan.search.workers)
    study = run_workers(spec, objective, gpus, deadline=deadline, mark_killed=mark_killed)
    _remove_models_of_killed(objective.folder, study)
    return study, pending(spec, study.get_trials(deepcopy=False))


def study_spec(plan: SweepPlan, root: Path) -> StudySpec:
    """The study of a search. Its name has a hash of all that its scores depend on."""
    search = plan.search
    settings = with_values(plan.config.model_dump(), search.fixed)
    points = grid_points(search.space) if search.sampler == "grid" else []
    budget = search.trials or len(points)
    n_trials = min(budget, len(points)) if points else budget
    name = f"{plan.profile}-{plan.run}-{study_hash(plan)[:8]}"
    shortest, longest = _batches(search, settings["batches"])
    return StudySpec(
        name=name,
        storage=storage_url(os.environ.get(STORAGE) or search.storage, name, root),
        space=distributions(search.space, type(plan.config)),
        n_trials=n_trials,
        objectives=tuple(search.objectives),
        grid_points=tuple(points),
        sampler=search.sampler,
        pruner=search.pruner,
        resource=(validation_interval(search, shortest), longest),
        seed=plan.seed,
    )


def _batches(search: Config, batches: int) -> tuple[int, int]:
    """Batches of the shortest and of the longest trial."""
    searched = search.space.get("batches")
    lengths: Sequence[Any] = [batches] if searched is None else searched.choices or searched.ends
    return int(min(lengths)), int(max(lengths))


def study_hash(plan: SweepPlan) -> str:
    """Changes with all that a trial's score depends on, or that decides which trials there are.

    Raises:
        SearchError: a file or folder that trials read is not there.
    """
    settings = with_values(plan.config.model_dump(), plan.search.fixed) | {"validation": None}  # trials have their own
    scorers = {
        name: (it.name, {key: value for key, value in it.settings.items() if key != "expected_range"})
        for name, it in plan.scorers.items()
    }
    try:
        files = {str(path): digest(path) for path in [*sorted(plan.prepared.glob("*.parquet")), *plan.made_before]}
    except FileNotFoundError as error:
        raise SearchError(str(error)) from None
    parts = {
        "run": (plan.run, plan.method, plan.seed),
        "settings": fixed_settings(settings, plan.search.space),
        "search": plan.search.model_dump(exclude=SESSION_ONLY),
        "model": plan.training.model.model_dump(),
        "sampling": plan.sampling.model_dump(),
        "scorers": scorers,
        "inputs": {**plan.inputs, **files},
    }
    return values_sha(parts)


def worker_gpus(workers: int | None) -> list[str | None]:
    """The GPU of each worker on this host, shared where there are more workers than GPUs; None without any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        gpus = [str(number) for number in range(torch.cuda.device_count())]
    else:
        gpus = [gpu for gpu in visible.split(",") if gpu]
    return [gpus[i % len(gpus)] if gpus else None for i in range(workers or len(gpus) or 1)]


def _remove_models_of_killed(folder: Path, study: optuna.Study) -> None:
    """Removes models of trials that were killed; not `best`, nor those that another session is training."""
    running = {str(t.number) for t in study.get_trials(deepcopy=False, states=[TrialState.RUNNING])}
    for model in folder.iterdir():
        if model.name.isdigit() and model.name not in running:
            shutil.rmtree(model, ignore_errors=True)


def count_states(study: optuna.Study) -> dict[str, int]:
    """State -> number of trials, for the message at the end."""
    states = [trial.state.name.lower() for trial in study.get_trials(deepcopy=False)]
    return {state: states.count(state) for state in sorted(set(states))}
