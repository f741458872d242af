"""Score distributions: a dot for each prompt, its score by the base across and by the run up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from attune.evaluation.report.axis import Tick, axis_of
from attune.evaluation.statistics import prompt_means

MOST = 300  # dots of a panel; of more prompts, so many at equal steps of the sorted differences


@dataclass(frozen=True)
class Dot:
    """A prompt. Places are percentages, y from the top."""

    x: float
    y: float
    tone: str  # better, worse or same
    prompt: str
    scores: tuple[float, float]  # by the base and by the run


@dataclass(frozen=True)
class Panel:
    """A run against the base."""

    run: str
    better: int
    worse: int
    same: int
    dots: tuple[Dot, ...]
    ticks: tuple[Tick, ...]


def panels(tables: Mapping[str, pd.DataFrame], runs: Sequence[str], base: str, scorer: str) -> list[Panel]:
    """A panel for each run, all on the same axes.

    Args:
        tables: run -> score table.
        runs: those to draw, in this order.
    """
    means = {name: prompt_means(tables[name][scorer].to_numpy(float), tables[name]["prompt"]) for name in (base, *runs)}
    axis = axis_of([value for values, _ in means.values() for value in (values.min(), values.max())])
    found = []
    for run in runs:
        (before, prompts), (after, _) = means[base], means[run]
        difference = after - before
        dots = tuple(
            Dot(
                axis.place(before[i]),
                round(100 - axis.place(after[i]), 2),
                {1: "better", -1: "worse", 0: "same"}[int(np.sign(difference[i]))],
                str(prompts[i]),
                (float(before[i]), float(after[i])),
            )
            for i in some(difference)
        )
        counts = (int((difference > 0).sum()), int((difference < 0).sum()), int((difference == 0).sum()))
        found.append(Panel(run, *counts, dots, tuple(axis.ticks(4))))
    return found


def some(values: np.ndarray) -> np.ndarray:
    """Positions of all values (n,), or of `MOST` at equal steps of their order."""
    if len(values) <= MOST:
        return np.arange(len(values))
    return np.argsort(values, kind="stable")[np.linspace(0, len(values) - 1, MOST).astype(int)]
