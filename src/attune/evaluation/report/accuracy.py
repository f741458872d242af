"""Pair accuracy of the preference models by timestep, as the page draws it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attune.evaluation.report.axis import Axis, Tick, axis_of

CHANCE = 0.5


@dataclass(frozen=True)
class Line:
    """A model. Points of SVG polylines in percent, y from the top."""

    model: str
    points: str
    band: str  # a polygon: the 95 % intervals
    places: tuple[tuple[float, float], ...]
    values: tuple[tuple[int, float, tuple[float, float]], ...]  # timestep, accuracy, interval


@dataclass(frozen=True)
class Accuracy:
    """The plot."""

    lines: tuple[Line, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    chance: float


def accuracy(metrics: Mapping[str, Mapping[str, Sequence[Any]]]) -> Accuracy | None:
    """The plot of `accuracy_by_t` of train/preference.json; None of an empty one.

    Args:
        metrics: model (say "spm", "untimed") -> {"t": timesteps, "accuracy": shares in [0, 1], "ci95": (low, high) per
            timestep}.

    Raises:
        ValueError: a model's lists differ in length.
    """
    if not metrics:
        return None
    across = axis_of([t for values in metrics.values() for t in values["t"]])
    up = axis_of([end for values in metrics.values() for pair in values["ci95"] for end in pair], CHANCE)
    lines = tuple(_line(name, values, across, up) for name, values in metrics.items())
    return Accuracy(lines, tuple(across.ticks()), tuple(up.ticks(4)), 100 - up.place(CHANCE))


def _line(name: str, values: Mapping[str, Sequence[Any]], across: Axis, up: Axis) -> Line:
    if not len(values["t"]) == len(values["accuracy"]) == len(values["ci95"]):
        raise ValueError(f"{name}: {len(values['t'])} timesteps but {len(values['accuracy'])} accuracies")
    order = np.argsort(values["t"])
    rows = [(int(values["t"][i]), float(values["accuracy"][i]), tuple(values["ci95"][i])) for i in order]
    places = tuple((across.place(t), round(100 - up.place(share), 2)) for t, share, _ in rows)
    high = [(x, round(100 - up.place(ci[1]), 2)) for (x, _), (_, _, ci) in zip(places, rows, strict=True)]
    low = [(x, round(100 - up.place(ci[0]), 2)) for (x, _), (_, _, ci) in zip(places, rows, strict=True)]
    return Line(name, _points(places), _points([*high, *reversed(low)]), places, tuple(rows))


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in places)
