"""Stage prepare: prompts and preference pairs, checked, with latents and text embeddings cached."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

from attune.config import plugins
from attune.config.profile import Profile
from attune.paths import PREPARED, REPORTS
from attune.stages.common import stage

QUARANTINE = Path("data/quarantine.csv")


def main() -> None:
    with stage("prepare", "model", "sampling", "data", "scorers") as (profile, run):
        counts = prepare(profile)
        REPORTS.mkdir(exist_ok=True)
        (REPORTS / "data.json").write_text(json.dumps(counts, indent=2) + "\n")
        run.summary(counts)
        run.dataset(PREPARED / "pairs.parquet", "preference pairs", int(counts["pairs"]))


def prepare(profile: Profile) -> dict[str, float]:
    """Asks the source for rows, painting with the base model if it wants that, and writes data/prepared.

    Data that is not there, or too bad, ends the process with one message; the source looks before a model loads.
    """
    from attune.build import load_policy, load_scorer
    from attune.data.quarantine import Quarantine, TooManyBadRows
    from attune.data.rows import Rules
    from attune.data.sources import Quota, SourceError
    from attune.data.writing import write_prepared
    from attune.diffusion.generate import generate_images

    source = plugins.load("sources", profile.data["source"])
    config = source.Config.model_validate({k: v for k, v in profile.data.items() if k != "source"})
    decided = config.model_dump()
    held_out = decided.get("held_out_pairs")
    quota = Quota({"train": decided.get("pairs"), "validation": held_out, "test": held_out})
    rules = Rules(quota, **{key: decided[key] for key in ("min_side", "max_bad_share") if key in decided})
    policy = cache(lambda: load_policy(profile))

    def painter(prompts, ordinals, title):
        return generate_images(policy(), prompts, ordinals, profile.sampling, profile.seed, title)

    try:
        with Quarantine(QUARANTINE, profile.data["source"]) as quarantine:
            rows = source.read(config, profile.seed, painter, quota)
            scorers = {name: load_scorer(name, profile) for name in config.score_with}
            return write_prepared(PREPARED, rows, policy().backbone, scorers, quarantine, rules)
    except (SourceError, TooManyBadRows) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
