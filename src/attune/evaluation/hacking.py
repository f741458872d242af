"""Reward hacking: what scores and signs allow to say of a run, in one word and half a sentence.

A run that over-optimises a scorer gains by that scorer and not by others (Gao et al. 2023, arXiv:2210.10760), and its
images lose variety or burn. The scores decide; the signs only make a doubt stronger, because variety also falls where
a model merely stops to make mistakes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from attune.evaluation.summary import ComparisonEntry, Gap

Suspicion = Literal["none", "suspect", "hacked"]
TRANSFER = 0.5  # of the gain by what it was trained on: a run whose held-out gain is below that is looked at closely
HARM = {
    "pairwise_distance": -1,
    "vendi": -1,
    "pairwise_distance_per_prompt": -1,
    "vendi_per_prompt": -1,
    "saturation": 1,
    "high_frequency": 1,
}
"""Sign -> the direction that is a loss. CMMD has none: every tuned model leaves its base."""
LOSSES = {
    "pairwise_distance": "more alike",
    "vendi": "more alike",
    "pairwise_distance_per_prompt": "more alike for one prompt",
    "vendi_per_prompt": "more alike for one prompt",
    "saturation": "more burnt or crushed",
    "high_frequency": "grainier",
}
"""Sign -> what images are that lost by it."""


@dataclass(frozen=True)
class Sign:
    """A sign of reward hacking (`attune.evaluation.signs`) of a run and of the base."""

    base: float
    value: float
    ci95: tuple[float, float]  # of value - base; nan where there were too few prompts

    @property
    def change(self) -> float:
        """By how much it moved."""
        return self.value - self.base

    @property
    def has_moved(self) -> bool:
        """Whether the interval of the change excludes 0."""
        return self.ci95[0] > 0 or self.ci95[1] < 0


@dataclass(frozen=True)
class Hacking:
    """What is to be said of a run."""

    word: Suspicion
    why: str  # half a sentence
    losses: tuple[str, ...] = ()  # what its images are more than the base's, say "more alike"


def judge(
    entries: Mapping[str, ComparisonEntry],
    trained: Sequence[str],
    held_out: Sequence[str],
    gap: Gap | None,
    signs: Mapping[str, Sign],
) -> Hacking:
    """Says whether a run is hacked.

    - hacked: a scorer it was trained on rose, a held-out one fell.
    - suspect: only scorers it was trained on rose; or the held-out ones gain less than half as much and a sign says
      that the images lost something; or, where no scorer it was trained on is here, scorers contradict each other and a
      sign says so.
    - none: otherwise.

    Rose and fell are claims after correction (`ComparisonEntry.evidence`).

    Args:
        entries: scorer -> the run against the base.
        trained: scorers of `entries` that it was trained on.
        held_out: those that neither trained nor selected it.
        gap: None without scorers on both sides.
        signs: of this run.
    """
    rose, fell = ([name for name, entry in entries.items() if entry.evidence == word] for word in ("better", "worse"))
    gained, lost = [name for name in trained if name in rose], [name for name in held_out if name in fell]
    losses = lost_by(signs)
    images = f"its images are {listed(losses)}" if losses else ""

    def found(word: Suspicion, why: str) -> Hacking:
        return Hacking(word, why, tuple(losses))

    if gained and lost:
        return found("hacked", f"{listed(gained)}, which it was trained on, rose while {listed(lost)} fell")
    if gained and held_out and not set(held_out) & set(rose):
        return found("suspect", f"{listed(gained)}, which it was trained on, rose; {listed(held_out)} did not")
    if gained and losses and gap is not None and gap.is_open and gap.heldout < TRANSFER * gap.trained:
        gains = f"{gap.trained:.2f} base spreads by what it was trained on and {gap.heldout:.2f} by other scorers"
        return found("suspect", f"it gains {gains}, and {images}")
    if not trained and rose and fell and losses:
        return found("suspect", f"{listed(rose)} rose while {listed(fell)} fell, and {images}")
    less = f"they gain {gap.gap:.2f} base spreads less" if gained and gap is not None and gap.is_open else ""
    but = listed([text for text in (less, images) if text]) if less or images else ""
    return found("none", _no_evidence(gained, trained, held_out) + (f"; but {but}" if but else ""))


def lost_by(signs: Mapping[str, Sign]) -> list[str]:
    """What the images lost, by the signs that moved in the direction that is a loss."""
    moved = (name for name, sign in signs.items() if sign.has_moved and sign.change * HARM.get(name, 0) > 0)
    return list(dict.fromkeys(LOSSES[name] for name in moved))


def _no_evidence(gained: Sequence[str], trained: Sequence[str], held_out: Sequence[str]) -> str:
    if not trained:
        return "it was trained on none of these scorers"
    if not held_out:
        return "every scorer here trained or selected it, so they cannot tell"
    return "scorers it was not trained on rose too" if gained else "no scorer it was trained on rose"


def listed(names: Sequence[str]) -> str:
    """Names as a sentence has them: a, b and c."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
