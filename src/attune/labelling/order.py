"""Which pair an annotator is asked about next, and which of its images is on the left.

All of it is drawn by hashing the seed, the annotator and the pair, so it is the same after a restart, does not
depend on how many pairs there are, and is not known to the page.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from attune.evaluation.people import Key
from attune.labelling.pairs import LabelPair

MOST_REPEATS = 0.5


@dataclass(frozen=True)
class Question:
    """A pair as one annotator is shown it."""

    pair: LabelPair
    repeat: bool  # the annotator has been asked about it before
    swapped: bool  # the image of side b is on the left
    id: str  # what the page calls it

    @property
    def key(self) -> Key:
        """What was asked, whichever side was on the left; an `Answer` has the same."""
        return *self.pair.key, self.repeat


def questions(pairs: Sequence[LabelPair], annotator: str, *, seed: int, repeats: float, secret: str) -> list[Question]:
    """All questions for an annotator in the order in which they are asked.

    A share of the pairs comes back. These are of the first half of the order, and each comes back half a round later,
    so that there is always as much between the two answers. Sides are drawn anew.

    Args:
        pairs: what there is to ask about.
        annotator: a name.
        seed: of the order and of the sides.
        repeats: the share of the pairs, at most `MOST_REPEATS`.
        secret: makes ids that tell nothing about what they stand for.
    """
    n = len(pairs)
    order = sorted(pairs, key=lambda pair: _draw(seed, annotator, "order", pair))
    half = n // 2
    again = sorted(range(half), key=lambda i: _draw(seed, annotator, "again", order[i]))[: round(repeats * n)]
    placed = [(float(place), pair, False) for place, pair in enumerate(order)]
    placed += [(i + half + 0.5, order[i], True) for i in again]
    found = []
    for _, pair, repeat in sorted(placed, key=lambda entry: entry[0]):
        swapped = _draw(seed, annotator, f"side {repeat}", pair) % 2 == 1
        found.append(Question(pair, repeat, swapped, _hash(secret, annotator, *pair.key, repeat, swapped)[:24]))
    return found


def _draw(seed: int, annotator: str, what: str, pair: LabelPair) -> int:
    """A random whole number. Images are no part of it, so a pair keeps its place when a run is made anew."""
    return int(_hash(str(seed), annotator, what, pair.prompt, pair.ordinal), 16)


def _hash(*values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
