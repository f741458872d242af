"""The report as a document: the tables, figures and words of one summary, as Markdown and as HTML.

Every table is followed by its protocol.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attune.evaluation.people import PeopleComparison
from attune.evaluation.report.document import (
    DocumentBlock,
    Heading,
    Paragraph,
    Picture,
    render_html,
    render_markdown,
)
from attune.evaluation.report.tables import (
    extremes_table,
    hacking_table,
    overview,
    pairs_table,
    parts_table,
    people_table,
    scorer_table,
)
from attune.evaluation.report.verdict import best_text, differing_versions, verdict
from attune.evaluation.summary import Summary

TITLE = "attune: methods compared with their base"


def to_markdown(summary: Summary, figures: Sequence[Picture] = ()) -> str:
    """The report as Markdown; figures are linked by their path relative to it."""
    return render_markdown(TITLE, list(_blocks(summary, figures)))


def to_html(summary: Summary, figures: Sequence[Picture] = ()) -> str:
    """The report as one self-contained HTML page."""
    return render_html(TITLE, list(_blocks(summary, figures)))


def _blocks(summary: Summary, figures: Sequence[Picture]) -> Iterator[DocumentBlock]:
    protocol = Paragraph(f"Protocol {summary.protocol.describe()}", quiet=True)
    methods = summary.methods.values()
    yield Heading("Verdict")
    yield verdict(summary)
    if summary.best is not None:
        yield Paragraph(best_text(summary, summary.best))
    yield Heading("Results")
    yield overview(summary)
    yield protocol
    if differing := differing_versions(summary.made_with):
        yield Paragraph(differing)
    yield Paragraph(_LEGEND + (_SELECTED if any(method.selected_by for method in methods) else ""))
    if summary.people:
        yield Heading("Scorer: people")
        yield people_table(summary)
        yield Paragraph(_PEOPLE)
        yield from (Paragraph(_changed(found)) for found in summary.people if found.changed)
    yield from figures
    for scorer in summary.scorers:
        yield Heading(f"Scorer: {scorer}")
        yield scorer_table(summary, scorer)
        yield protocol
    if parts := [s for s in summary.methods[summary.base].scores if s not in summary.scorers]:
        yield Heading("What changed: parts of the scores")
        yield parts_table(summary, parts)
        yield protocol
    if summary.pairs:
        yield Heading("Between methods")
        yield pairs_table(summary)
        yield protocol
    yield Heading("Reward hacking")
    yield hacking_table(summary)
    yield protocol
    yield Paragraph(_HACKING)
    if all(method.diagnostics.diversity is None for method in methods):
        yield Paragraph(_NO_FEATURES)
    yield Heading(f"Where {summary.headline} changed most")
    yield extremes_table(summary)
    yield protocol


def _changed(found: PeopleComparison) -> str:
    return (
        f"{found.run} against {found.other}: {found.changed} answers are about images that have changed since, and are "
        f"not used; make label A={found.other} B={found.run} asks about the new ones."
    )


_PEOPLE = (
    "Win rate by people who saw both images of a prompt blinded, in random order; ties, and pairs of which neither was "
    "acceptable, count half. The interval is a bootstrap over prompts, the p-value an exact two-sided sign test "
    "over prompts after Holm correction over these rows. Agreement is the share of equal answers: with oneself of "
    "pairs that were shown a second time, between annotators of pairs that several answered; its 95 % interval is "
    "Wilson's."
)
_LEGEND = (
    "Mean score and, in brackets, the mean paired difference to the base; * p < 0.05, ** p < 0.01, "
    "*** p < 0.001: two-sided Wilcoxon signed-rank over prompts, after Holm correction over all methods and "
    "scorers. (trained) marks a scorer the method optimised; only the others are independent evidence. "
    "Intervals are 95 % paired bootstrap percentiles; win rates count ties half; MDE is the smallest mean "
    "difference that this many prompts detect four times in five, at the level that the correction demands of the "
    "smallest p-value."
)
_SELECTED = (
    " (selected by) marks a scorer that early stopping or a search chose the method by: it is no independent "
    "evidence either."
)
_HACKING = (
    "Gains are in units of the base's spread over prompts. A method that over-optimises the scorers it was trained on "
    "shows a large gap between trained and held-out scorers, falling diversity, or rising saturation "
    "or high-frequency energy against the base."
)
_NO_FEATURES = (
    "Diversity and drift from the base were not measured: they need image features, and none of these scorers offers "
    "any (aesthetic and clipscore do)."
)
