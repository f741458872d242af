"""The verdict of the report: what the evidence says of each method, in words.

A claim is made only where both the corrected test and the interval of the mean difference support it
(`ComparisonEntry.evidence`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from attune.evaluation.protocol import MODEL
from attune.evaluation.report.document import DocumentBlock, Items, Paragraph
from attune.evaluation.report.tables import decimals, not_held_out, p_text, percent
from attune.evaluation.summary import Evidence, MethodSummary, Summary


def verdict(summary: Summary) -> DocumentBlock:
    """One item per method; a paragraph where only the base was scored."""
    items = tuple((name, _sentences(summary, method)) for name, method in summary.tuned.items())
    return Items(items) if items else Paragraph("Only the base has been scored; there is nothing to compare.")


def differing_versions(made_with: Mapping[str, Mapping[str, str]]) -> str:
    """A warning where methods were not generated and scored by the same versions on the same device; else nothing."""
    names = sorted({name for found in made_with.values() for name in found} - {f"generate.{MODEL}"})
    differing = [name for name in names if len({found.get(name) for found in made_with.values()}) > 1]
    listed = (f"{name} ({', '.join(f'{m}: {v.get(name)}' for m, v in made_with.items())})" for name in differing)
    if not differing:
        return ""
    return f"Not all methods were made with the same {'; '.join(listed)}: the last digits of their scores may differ."


def _sentences(summary: Summary, method: MethodSummary) -> str:
    """What is said of one method: scorers of the same evidence together, in the order of the scorers."""
    openings: dict[Evidence, str] = {
        "better": f"beats {summary.base} on",
        "worse": f"is worse than {summary.base} on",
        "mixed": "mixed evidence (mean, ranks and win rate disagree) on",
        "no evidence": f"no evidence of a difference from {summary.base} on",
    }
    claims: dict[Evidence, list[str]] = {}
    for scorer in summary.scorers:
        claims.setdefault(method.vs_base[scorer].evidence, []).append(_claim(summary, scorer, method))
    said = (f"{openings[evidence]} {' and '.join(listed)}" for evidence, listed in claims.items())
    return "; ".join(said) + "." + _hacked(method) + _not_evaluated(summary, method)


def _claim(summary: Summary, scorer: str, method: MethodSummary) -> str:
    entry, digits = method.vs_base[scorer], decimals(summary, scorer)
    low, high = entry.difference_ci95
    by = " by " if entry.evidence in ("better", "worse") else " "
    support = [
        f"95 % CI {low:+.{digits}f} to {high:+.{digits}f}",
        f"win rate {percent(entry.win_rate)}",
        f"{p_text(entry.p_corrected)} after Holm",
    ]
    if entry.evidence == "no evidence" and math.isfinite(entry.minimum_detectable_effect):
        mde = f"{entry.minimum_detectable_effect:.{digits}f}"
        support.append(f"{summary.protocol.n_prompts} prompts would reveal {mde} four times in five")
    mark = not_held_out(method, scorer, trained="trained on")
    return f"{scorer}{mark}{by}{entry.difference:+.{digits}f} ({', '.join(support)})"


def _hacked(method: MethodSummary) -> str:
    """A warning where the run is hacked, or may be."""
    found = method.hacking
    if found is None or found.word == "none":
        return ""
    return f" It is hacked: {found.why}." if found.word == "hacked" else f" Reward hacking is suspected: {found.why}."


def _not_evaluated(summary: Summary, method: MethodSummary) -> str:
    """Scorers that trained or selected a method and have no scores here, so that no mark in a table shows them."""
    text = ""
    for what, scorers in (("trained on", method.trained_on), ("selected by", method.selected_by)):
        if missing := [scorer for scorer in scorers if scorer not in summary.scorers]:
            were = "was" if len(missing) == 1 else "were"
            text += f" Also {what}: {', '.join(missing)}, which {were} not evaluated."
    return text
