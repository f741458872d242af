"""Stage generate@<run>: images of test prompts, under the same prompts and noise for every model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from attune.config.plan import GeneratePlan
from attune.config.profile import BASE
from attune.paths import Paths
from attune.stages.common import planned, stage
from attune.stop import stoppable

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from attune.evaluation.protocol import Protocol


def main() -> None:
    plan = planned(GeneratePlan, "generate")
    settings = {"model": plan.model.model_dump(), "seed": plan.seed, "generate": plan.generate.model_dump()}
    with stage(f"generate@{plan.run}", plan, settings, method=plan.run) as run:
        run.summary({"images": len(generate(plan))})


def generate(plan: GeneratePlan) -> np.ndarray:
    """Generates images of test prompts and writes PNGs, their index and the protocol so far."""
    from PIL import Image

    from attune.build import load_policy
    from attune.diffusion.generate import generate_images
    from attune.diffusion.lora_files import model_identity
    from attune.evaluation.protocol import MODEL
    from attune.evaluation.scoring import MADE_WITH, versions_and_device

    paths = Paths(plan.profile)
    index = image_index(plan)
    policy, generated_by = load_policy(plan.model), {}
    if (source := model_of(plan)) is not None:
        policy.load(source, may_be_zero=source == str(paths.model(plan.run)))
        generated_by = {MODEL: model_identity(source)}
    prompts, ordinals = index.prompt.tolist(), index.ordinal.tolist()
    sampling, folder = plan.generate.sampling, paths.generated(plan.run)
    images = generate_images(policy, prompts, ordinals, sampling, plan.seed, f"generate {plan.run}")
    folder.mkdir(parents=True, exist_ok=True)
    for file, image in zip(index.file, images, strict=True):
        Image.fromarray(image).save(folder / file)
    index.to_parquet(folder / "index.parquet", index=False)
    protocol = generation_protocol(plan, index.prompt.unique().tolist(), images.shape[1])
    (folder / "protocol.json").write_text(json.dumps(protocol.to_dict(), indent=2) + "\n")
    (folder / MADE_WITH).write_text(json.dumps(versions_and_device() | generated_by, indent=2) + "\n")
    return images


def model_of(plan: GeneratePlan) -> str | None:
    """Where the run's model is: its own folder, a released model, or None for the base as it is."""
    folder = Paths(plan.profile).model(plan.run)
    made = json.loads((folder / "run.json").read_text())
    if made["from"] is not None:
        return made["from"]
    return None if plan.run == BASE else str(folder)


def image_index(plan: GeneratePlan) -> pd.DataFrame:
    """A row per image: prompt, ordinal, file."""
    import pandas as pd

    wanted = plan.generate.prompts
    table = pd.read_parquet(Paths(plan.profile).prepared / "test_prompts.parquet")
    prompts = table.prompt.head(wanted).tolist()
    if len(prompts) < wanted:
        raise SystemExit(f"generate.prompts: {wanted} wanted, the test split has {len(prompts)}: lower it")
    ordinals = pd.DataFrame({"ordinal": range(plan.generate.images_per_prompt)})
    index = pd.DataFrame({"prompt": prompts}).merge(ordinals, how="cross")
    index["file"] = [f"{row:05d}.png" for row in range(len(index))]
    return index


def generation_protocol(plan: GeneratePlan, prompts: list[str], resolution: int) -> Protocol:
    """How these images were made; evaluate adds who scored them."""
    from attune.evaluation.protocol import Protocol, autoencoder_identity, hash_prompts

    sampling = plan.generate.sampling
    return Protocol(
        prompt_set_sha=hash_prompts(prompts),
        n_prompts=len(prompts),
        images_per_prompt=plan.generate.images_per_prompt,
        sampler="ddim",
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
