"""The result in a few figures and lines: what a tracking UI shows of a whole pipeline."""

from __future__ import annotations

from attune.evaluation.report.document import escape_markdown
from attune.evaluation.report.forest import by_gain
from attune.evaluation.report.sentence import first_sentence
from attune.evaluation.summary import MethodSummary, Summary


def headline_metrics(summary: Summary) -> dict[str, float]:
    """Every run's mean by the headline scorer and its difference to the base, each kind in one section of the UI.

    `best` is the largest difference of a run that is not hacked.
    """
    scorer = summary.headline
    means = {f"{scorer}/{name}": method.scores[scorer].mean for name, method in summary.methods.items()}
    gains = {
        f"{scorer} above {summary.base}/{name}": method.vs_base[scorer].difference
        for name, method in summary.tuned.items()
        if scorer in method.vs_base
    }
    honest = [gain for key, gain in gains.items() if summary.methods[key.rpartition("/")[2]].suspicion != "hacked"]
    return means | gains | ({"best": max(honest)} if honest else {})


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
        rows.append(
            f"| {name} | {mean} | {entry.difference:+.4g} | {low:+.4g} to {high:+.4g} | {evidence(method, scorer)} |"
        )
    said = escape_markdown(first_sentence(summary))
    return f"{said}\n\n{chr(10).join(rows)}\n\nreport.html is among the artifacts.", in_short(summary)


def in_short(summary: Summary) -> str:
    """Which run is best, how far it is above the base, and whether it is hacked."""
    scorer = summary.headline
    entries = {name: method.vs_base[scorer] for name, method in summary.tuned.items() if scorer in method.vs_base}
    if not entries:
        return f"{summary.base} alone"
    best = by_gain(summary)[0]
    return f"{best} {entries[best].difference:+.2g} {scorer}, {evidence(summary.methods[best], scorer)}"


def evidence(method: MethodSummary, scorer: str) -> str:
    """What the comparison with the base allows to say; a hacked run, or one that may be, never without that word."""
    said = {"hacked": ", hacked", "suspect": ", hacking suspected"}.get(method.suspicion, "")
    return f"{method.vs_base[scorer].evidence}{said}"
