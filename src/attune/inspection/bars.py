"""Histograms as rows of bars: what a page draws across its width."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

MOST = 10  # bars of a histogram, without the open ones at its ends
OUTER = (5, 95)  # percentiles: what lies beyond is counted in open bars
RATIOS = (1 / 2, 3 / 4, 0.999, 1.001, 4 / 3, 2)  # width / height, between the kinds of shape
SHAPES = ("tall, beyond 1:2", "1:2 to 3:4", "3:4 to 1:1", "square", "1:1 to 4:3", "4:3 to 2:1", "wide, beyond 2:1")


@dataclass(frozen=True)
class Bar:
    """A bar: how many, as a part of the longest one, and whether that is a flaw."""

    label: str
    count: int
    length: float  # in [0, 1]
    is_bad: bool = False


def histogram(values: Sequence[int] | np.ndarray, mark: int, is_bad: Callable[[float], bool]) -> list[Bar]:
    """Bars of whole numbers of equal width; one of them begins at `mark`.

    Args:
        mark: the number that matters, say the model's resolution.
        is_bad: whether the first value of a bar is on the bad side of the mark.
    """
    numbers = np.asarray(values)
    if not len(numbers):
        return []
    low, high = np.percentile(numbers, OUTER)
    width = _nice((high - low + 1) / MOST)
    first, last = math.floor((low - mark) / width), math.floor((high - mark) / width)
    places = np.clip(np.floor((numbers - mark) / width).astype(int), first, last)
    counts = np.bincount(places - first, minlength=last - first + 1)
    open_low, open_high = numbers.min() < mark + first * width, numbers.max() >= mark + (last + 1) * width
    labels = [_label(mark + place * width, width) for place in range(first, last + 1)]
    if open_low:
        labels[0] = f"below {mark + (first + 1) * width:,}"
    if open_high:
        labels[-1] = f"{mark + last * width:,} and more"
    bad = [is_bad(mark + place * width) for place in range(first, last + 1)]
    return _bars(labels, counts.tolist(), bad)


def shapes(ratios: np.ndarray) -> list[Bar]:
    """Bars of the kinds of shape among ratios (n,) of width to height; kinds without an image are left out."""
    counts = np.bincount(np.digitize(ratios, RATIOS), minlength=len(SHAPES)).tolist()
    there = [(label, count) for label, count in zip(SHAPES, counts, strict=True) if count]
    return _bars([label for label, _ in there], [count for _, count in there], [False] * len(there))


def _bars(labels: Sequence[str], counts: Sequence[int], bad: Sequence[bool]) -> list[Bar]:
    longest = max(counts, default=1)
    return [Bar(label, n, n / longest, flaw) for label, n, flaw in zip(labels, counts, bad, strict=True)]


def _nice(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50 ... that is no less."""
    power = 10 ** max(0, math.floor(math.log10(max(width, 1))))
    return next(int(step * power) for step in (1, 2, 5, 10) if step * power >= width)


def _label(start: int, width: int) -> str:
    if start < 0:
        return f"below {start + width:,}"
    return f"{start:,}" if width == 1 else f"{start:,} to {start + width - 1:,}"
