"""Everything that is said of the data, as one value: what the verdict, the page and the terminal's table read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from attune.inspection import choices
from attune.inspection.bars import Bar, histogram, shapes
from attune.inspection.choices import Agreement, Circles, Contradictions, Share
from attune.inspection.collect import Collected
from attune.inspection.rejected import Rejected, leaking_prompts, rejected
from attune.inspection.tokens import Lengths

REPEATED = 8  # of the prompts with the most pairs
DEEP_CUT = 0.25  # of an image's area: more than a quarter cropped away may hold what the prompt says


@dataclass(frozen=True)
class ImageFacts:
    """Sizes of the distinct images of the pairs that were kept, and what the model's square does to them."""

    images: int
    resolution: int  # pixels
    enlarged: int  # images with a shorter side than that
    cropped: int  # images that are not square
    deeply_cropped: int  # those that lose more than a quarter
    mean_cut: float  # share of the area that the centre crop leaves out, of all images
    largest_cut: float
    smallest: tuple[int, int]  # width and height of the image with the shortest side
    largest: tuple[int, int]
    kinds: list[tuple[str, int]]  # type of file, images
    sides: list[Bar]
    shapes: list[Bar]


@dataclass(frozen=True)
class Facts:
    """What is known of the data."""

    found: Collected
    ties: dict[str, int]  # split -> pairs
    choices: dict[str, int]
    position: Share | None  # of image 0 being chosen
    contradictions: Contradictions
    circles: Circles
    identical: int  # pairs that show the same pixels twice
    leaks: int  # prompts in several splits
    spellings: int  # prompts written in several ways
    pairs_per_prompt: list[Bar]
    repeated: list[tuple[str, int]]  # prompts with the most pairs
    images: ImageFacts | None
    lengths: Lengths
    length_bars: list[Bar]
    agreements: list[Agreement]
    rejected: list[Rejected]
    quarantine: Path


def facts(found: Collected, quarantine: Path, lengths: Lengths, resolution: int, scorers: Sequence[str]) -> Facts:
    """Counts and shares of what was found.

    Args:
        quarantine: its file.
        lengths: of the prompts that were found.
        resolution: of the model, in pixels.
        scorers: whose scores the pairs have.
    """
    pairs = found.pairs
    per_prompt = pairs.prompt.value_counts()
    reasons = {name.partition("/")[2]: int(n) for name, n in found.counts.items() if name.startswith("quarantined/")}
    agreements = [choices.agreement(pairs, name) for name in scorers] if len(pairs) else []
    return Facts(
        found=found,
        ties=_by_split(pairs[pairs.label_0 == 0.5]),
        choices=_by_split(pairs[pairs.label_0 != 0.5]),
        position=choices.first_chosen(pairs),
        contradictions=choices.contradictions(pairs) if len(pairs) else Contradictions(0, 0, 0.0),
        circles=choices.circles(pairs) if len(pairs) else Circles(0, 0),
        identical=choices.identical(pairs),
        leaks=leaking_prompts(quarantine),
        spellings=choices.spellings(found.prompts.prompt.tolist()),
        pairs_per_prompt=histogram(per_prompt.to_numpy(), 1, lambda n: False),
        repeated=[(str(prompt), int(n)) for prompt, n in per_prompt.head(REPEATED).items() if n > 1],
        images=image_facts(found, resolution) if len(found.images) else None,
        lengths=lengths,
        length_bars=histogram(lengths.counts, lengths.limit + 1, lambda n: not lengths.are_words and n > lengths.limit),
        agreements=[each for each in agreements if each is not None],
        rejected=rejected(quarantine, reasons),
        quarantine=quarantine,
    )


def image_facts(found: Collected, resolution: int) -> ImageFacts:
    """Sizes, and what resizing the shorter side to `resolution` and cropping the centre does."""
    used = {*found.pairs.image_0, *found.pairs.image_1} if found.singles is None else {*found.singles.image}
    images = found.images.iloc[sorted(used)]
    width, height = images.width.to_numpy(), images.height.to_numpy()
    short, cut = np.minimum(width, height), 1 - np.minimum(width, height) / np.maximum(width, height)
    area, least = (width * height).argmax(), short.argmin()
    return ImageFacts(
        images=len(short),
        resolution=resolution,
        enlarged=int((short < resolution).sum()),
        cropped=int((cut > 0).sum()),
        deeply_cropped=int((cut > DEEP_CUT).sum()),
        mean_cut=float(cut.mean()),
        largest_cut=float(cut.max()),
        smallest=(int(width[least]), int(height[least])),
        largest=(int(width[area]), int(height[area])),
        kinds=[(str(kind), int(n)) for kind, n in images.kind.value_counts().items()],
        sides=histogram(short, resolution, lambda side: side < resolution),
        shapes=shapes(width / height),
    )


def _by_split(pairs: pd.DataFrame) -> dict[str, int]:
    return {str(split): int(n) for split, n in pairs.split.value_counts().items()}
