"""The published comparison: summary.json, report.md and report.html from one summary.

Every table carries its protocol. Claims are made in words, and only where both the corrected test and the
interval of the mean difference support them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attune.evaluation.protocol import Protocol
from attune.evaluation.report.document import (
    Block,
    Heading,
    Items,
    Paragraph,
    Picture,
    escape_markdown,
    render_html,
    render_markdown,
)
from attune.evaluation.report.tables import (
    decimals,
    extremes_table,
    hacking_table,
    overview,
    p_text,
    pairs_table,
    parts_table,
    percent,
    scorer_table,
)
from attune.evaluation.summary import summarise, verdict
from attune.files import write_atomically

__all__ = ["escape_markdown", "summarise", "to_html", "to_markdown", "verdict", "write_report"]

TITLE = "attune: methods compared with their base"


def write_report(directory: str | Path, summary: Mapping[str, Any], figures: Sequence[Picture] = ()) -> None:
    """Writes summary.json, report.md and report.html into `directory`, each atomically."""
    files = {
        "summary.json": json.dumps(summary, indent=2, allow_nan=False) + "\n",
        "report.md": to_markdown(summary, figures),
        "report.html": to_html(summary, figures),
    }
    for name, text in files.items():
        write_atomically(Path(directory) / name, text.encode())


def to_markdown(summary: Mapping[str, Any], figures: Sequence[Picture] = ()) -> str:
    """The report as Markdown; figures are linked by their path relative to it."""
    return render_markdown(TITLE, list(_blocks(summary, figures)))


def to_html(summary: Mapping[str, Any], figures: Sequence[Picture] = ()) -> str:
    """The report as one self-contained HTML page."""
    return render_html(TITLE, list(_blocks(summary, figures)))


def _blocks(summary: Mapping[str, Any], figures: Sequence[Picture]) -> Iterator[Block]:
    protocol = Paragraph(f"Protocol {Protocol.from_dict(summary['protocol']).describe()}", quiet=True)
    yield Heading("Verdict")
    yield from _verdicts(summary)
    yield Heading("Results")
    yield overview(summary)
    yield protocol
    yield Paragraph(_LEGEND)
    yield from figures
    for scorer in summary["scorers"]:
        yield Heading(f"Scorer: {scorer}")
        yield scorer_table(summary, scorer)
        yield protocol
    if parts := [s for s in summary["methods"][summary["base"]]["scores"] if s not in summary["scorers"]]:
        yield Heading("What changed: parts of the scores")
        yield parts_table(summary, parts)
        yield protocol
    if summary["pairs"]:
        yield Heading("Between methods")
        yield pairs_table(summary)
        yield protocol
    yield Heading("Reward hacking")
    yield hacking_table(summary)
    yield protocol
    yield Paragraph(_HACKING)
    if not any("diversity" in method for method in summary["methods"].values()):
        yield Paragraph(_NO_FEATURES)
    yield Heading(f"Where {summary['scorers'][0]} changed most")
    yield extremes_table(summary)
    yield protocol


_LEGEND = (
    "Mean score and, in brackets, the mean paired difference to the base; * p < 0.05, ** p < 0.01, "
    "*** p < 0.001: two-sided Wilcoxon signed-rank over prompts, after Holm correction over all methods and "
    "scorers. (trained) marks a scorer the method optimised; only the others are independent evidence. "
    "Intervals are 95 % paired bootstrap percentiles; win rates count ties half; MDE is the smallest mean "
    "difference this many prompts detect with power 0.8."
)
_HACKING = (
    "Gains are in units of the base's spread over prompts. A method that serves its judge rather than the "
    "reader shows a large gap between trained and held-out scorers, falling diversity, or rising saturation "
    "or high-frequency energy against the base."
)

_NO_FEATURES = (
    "Diversity and drift from the base were not measured: they need image features, and none of these scorers offers "
    "any (aesthetic and clipscore do)."
)


def _verdicts(summary: Mapping[str, Any]) -> Iterator[Block]:
    base = summary["base"]
    tuned = {name: method for name, method in summary["methods"].items() if name != base}
    items = tuple((name, _sentences(summary, method, base)) for name, method in tuned.items())
    yield Items(items) if items else Paragraph("Only the base has been scored; there is nothing to compare.")


def _sentences(summary: Mapping[str, Any], method: Mapping[str, Any], base: str) -> str:
    """The verdicts of one method, alike ones together, in the order of the scorers."""
    openings = {
        "better": f"beats {base} on",
        "worse": f"is worse than {base} on",
        "mixed": "mixed evidence (mean, ranks and win rate disagree) on",
        "no evidence": f"no evidence of a difference from {base} on",
    }
    claims: dict[str, list[str]] = {}
    for scorer in summary["scorers"]:
        kind = verdict(method["vs_base"][scorer])
        claims.setdefault(kind, []).append(_claim(summary, scorer, method, kind))
    said = (f"{openings[kind]} {' and '.join(listed)}" for kind, listed in claims.items())
    return "; ".join(said) + "." + _transfer(summary, method)


def _claim(summary: Mapping[str, Any], scorer: str, method: Mapping[str, Any], kind: str) -> str:
    entry, digits = method["vs_base"][scorer], decimals(summary, scorer)
    low, high = entry["difference_ci95"]
    trained = " (trained on)" if scorer in method["trained_on"] else ""
    by = " by " if kind in ("better", "worse") else " "
    evidence = [
        f"95 % CI {low:+.{digits}f} to {high:+.{digits}f}",
        f"win rate {percent(entry['win_rate'])}",
        f"{p_text(entry['p_holm'])} after Holm",
    ]
    if kind == "no evidence" and entry["minimum_detectable_effect"] is not None:
        mde = f"{entry['minimum_detectable_effect']:.{digits}f}"
        evidence.append(f"{summary['n_prompts']} prompts would reveal {mde} four times in five")
    return f"{scorer}{trained}{by}{entry['difference']:+.{digits}f} ({', '.join(evidence)})"


def _transfer(summary: Mapping[str, Any], method: Mapping[str, Any]) -> str:
    """A warning when the scorers a method optimised improve at the cost of, or without, the others."""
    verdicts = {scorer: verdict(method["vs_base"][scorer]) for scorer in summary["scorers"]}
    trained = {verdicts[scorer] for scorer in method["trained_on"]}
    heldout = {scorer: kind for scorer, kind in verdicts.items() if scorer not in method["trained_on"]}
    if "better" not in trained or not heldout:
        return ""
    if worse := [scorer for scorer, kind in heldout.items() if kind == "worse"]:
        harmed = " and ".join(worse)
        return f" What it was trained on improved while {harmed} got worse: suspect reward hacking."
    if "better" not in heldout.values():
        return " Only what it was trained on improved: suspect reward hacking."
    return ""
