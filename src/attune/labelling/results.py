"""What the answers so far say, in lines for the page and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from attune.evaluation.agreement import Agreement
from attune.evaluation.people import Answer, compare
from attune.labelling.pairs import LabelPair


def current(answers: Iterable[Answer], pairs: Sequence[LabelPair]) -> list[Answer]:
    """The answers about pairs that there are now."""
    keys = {pair.key for pair in pairs}
    return [answer for answer in answers if answer.pair in keys]


def result_lines(answers: Sequence[Answer], a: str, b: str) -> Iterator[str]:
    """Who won how often, how sure that is, and how far the answers agree.

    Args:
        answers: about current pairs, of any number of people.
        a: what the first images are called.
        b: what the second ones are called.
    """
    found = compare(answers, b, a)
    if not found.n_answers:
        yield "No answers yet."
        return
    counts = {word: sum(each.answer == word and not each.repeat for each in answers) for word in ("a", "b")}
    yield (
        f"{found.n_answers} answers about {found.n_pairs} pairs, annotators: {found.n_annotators}. "
        f"{b} {counts['b']}, {a} {counts['a']}, ties {found.ties}, both bad {found.both_bad}."
    )
    low, high = found.ci95
    yield (
        f"Win rate of {b} against {a}: {100 * found.win_rate:.1f} % (95 % CI {100 * low:.1f} to {100 * high:.1f} %) "
        f"over {found.n_prompts} prompts, ties half; sign test p = {found.p_value:.3f}."
    )
    for what, measured in (("with oneself", found.with_oneself), ("between annotators", found.between)):
        if measured is not None:
            yield _agreement_line(what, measured)


def _agreement_line(what: str, found: Agreement) -> str:
    low, high = found.ci95
    coefficient = f", {found.measure} {found.coefficient:.2f}" if math.isfinite(found.coefficient) else ""
    return (
        f"Agreement {what}: {100 * found.share:.1f} % of {found.n_items} pairs "
        f"(95 % CI {100 * low:.1f} to {100 * high:.1f} %){coefficient}."
    )
