"""How far people agree: with each other about the same items, and with themselves about an item that comes back.

Answers are words of no order, so every disagreement counts the same.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from scipy import stats

KAPPA, ALPHA = "Cohen's kappa", "Krippendorff's alpha"


@dataclass(frozen=True)
class Agreement:
    """How often two answers about one item are the same, and how much more often than by chance."""

    share: float  # of pairs of answers about one item that are the same, averaged over items
    ci95: tuple[float, float]
    n_items: int
    measure: str  # KAPPA or ALPHA: the coefficient's name
    coefficient: float  # 1 for full agreement, 0 for what chance gives; nan where every answer is the same word

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> Agreement | None:
        """The inverse of `dataclasses.asdict` after JSON, where nan is null."""
        if values is None:
            return None
        coefficient = math.nan if values["coefficient"] is None else values["coefficient"]
        return cls(**{**values, "ci95": tuple(values["ci95"]), "coefficient": coefficient})


def agreement(items: Sequence[Mapping[str, str]]) -> Agreement | None:
    """The agreement of raters about items; None if no item has two answers.

    Two raters are compared by Cohen's kappa; more of them by Krippendorff's alpha, which allows for items that not
    everybody answered.

    Args:
        items: of each item, rater -> answer. Items with a single answer are left out.
    """
    shared = [item for item in items if len(item) > 1]
    if not shared:
        return None
    raters = sorted({rater for item in shared for rater in item})
    share = raw_agreement([list(item.values()) for item in shared])
    if len(raters) == 2:
        measure, coefficient = KAPPA, cohens_kappa(*([item[rater] for item in shared] for rater in raters))
    else:
        measure, coefficient = ALPHA, krippendorffs_alpha([list(item.values()) for item in shared])
    return Agreement(share, wilson_interval(share, len(shared)), len(shared), measure, coefficient)


def raw_agreement(items: Sequence[Sequence[str]]) -> float:
    """Share of pairs of answers about one item that are the same, averaged over items of two answers or more."""
    return sum(_equal_pairs(item) / (len(item) * (len(item) - 1)) for item in items) / len(items)


def _equal_pairs(item: Sequence[str]) -> int:
    """Ordered pairs of different raters with the same answer."""
    return sum(count * (count - 1) for count in Counter(item).values())


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n items.

    Source: Wilson 1927. It has a width where all items agree, which a bootstrap has not. Where an item has more than
    two answers its share is no longer 0 or 1, so it varies less and the interval is wider than it had to be.
    """
    z = float(stats.norm.ppf(0.975))
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def cohens_kappa(first: Sequence[str], second: Sequence[str]) -> float:
    """Agreement of two raters beyond chance: (p_o - p_e) / (1 - p_e); nan where both always say the same word.

    Source: Cohen 1960. p_o is the share of equal answers, p_e what two raters with these frequencies would have if
    they answered independently.

    Args:
        first: the answers of one rater, one per item.
        second: those of the other, in the same order.
    """
    n = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    ours, theirs = Counter(first), Counter(second)
    expected = sum(ours[word] * theirs[word] for word in ours) / n**2
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan


def krippendorffs_alpha(items: Sequence[Sequence[str]]) -> float:
    """Agreement beyond chance of any number of raters, 1 - D_o / D_e; nan where every answer is the same word.

    Source: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", nominal data. Of an item with m answers
    every ordered pair of them counts 1 / (m - 1) in the coincidences.

    Args:
        items: the answers about each item, two or more, from whom it may be.
    """
    coincidences: defaultdict[tuple[str, str], float] = defaultdict(float)
    for item in items:
        for pair in permutations(item, 2):
            coincidences[pair] += 1 / (len(item) - 1)
    totals: defaultdict[str, float] = defaultdict(float)
    for (word, _), weight in coincidences.items():
        totals[word] += weight
    n = sum(totals.values())
    differing = sum(weight for (one, other), weight in coincidences.items() if one != other)
    expected = (n * n - sum(total * total for total in totals.values())) / (n - 1)
    return 1 - differing / expected if expected > 0 else math.nan
