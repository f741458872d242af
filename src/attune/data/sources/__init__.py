"""Where preference data comes from: one source, one file. A source is a module with a `Config` and a `read`.

    read(config, seed, paint, quota) -> Iterator[Prompt | Pair | Bad]

It checks that its files are there when it is called, and yields rows one by one, as it finds them: nothing is
decoded or checked here, that is `attune.data.writing`. `paint(prompts, ordinals, title)` draws images from the
base model, uint8 (n, H, W, 3); sources that bring images of their own never call it.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Painter = Callable[[Sequence[str], Sequence[int], str], np.ndarray]
Picture = bytes | Path | np.ndarray | None
"""An encoded image, the file of one, pixels as uint8 (H, W, 3), or None: the source has lost it."""

SPLITS = ("train", "validation", "test")  # a prompt found in several belongs to the last of them


class SourceError(ValueError):
    """The data is not there or not what the source reads; the message names the key, the file or the column."""


@dataclass(frozen=True)
class Prompt:
    """A prompt that needs no pair."""

    prompt: str | None
    split: str
    file: str = ""
    row: int | str = 0


@dataclass(frozen=True)
class Pair:
    """Two images for a prompt and people's choice, as the source has them; `file` and `row` say where."""

    prompt: str | None
    image_0: Picture
    image_1: Picture
    label_0: float | None  # 1 if image 0 was chosen, 0 if image 1, 0.5 for a tie
    label_1: float | None
    split: str
    file: str = ""
    row: int | str = 0
    extra: Mapping[str, float] = field(default_factory=dict)  # further columns of the pairs


@dataclass(frozen=True)
class Bad:
    """A row that is not even a pair, and why in a word."""

    reason: str
    file: str = ""
    row: int | str = 0
    prompt: str | None = None


class Quota:
    """How many pairs of each split are wanted, and how many have been found; a split without a limit takes all."""

    def __init__(self, limits: Mapping[str, int | None] | None = None):
        self.limits = limits or {}
        self.taken: Counter[str] = Counter()

    def open(self, split: str) -> bool:
        """Whether more pairs of that split are wanted."""
        limit = self.limits.get(split)
        return limit is None or self.taken[split] < limit

    def until_full(self, rows: Iterable[Pair | Bad], split: str) -> Iterator[Pair | Bad]:
        """The rows until enough pairs of that split are found; asks for no row more than that takes."""
        rows = iter(rows)
        while self.open(split) and (row := next(rows, None)) is not None:
            yield row


def as_float(value: Any) -> float | None:
    """A number, however the data set writes it; None if it is missing, NaN or none."""
    try:
        return None if math.isnan(as_float := float(value)) else as_float
    except (TypeError, ValueError):
        return None


def same_prompt(prompt: str) -> str:
    """What two spellings of a prompt have in common: neither case nor spacing makes a prompt unseen."""
    return " ".join(prompt.casefold().split())


def hashed_split(prompt: str | None, validation_share: float, test_share: float) -> str:
    """The split of a prompt by its own hash: the same in every run, whatever rows come before or after it."""
    identity = hashlib.sha256(same_prompt(prompt or "").encode(errors="replace")).digest()
    position = int.from_bytes(identity[:8]) / 2**64
    if position < test_share:
        return "test"
    return "validation" if position < test_share + validation_share else "train"


def ranked_pairs(ranks: Sequence[float]) -> list[tuple[int, int, float]]:
    """All pairs (i, j) of ranked images, with label_0: 1 where i has the better, that is smaller, rank."""
    n = len(ranks)
    return [
        (i, j, 0.5 if ranks[i] == ranks[j] else float(ranks[i] < ranks[j])) for i in range(n) for j in range(i + 1, n)
    ]
