"""The report as Markdown, for the repository: what report.html says first, its table, and the verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attune.evaluation.report.document import DocumentBlock, Heading, Paragraph, Picture, render_markdown
from attune.evaluation.report.sentence import first_sentence, lead
from attune.evaluation.report.tables import hacking_table, overview, people_table
from attune.evaluation.report.verdict import differing_versions, verdict
from attune.evaluation.summary import Summary

TITLE = "Runs compared with their base"


def to_markdown(summary: Summary, pictures: Sequence[Picture] = ()) -> str:
    """The report as Markdown; pictures are linked by their path relative to it."""
    return render_markdown(TITLE, list(_blocks(summary, pictures)))


def _blocks(summary: Summary, pictures: Sequence[Picture]) -> Iterator[DocumentBlock]:
    yield Paragraph(first_sentence(summary))
    yield Paragraph(lead(summary))
    yield overview(summary)
    yield Paragraph(_LEGEND)
    if differing := differing_versions(summary.made_with):
        yield Paragraph(differing)
    yield from pictures
    if summary.tuned:
        yield Heading("Run by run")
        yield verdict(summary)
        yield Heading("Reward hacking")
        yield hacking_table(summary)
        yield Paragraph(_HACKING)
    if summary.people:
        yield Heading("People")
        yield people_table(summary)
        yield Paragraph(_PEOPLE)
        yield from (
            Paragraph(
                f"{found.run} against {found.other}: {found.changed} answers are about images that have changed since, "
                f"and are not used; make label A={found.other} B={found.run} asks about the new ones."
            )
            for found in summary.people
            if found.changed
        )
    yield Heading("Protocol")
    yield Paragraph(summary.protocol.describe(), quiet=True)


_LEGEND = (
    "Mean score, and the mean paired difference to the base with its 95 % bootstrap interval over prompts. (trained) "
    "marks a scorer that the run was optimised for, (selected by) one that early stopping or a search chose it by: "
    "neither is independent evidence. Everything else is in report.html beside this file, and in summary.json."
)
_HACKING = (
    "The gap is the gain on scorers that a run was trained on minus that on held-out ones, in units of the base's "
    "spread over prompts. Signs are changes against the base whose 95 % interval excludes 0; how they are judged is in "
    "report.html."
)
_PEOPLE = (
    "Win rate by people who saw both images of a prompt blinded, in random order; ties, and pairs of which neither was "
    "acceptable, count half. The interval is a bootstrap over prompts, the p-value an exact two-sided sign test "
    "over prompts after Holm correction over these rows. Agreement is the share of equal answers: with oneself of "
    "pairs that were shown a second time, between annotators of pairs that several answered; its 95 % interval is "
    "Wilson's."
)
