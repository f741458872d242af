"""The report's tables: a summary in, a table out; and how its numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence

from attune.evaluation.agreement import Agreement
from attune.evaluation.people import PeopleComparison
from attune.evaluation.report.document import Cell, Table
from attune.evaluation.summary import ALPHA, ComparisonEntry, MethodSummary, Summary


def overview(summary: Summary) -> Table:
    """Methods by scorers: mean, difference to the base, marks; and how often people preferred them, if asked."""
    people = {name: found for name in summary.methods if (found := summary.people_vs_base(name))}
    rows: list[tuple[Cell | str, ...]] = []
    for name, method in summary.methods.items():
        cells = [_overview_cell(summary, method, scorer) for scorer in summary.scorers]
        asked = [_preferred(people[name]) if name in people else ""] if people else []
        rows.append((name, *cells, *asked))
    return Table(("method", *summary.scorers, *(["people"] if people else [])), tuple(rows))


def _overview_cell(summary: Summary, method: MethodSummary, scorer: str) -> Cell:
    digits = decimals(summary, scorer)
    text = f"{method.scores[scorer].mean:.{digits}f}"
    if scorer not in method.vs_base:
        return Cell(text)
    entry = method.vs_base[scorer]
    difference = f"({entry.difference:+.{digits}f}){_stars(entry.p_corrected)}"
    return Cell(f"{text} {difference}{not_held_out(method, scorer)}", _tone(entry))


def scorer_table(summary: Summary, scorer: str) -> Table:
    """Everything about one scorer."""
    digits = decimals(summary, scorer)
    rows = []
    for name, method in summary.methods.items():
        location, entry = method.scores[scorer], method.vs_base.get(scorer)
        middle = (f"{location.mean:.{digits}f}", f"{location.median:.{digits}f}")
        rows.append((name + not_held_out(method, scorer), *middle, *(_evidence(entry, digits) if entry else [""] * 6)))
    header = ("method", "mean", "median", "difference", "95 % CI", "win rate", "95 % CI", "p (Holm)", "MDE")
    return Table(header, tuple(rows))


def _evidence(entry: ComparisonEntry, digits: int) -> list[Cell | str]:
    low, high = entry.difference_ci95
    mde = entry.minimum_detectable_effect
    return [
        Cell(f"{entry.difference:+.{digits}f}{_stars(entry.p_corrected)}", _tone(entry)),
        f"{low:+.{digits}f} to {high:+.{digits}f}",
        percent(entry.win_rate),
        f"{100 * entry.ci95[0]:.1f} to {percent(entry.ci95[1])}",
        p_text(entry.p_corrected).removeprefix("p ").removeprefix("= "),
        f"{mde:.{digits}f}" if math.isfinite(mde) else "",
    ]


def parts_table(summary: Summary, parts: Sequence[str]) -> Table:
    """Methods by parts of scorers: what a gain is made of. No marks: no claim rests on these."""
    rows = []
    for name, method in summary.methods.items():
        row = [name]
        for part in parts:
            digits, entry = decimals(summary, part), method.vs_base.get(part)
            difference = f" ({entry.difference:+.{digits}f})" if entry else ""
            row.append(f"{method.scores[part].mean:.{digits}f}{difference}")
        rows.append(tuple(row))
    return Table(("method", *parts), tuple(rows))


def pairs_table(summary: Summary) -> Table:
    """Each two methods on each scorer."""
    rows: list[tuple[Cell | str, ...]] = []
    for pair in summary.pairs:
        cells = []
        for scorer in summary.scorers:
            entry, digits = pair.scores[scorer], decimals(summary, scorer)
            text = f"{entry.difference:+.{digits}f}{_stars(entry.p_corrected)}, {percent(entry.win_rate)}"
            cells.append(Cell(text, _tone(entry)))
        rows.append((f"{pair.method} against {pair.other}", *cells))
    return Table(("difference, win rate", *summary.scorers), tuple(rows))


def hacking_table(summary: Summary) -> Table:
    """One row per method; the columns are what was measured, and `selected by` where a scorer selected."""
    measured = {}
    for name, method in summary.methods.items():
        found = method.diagnostics
        measured[name] = {**(found.diversity or {}), **(found.indices or {}), **(found.drift or {})}
    keys = list(dict.fromkeys(key for values in measured.values() for key in values))
    selected = any(method.selected_by for method in summary.methods.values())
    rows = []
    for name, method in summary.methods.items():
        scorers = [", ".join(method.trained_on) or "-", *([", ".join(method.selected_by) or "-"] if selected else [])]
        gap = method.gap
        gains = (gap.trained, gap.heldout, gap.gap) if gap else (math.nan,) * 3
        values = [measured[name].get(key, math.nan) for key in keys]
        rows.append((name, *scorers, *(_or_dash(v, "+.2f") for v in gains), *(_or_dash(v, "#.3g") for v in values)))
    header = ("method", "trained on", *(["selected by"] if selected else []), "gain, trained", "gain, held out", "gap")
    return Table((*header, *(key.replace("_", " ") for key in keys)), tuple(rows))


def extremes_table(summary: Summary) -> Table:
    """Prompts that gained and lost most on the first scorer."""
    digits = decimals(summary, summary.headline)
    rows = tuple(
        (name, Cell(f"{row.difference:+.{digits}f}", tone), row.prompt)
        for name, method in summary.tuned.items()
        if method.extremes is not None
        for tone, side in (("good", method.extremes.gained), ("bad", method.extremes.lost))
        for row in side
    )
    return Table(("method", "difference", "prompt"), rows, prose=True)


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


def _preferred(found: PeopleComparison) -> Cell:
    """The win rate by people; coloured where test and interval agree that it is not a half."""
    low, high = found.ci95
    tone = "" if found.p_holm >= ALPHA else "good" if low > 0.5 else "bad" if high < 0.5 else ""
    return Cell(percent(found.win_rate) + _stars(found.p_holm), tone)


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


def _tone(entry: ComparisonEntry) -> str:
    return {"better": "good", "worse": "bad"}.get(entry.evidence, "")


def _stars(p: float) -> str:
    """A star for each level that a corrected p-value is below."""
    return "*" * sum(p < level for level in (0.05, 0.01, 0.001))


def _or_dash(value: float, spec: str) -> str:
    return format(value, spec) if math.isfinite(value) else "-"
