"""Stage evaluate@<run>: scores the images of a run with every scorer, one row per image."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

from attune.config.plan import EvaluatePlan
from attune.paths import TRACKED_RUNS, Paths
from attune.stages.common import planned, stage
from attune.stop import stoppable

if TYPE_CHECKING:
    import pandas as pd


def main() -> None:
    plan = planned(EvaluatePlan, "evaluate")
    settings = {"scorers": {name: {"scorer": it.name, **it.settings} for name, it in plan.scorers.items()}}
    with stage(f"evaluate@{plan.run}", plan, settings, method=plan.run) as run:
        frame = evaluate(plan)
        means = {scorer: float(frame[scorer].mean()) for scorer in sorted(plan.scorers)}
        run.summary(means)
        trained_by = TRACKED_RUNS / plan.run
        if trained_by.exists():  # so that one row of the tracking UI holds beta, learning rate and scores
            run.note(trained_by.read_text().strip() or None, means)


def evaluate(plan: EvaluatePlan) -> pd.DataFrame:
    """Scores the run's images by the profile's scorers; an unexpected mean ends the stage with its message."""
    from attune.build import load_scorer
    from attune.evaluation.protocol import scorer_identity
    from attune.evaluation.scoring import UnexpectedMean, evaluate_folder, evaluation_protocol

    paths = Paths(plan.profile)
    folder = paths.generated(plan.run)
    identities = [scorer_identity(name, scorer.config) for name, scorer in plan.scorers.items()]
    loaders = {name: partial(load_scorer, scorer) for name, scorer in plan.scorers.items()}
    try:
        return evaluate_folder(folder, loaders, evaluation_protocol(folder, identities), paths.reports)
    except UnexpectedMean as error:
        sys.exit(str(error))


if __name__ == "__main__":
    with stoppable("evaluate"):
        main()
