"""The result in a few figures and lines: what a tracking UI shows of a whole pipeline."""

from __future__ import annotations

from attune.evaluation.report.document import escape_markdown
from attune.evaluation.report.sentence import first_sentence
from attune.evaluation.summary import Summary


def headline_metrics(summary: Summary) -> dict[str, float]:
    """Every run's mean by the headline scorer and its difference to the base, each kind in one section of the UI."""
    scorer = summary.headline
    means = {f"{scorer}/{name}": method.scores[scorer].mean for name, method in summary.methods.items()}
    gains = {
        f"{scorer} above {summary.base}/{name}": method.vs_base[scorer].difference
        for name, method in summary.tuned.items()
        if scorer in method.vs_base
    }
    best = {"best": max(gains.values())} if gains else {}
    return means | gains | best


def description(summary: Summary) -> tuple[str, str]:
    """The comparison in Markdown, and in a few words."""
    scorer = summary.headline
    rows = [f"| run | {scorer} | above {summary.base} | 95 % interval | |", "|---|---:|---:|---:|---|"]
    for name, method in summary.methods.items():
        mean, entry = f"{method.scores[scorer].mean:.4g}", method.vs_base.get(scorer)
        if entry is None:
            rows.append(f"| {name} | {mean} | | | |")
            continue
        low, high = entry.difference_ci95
        rows.append(f"| {name} | {mean} | {entry.difference:+.4g} | {low:+.4g} to {high:+.4g} | {entry.evidence} |")
    said = escape_markdown(first_sentence(summary))
    return f"{said}\n\n{chr(10).join(rows)}\n\nreport.html is among the artifacts.", in_short(summary)


def in_short(summary: Summary) -> str:
    """Which run is farthest above the base, and how far."""
    scorer = summary.headline
    entries = {name: method.vs_base[scorer] for name, method in summary.tuned.items() if scorer in method.vs_base}
    if not entries:
        return f"{summary.base} alone"
    best = max(entries, key=lambda name: entries[name].difference)
    return f"{best} {entries[best].difference:+.2g} {scorer}, {entries[best].evidence}"
