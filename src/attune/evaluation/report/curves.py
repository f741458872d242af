"""Training curves as the page draws them, what is healthy for each, and one line on whether the training learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from attune.evaluation.report.axis import Axis, Tick, axis_of

LN2 = math.log(2)
POINTS = 120  # of a curve; more steps are averaged
SHOWN = ("loss", "reward", "accuracy", "margin", "clipped", "grad_norm")
HEALTHY = {
    "accuracy": (0.5, 0.95, "above a half; near 1 it knows its pairs by heart"),
    "margin": (0.0, math.inf, "above 0"),
    "clipped": (0.0, 0.3, "below 0.3; more means that steps are too large for the clip range"),
    "loss": (-math.inf, LN2, "below ln 2 = 0.693, where model and reference are the same"),
}
"""Metric -> the range that is healthy, and why. That of the loss holds where it starts at ln 2."""


@dataclass(frozen=True)
class Curve:
    """A metric by step; coordinates are percentages, y from the top."""

    metric: str
    raw: str  # points of an SVG polyline
    smooth: str
    ticks: tuple[Tick, ...]
    steps: int
    healthy: tuple[float, float] | None  # y of the upper and of the lower end
    why: str


@dataclass(frozen=True)
class Training:
    """A run's training."""

    run: str
    learned: str  # yes, no or unclear
    sentence: str
    curves: tuple[Curve, ...]


def training(run: str, frame: pd.DataFrame) -> Training | None:
    """The curves that a training logged; None of a run without steps."""
    if frame.empty:
        return None
    word, sentence = learned(frame)
    shown = [metric for metric in SHOWN if metric in frame and frame[metric].notna().any()]
    return Training(run, word, sentence, tuple(_curve(frame, metric) for metric in shown))


def learned(frame: pd.DataFrame) -> tuple[str, str]:
    """Whether a training learned what it was asked to: yes, no or unclear; and a sentence.

    By the last third of its steps: of pairs, how often the model prefers the chosen image; of rewards, whether they are
    higher than in the first third; else whether the loss is lower. Steps count as independent (95 % intervals by t).
    """
    for metric, judged in (("accuracy", _accuracy), ("reward", _rising), ("loss", _rising)):
        if metric in frame and frame[metric].notna().sum() >= 6:
            return judged(frame[metric].dropna().to_numpy(float), metric)
    return "unclear", f"{len(frame)} steps are too few to tell."


def _accuracy(values: np.ndarray, metric: str) -> tuple[str, str]:
    last = _thirds(values)[1]
    mean, half = last.mean(), _half_width([last])
    low, high = 100 * max(0, mean - half), 100 * min(1, mean + half)
    text = f"it prefers the chosen image in {100 * mean:.0f} % of pairs [{low:.0f}, {high:.0f}] at the end"
    if mean - half > 0.5:
        return "yes", f"Yes: {text}."
    if mean + half < 0.5:
        return "no", f"No: {text}, which is below a half."
    return "unclear", f"Not certain: {text}, and a half is within the interval."


def _rising(values: np.ndarray, metric: str) -> tuple[str, str]:
    """A reward that should rise, or a loss that should fall."""
    first, last = _thirds(values)
    change, half = last.mean() - first.mean(), _half_width([first, last])
    better = change if metric == "reward" else -change
    text = f"the {metric} went from {first.mean():.4g} to {last.mean():.4g}, first against last third"
    if better - half > 0:
        return "yes", f"Yes: {text}."
    return ("no", f"No: {text}.") if better + half < 0 else ("unclear", f"Not to be seen here: {text}.")


def _thirds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    third = max(2, len(values) // 3)
    return values[:third], values[-third:]


def _half_width(parts: Sequence[np.ndarray]) -> float:
    """Half a 95 % interval of a mean, or of the difference of two."""
    from scipy import stats

    error = math.sqrt(sum(part.var(ddof=1) / len(part) for part in parts))
    return float(stats.t.ppf(0.975, sum(len(part) - 1 for part in parts))) * error


def _curve(frame: pd.DataFrame, metric: str) -> Curve:
    values = frame[["step", metric]].dropna().sort_values("step")
    steps, raw = values["step"].to_numpy(float), values[metric].to_numpy(float)
    if len(raw) > POINTS:
        parts = np.array_split(np.arange(len(raw)), POINTS)
        steps, raw = (np.array([column[part].mean() for part in parts]) for column in (steps, raw))
    smooth = pd.Series(raw).rolling(max(1, len(raw) // 10), center=True, min_periods=1).mean().to_numpy()
    is_healthy = metric in HEALTHY and (metric != "loss" or abs(values[metric].iloc[0] - LN2) < 0.01)
    around = [end for end in HEALTHY[metric][:2] if math.isfinite(end) and metric != "accuracy"] if is_healthy else []
    vertical = axis_of(raw, *around, *([0.5] if metric == "accuracy" else []))
    across = axis_of(steps)
    band = None
    if is_healthy:
        low, high, _ = HEALTHY[metric]
        band = (100 - vertical.place(high), 100 - vertical.place(low))
    return Curve(
        metric,
        raw=_points(across, vertical, steps, raw),
        smooth=_points(across, vertical, steps, smooth),
        ticks=tuple(vertical.ticks(3)),
        steps=int(values["step"].max()),
        healthy=band,
        why=HEALTHY[metric][2] if is_healthy else "",
    )


def _points(across: Axis, up: Axis, x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{across.place(a)},{100 - up.place(b):.2f}" for a, b in zip(x, y, strict=True))
