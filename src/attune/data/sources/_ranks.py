"""Ranks of images as labelled pairs."""

from __future__ import annotations

from collections.abc import Sequence

MAX_IMAGES = 100  # of a prompt: n images make n (n - 1) / 2 pairs


def too_many_images(n: int) -> str:
    """What is said of a prompt with more than MAX_IMAGES."""
    return f"{n} images of one prompt; {MAX_IMAGES} are read at most"


def ranked_pairs(ranks: Sequence[float]) -> list[tuple[int, int, float]]:
    """All pairs (i, j) of ranked images, with label_0: 1 where i has the better, that is smaller, rank."""
    n = len(ranks)
    return [
        (i, j, 0.5 if ranks[i] == ranks[j] else float(ranks[i] < ranks[j])) for i in range(n) for j in range(i + 1, n)
    ]
