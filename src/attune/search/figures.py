"""Figures of a search: scores by trial and by parameter, importances, the Pareto front, the finalists."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from attune.evaluation.statistics import Comparison
from attune.search.results import scores
from attune.search.space import rounded_params
from attune.search.study import StudySpec

FEWEST = 40  # complete trials that importances are worked out from
FULL, PRUNED, LINE, EDGE = "#2166ac", "#b0b0b0", "#d6604d", "#555555"


def draw(study: optuna.Study, spec: StudySpec, folder: Path) -> list[Path]:
    """Writes history.png, slice.png, importance.png and pareto.png where they apply; returns the files."""
    ended = [t for t in study.get_trials(deepcopy=False) if np.isfinite(scores(t, spec)).all()]
    full = [trial for trial in ended if trial.state == TrialState.COMPLETE]
    for name in ("history", "slice", "importance", "pareto", "finals"):
        (folder / f"{name}.png").unlink(missing_ok=True)
    if not full:
        return []
    figures = {"history": history(ended, spec), "slice": slices(ended, spec)}
    if (weights := importances(study, spec)) is not None:
        figures["importance"] = importance(weights, spec)
    if len(spec.objectives) == 2:
        figures["pareto"] = pareto(full, [trial.number for trial in study.best_trials], spec)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=120)
    return [folder / f"{name}.png" for name in figures]


def draw_finalists(
    trials: list[FrozenTrial], compared: Mapping[int, Comparison], spec: StudySpec, folder: Path
) -> None:
    """Writes finals.png: finalists, the best on top, by their difference to the incumbent, with 95 % intervals."""
    shown = [trial for trial in trials if trial.number in compared][::-1]
    if not shown:
        return
    figure, panels = _panels(1, 1, spec.name)
    axes = panels[0][0]
    mean = np.array([compared[trial.number].difference for trial in shown])
    bounds = np.array([compared[trial.number].difference_ci95 for trial in shown])
    several = compared[shown[0].number].n_prompts > 1  # a single prompt has no interval
    spread = np.abs(bounds.T - mean) if several else None
    axes.errorbar(mean, range(len(shown)), xerr=spread, fmt="o", color=FULL, capsize=3)
    axes.axvline(0, color=LINE, linewidth=1)
    labels = ["\n".join(f"{key} {value}" for key, value in rounded_params(trial.params).items()) for trial in shown]
    axes.set_yticks(range(len(shown)), labels)
    axes.set(ylim=(-0.6, len(shown) - 0.4), xlabel=f"{spec.objectives[0]}, difference to the settings in use")
    figure.savefig(folder / "finals.png", dpi=120)


def history(trials: list[FrozenTrial], spec: StudySpec) -> Figure:
    """Scores by trial, and the best so far; one panel per objective."""
    figure, panels = _panels(1, len(spec.objectives), spec.name)
    for i, axes in enumerate(panels[0]):
        _points(axes, [trial.number for trial in trials], trials, spec, i)
        full = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        so_far = np.maximum.accumulate([trial.values[i] for trial in full])
        axes.step([trial.number for trial in full], so_far, where="post", color=LINE, label="best so far")
        axes.set(xlabel="trial", ylabel=spec.objectives[i])
        axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, panels)
    return figure


def slices(trials: list[FrozenTrial], spec: StudySpec) -> Figure:
    """Scores by each parameter: a row per objective."""
    figure, panels = _panels(len(spec.objectives), len(spec.space), spec.name)
    for i, row in enumerate(panels):
        for (key, distribution), axes in zip(spec.space.items(), row, strict=True):
            values = [rounded_params(trial.params)[key] for trial in trials]
            if isinstance(distribution, CategoricalDistribution):
                values = [distribution.choices.index(value) for value in values]
                axes.set_xticks(range(len(distribution.choices)), [str(choice) for choice in distribution.choices])
                axes.set_xlim(-0.5, len(distribution.choices) - 0.5)
            elif distribution.log:
                axes.set_xscale("log")
                axes.set_xlim(distribution.low / 1.1, distribution.high * 1.1)  # the whole range
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axes.xaxis.set_minor_formatter(NullFormatter())
            _points(axes, values, trials, spec, i)
            axes.set(xlabel=key, ylabel=spec.objectives[i])
    _legend(figure, panels)
    return figure


def importances(study: optuna.Study, spec: StudySpec) -> list[dict[str, float]] | None:
    """Importance of each parameter for the better trials (PED-ANOVA), a share of 1, per objective.

    None where there are too few parameters or trials, or too little difference between them. Of scores that depend on
    one of two parameters alone, its share was 0.08 to 0.99 after 16 trials and 0.85 to 0.99 after 40 (docs/search.md).
    """
    if len(spec.space) < 2 or len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])) < FEWEST:
        return None
    try:
        with warnings.catch_warnings(action="ignore"):  # that low values are taken for the better ones, hence the sign
            found = [
                optuna.importance.get_param_importances(study, target=partial(_negated, i))
                for i in range(len(spec.objectives))
            ]
    except (ValueError, RuntimeError):
        return None
    return found if all(found) and all(np.isfinite(list(shares.values())).all() for shares in found) else None


def _negated(objective: int, trial: FrozenTrial) -> float:
    return -trial.values[objective]


def importance(shares: list[dict[str, float]], spec: StudySpec) -> Figure:
    """Bars of `importances`."""
    figure, panels = _panels(1, len(shares), spec.name)
    for axes, share, name in zip(panels[0], shares, spec.objectives, strict=True):
        keys = list(spec.space)[::-1]
        bars = axes.barh(keys, [share.get(key, 0.0) for key in keys], color=FULL, height=0.6)
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.set(xlabel=f"importance for {name}", xlim=(0, 1.15))
    return figure


def pareto(trials: list[FrozenTrial], front: list[int], spec: StudySpec) -> Figure:
    """Both scores of every trial; those of the Pareto front are numbered and joined."""
    figure, panels = _panels(1, 1, spec.name)
    axes = panels[0][0]
    best = sorted((trial for trial in trials if trial.number in front), key=lambda trial: trial.values[0])
    rest = [trial.values for trial in trials if trial.number not in front]
    if rest:
        axes.scatter(*zip(*rest, strict=True), color=PRUNED, edgecolor=EDGE, linewidth=0.5, label="other trials")
    first, second = zip(*(trial.values for trial in best), strict=True)
    axes.plot(first, second, "o-", color=LINE, label="front")
    for trial in best:
        axes.annotate(str(trial.number), trial.values, textcoords="offset points", xytext=(6, 4))
    axes.set(xlabel=spec.objectives[0], ylabel=spec.objectives[1])
    _legend(figure, panels)
    return figure


def _points(axes: Axes, x: list[float], trials: list[FrozenTrial], spec: StudySpec, objective: int) -> None:
    """Complete trials as dots, pruned ones as crosses."""
    y = [scores(trial, spec)[objective] for trial in trials]
    for label, state, colour, marker in (
        ("complete", TrialState.COMPLETE, FULL, "o"),
        ("pruned", TrialState.PRUNED, EDGE, "x"),
    ):
        of_it = [i for i, trial in enumerate(trials) if trial.state == state]
        if of_it:
            points = [x[i] for i in of_it], [y[i] for i in of_it]
            axes.scatter(*points, label=label, zorder=3, color=colour, marker=marker)


def _panels(rows: int, columns: int, title: str) -> tuple[Figure, np.ndarray]:
    """A figure with axes (rows, columns)."""
    figure = Figure(figsize=(max(5.5, 3.6 * columns), 0.6 + 3.2 * rows), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _legend(figure: Figure, panels: np.ndarray) -> None:
    """One legend for all panels, below them."""
    known: dict[str, Any] = {}
    for axes in panels.flat:
        known |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(list(known.values()), list(known), loc="outside lower center", ncols=len(known), frameon=False)
