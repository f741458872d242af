"""The report's tables: a summary in, a table out; and how its numbers are written."""

from __future__ import annotations

import math

from attune.evaluation.agreement import Agreement
from attune.evaluation.people import PeopleComparison
from attune.evaluation.report.document import Table
from attune.evaluation.summary import MethodSummary, Summary


def overview(summary: Summary) -> Table:
    """Runs by scorers: mean, and difference to the base with its interval; and how often people preferred them."""
    people = {name: found for name in summary.methods if (found := summary.people_vs_base(name))}
    rows = []
    for name, method in summary.methods.items():
        asked = [_preferred(people[name]) if name in people else ""] if people else []
        rows.append((name, *(_score(summary, method, scorer) for scorer in summary.scorers), *asked))
    return Table(("run", *summary.scorers, *(["people"] if people else [])), tuple(rows))


def _score(summary: Summary, method: MethodSummary, scorer: str) -> str:
    digits = decimals(summary, scorer)
    text = f"{method.scores[scorer].mean:.{digits}f}"
    if scorer not in method.vs_base:
        return text
    entry = method.vs_base[scorer]
    low, high = entry.difference_ci95
    interval = f"{entry.difference:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    return f"{text}, {interval}{not_held_out(method, scorer)}"


def hacking_table(summary: Summary) -> Table:
    """One row per run: the verdict, what it was trained on, the gap, and the signs that moved."""
    rows = []
    for name, method in summary.tuned.items():
        gap = _interval(method.gap.gap, method.gap.ci95) if method.gap else "-"
        moved = [
            f"{sign.replace('_', ' ')} {found.change:+.3g}" for sign, found in method.signs.items() if found.has_moved
        ]
        found = method.hacking
        trained = ", ".join((*method.trained_on, *(f"{scorer} (selected by)" for scorer in method.selected_by))) or "-"
        words = [f"{found.word}: {found.why}" if found else "-", trained, gap, ", ".join(moved) or "-"]
        rows.append((name, *words))
    return Table(("run", "reward hacking", "trained on", "gap, 95 % CI", "signs that moved"), tuple(rows), prose=True)


def _interval(value: float, ci95: tuple[float, float]) -> str:
    return f"{value:+.2f} ({ci95[0]:+.2f} to {ci95[1]:+.2f})" if math.isfinite(value) else "-"


def people_table(summary: Summary) -> Table:
    """What people chose, a row per two runs."""
    rows = []
    for found in summary.people:
        low, high = found.ci95
        asked = found.n_answers > 0
        rows.append(
            (
                f"{found.run} against {found.other}",
                _preferred(found) if asked else "-",
                f"{100 * low:.1f} to {percent(high)}" if asked else "-",
                p_text(found.p_holm).removeprefix("p ").removeprefix("= ") if asked else "-",
                *(str(n) for n in (found.n_prompts, found.n_answers, found.n_annotators, found.ties, found.both_bad)),
                *(_agreement(each) for each in (found.with_oneself, found.between)),
            )
        )
    header = ("people", "win rate", "95 % CI", "p (Holm)", "prompts", "answers", "annotators", "ties", "both bad")
    return Table((*header, "agreement with oneself", "between annotators"), tuple(rows))


def _preferred(found: PeopleComparison) -> str:
    low, high = found.ci95
    return f"{percent(found.win_rate)} ({100 * low:.1f} to {percent(high)})"


def _agreement(found: Agreement | None) -> str:
    if found is None:
        return "-"
    low, high = found.ci95
    coefficient = f", {found.measure} {found.coefficient:.2f}" if math.isfinite(found.coefficient) else ""
    return f"{percent(found.share)} of {found.n_items} ({100 * low:.0f} to {100 * high:.0f} %){coefficient}"


def decimals(summary: Summary, scorer: str) -> int:
    """Enough to show differences of a thousandth of the score's size."""
    size = abs(summary.methods[summary.base].scores[scorer].mean)
    return 4 if size < 2 else 3 if size < 200 else 1


def not_held_out(method: MethodSummary, scorer: str, trained: str = "trained") -> str:
    """The mark of a scorer that is no independent evidence for a method; empty where it is.

    Args:
        trained: the word for a scorer the method was trained on.
    """
    marks = [trained] * (scorer in method.trained_on) + ["selected by"] * (scorer in method.selected_by)
    return f" ({', '.join(marks)})" if marks else ""


def p_text(p: float) -> str:
    """A p-value as the field prints it."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def percent(share: float) -> str:
    """A share as a percentage."""
    return f"{100 * share:.1f} %"
