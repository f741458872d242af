"""Stage prepare: prompts and preference pairs, with latents and text embeddings cached."""

from __future__ import annotations

from attune import plugins
from attune.config import Profile
from attune.stages.common import PREPARED, stage


def main() -> None:
    with stage("prepare", "model", "sampling", "data") as (profile, run):
        prepared = prepare(profile)
        labels = prepared.pairs.label_0
        run.summary(
            {
                "prompts": len(prepared.prompts),
                "pairs": len(labels),
                "tie_share": float((labels == 0.5).mean()),
            }
        )
        run.dataset(PREPARED / "pairs.parquet", "preference pairs", len(labels))


def prepare(profile: Profile):
    """Asks the source, paints with the base model if the source wants that, and writes data/prepared."""
    from attune.assembly import load_policy
    from attune.data.prepared import write_prepared
    from attune.painting import paint
    from attune.sources import check

    source = plugins.load("sources", profile.data["source"])
    config = source.Config.model_validate({k: v for k, v in profile.data.items() if k != "source"})
    policy = load_policy(profile)
    prepared = check(
        source.prepare(
            config,
            profile.seed,
            lambda prompts, ordinals, title: paint(policy, prompts, ordinals, profile.sampling, profile.seed, title),
        )
    )
    write_prepared(PREPARED, prepared, policy.backbone)
    return prepared


if __name__ == "__main__":
    main()
