"""The results of a search: a table of trials, the best settings, and those written into the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from attune.config.edit import write_yaml
from attune.config.resolve import read_yaml
from attune.config.schema import ConfigError
from attune.paths import BEST_SETTINGS
from attune.search.space import rounded_params
from attune.search.study import RETRY_OF, StudySpec


def table(trials: Sequence[FrozenTrial], spec: StudySpec) -> pd.DataFrame:
    """A row per trial: number, state, parameters, a score per objective, seconds, prompts scored, host.

    A pruned trial's score is the last it reported, or the mean over its prompts as far as they were scored; `retry_of`
    is the trial whose process was killed and which this one repeats.
    """
    rows = []
    for trial in trials:
        known = {**trial.user_attrs, "host": trial.user_attrs.get("owner", {}).get("host")}
        rows.append(
            {"number": trial.number, "state": trial.state.name.lower()}
            | {key: rounded_params(trial.params).get(key) for key in spec.space}
            | dict(zip(spec.objectives, scores(trial, spec), strict=True))
            | {key: known.get(key) for key in ("seconds", "prompts", "host", RETRY_OF, "error")}
        )
    frame = pd.DataFrame(rows)
    return frame.astype({"prompts": "Int64", RETRY_OF: "Int64"}) if rows else frame


def scores(trial: FrozenTrial, spec: StudySpec) -> list[float]:
    """A trial's score per objective, nan where there is none."""
    if trial.state == TrialState.COMPLETE:
        return list(trial.values)
    reports = list(trial.intermediate_values.values())
    if trial.state != TrialState.PRUNED or not reports:
        return [float("nan")] * len(spec.objectives)
    return [float(np.mean(reports)) if spec.pruner == "wilcoxon" else reports[-1]]


def ranked(study: optuna.Study, spec: StudySpec) -> list[FrozenTrial]:
    """Complete trials, the highest score first.

    With two objectives those of the Pareto front, by the sum of their scores, each scaled to 0..1 over the front.
    """
    ended = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if not ended:
        return []
    front = study.best_trials if len(spec.objectives) > 1 else ended
    values = np.array([trial.values for trial in front])
    span = np.ptp(values, axis=0)
    relative = (values - values.min(axis=0)) / np.where(span > 0, span, 1)
    return [front[i] for i in np.argsort(-relative.sum(axis=1), kind="stable")]


def write(study: optuna.Study, spec: StudySpec, names: dict[str, str], folder: Path, **more: Any) -> FrozenTrial | None:
    """Writes trials.csv and, if there is a best trial, best_params.yaml; returns that trial.

    Args:
        names: profile and run, which `apply` checks.
        more: is added to best_params.yaml; `provisional` says why `apply` must not use it yet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "finals.csv").unlink(missing_ok=True)  # the full-length rerun writes it again
    table(study.get_trials(deepcopy=False), spec).to_csv(folder / "trials.csv", index=False)
    found = next(iter(ranked(study, spec)), None)
    if found is not None:
        write_best(found, spec, names, folder, **more)
    return found


def write_best(found: FrozenTrial, spec: StudySpec, names: dict[str, str], folder: Path, **more: Any) -> None:
    """Writes best_params.yaml: a trial's settings and scores, and `more`."""
    facts: dict[str, Any] = {**names, "study": spec.name, "trial": found.number}
    facts["scores"] = dict(zip(spec.objectives, (round(value, 6) for value in found.values), strict=True))
    write_yaml(facts | more | {"params": rounded_params(found.params)}, folder / BEST_SETTINGS)


def apply(folder: Path, profile: str, run: str, write: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """Writes the best settings into the profile, and returns them.

    Args:
        write: sets values of the profile's file by dotted key, say {"methods.dpo.beta": 500.0}.

    Raises:
        ConfigError: there are none, they are those of another profile or run, or the search is not over.
    """
    file = folder / BEST_SETTINGS
    if not file.exists():
        raise ConfigError(f"{file}: is not there; run the search first")
    found = read_yaml(file)
    for key, wanted in {"profile": profile, "run": run}.items():
        if found.get(key) != wanted:
            raise ConfigError(f"{file}: {key} is {found.get(key)!r}, and {wanted!r} is to be changed")
    if "provisional" in found:
        raise ConfigError(f"{file}: {found['provisional']}; run the search again, it goes on")
    write({f"methods.{run}.{key}": value for key, value in found["params"].items()})
    return found["params"]
