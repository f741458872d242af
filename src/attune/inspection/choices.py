"""What the pairs say: choices that contradict each other or go in a circle, which side is chosen, who agrees.

Pairs are tables as `collect` makes them. All functions are pure; shares have the 95 % interval of
`evaluation.statistics`, which resamples prompts, because the pairs of a prompt are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pandas as pd

from attune.data.splits import normalize_prompt
from attune.evaluation.statistics import bootstrap_mean_ci, prompt_means

MANY_PROMPTS, FEW_RESAMPLES, RESAMPLES = 2_000, 1_000, 10_000  # many prompts need fewer resamples, and are slow

Comparison: TypeAlias = "tuple[str, bytes, bytes]"
"""A prompt in its normal form and the pixels of two images in a fixed order."""


@dataclass(frozen=True)
class Share:
    """A mean over prompts between 0 and 1, its interval, and of how many choices and prompts it is."""

    value: float
    low: float
    high: float
    choices: int
    prompts: int

    @property
    def is_chance(self) -> bool:
        """Whether a coin would do as well, as far as these data tell."""
        return self.low <= 0.5 <= self.high


@dataclass(frozen=True)
class Agreement:
    """How often a scorer prefers the image that was chosen, and by how much."""

    scorer: str
    accuracy: Share
    margin: float  # mean score of the chosen image minus that of the other


@dataclass(frozen=True)
class Contradictions:
    """Pairs of images that were chosen both ways for one prompt."""

    pairs: int  # of these images, in any direction
    comparisons: int  # distinct sets of prompt and images
    share: float  # of all choices


@dataclass(frozen=True)
class Circles:
    """Triples of images of a prompt, each compared with the others, whose choices go round in a circle."""

    circles: int
    triples: int


def comparison(prompt: str, content_0: bytes, content_1: bytes, label_0: float) -> tuple[Comparison, bool] | None:
    """What is compared, whichever comes first, and whether the first in that order was chosen; None for no choice."""
    if label_0 == 0.5 or content_0 == content_1:
        return None
    swapped = content_0 > content_1
    sides = (content_1, content_0) if swapped else (content_0, content_1)
    return (normalize_prompt(prompt), *sides), (label_0 > 0.5) != swapped


def choices(pairs: pd.DataFrame) -> pd.DataFrame:
    """The pairs that are no ties."""
    return pairs[pairs.label_0 != 0.5]


def contradictions(pairs: pd.DataFrame) -> Contradictions:
    """Counts the comparisons that were decided both ways."""
    decided = _comparisons(pairs)
    both = decided.groupby("key").first_chosen.transform("nunique") == 2
    n = int(both.sum())
    return Contradictions(n, int(decided[both].key.nunique()), n / max(1, len(choices(pairs))))


def _comparisons(pairs: pd.DataFrame) -> pd.DataFrame:
    """`key` and `first_chosen` of the pairs that decide between two images."""
    columns = (pairs[name] for name in ("prompt", "content_0", "content_1", "label_0"))
    found = [one for row in zip(*columns, strict=True) if (one := comparison(*row)) is not None]
    return pd.DataFrame({"key": [key for key, _ in found], "first_chosen": [first for _, first in found]})


def circles(pairs: pd.DataFrame) -> Circles:
    """Counts triples i over j over k over i; of two images the side chosen more often counts, of equals neither."""
    found = np.zeros(2)
    decided = _comparisons(pairs)
    if decided.empty:
        return Circles(0, 0)
    prompts = [key[0] for key in decided.key]
    for _, group in decided.groupby(prompts):
        if len(group) >= 3:
            found += _circles_of(group)
    return Circles(int(found[0]), int(found[1]))


def _circles_of(decided: pd.DataFrame) -> np.ndarray:
    """Circles and triples of one prompt: closed walks of three steps, of directed and of undirected edges."""
    contents = {content: i for i, content in enumerate({side for key in decided.key for side in key[1:]})}
    wins = np.zeros((len(contents), len(contents)))
    for (_, first, second), first_chosen in zip(decided.key, decided.first_chosen, strict=True):
        winner, loser = (first, second) if first_chosen else (second, first)
        wins[contents[winner], contents[loser]] += 1
    beats = (wins > wins.T).astype(float)
    either = beats + beats.T
    return np.array([np.trace(beats @ beats @ beats) / 3, np.trace(either @ either @ either) / 6])


def first_chosen(pairs: pd.DataFrame) -> Share | None:
    """How often image 0 is the chosen one; None without a choice."""
    decided = choices(pairs)
    return share_over_prompts(decided.label_0.to_numpy(), decided.prompt.tolist())


def agreement(pairs: pd.DataFrame, scorer: str) -> Agreement | None:
    """How far a scorer agrees with the choices; equal scores count half. None without a choice.

    Args:
        pairs: with `<scorer>_0` and `<scorer>_1`.
    """
    decided = choices(pairs)
    margins = (decided[f"{scorer}_0"] - decided[f"{scorer}_1"]).to_numpy() * (2 * decided.label_0.to_numpy() - 1)
    accuracy = share_over_prompts((np.sign(margins) + 1) / 2, decided.prompt.tolist())
    return None if accuracy is None else Agreement(scorer, accuracy, float(margins.mean()))


def share_over_prompts(hits: np.ndarray, prompts: Sequence[str]) -> Share | None:
    """Mean of (n,) hits in [0, 1], of each prompt first and then of all prompts; None without any."""
    if not len(hits):
        return None
    means, distinct = prompt_means(hits, prompts)
    low, high = bootstrap_mean_ci(means, resamples=RESAMPLES if len(means) <= MANY_PROMPTS else FEW_RESAMPLES)
    return Share(float(means.mean()), low, high, len(hits), len(distinct))


def identical(pairs: pd.DataFrame) -> int:
    """Pairs that show the same pixels twice."""
    return int((pairs.content_0 == pairs.content_1).sum()) if len(pairs) else 0


def spellings(prompts: Sequence[str]) -> int:
    """Prompts that are there in several spellings: other case, other spacing."""
    distinct = pd.Series(list(dict.fromkeys(prompts)), dtype="str")
    return int((distinct.map(normalize_prompt).value_counts() > 1).sum())
