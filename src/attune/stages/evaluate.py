"""Stage evaluate@<method>: scores held-out images with every scorer, one row per image."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import TYPE_CHECKING

from attune.config.plugins import plugin_config
from attune.config.profile import Profile
from attune.paths import GENERATED, REPORTS, RUNS
from attune.stages.common import stage

if TYPE_CHECKING:
    import pandas as pd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", required=True, help="a folder of data/generated")
    name = parser.parse_args().method
    with stage(f"evaluate@{name}", "scorers", method=name) as (profile, run):
        frame = evaluate(name, profile)
        means = {scorer: float(frame[scorer].mean()) for scorer in sorted(profile.scorers)}
        run.summary(means)
        trained_by = RUNS / name
        if trained_by.exists():  # so that one row of the tracking UI holds beta, learning rate and scores
            run.note(trained_by.read_text().strip() or None, means)


def evaluate(name: str, profile: Profile) -> pd.DataFrame:
    """Scores data/generated/<name> by the profile's scorers; an unexpected mean ends the stage with its message."""
    from attune.build import load_scorer
    from attune.evaluation.protocol import scorer_identity
    from attune.evaluation.scoring import UnexpectedMean, evaluate_folder, evaluation_protocol

    folder = GENERATED / name
    configs = {n: plugin_config("rewards", n, block, f"scorers.{n}") for n, block in profile.scorers.items()}
    protocol = evaluation_protocol(folder, [scorer_identity(n, config) for n, config in configs.items()])
    try:
        return evaluate_folder(folder, {n: partial(load_scorer, n, profile) for n in configs}, protocol, REPORTS)
    except UnexpectedMean as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
