"""Stage evaluate@<run>: scores the images of a run with every scorer, one row per image."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

from attune.config.plan import EvaluatePlan
from attune.paths import TRACKED_RUNS, Paths, project_root
from attune.stages.common import held, launch, planned, stage
from attune.stop import stoppable

if TYPE_CHECKING:
    import pandas as pd


def main() -> None:
    plan = planned(EvaluatePlan, "evaluate")
    launch("attune.stages.evaluate")
    settings = {"scorers": {name: {"scorer": it.name, **it.settings} for name, it in plan.scorers.items()}}
    with stage(f"evaluate@{plan.run}", plan, settings, method=plan.run) as run:
        frame = evaluate(plan)
        if frame is None:
            return
        means = {scorer: float(frame[scorer].mean()) for scorer in sorted(plan.scorers)}
        run.summary(means)
        trained_by = TRACKED_RUNS / plan.run
        if trained_by.exists():  # so that one row of the tracking UI holds beta, learning rate and scores
            run.note(trained_by.read_text().strip() or None, means)


def evaluate(plan: EvaluatePlan) -> pd.DataFrame | None:
    """Scores the run's images by the profile's scorers; an unexpected mean ends the stage with its message.

    The shards of scores stay, so that a scorer that is added is the only one to be asked.

    Returns:
        The table; None in all processes but the main one.
    """
    from attune.build import load_scorer, shard, shard_ids
    from attune.evaluation.protocol import scorer_identity
    from attune.evaluation.scoring import UnexpectedMean, evaluate_folder, evaluation_protocol
    from attune.shards import Shards, process_group

    paths, ours = Paths(plan.profile), shard()
    folder, shards = paths.generated(plan.run), Shards(project_root() / paths.kept_scores(plan.run))
    identities = [scorer_identity(name, scorer.config) for name, scorer in plan.scorers.items()]
    loaders = {name: partial(load_scorer, scorer) for name, scorer in plan.scorers.items()}
    ids = shard_ids(plan.parts)
    try:
        with held(shards.folder.with_suffix(".lock"), f"evaluate@{plan.run}"), process_group(ours):
            protocol = evaluation_protocol(folder, identities)
            return evaluate_folder(folder, loaders, protocol, paths.reports, ids, shards, ours)
    except UnexpectedMean as error:
        sys.exit(str(error))


if __name__ == "__main__":
    with stoppable("evaluate"):
        main()
