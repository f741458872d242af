"""What a search found, as files: a row per trial, the best settings, and those written into the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from attune.config.check import read_params, update_params_file, write_yaml
from attune.config.schema import ConfigError
from attune.search.space import drawn
from attune.search.study import RETRY_OF, Plan

BEST = "best_params.yaml"


def table(trials: Sequence[FrozenTrial], plan: Plan) -> pd.DataFrame:
    """A row per trial: number, state, parameters, a score per objective, seconds, prompts scored, host.

    A pruned trial's score is the last it reported, or the mean over its prompts as far as they were scored; `retry_of`
    is the trial that died with its process and was done again here.
    """
    rows = []
    for trial in trials:
        known = trial.user_attrs
        rows.append(
            {"number": trial.number, "state": trial.state.name.lower()}
            | {key: drawn(trial.params).get(key) for key in plan.space}
            | dict(zip(plan.objectives, scores(trial, plan), strict=True))
            | {key: known.get(key) for key in ("seconds", "prompts", "host", RETRY_OF, "error")}
        )
    frame = pd.DataFrame(rows)
    return frame.astype({"prompts": "Int64", RETRY_OF: "Int64"}) if rows else frame


def scores(trial: FrozenTrial, plan: Plan) -> list[float]:
    """A trial's score per objective, nan where there is none."""
    if trial.state == TrialState.COMPLETE:
        return list(trial.values)
    reports = list(trial.intermediate_values.values())
    if trial.state != TrialState.PRUNED or not reports:
        return [float("nan")] * len(plan.objectives)
    return [float(np.mean(reports)) if plan.pruner == "wilcoxon" else reports[-1]]


def ranked(study: optuna.Study, plan: Plan) -> list[FrozenTrial]:
    """Trials that got to their end, the highest score first.

    Of two objectives those of the Pareto front, by the sum of their scores, each from 0 to 1 over the front.
    """
    ended = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if not ended:
        return []
    front = study.best_trials if len(plan.objectives) > 1 else ended
    values = np.array([trial.values for trial in front])
    span = np.ptp(values, axis=0)
    relative = (values - values.min(axis=0)) / np.where(span > 0, span, 1)
    return [front[i] for i in np.argsort(-relative.sum(axis=1), kind="stable")]


def write(study: optuna.Study, plan: Plan, names: dict[str, str], folder: Path, **more: Any) -> FrozenTrial | None:
    """Writes trials.csv and, if there is a best trial, best_params.yaml; returns that trial.

    Args:
        names: profile and run, for whoever applies the settings.
        more: goes into best_params.yaml too; `provisional` says why nobody should apply them yet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "finals.csv").unlink(missing_ok=True)  # written again after this, if there is a last round
    table(study.get_trials(deepcopy=False), plan).to_csv(folder / "trials.csv", index=False)
    found = next(iter(ranked(study, plan)), None)
    if found is not None:
        write_best(found, plan, names, folder, **more)
    return found


def write_best(found: FrozenTrial, plan: Plan, names: dict[str, str], folder: Path, **more: Any) -> None:
    """Writes best_params.yaml: a trial's settings and scores, and what more there is to say of it."""
    facts: dict[str, Any] = {**names, "study": plan.study, "trial": found.number}
    facts["scores"] = dict(zip(plan.objectives, (round(value, 6) for value in found.values), strict=True))
    write_yaml(facts | more | {"params": drawn(found.params)}, folder / BEST)


def apply(folder: Path, profile: str, run: str) -> dict[str, Any]:
    """Writes the best settings into the run's block of the parameters, and returns them.

    Raises:
        ConfigError: there are none, they are those of another profile or run, or the search is not over.
    """
    file = folder / BEST
    if not file.exists():
        raise ConfigError(f"{file}: is not there; run the search first")
    found = read_params(file)
    for key, wanted in {"profile": profile, "run": run}.items():
        if found.get(key) != wanted:
            raise ConfigError(f"{file}: {key} is {found.get(key)!r}, and {wanted!r} is to be changed")
    if "provisional" in found:
        raise ConfigError(f"{file}: {found['provisional']}; run the search again, it goes on")
    update_params_file({f"profiles.{profile}.methods.{run}.{key}": value for key, value in found["params"].items()})
    return found["params"]
