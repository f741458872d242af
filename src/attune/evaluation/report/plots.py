"""The tables behind `dvc plots show`: a CSV per plot, drawn by the Vega templates in .dvc/plots.

Every function gives a table with its columns, also of no rows: DVC leaves out the plot of an empty table in silence,
and warns of a file that is not there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attune.evaluation.summary import Summary
from attune.files import write_atomically

POINTS = 200  # of a curve; a longer training is averaged over as many stretches
PREFERENCE = "preference"


def loss(curves: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """run, step, loss: the loss of every training, averaged over stretches of equal length where it is long.

    Args:
        curves: run -> a row per optimizer step with step and loss, among others.
    """
    rows = []
    for run, curve in ((run, curve) for run, curve in curves.items() if "loss" in curve):
        for part in np.array_split(np.arange(len(curve)), min(POINTS, len(curve))) if len(curve) else ():
            stretch = curve.iloc[part]
            rows.append((run, int(stretch["step"].iloc[-1]), float(stretch["loss"].mean())))
    return _table(rows, ("run", "step", "loss"))


def held_out(trainings: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """run, scorer, step, score: the mean score of validation prompts during trainings that were validated.

    Args:
        trainings: run -> what its training notes in train/<run>.json.
    """
    rows = [
        (run, noted["validation"]["scorer"], each["step"], each["score"])
        for run, noted in trainings.items()
        if "validation" in noted
        for each in noted["validation"]["scores"]
    ]
    return _table(rows, ("run", "scorer", "step", "score"))


def forest(summary: Summary) -> pd.DataFrame:
    """scorer, run, difference, low, high: mean paired difference to the base with its 95 % interval."""
    rows = [
        (scorer, run, entry.difference, *entry.difference_ci95)
        for scorer in summary.scorers
        for run, method in summary.tuned.items()
        for entry in (method.vs_base[scorer],)
    ]
    return _table(rows, ("scorer", "run", "difference", "low", "high"))


def accuracy(preference: Mapping[str, Mapping[str, Any]] | None) -> pd.DataFrame:
    """model, t, accuracy, low, high: of preference models, the step-aware one and the one it started from.

    Args:
        preference: model -> t, accuracy and ci95, each by timestep; None where none was trained.
    """
    rows = [
        (model, t, value, low, high)
        for model, curve in (preference or {}).items()
        for t, value, (low, high) in zip(curve["t"], curve["accuracy"], _intervals(curve), strict=True)
    ]
    return _table(rows, ("model", "t", "accuracy", "low", "high"))


def write_plots(folder: Path, summary: Summary, train: Path) -> None:
    """Writes loss.csv, held_out.csv, forest.csv and accuracy.csv into `folder`.

    Args:
        train: with <run>.csv and <run>.json of the trainings, and those of `preference` if there is one.
    """
    runs = [*summary.methods, PREFERENCE]
    notes = {run: json.loads((train / f"{run}.json").read_text()) for run in _there(train, runs, ".json")}
    curves = {run: pd.read_csv(train / f"{run}.csv") for run in _there(train, runs, ".csv")}
    tables = {
        "loss": loss(curves),
        "held_out": held_out(notes),
        "forest": forest(summary),
        "accuracy": accuracy(notes.get(PREFERENCE, {}).get("accuracy_by_t")),
    }
    for name, table in tables.items():
        write_atomically(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.6g").encode())


def _intervals(curve: Mapping[str, Any]) -> Sequence[tuple[float, float]]:
    """Nothing for a curve that an older version wrote."""
    return curve.get("ci95") or [(math.nan, math.nan)] * len(curve["t"])


def _there(train: Path, runs: Iterable[str], ending: str) -> list[str]:
    return [run for run in runs if (train / f"{run}{ending}").exists()]


def _table(rows: Sequence[tuple[Any, ...]], columns: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(columns))
