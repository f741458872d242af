"""The full-length rerun: the best trials, and the incumbent settings, each trained at full length.

A short training prefers other settings than a long one, above all a higher learning rate. So the finalists go on to the
full length, as on the last rung of successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943), and the winner
there is the result of the search. It may be the incumbent: the settings in use when the search began.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from attune.evaluation.statistics import Comparison, compare_paired
from attune.files import values_sha
from attune.search.figures import draw_finalists
from attune.search.results import ranked, table, write_best
from attune.search.space import Distribution, fixed_settings, rounded_params
from attune.search.study import StudySpec, connect, pending, study_lock

INCUMBENT = "incumbent"  # attribute of a search's study: the settings in use when it began
FINALISTS = "finalists"  # attribute of it: all settings that were ever in the rerun


def rerun_spec(spec: StudySpec, study: optuna.Study, n: int, settings: Mapping[str, Any]) -> StudySpec:
    """The study of the full-length rerun after a search: the incumbent and the best n settings, each once.

    Earlier finalists stay in it if more trials are asked for later, so nothing is trained twice.

    Args:
        settings: the run's settings. A change of those that are not searched makes another study.
    """
    name = f"{spec.name}-{values_sha(fixed_settings(settings, spec.space))[:4]}-full"
    best = distinct([rounded_params(trial.params) for trial in ranked(study, spec)])[:n]
    with study_lock(spec):
        if (known := study.user_attrs.get(FINALISTS)) is None:  # a rerun of that name is of a search since deleted
            with suppress(KeyError):
                optuna.delete_study(study_name=name, storage=connect(spec.storage))
        points = distinct([*_incumbent(spec, study), *(known or []), *best])
        study.set_user_attr(FINALISTS, points)
    incumbent = study.user_attrs[INCUMBENT]
    space = {key: _widened(kind, incumbent[key], [point[key] for point in points]) for key, kind in spec.space.items()}
    rerun = replace(spec, name=name, sampler="grid", pruner="none", space=space)
    return replace(rerun, grid_points=tuple(points), n_trials=len(points))


def _incumbent(spec: StudySpec, study: optuna.Study) -> list[dict[str, Any]]:
    """The incumbent in a list; an empty one if it has null where the space has numbers, which Optuna cannot store."""
    known = study.user_attrs[INCUMBENT]
    numbers = [key for key, kind in spec.space.items() if not isinstance(kind, CategoricalDistribution)]
    return [] if any(known[key] is None for key in numbers) else [known]


def _widened(kind: Distribution, incumbent: Any, values: Sequence[Any]) -> Distribution:
    """The distribution made wide enough for the values, as Optuna stores no others; nothing is drawn from it.

    Optuna wants the same choices in every session, so they hold all that may ever be among the values.
    """
    if isinstance(kind, CategoricalDistribution):
        rounded = rounded_params(dict(enumerate(kind.choices))).values()
        return CategoricalDistribution(distinct([*kind.choices, *rounded, incumbent]))
    bounds = min(kind.low, *values), max(kind.high, *values)
    return IntDistribution(*bounds) if isinstance(kind, IntDistribution) else FloatDistribution(*bounds)


def write(
    study: optuna.Study, spec: StudySpec, incumbent: dict[str, Any], names: dict[str, str], folder: Path
) -> FrozenTrial | None:
    """Writes finals.csv and, once all finalists have ended, finals.png and best_params.yaml; returns the best then.

    None if finalists are pending, or if none ended well.

    Args:
        names: profile and run, which `apply` checks.
    """
    trials, compared = study.get_trials(deepcopy=False), compare_with_incumbent(study, spec, incumbent)
    rows = table(trials, spec)
    rows.insert(2, "before", [has_settings(trial, incumbent) for trial in trials])
    rows["difference"] = [compared[n].difference if n in compared else None for n in rows.number]
    for i, bound in enumerate(("ci95_low", "ci95_high")):
        rows[bound] = [compared[n].difference_ci95[i] if has_interval(compared, n) else None for n in rows.number]
    rows.to_csv(folder / "finals.csv", index=False)
    if pending(spec, trials) or not (ended := ranked(study, spec)):
        return None
    best = ended[0]
    facts: dict[str, Any] = {"before": incumbent}
    if best.number in compared:
        facts |= {"difference": round(compared[best.number].difference, 6), "n": compared[best.number].n_prompts}
    if has_interval(compared, best.number):
        facts["ci95"] = [round(end, 6) for end in compared[best.number].difference_ci95]
    write_best(best, spec, names, folder, **facts)
    draw_finalists(ended, compared, spec, folder)
    return best


def has_interval(compared: Mapping[int, Comparison], number: int) -> bool:
    """Whether a finalist's difference has an interval: resamples of a single prompt are all the same."""
    return number in compared and compared[number].n_prompts > 1


def compare_with_incumbent(study: optuna.Study, spec: StudySpec, incumbent: dict[str, Any]) -> dict[int, Comparison]:
    """Number of a finalist -> its comparison with the incumbent, paired by prompt, on the first objective.

    The winner's difference is too large on average, as it was selected on these prompts; the report has others.
    """
    ended = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    scores = {trial.number: np.array(trial.user_attrs["scores"][spec.objectives[0]]) for trial in ended}
    base = next((trial.number for trial in ended if has_settings(trial, incumbent)), None)
    if base is None:
        return {}
    others = [number for number in scores if number != base]
    return {number: compare_paired(scores[number], scores[base], seed=spec.seed) for number in others}


def has_settings(trial: FrozenTrial, settings: dict[str, Any]) -> bool:
    """Whether a trial has these settings."""
    return rounded_params(trial.params) == settings


def distinct(values: Sequence[Any]) -> list[Any]:
    """The values without repetitions, in their order."""
    return [value for i, value in enumerate(values) if value not in values[:i]]
