"""The forest plot: every run against the base by every scorer, on one axis.

Differences are in units of the base's spread over prompts, so scorers of different scales share the axis. Runs stand in
the order of their gain by the headline scorer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from attune.evaluation.report.axis import Axis, Tick, axis_of, change
from attune.evaluation.report.tables import decimals
from attune.evaluation.summary import MethodSummary, Summary

DENSE = 26  # intervals: more of them are drawn close together, without a line of text each


@dataclass(frozen=True)
class Interval:
    """A run by one scorer. Places are percentages of the axis."""

    scorer: str
    colour: int  # number of the scorer
    place: float
    low: float
    high: float
    text: str  # in the scorer's units: difference and 95 % interval
    short: str  # the difference alone
    is_claim: bool  # better or worse, by test and interval
    is_trained: bool
    is_selected: bool


@dataclass(frozen=True)
class Row:
    """A run with its intervals, and the scorers that cannot be drawn because the base's scores have no spread."""

    run: str
    word: str  # of reward hacking
    headline: str  # the difference by the headline scorer, in its units
    intervals: tuple[Interval, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Forest:
    """The plot."""

    rows: tuple[Row, ...]
    scorers: tuple[str, ...]
    zero: float
    ticks: tuple[Tick, ...]
    is_dense: bool


def forest(summary: Summary) -> Forest:
    """All runs but the base, in the order of `by_gain`."""
    runs = by_gain(summary)
    spread = {scorer: summary.methods[summary.base].scores[scorer].sd for scorer in summary.scorers}
    drawn = [scorer for scorer in summary.scorers if math.isfinite(spread[scorer])]
    ends = [
        end / spread[scorer]
        for name in runs
        for scorer in drawn
        for end in summary.methods[name].vs_base[scorer].difference_ci95
    ]
    axis = axis_of(ends, 0.0)
    rows = tuple(
        Row(
            name,
            method.suspicion,
            _change(summary, method, summary.headline)[0],
            tuple(_interval(summary, method, scorer, axis, spread[scorer]) for scorer in drawn),
            tuple(scorer for scorer in summary.scorers if scorer not in drawn),
        )
        for name, method in ((name, summary.methods[name]) for name in runs)
    )
    n = len(runs) * len(drawn)
    return Forest(rows, summary.scorers, axis.place(0.0), tuple(axis.ticks(with_sign=True)), n > DENSE)


def by_gain(summary: Summary) -> list[str]:
    """All runs but the base: those shown to be better by the headline scorer first, then by mean difference."""
    found = {name: method.vs_base[summary.headline] for name, method in summary.tuned.items()}
    return sorted(found, key=lambda name: (found[name].evidence != "better", -found[name].difference))


def _interval(summary: Summary, method: MethodSummary, scorer: str, axis: Axis, spread: float) -> Interval:
    entry, (short, interval) = method.vs_base[scorer], _change(summary, method, scorer)
    low, high = entry.difference_ci95
    return Interval(
        scorer=scorer,
        colour=summary.scorers.index(scorer),
        place=axis.place(entry.difference / spread),
        low=axis.place(low / spread),
        high=axis.place(high / spread),
        text=f"{short} {interval}",
        short=short,
        is_claim=entry.evidence in ("better", "worse"),
        is_trained=scorer in method.trained_on,
        is_selected=scorer in method.selected_by,
    )


def _change(summary: Summary, method: MethodSummary, scorer: str) -> tuple[str, str]:
    """A difference and its interval, in the scorer's units."""
    entry = method.vs_base[scorer]
    return change(entry.difference, entry.difference_ci95, decimals(summary, scorer))
