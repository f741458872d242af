"""The few pairs that a page shows, chosen while the rows pass by, so that no other image is kept."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from attune.data.images import decode
from attune.data.ingest.ingest import clean_prompt
from attune.data.ingest.reader import DecodedImage
from attune.data.ingest.scorer import ImageScorer
from attune.data.local import read_regular
from attune.data.rows import ImageRef, LabelledImage, Pair
from attune.evaluation.images import thumbnail_uri
from attune.inspection.choices import comparison
from attune.text import cut

SUSPECTS = 8  # pairs of a sheet of suspicious ones
PAGE_BYTES = 3_000_000  # of all encoded images; base64 makes a third more of them
PROMPT_CHARS = 300
CONTRADICTIONS, AT_RANDOM = "contradictions", "at random"


@dataclass(frozen=True)
class ShownPair:
    """A pair as a page shows it; images are data URIs."""

    number: int
    prompt: str
    images: tuple[str, ...]  # of a single image one
    label_0: float  # of a single image 1 if it is liked, else 0
    split: str
    place: str
    note: str = ""
    digests: tuple[bytes, bytes] = (b"", b"")
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # scorer -> of image 0 and of image 1


@dataclass(frozen=True)
class _Waiting:
    """A pair whose scores are not known yet."""

    number: int
    pair: Pair
    digests: tuple[bytes, bytes]


class Sheets:
    """Pairs at random, pairs that contradict an earlier one, and those that each scorer disagrees with most.

    Each sheet is bounded. A pair waits for its scores with its encoded images, no longer than the scorer's batch.
    """

    def __init__(self, n: int, seed: int, scorers: Sequence[str]):
        self._n, self._random, self._scorers = n, random.Random(seed), tuple(scorers)
        self._offered = 0
        self._chosen: list[ShownPair] = []
        self._contradictions: list[ShownPair] = []
        self._first: dict[tuple, tuple[bool, str]] = {}  # comparison -> its first choice, and where that is
        self._waiting: deque[_Waiting] = deque()
        self._worst: dict[str, list[tuple[float, int, ShownPair]]] = {name: [] for name in self._scorers}
        self._bytes = PAGE_BYTES // max(1, 2 * (n + SUSPECTS * (1 + len(self._scorers))))

    def offer(self, number: int, pair: Pair, images: tuple[DecodedImage, DecodedImage], scorer: ImageScorer) -> None:
        """Looks at a pair that was kept, and at those before it whose scores are known by now."""
        waiting = _Waiting(number, pair, (images[0].digest, images[1].digest))
        self._one_of_all(lambda: self._show(waiting))
        self._contradicting(waiting, images)
        if self._scorers:
            self._waiting.append(waiting)
            self._judge_scored(scorer)

    def offer_image(self, number: int, row: LabelledImage) -> None:
        """Looks at a single image that was kept."""
        prompt, label_0 = clean_prompt(row.prompt), float(bool(row.liked))
        self._one_of_all(
            lambda: ShownPair(number, prompt, (data_uri(row.image, self._bytes),), label_0, row.split, _place(row))
        )

    def finished(self, kept: Set[float] | None, scorer: ImageScorer) -> dict[str, list[ShownPair]]:
        """Title -> pairs, with their scores; those that were left out in the end (not in `kept`) are not shown."""
        self._judge_scored(scorer)
        worst = {name: [shown for *_, shown in sorted(heap, reverse=True)] for name, heap in self._worst.items()}
        random_pairs = sorted(self._chosen, key=lambda shown: shown.number)
        sheets = {CONTRADICTIONS: self._contradictions, **worst, AT_RANDOM: random_pairs}
        return {
            title: [self._scored(shown, scorer) for shown in sheet]
            for title, sheet in (
                (t, [s for s in found if kept is None or s.number in kept]) for t, found in sheets.items()
            )
            if sheet
        }

    def _scored(self, shown: ShownPair, scorer: ImageScorer) -> ShownPair:
        """With the scores of both images, of a pair."""
        if len(shown.images) == 1:
            return shown
        return replace(shown, scores=self._scores(shown.digests, shown.prompt, scorer))

    def _one_of_all(self, show: Callable[[], ShownPair]) -> None:
        """Reservoir sampling: everything so far has the same chance to be shown (Vitter 1985, algorithm R)."""
        self._offered += 1
        if len(self._chosen) < self._n:
            self._chosen.append(show())
        elif self._n and (place := self._random.randrange(self._offered)) < self._n:
            self._chosen[place] = show()

    def _contradicting(self, waiting: _Waiting, images: tuple[DecodedImage, DecodedImage]) -> None:
        pair = waiting.pair
        found = comparison(pair.prompt or "", images[0].content, images[1].content, pair.label_0 or 0.0)
        if found is None:
            return
        key, choice = found
        before, place = self._first.setdefault(key, (choice, _place(pair)))
        if before != choice and len(self._contradictions) < SUSPECTS:
            self._contradictions.append(self._show(waiting, f"the other way round in {place}"))

    def _judge_scored(self, scorer: ImageScorer) -> None:
        while self._waiting:
            waiting = self._waiting[0]
            scores = self._scores(waiting.digests, clean_prompt(waiting.pair.prompt), scorer)
            if not scores:
                return
            self._waiting.popleft()
            for name, (first, second) in scores.items():
                self._keep_worst(name, (second - first) * (2 * (waiting.pair.label_0 or 0.0) - 1), waiting)

    def _keep_worst(self, name: str, against: float, waiting: _Waiting) -> None:
        """Keeps the pair if few have a score so far `against` their choice; a tie or a right score is not."""
        heap = self._worst[name]
        if not against > 0 or (len(heap) == SUSPECTS and against <= heap[0][0]):
            return
        entry = (against, -waiting.number, self._show(waiting, f"{name} prefers the other image"))
        if len(heap) < SUSPECTS:
            heapq.heappush(heap, entry)
        else:
            heapq.heapreplace(heap, entry)

    def _scores(self, digests: tuple[bytes, bytes], prompt: str, scorer: ImageScorer) -> dict[str, tuple[float, float]]:
        """Scorer -> scores of both images; empty while any of them is not known."""
        first, second = (scorer.scores(digest, prompt) for digest in digests)
        return {name: (first[name], second[name]) for name in self._scorers if name in first and name in second}

    def _show(self, waiting: _Waiting, note: str = "") -> ShownPair:
        pair = waiting.pair
        return ShownPair(
            number=waiting.number,
            prompt=clean_prompt(pair.prompt),
            images=(data_uri(pair.image_0, self._bytes), data_uri(pair.image_1, self._bytes)),
            label_0=pair.label_0 or 0.0,
            split=pair.split,
            place=_place(pair),
            note=note,
            digests=waiting.digests,
        )


def _place(row: Pair | LabelledImage) -> str:
    return cut(f"{row.file} row {row.row}", 80)


def data_uri(ref: ImageRef, most_bytes: int) -> str:
    """A good image as a small copy inside an address; images smaller than that stay as large as they are."""
    return thumbnail_uri(Image.fromarray(ref) if isinstance(ref, np.ndarray) else decode(_encoded(ref)), most_bytes)


def _encoded(ref: ImageRef) -> bytes:
    return read_regular(ref) if isinstance(ref, Path) else ref if isinstance(ref, bytes) else b""
