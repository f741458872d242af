"""Looks at the data before any training: `make inspect`. Nothing is encoded and nothing is trained.

Reads the source of params.yaml's profile by the rules of `prepare`, decodes every image once, prints a short table and
writes reports/<profile>/data.html, with the rows that cannot be used in data_quarantine.csv beside it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attune.config import plugins
from attune.config.plan import Plugin
from attune.config.resolve import Settings, load
from attune.config.schema import ConfigError
from attune.data.rows import SourceError
from attune.files import write_atomically
from attune.paths import Paths
from attune.stop import stoppable

if TYPE_CHECKING:
    import numpy as np
    import torch

    from attune.inspection.collect import Collected
    from attune.inspection.page import Subject
    from attune.interfaces import Reward

MOST_IMAGES = 200  # pairs at random: more than that, and their pictures become too small to be seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--score", nargs="+", action="extend", default=[], metavar="NAME", help="scorers of the profile"
    )
    parser.add_argument("--max-rows", type=_number(1), metavar="N", help="read no more rows with images than that")
    parser.add_argument(
        "--images", type=_number(0, MOST_IMAGES), default=24, metavar="N", help="pairs at random to show (default: 24)"
    )
    given = parser.parse_args()
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    try:
        settings = load()
    except ConfigError as error:
        sys.exit(str(error))
    if unknown := [name for name in given.score if name not in settings.scorers]:
        known = ", ".join(settings.scorers)
        sys.exit(f"--score {unknown[0]}: not in params/{settings.profile}.yaml:scorers; there are {known}")
    inspect(settings, list(dict.fromkeys(given.score)), given.max_rows, given.images)


def inspect(settings: Settings, score: Sequence[str], most_rows: int | None, images: int) -> None:
    """Reads the data, prints the table, and writes page and quarantine. Data that is not there ends the process."""
    from attune.inspection.facts import facts
    from attune.inspection.learning import learnings
    from attune.inspection.page import to_html, to_text
    from attune.inspection.tokens import lengths
    from attune.inspection.verdict import verdict
    from attune.planning.costs import facts as model_facts
    from attune.planning.make import wanted_rows

    reports, wanted = Paths(settings.profile).reports, wanted_rows(settings)
    quarantine, page = reports / "data_quarantine.csv", reports / "data.html"
    found = read(settings, quarantine, score, most_rows, images)
    prompts = lengths(found.prompts.prompt.tolist(), settings.model)
    known = facts(found, quarantine, prompts, model_facts(settings).resolution, score)
    runs, subject = learnings(settings, found.counts), subject_of(settings)
    decided = verdict(known, wanted, runs)
    write_atomically(page, to_html(subject, known, decided, wanted, runs).encode())
    sys.stdout.write(f"{to_text(subject, known, decided, runs)}\n\npage: {page}\n")


def read(settings: Settings, quarantine: Path, score: Sequence[str], most_rows: int | None, images: int) -> Collected:
    """The tables of what the source has; scorers are loaded before anything is read."""
    import torch

    from attune.data.ingest.ingest import Rules
    from attune.data.ingest.scorer import ImageScorer
    from attune.data.quarantine import Quarantine
    from attune.data.rows import Quota
    from attune.inspection.collect import collect
    from attune.inspection.sheets import Sheets

    torch.set_num_threads(settings.threads)
    source, config = plugins.load("sources", settings.source), settings.data
    limits = {key: value for key, value in config.model_dump().items() if key in ("min_side", "max_bad_share")}
    rules = Rules(Quota.of(config), **limits)
    try:
        rows = source.read(config, settings.seed, _generator(settings), rules.quota)
        scorer = ImageScorer({name: load_scorer(settings, name) for name in score}, _device(score))
        with Quarantine(quarantine, settings.source) as file:
            sheets = Sheets(images, settings.seed, score)
            return collect(rows, rules, scorer, file, sheets, most_rows)
    except SourceError as error:
        sys.exit(str(error))
    except ValueError as error:
        if not score:
            raise
        sys.exit(f"--score {' '.join(score)}: {error}")  # say, the oracle, asked about prompts it does not know


def subject_of(settings: Settings) -> Subject:
    """What is looked at: names, and how many pairs the source says it has."""
    from attune.inspection.page import Subject

    try:
        sizes = plugins.load("sources", settings.source).split_sizes(settings.data) or {}
    except SourceError:  # said by `read`
        sizes = {}
    pairs = sum(n for name, n in sizes.items() if name.startswith("pairs/"))
    return Subject(settings.profile, settings.source, str(getattr(settings.data, "path", "")), pairs or None)


def load_scorer(settings: Settings, name: str) -> Reward:
    """A scorer; one that cannot be had ends the process with a line that names it."""
    from attune import build

    scorer = settings.scorers[name]
    plugin = Plugin(kind="rewards", name=scorer.plugin, settings=scorer.config.model_dump(mode="json"))
    try:
        return build.load_scorer(plugin)
    except (OSError, ValueError) as error:
        sys.exit(f"--score {name}: {error}")


def _device(score: Sequence[str]) -> torch.device:
    """Where scorers compute; without any, nothing is to be computed."""
    import torch

    from attune import build

    return build.device() if score else torch.device("cpu")


def _generator(settings: Settings) -> Callable[[Sequence[str], Sequence[int], str], np.ndarray]:
    """Makes images with the base model, for sources that have none of their own."""

    def generate(prompts: Sequence[str], ordinals: Sequence[int], desc: str) -> np.ndarray:
        from attune.build import load_policy
        from attune.diffusion.generate import generate_images

        policy = load_policy(settings.model)
        return generate_images(policy, prompts, ordinals, settings.sampling, settings.seed, desc)

    return generate


def _number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Reads a whole number in a range; argparse says what was wrong."""

    def read_number(text: str) -> int:
        value = int(text)
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"a number from {least}{'' if most is None else f' to {most}'} is wanted")
        return value

    return read_number


if __name__ == "__main__":
    with stoppable("inspect"):
        main()
