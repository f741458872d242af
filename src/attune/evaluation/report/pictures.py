"""The pictures of the page: which prompts are shown is decided by rules, and the page says which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from attune.evaluation.images import thumbnail_uri
from attune.evaluation.statistics import prompt_means
from attune.files import values_sha

PAGE_BYTES = 1_800_000  # of all pictures; in base64 they are a third more
GAIN, MEDIAN, LOSS, RANDOM = "largest gain", "median", "largest loss", "at random"
OF_A_RUN = 2  # prompts each of the largest gains, the largest losses, and at random


@dataclass(frozen=True)
class Side:
    """An image of a run."""

    run: str
    uri: str
    score: float


@dataclass(frozen=True)
class Shown:
    """A prompt with the images of two runs from the same noise."""

    why: str
    prompt: str
    difference: float  # of the prompt, over all its images
    sides: tuple[Side, Side]


@dataclass(frozen=True)
class Pictures:
    """The strip of the first screen, and the extremes of every run."""

    strip: tuple[Shown, ...]
    extremes: Mapping[str, tuple[Shown, ...]]


def pictures(
    tables: Mapping[str, pd.DataFrame], generated: Path, runs: Sequence[str], base: str, scorer: str
) -> Pictures:
    """Of the first run the prompts with the largest gain, the median and the largest loss; of every run a few.

    Args:
        tables: run -> score table.
        generated: folder of the runs' folders of images.
        runs: those to show, the one of the strip first.
        scorer: the differences are by this one.
    """
    found = {run: _chosen(tables[run], tables[base], scorer) for run in runs}
    count = sum(2 * len(chosen) for chosen in found.values())
    most = PAGE_BYTES // max(1, count)

    def show(run: str, why: str, prompt: str, difference: float) -> Shown:
        return Shown(_named(why, difference), prompt, difference, (side(base, prompt), side(run, prompt)))

    def side(run: str, prompt: str) -> Side:
        table = tables[run]
        row = table[table["prompt"] == prompt].sort_values("ordinal").iloc[0]
        return Side(run, thumbnail_uri(generated / run / row["file"], most), float(row[scorer]))

    strip: tuple[Shown, ...] = ()
    if runs:
        first = found[runs[0]]
        strip = tuple(show(runs[0], *next(each for each in first if each[0] == why)) for why in (GAIN, MEDIAN, LOSS))
    extremes = {run: tuple(show(run, *each) for each in chosen if each[0] != MEDIAN) for run, chosen in found.items()}
    return Pictures(strip, extremes)


def _named(why: str, difference: float) -> str:
    """What it is called: where all prompts gained, the end of the losses is the smallest gain."""
    if why == GAIN and difference < 0:
        return "smallest loss"
    return "smallest gain" if why == LOSS and difference > 0 else why


def _chosen(run: pd.DataFrame, base: pd.DataFrame, scorer: str) -> list[tuple[str, str, float]]:
    """Why, prompt and difference of what is shown of a run. Those at random are the first by the hash of their text."""
    after, prompts = prompt_means(run[scorer].to_numpy(float), run["prompt"])
    difference = after - prompt_means(base[scorer].to_numpy(float), base["prompt"])[0]
    order = np.argsort(difference, kind="stable")
    ends = min(OF_A_RUN, len(order) // 2) or 1
    chosen = [(GAIN, i) for i in order[::-1][:ends]] + [(LOSS, i) for i in order[:ends]]
    chosen.append((MEDIAN, order[len(order) // 2]))
    others = [i for i in range(len(order)) if i not in {place for _, place in chosen}]
    by_hash = sorted(others, key=lambda i: values_sha(str(prompts[i])))
    chosen += [(RANDOM, i) for i in by_hash[:OF_A_RUN]]
    return [(why, str(prompts[i]), float(difference[i])) for why, i in chosen]
