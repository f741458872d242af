"""The last round: the best trials, and the settings the search began with, each trained in full.

A short training prefers other settings than a long one, a higher learning rate above all. So the best few go on to
the full length, as on the last rung of successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943), and the
winner there is what the search has found. That may be what there was before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from attune.evaluation.statistics import Comparison, compare_paired
from attune.files import values_sha
from attune.search.figures import draw_finals
from attune.search.results import ranked, table, write_best
from attune.search.space import drawn, unsearched
from attune.search.study import Plan, connect, exclusive, remaining

BEFORE = "before"  # attribute of a search's study: the settings it began with
FINALISTS = "finalists"  # attribute of it: all settings that were ever sent to the last round


def planned(plan: Plan, study: optuna.Study, n: int, block: Mapping[str, Any]) -> Plan:
    """The plan of the last round after a search: the settings it began with and the best n, each once.

    Who was a finalist stays one if more trials are asked for later, so nothing is trained twice.

    Args:
        block: the run's settings; all are anew if those that are not searched have changed.
    """
    name = f"{plan.study}-{values_sha(unsearched(block, plan.space))[:4]}-finals"
    best = distinct([drawn(trial.params) for trial in ranked(study, plan)])[:n]
    with exclusive(plan):
        if (known := study.user_attrs.get(FINALISTS)) is None:  # then a study of that name is of a search now deleted
            with suppress(KeyError):
                optuna.delete_study(study_name=name, storage=connect(plan.storage))
        cells = distinct([*_before(plan, study), *(known or []), *best])
        study.set_user_attr(FINALISTS, cells)
    before = study.user_attrs[BEFORE]
    space = {key: _holding(kind, before[key], [cell[key] for cell in cells]) for key, kind in plan.space.items()}
    changes = {"space": space, "cells": tuple(cells), "trials": len(cells), "sampler": "grid", "pruner": "none"}
    return replace(plan, study=name, **changes)


def _before(plan: Plan, study: optuna.Study) -> list[dict[str, Any]]:
    """The settings that the search began with; none, if one of them is null where the space has numbers."""
    known = study.user_attrs[BEFORE]
    numbers = [key for key, kind in plan.space.items() if not isinstance(kind, CategoricalDistribution)]
    return [] if any(known[key] is None for key in numbers) else [known]


def _holding(kind: BaseDistribution, before: Any, values: Sequence[Any]) -> BaseDistribution:
    """A space with the values in it, for Optuna to store them: nothing is drawn any more.

    Of choices Optuna wants the same in every session, so there are all that may ever be among the values.
    """
    if isinstance(kind, CategoricalDistribution):
        rounded = drawn(dict(enumerate(kind.choices))).values()
        return CategoricalDistribution(distinct([*kind.choices, *rounded, before]))
    bounds = min(kind.low, *values), max(kind.high, *values)
    return IntDistribution(*bounds) if isinstance(kind, IntDistribution) else FloatDistribution(*bounds)


def write(
    study: optuna.Study, plan: Plan, before: dict[str, Any], names: dict[str, str], folder: Path
) -> FrozenTrial | None:
    """Writes finals.csv and, once all finalists have ended, finals.png and best_params.yaml; returns the best then.

    None if some are left to do, or if none got to its end.

    Args:
        before: the settings the search began with.
        names: profile and run, for whoever applies the settings.
    """
    trials, found = study.get_trials(deepcopy=False), against(study, plan, before)
    rows = table(trials, plan)
    rows.insert(2, "before", [is_of(trial, before) for trial in trials])
    rows["difference"] = [found[n].difference if n in found else None for n in rows.number]
    for i, bound in enumerate(("ci95_low", "ci95_high")):
        rows[bound] = [found[n].difference_ci95[i] if n in found else None for n in rows.number]
    rows.to_csv(folder / "finals.csv", index=False)
    if remaining(plan, trials) or not (ended := ranked(study, plan)):
        return None
    best = ended[0]
    more = {"before": before}
    if best.number in found:
        low, high = found[best.number].difference_ci95
        more |= {"difference": round(found[best.number].difference, 6), "ci95": [round(low, 6), round(high, 6)]}
    write_best(best, plan, names, folder, **more)
    draw_finals(ended, found, plan, folder)
    return best


def against(study: optuna.Study, plan: Plan, before: dict[str, Any]) -> dict[int, Comparison]:
    """Number of a finalist -> it against the settings `before`, prompt by prompt, by the first objective.

    The winner is flattered, for these are the prompts that it was chosen by; the report's are not.
    """
    ended = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    scores = {trial.number: np.array(trial.user_attrs["scores"][plan.objectives[0]]) for trial in ended}
    base = next((trial.number for trial in ended if is_of(trial, before)), None)
    rivals = [number for number in scores if number != base] if base is not None else []
    return {number: compare_paired(scores[number], scores[base], seed=plan.seed) for number in rivals}


def is_of(trial: FrozenTrial, settings: dict[str, Any]) -> bool:
    """Whether a trial has these settings."""
    return drawn(trial.params) == settings


def distinct(values: Sequence[Any]) -> list[Any]:
    """Without repetitions, in their order."""
    return [value for i, value in enumerate(values) if value not in values[:i]]
