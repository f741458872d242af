"""The facts as one self-contained HTML page, and as a few lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from attune.data.splits import SPLITS
from attune.evaluation.report.document import one_line
from attune.inspection import verdict as words
from attune.inspection.facts import Facts
from attune.inspection.learning import Learning
from attune.inspection.sheets import AT_RANDOM, CONTRADICTIONS, PROMPT_CHARS
from attune.inspection.verdict import Verdict, count, interval, percent
from attune.text import cut


@dataclass(frozen=True)
class Subject:
    """What was looked at."""

    profile: str
    source: str
    path: str  # of the data; empty for generated ones
    total_pairs: int | None  # that the source has, if it can tell


def to_html(
    subject: Subject, facts: Facts, verdict: Verdict, wanted: Mapping[str, int], runs: Sequence[Learning]
) -> str:
    """The page. Every text is shown as itself, on one line and without control characters or marks of direction."""
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            subject=subject,
            facts=facts,
            found=facts.found,
            verdict=verdict,
            splits=[(name, _by_split(name, facts, wanted)) for name in ("prompts", "pairs", "choices", "ties")],
            split_names=SPLITS,
            runs=runs,
            many_epochs=words.MANY_EPOCHS,
            read=read_text(subject, facts),
            titles={CONTRADICTIONS: "Choices that contradict an earlier one", AT_RANDOM: "Pairs at random"},
        )
    )


def to_text(subject: Subject, facts: Facts, verdict: Verdict, runs: Sequence[Learning]) -> str:
    """A short table, the verdict, and what to do."""
    return "\n".join(_lines(subject, facts, verdict, runs))


def read_text(subject: Subject, facts: Facts) -> str:
    """How much was read, and what share of the whole that is, where it is known."""
    found = facts.found
    text = count(found.rows, "row") + " read"
    if not found.is_whole:
        total = subject.total_pairs
        of = f"about {total:,}, {percent(found.rows, total)}" if total else "an unknown number"
        text = f"the first {text}, of {of}"
    return text + (f"; {found.passed_over:,} more passed over, as their split has enough" if found.passed_over else "")


def _lines(subject: Subject, facts: Facts, verdict: Verdict, runs: Sequence[Learning]) -> Iterator[str]:
    yield f"data of profile {subject.profile}: {subject.source} {one_line(subject.path)}".rstrip()
    yield f"{read_text(subject, facts)}; {facts.found.counts['quarantined']:,.0f} in the quarantine"
    yield ""
    yield f"{'':10}" + "".join(f"{name:>12}" for name in SPLITS)
    for name in ("prompts", "pairs", "choices", "ties"):
        yield f"{name:10}" + "".join(f"{n:>12,}" for n, _ in _by_split(name, facts, {}))
    if runs:
        yield ""
    for each in runs:
        times = f"{each.epochs:.1f} times each" if each.rows else "it cannot be trained"
        yield f"{each.run}: {each.rows:,} {each.kind}, {each.presented:,} presented, {times}"
    yield ""
    yield verdict.sentence
    for number, finding in enumerate(verdict.findings, 1):
        yield f"{number:2}. {one_line(finding.text)} {one_line(finding.remedy)}"


def _by_split(name: str, facts: Facts, wanted: Mapping[str, int]) -> list[tuple[int, int]]:
    """What there is of each split, and the fewest that are needed."""
    counts = facts.found.counts
    own: Mapping[str, float] = {"choices": facts.choices, "ties": facts.ties}.get(
        name, {split: counts.get(f"{name}/{split}", 0) for split in SPLITS}
    )
    return [(int(own.get(split, 0)), wanted.get(f"{name}/{split}", 0)) for split in SPLITS]


def _environment() -> Environment:
    """Escapes every value, and makes every text one line without invisible characters before that."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "percent": percent,
        "interval": interval,
        "thousands": lambda n: f"{n:,.0f}",
        "cut": lambda text: cut(text, PROMPT_CHARS),
        "said": words.said,
    }
    made.globals["count"] = count
    return made


def _plain(value: Any) -> Any:
    return one_line(value) if type(value) is str else value
