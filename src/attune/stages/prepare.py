"""Stage prepare: prompts and preference pairs, checked, with latents and text embeddings cached."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from attune.config import plugins
from attune.config.plan import PreparePlan, Session, read
from attune.config.sources import SourceConfig
from attune.data.rows import SourceError
from attune.files import write_atomically
from attune.last_output import last_output
from attune.paths import Paths
from attune.stages.common import is_main_process, launch, planned, shard_folder, stage
from attune.stop import stoppable

if TYPE_CHECKING:
    import numpy as np

    from attune.data.ingest.compute import Work
    from attune.data.ingest.rules import Rules
    from attune.data.rows import ImageGenerator
    from attune.distributed import Shard
    from attune.shards import Shards


def main() -> None:
    plan = planned(PreparePlan, "prepare")
    launch("attune.stages.prepare")
    paths = Paths(plan.profile)
    data = {"source": plan.source.name, **plan.source.settings}
    settings = {
        "model": plan.model.model_dump(),
        "sampling": plan.sampling.model_dump(),
        "data": data,
        "seed": plan.seed,
    }
    with shard_folder(f"prepare-{plan.profile}", plan) as kept, stage("prepare", plan, settings, kept) as run:
        counts = prepare(plan, kept.folder)
        if not is_main_process():
            return
        text = json.dumps(counts, indent=2) + "\n"
        # models/<profile>/data is what runs that need nothing but the data come `after`: what they are made from
        for file in (paths.reports / "data.json", paths.model("data") / "data.json"):
            write_atomically(file, text.encode())
        run.summary(counts)
        kind = "images" if "images" in counts else "pairs"
        run.dataset(paths.prepared / f"{kind}.parquet", f"prepared {kind}", int(counts[kind]))


def prepare(plan: PreparePlan, kept: Path) -> dict[str, float]:
    """Asks the source for rows, generating images with the base model if it wants that, and writes them prepared.

    Data that is not there, too bad or too little ends the process with one message: before a model is loaded, where
    that can be known without opening an image.

    Args:
        kept: folder for the shards.

    Returns:
        Counts; {} in all processes but the main one.
    """
    from attune.build import shard
    from attune.data.ingest.rules import Rules
    from attune.data.ingest.write import write_prepared
    from attune.data.quarantine import Quarantine, TooManyBadRows
    from attune.data.rows import Quota
    from attune.shards import Shards, process_group

    paths, source, config = Paths(plan.profile), plugins.load("sources", plan.source.name), plan.source.config
    decided = config.model_dump()
    limits = {key: decided[key] for key in ("min_side", "max_bad_share") if key in decided}
    wanted = read(Session, "session").wanted
    rules = Rules(Quota.of(config), **limits, wanted=wanted, consensus=config.consensus)
    ours = shard()
    shards, work = Shards(kept, last_output(paths.prepared)), work_of(plan, ours)
    generate = partial(generate_images, plan, work, shards, ours)
    try:
        with process_group(ours), ExitStack() as stack:
            ours.broadcast_from_main(lambda: check_quick_rows(plan, rules, generate))
            quarantine = None
            if ours.is_main_process:
                quarantine = stack.enter_context(Quarantine(paths.quarantine, plan.source.name))
            rows = source.read(config, plan.seed, generate, rules.quota)
            return write_prepared(paths.prepared, rows, work, shards, quarantine, rules, ours)
    except (SourceError, TooManyBadRows) as error:
        sys.exit(str(error))


def work_of(plan: PreparePlan, ours: Shard) -> Work:
    """What is computed of images and prompts. Networks are loaded when they are first asked for."""
    from attune.build import device, load_backbone, load_scorer, shard_ids
    from attune.data.ingest.compute import Work
    from attune.shards import own_threads

    return Work(
        device=device(),
        backbone=cache(lambda: load_backbone(plan.model)),
        scorers={name: cache(partial(load_scorer, scorer)) for name, scorer in plan.score_with.items()},
        ids=shard_ids(plan.parts),
        threads=own_threads(ours.world_size),
    )


def check_quick_rows(plan: PreparePlan, rules: Rules, generate: ImageGenerator) -> None:
    """What can be said of rows without opening an image, where a source knows all its rows by their names."""
    from attune.data.ingest.rules import check_rows
    from attune.data.quarantine import Quarantine

    source, config = plugins.load("sources", plan.source.name), plan.source.config
    if _rows_are_quick(source, config):
        with Quarantine(Paths(plan.profile).quarantine, plan.source.name) as quarantine:
            check_rows(source.read(config, plan.seed, generate, rules.quota), quarantine, rules)


def generate_images(
    plan: PreparePlan,
    work: Work,
    shards: Shards,
    ours: Shard,
    prompts: Sequence[str],
    ordinals: Sequence[int],
    desc: str,
) -> np.ndarray:
    """Images of the base model, uint8 (n, H, W, 3), generated by all processes; each batch is a shard."""
    import numpy as np
    import torch

    from attune.build import as_policy
    from attune.diffusion.generate import generate_batch
    from attune.shards import Content, compute_missing, shard_name

    policy = cache(lambda: as_policy(work.backbone()))

    def batch(rows: slice) -> Content:
        images = generate_batch(policy(), prompts[rows], ordinals[rows], plan.sampling, plan.seed)
        return {"images": torch.from_numpy(images)}, {}

    size = plan.sampling.batch_size
    parts = [slice(start, start + size) for start in range(0, len(prompts), size)]
    asked = [(list(prompts[rows]), list(map(int, ordinals[rows]))) for rows in parts]
    names = [f"generated/{shard_name(work.ids['generated'], *each)}" for each in asked]
    compute_missing({name: partial(batch, rows) for name, rows in zip(names, parts, strict=True)}, shards, ours, desc)
    return np.concatenate([shards.read(name)[0]["images"].numpy() for name in names])


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
