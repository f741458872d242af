"""Stage generate@<run>: images of test prompts, under the same prompts and noise for every model."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from attune.backbones._diffusers import sampler_name
from attune.config.plan import GeneratePlan
from attune.config.profile import BASE
from attune.paths import Paths
from attune.stages.common import launch, planned, shard_folder, stage
from attune.stop import stoppable

if TYPE_CHECKING:
    import pandas as pd

    from attune.diffusion.policy import Policy
    from attune.distributed import Shard
    from attune.evaluation.protocol import Protocol
    from attune.shards import Content


def main() -> None:
    plan = planned(GeneratePlan, "generate")
    launch("attune.stages.generate")
    settings = {"model": plan.model.model_dump(), "seed": plan.seed, "generate": plan.generate.model_dump()}
    kept = shard_folder(f"generate-{plan.profile}-{plan.run}", plan)
    with kept as folder, stage(f"generate@{plan.run}", plan, settings, folder, method=plan.run) as run:
        run.summary({"images": generate(plan, folder.folder)})


def generate(plan: GeneratePlan, kept: Path) -> int:
    """Generates images of test prompts and writes them, their index and the protocol so far; returns their number.

    Args:
        kept: folder for the shards, each a batch of images.
    """
    from attune.build import shard
    from attune.evaluation.images import write_images
    from attune.shards import Shards, compute_missing, process_group

    paths, index, ours, shards = Paths(plan.profile), image_index(plan), shard(), Shards(kept)
    tasks = batches(plan, index, ours)
    with process_group(ours):
        compute_missing(tasks, shards, ours, f"generate {plan.run}")
    if not ours.is_main_process:
        return len(index)
    folder = paths.generated(plan.run)
    folder.mkdir(parents=True, exist_ok=True)
    index["file"] = write_images(folder, (shards.read(name)[0] for name in tasks), len(index))
    index.to_parquet(folder / "index.parquet", index=False)
    describe(plan, index, folder)
    return len(index)


def batches(plan: GeneratePlan, index: pd.DataFrame, ours: Shard) -> dict[str, Callable[[], Content]]:
    """Shard -> what generates its images, as PNG. The model is loaded when the first is asked for."""
    import numpy as np
    import torch

    from attune.build import shard_ids
    from attune.diffusion.generate import generate_batch
    from attune.evaluation.images import png
    from attune.files import digest
    from attune.shards import in_order, own_threads, shard_name

    policy, size, seed = cache(lambda: load_model(plan)), plan.generate.sampling.batch_size, plan.seed
    source = model_of(plan)
    own = digest(Path(source)) if source is not None and Path(source).exists() else source
    identity = [shard_ids(plan.parts)["images"], own]

    def batch(rows: pd.DataFrame) -> Content:
        images = generate_batch(policy(), rows.prompt.tolist(), rows.ordinal.tolist(), plan.generate.sampling, seed)
        files = in_order(png, images, own_threads(ours.world_size))
        data = (torch.from_numpy(np.frombuffer(file, np.uint8).copy()) for file in files)
        return {f"{row:09d}": one for row, one in zip(rows.index, data, strict=True)}, {}

    parts = (index.iloc[start : start + size] for start in range(0, len(index), size))
    return {
        shard_name(identity, rows.index[0], rows.prompt.tolist(), rows.ordinal.tolist()): partial(batch, rows)
        for rows in parts
    }


def load_model(plan: GeneratePlan) -> Policy:
    """The run's model."""
    from attune.build import load_policy

    policy = load_policy(plan.model)
    if (source := model_of(plan)) is not None:
        policy.load(source, may_be_zero=source == str(Paths(plan.profile).model(plan.run)))
    return policy


def describe(plan: GeneratePlan, index: pd.DataFrame, folder: Path) -> None:
    """Writes how the images were made, and with what."""
    from attune.diffusion.lora_files import model_identity
    from attune.evaluation.images import read_images
    from attune.evaluation.protocol import MODEL
    from attune.evaluation.scoring import MADE_WITH, versions_and_device

    source = model_of(plan)
    generated_by = {} if source is None else {MODEL: model_identity(source)}
    side = read_images(folder, index.file.tolist()[:1]).shape[1]
    protocol = generation_protocol(plan, index.prompt.unique().tolist(), side)
    (folder / "protocol.json").write_text(json.dumps(protocol.to_dict(), indent=2) + "\n")
    (folder / MADE_WITH).write_text(json.dumps(versions_and_device() | generated_by, indent=2) + "\n")


def model_of(plan: GeneratePlan) -> str | None:
    """Where the run's model is: its own folder, a released model, or None for the base as it is."""
    folder = Paths(plan.profile).model(plan.run)
    made = json.loads((folder / "run.json").read_text())
    if made["from"] is not None:
        return made["from"]
    return None if plan.run == BASE else str(folder)


def image_index(plan: GeneratePlan) -> pd.DataFrame:
    """A row per image: prompt, ordinal."""
    import pandas as pd

    wanted = plan.generate.prompts
    table = pd.read_parquet(Paths(plan.profile).prepared / "test_prompts.parquet")
    prompts = table.prompt.head(wanted).tolist()
    if len(prompts) < wanted:
        raise SystemExit(f"generate.prompts: {wanted} wanted, the test split has {len(prompts)}: lower it")
    ordinals = pd.DataFrame({"ordinal": range(plan.generate.images_per_prompt)})
    return pd.DataFrame({"prompt": prompts}).merge(ordinals, how="cross")


def generation_protocol(plan: GeneratePlan, prompts: list[str], resolution: int) -> Protocol:
    """How these images were made; evaluate adds who scored them."""
    from attune.evaluation.protocol import Protocol, autoencoder_identity, hash_prompts

    sampling = plan.generate.sampling
    return Protocol(
        prompt_set_sha=hash_prompts(prompts),
        n_prompts=len(prompts),
        images_per_prompt=plan.generate.images_per_prompt,
        sampler=sampler_name(plan.model, plan.generate.sampling.eta).lower(),
        steps=sampling.steps,
        eta=sampling.eta,
        guidance_scale=sampling.guidance_scale,
        resolution=resolution,
        dtype=plan.model.dtype,
        seed=plan.seed,
        scorers=(),
        autoencoder=autoencoder_identity(plan.model),
    )


if __name__ == "__main__":
    with stoppable("generate"):
        main()
