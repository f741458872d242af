"""Stage prepare: prompts and preference pairs, checked, with latents and text embeddings cached."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

from attune.config import plugins
from attune.config.plan import PreparePlan, Session, read
from attune.config.settings import SourceConfig
from attune.data.rows import SourceError
from attune.files import write_atomically
from attune.paths import Paths
from attune.stages.common import planned, stage
from attune.stop import stoppable

if TYPE_CHECKING:
    import numpy as np


def main() -> None:
    plan = planned(PreparePlan, "prepare")
    paths = Paths(plan.profile)
    data = {"source": plan.source.name, **plan.source.settings}
    settings = {
        "model": plan.model.model_dump(),
        "sampling": plan.sampling.model_dump(),
        "data": data,
        "seed": plan.seed,
    }
    with stage("prepare", plan, settings) as run:
        counts = prepare(plan)
        text = json.dumps(counts, indent=2) + "\n"
        # models/<profile>/data is what runs that need nothing but the data come `after`: what they are made from
        for file in (paths.reports / "data.json", paths.model("data") / "data.json"):
            write_atomically(file, text.encode())
        run.summary(counts)
        kind = "images" if "images" in counts else "pairs"
        run.dataset(paths.prepared / f"{kind}.parquet", f"prepared {kind}", int(counts[kind]))


def prepare(plan: PreparePlan) -> dict[str, float]:
    """Asks the source for rows, generating images with the base model if it wants that, and writes them prepared.

    Data that is not there, too bad or too little ends the process with one message: before a model is loaded, where
    that can be known without opening an image.
    """
    from attune.build import load_policy, load_scorer
    from attune.data.ingest.rules import Rules, check_rows
    from attune.data.ingest.write import write_prepared
    from attune.data.quarantine import Quarantine, TooManyBadRows
    from attune.data.rows import Quota
    from attune.diffusion.generate import generate_images

    paths, source, config = Paths(plan.profile), plugins.load("sources", plan.source.name), plan.source.config
    decided = config.model_dump()
    limits = {key: decided[key] for key in ("min_side", "max_bad_share") if key in decided}
    rules = Rules(Quota.of(config), **limits, wanted=read(Session, "session").wanted)
    policy = cache(lambda: load_policy(plan.model))

    def generate(prompts: Sequence[str], ordinals: Sequence[int], desc: str) -> np.ndarray:
        return generate_images(policy(), prompts, ordinals, plan.sampling, plan.seed, desc)

    try:
        if _rows_are_quick(source, config):
            with Quarantine(paths.quarantine, plan.source.name) as quarantine:
                check_rows(source.read(config, plan.seed, generate, rules.quota), quarantine, rules)
        with Quarantine(paths.quarantine, plan.source.name) as quarantine:
            rows = source.read(config, plan.seed, generate, rules.quota)
            scorers = {name: load_scorer(scorer) for name, scorer in plan.score_with.items()}
            return write_prepared(paths.prepared, rows, policy().backbone, scorers, quarantine, rules)
    except (SourceError, TooManyBadRows) as error:
        sys.exit(str(error))


def _rows_are_quick(source: ModuleType, config: SourceConfig) -> bool:
    """Whether a source knows all its pairs by their names: it reads files here, and counts their rows for the plan."""
    try:
        sizes = source.split_sizes(config) if source.needs_files(config) else None
    except SourceError:  # said by `read`
        return False
    return sizes is not None and "prompts/train" in sizes


if __name__ == "__main__":
    with stoppable("prepare"):
        main()
