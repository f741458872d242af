"""The report's tables: a summary in, a table out; and how its numbers are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attune.evaluation.report.document import Cell, Table
from attune.evaluation.summary import verdict

Entry = Mapping[str, Any]  # one scorer of `vs_base` or of a pair


def overview(summary: Mapping[str, Any]) -> Table:
    """Methods by scorers: mean, difference to the base, marks."""
    rows = []
    for name, method in summary["methods"].items():
        cells = (_overview_cell(summary, method, scorer) for scorer in summary["scorers"])
        rows.append((name, *cells))
    return Table(("method", *summary["scorers"]), tuple(rows))


def _overview_cell(summary: Mapping[str, Any], method: Mapping[str, Any], scorer: str) -> Cell:
    digits = decimals(summary, scorer)
    text = f"{method['scores'][scorer]['mean']:.{digits}f}"
    if scorer not in method["vs_base"]:
        return Cell(text)
    entry = method["vs_base"][scorer]
    trained = " (trained)" if scorer in method["trained_on"] else ""
    return Cell(f"{text} ({entry['difference']:+.{digits}f}){_stars(entry['p_holm'])}{trained}", _tone(entry))


def scorer_table(summary: Mapping[str, Any], scorer: str) -> Table:
    """Everything about one scorer."""
    digits = decimals(summary, scorer)
    rows = []
    for name, method in summary["methods"].items():
        centre = [f"{method['scores'][scorer][key]:.{digits}f}" for key in ("mean", "median")]
        entry = method["vs_base"].get(scorer)
        trained = " (trained)" if scorer in method.get("trained_on", ()) else ""
        rows.append((name + trained, *centre, *(_evidence(entry, digits) if entry else [""] * 6)))
    header = ("method", "mean", "median", "difference", "95 % CI", "win rate", "95 % CI", "p (Holm)", "MDE")
    return Table(header, tuple(rows))


def _evidence(entry: Entry, digits: int) -> list[Cell | str]:
    low, high = entry["difference_ci95"]
    mde = entry["minimum_detectable_effect"]
    return [
        Cell(f"{entry['difference']:+.{digits}f}{_stars(entry['p_holm'])}", _tone(entry)),
        f"{low:+.{digits}f} to {high:+.{digits}f}",
        percent(entry["win_rate"]),
        f"{100 * entry['ci95'][0]:.1f} to {percent(entry['ci95'][1])}",
        p_text(entry["p_holm"]).removeprefix("p ").removeprefix("= "),
        "" if mde is None else f"{mde:.{digits}f}",
    ]


def parts_table(summary: Mapping[str, Any], parts: Sequence[str]) -> Table:
    """Methods by parts of scorers: what a gain is made of. No marks: no claim rests on these."""
    rows = []
    for name, method in summary["methods"].items():
        row = [name]
        for part in parts:
            digits, entry = decimals(summary, part), method["vs_base"].get(part)
            difference = f" ({entry['difference']:+.{digits}f})" if entry else ""
            row.append(f"{method['scores'][part]['mean']:.{digits}f}{difference}")
        rows.append(tuple(row))
    return Table(("method", *parts), tuple(rows))


def pairs_table(summary: Mapping[str, Any]) -> Table:
    """Each two methods on each scorer."""
    rows = []
    for pair in summary["pairs"]:
        cells = []
        for scorer in summary["scorers"]:
            entry, digits = pair["scores"][scorer], decimals(summary, scorer)
            text = f"{entry['difference']:+.{digits}f}{_stars(entry['p_holm'])}, {percent(entry['win_rate'])}"
            cells.append(Cell(text, _tone(entry)))
        rows.append((f"{pair['method']} against {pair['other']}", *cells))
    return Table(("difference, win rate", *summary["scorers"]), tuple(rows))


def hacking_table(summary: Mapping[str, Any]) -> Table:
    """One row per method; the columns are whatever was measured."""
    groups = ("diversity", "indices", "drift")
    measured = {
        name: {key: value for group in groups for key, value in method.get(group, {}).items()}
        for name, method in summary["methods"].items()
    }
    keys = list(dict.fromkeys(key for values in measured.values() for key in values))
    rows = []
    for name, method in summary["methods"].items():
        gains = method.get("gap") or {}
        cells = [_signed(gains.get(key)) for key in ("trained", "heldout", "gap")]
        trained_on = ", ".join(method.get("trained_on", ())) or "-"
        values = [measured[name].get(key) for key in keys]
        rows.append((name, trained_on, *cells, *("-" if v is None else f"{v:#.3g}" for v in values)))
    header = ("method", "trained on", "gain, trained", "gain, held out", "gap")
    return Table((*header, *(key.replace("_", " ") for key in keys)), tuple(rows))


def extremes_table(summary: Mapping[str, Any]) -> Table:
    """Prompts that gained and lost most on the first scorer."""
    digits = decimals(summary, summary["scorers"][0])
    rows = tuple(
        (name, Cell(f"{row['difference']:+.{digits}f}", tone), row["prompt"])
        for name, method in summary["methods"].items()
        if name != summary["base"]
        for tone, side in (("good", "gained"), ("bad", "lost"))
        for row in method["extremes"][side]
    )
    return Table(("method", "difference", "prompt"), rows, prose=True)


def decimals(summary: Mapping[str, Any], scorer: str) -> int:
    """Enough to show differences of a thousandth of the score's size."""
    size = abs(summary["methods"][summary["base"]]["scores"][scorer]["mean"])
    return 4 if size < 2 else 3 if size < 200 else 1


def _tone(entry: Entry) -> str:
    return {"better": "good", "worse": "bad"}.get(verdict(entry), "")


def _stars(p: float) -> str:
    return "*" * sum(p < level for level in (0.05, 0.01, 0.001))


def p_text(p: float) -> str:
    """A p-value as the field prints it."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def percent(share: float) -> str:
    """A share as a percentage."""
    return f"{100 * share:.1f} %"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"
