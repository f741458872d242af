"""Numbers and ranks of data sets as labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def as_float(value: Any) -> float | None:
    """A number, however the data set writes it; None if it is missing, NaN or not a number."""
    try:
        return None if math.isnan(number := float(value)) else number
    except (TypeError, ValueError):
        return None


def ranked_pairs(ranks: Sequence[float]) -> list[tuple[int, int, float]]:
    """All pairs (i, j) of ranked images, with label_0: 1 where i has the better, that is smaller, rank."""
    n = len(ranks)
    return [
        (i, j, 0.5 if ranks[i] == ranks[j] else float(ranks[i] < ranks[j])) for i in range(n) for j in range(i + 1, n)
    ]
