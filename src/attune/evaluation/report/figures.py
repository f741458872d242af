"""The report's figures: every function returns a picture (PIL, RGB) and changes no global state of matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from attune.evaluation.report.document import one_line
from attune.evaluation.report.grid import INK, SOFT, image_grid
from attune.evaluation.report.tables import not_held_out
from attune.evaluation.summary import ALPHA, ComparisonEntry, Summary

__all__ = ["accuracy_by_t_plot", "image_grid", "score_difference_plot", "training_curves", "win_rate_plot"]

LINE = "#e4e7ec"
# Okabe and Ito's palette: distinct for colour-blind readers, and in grey
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DPI = 200
_DASHES = (0, (4, 3))
_LN2 = float(np.log(2))
Value = Literal["win_rate", "difference"]


def win_rate_plot(summary: Summary) -> Image.Image:
    """Forest plot: each method's win rate against the base with its interval, one panel per scorer.

    A filled dot is significant after Holm correction; the dashed line is a coin toss.
    """
    return _forest(summary, "win_rate", f"win rate against {summary.base}")


def score_difference_plot(summary: Summary) -> Image.Image:
    """Forest plot: each method's mean paired difference to the base, in the scorer's units."""
    return _forest(summary, "difference", f"mean difference to {summary.base}")


def accuracy_by_t_plot(metrics: Mapping[str, Mapping[str, Sequence[Any]]]) -> Image.Image:
    """Pair accuracy of preference models against the timestep of the noise in the images.

    Args:
        metrics: model (e.g. "step-aware", "untimed") -> {"t": timesteps, "accuracy": shares in [0, 1], and
            optionally "ci95": (low, high) per timestep}.

    Raises:
        ValueError: a model's lists differ in length.
    """
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = _tidy(figure.add_subplot())
    for (name, values), colour in zip(metrics.items(), _cycle(len(metrics)), strict=True):
        order = np.argsort(values["t"])
        t, accuracy = np.asarray(values["t"])[order], np.asarray(values["accuracy"], dtype=float)
        if len(accuracy) != len(t):
            raise ValueError(f"{name}: {len(t)} timesteps but {len(accuracy)} accuracies")
        axes.plot(t, accuracy[order], "o-", color=colour, lw=2, ms=4, label=_plain(name))
        if "ci95" in values:
            low, high = np.asarray(values["ci95"], dtype=float)[order].T
            axes.fill_between(t, low, high, color=colour, alpha=0.15, lw=0)
    _rule(axes, 0.5, "chance")
    axes.set(xlabel="timestep t (noise grows to the right)", ylabel="pair accuracy")
    axes.set_title("Pair accuracy of the preference model by timestep", loc="left", size=10.5, color=INK)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return _render(figure)


def training_curves(frames: Mapping[str, pd.DataFrame]) -> Image.Image:
    """Small multiples: one column per method, one row per metric, against the optimizer step.

    Args:
        frames: method -> columns step and any of loss, margin, grad_norm; what a method lacks is left blank.
    """
    metrics = [m for m in ("loss", "margin", "grad_norm") if any(m in frame for frame in frames.values())]
    if not metrics:
        raise ValueError("training curves need at least one of loss, margin, grad_norm")
    size = (0.6 + 2.7 * len(frames), 0.5 + 1.75 * len(metrics))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(metrics), len(frames), squeeze=False, sharex="col")
    for column, ((name, frame), colour) in enumerate(zip(frames.items(), _cycle(len(frames)), strict=True)):
        for row, metric in enumerate(metrics):
            _curve(grid[row][column], frame, metric, colour)
            if column == 0:
                grid[row][column].set_ylabel(metric.replace("_", " "))
        grid[0][column].set_title(_plain(name), loc="left", size=10.5, color=INK)
        grid[-1][column].set_xlabel("step")
    figure.align_ylabels(grid[:, 0])
    return _render(figure)


def _curve(axes: Axes, frame: pd.DataFrame, metric: str, colour: str) -> None:
    """One metric of one method: the raw values, faint, under their running mean."""
    _tidy(axes)
    if metric not in frame or frame[metric].isna().all():
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color=SOFT, size=8)
        axes.set_yticks([])
        return
    values = frame[["step", metric]].dropna().sort_values("step")
    smooth = values[metric].rolling(max(1, len(values) // 15), center=True, min_periods=1).mean()
    axes.plot(values["step"], values[metric], color=colour, lw=0.8, alpha=0.3)
    axes.plot(values["step"], smooth, color=colour, lw=2)
    # a preference loss is exactly ln 2 while policy == reference; the line shows whether training left it
    level = {"margin": 0.0, "loss": _LN2 if abs(values[metric].iloc[0] - _LN2) < 0.01 else None}.get(metric)
    if level is not None:
        _rule(axes, level, "ln 2" if metric == "loss" else "")


def _rule(axes: Axes, level: float, text: str) -> None:
    """A dashed horizontal line with its name at the right end."""
    axes.axhline(level, color=SOFT, lw=1, ls=_DASHES, zorder=1.5)
    place = ("axes fraction", "data")
    axes.annotate(text, (1, level), xycoords=place, ha="right", va="bottom", color=SOFT, size=8)


def _forest(summary: Summary, value: Value, label: str) -> Image.Image:
    methods, scorers = summary.tuned, summary.scorers
    if not methods:
        raise ValueError("a forest plot needs at least one method besides the base")
    figure = Figure(figsize=(1.2 + 2.9 * len(scorers), 1.15 + 0.42 * len(methods)), layout="constrained")
    panels = figure.subplots(1, len(scorers), squeeze=False, sharey=True, sharex=value == "win_rate")[0]
    for axes, scorer in zip(panels, scorers, strict=True):
        _tidy(axes).grid(axis="y", visible=False)
        axes.axvline(0.5 if value == "win_rate" else 0.0, color=SOFT, lw=1, ls=_DASHES, zorder=1)
        for y, method in enumerate(methods.values()):
            _forest_row(axes, y, method.vs_base[scorer], value, not_held_out(method, scorer))
        axes.set_title(_plain(scorer), loc="left", size=10.5, color=INK)
        axes.margins(x=0.12)
    if value == "win_rate":
        panels[0].xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    panels[0].set_yticks(range(len(methods)), [_plain(name) for name in methods])
    panels[0].set_ylim(len(methods) - 0.4, -0.6)
    sha = summary.protocol.sha
    note = f"{_plain(label)}, 95 % bootstrap interval; filled: p < {ALPHA} after Holm; protocol {sha}"
    figure.supxlabel(note, size=9, color=SOFT)
    return _render(figure)


def _forest_row(axes: Axes, y: int, entry: ComparisonEntry, shown: Value, note: str) -> None:
    """One interval with its dot and its number; grey and hollow unless significant."""
    is_share = shown == "win_rate"
    value, (low, high) = (entry.win_rate, entry.ci95) if is_share else (entry.difference, entry.difference_ci95)
    significant = entry.p_corrected < ALPHA
    colour = (COLOURS[0] if entry.difference > 0 else COLOURS[1]) if significant else SOFT
    axes.plot([low, high], [y, y], color=colour, lw=2, solid_capstyle="round", zorder=2)
    axes.plot(value, y, "o", ms=7, mfc=colour if significant else "white", mec=colour, mew=1.6, zorder=3)
    text = (f"{100 * value:.1f} %" if is_share else f"{value:+.3g}") + note
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # or the dashed line runs through the number
    style: dict[str, Any] = {"ha": "center", "size": 8, "color": colour, "bbox": box}
    axes.annotate(text, (value, y), (0, 7), textcoords="offset points", **style)


def _tidy(axes: Axes) -> Axes:
    """Light grid, no box, soft tick labels."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.grid(color=LINE, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, labelsize=8.5, length=0)
    axes.xaxis.label.set(color=SOFT, size=9)
    axes.yaxis.label.set(color=SOFT, size=9)
    return axes


def _cycle(n: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(n)]


def _plain(text: str) -> str:
    """Untrusted text as matplotlib shall show it: one short line, and no TeX between dollars."""
    return textwrap.shorten(one_line(text), 48, placeholder="...").replace("$", r"\$")


def _render(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(_DPI)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
