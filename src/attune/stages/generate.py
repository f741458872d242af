"""Stage generate@<method>: held-out images, under the same prompts and noise for every model."""

from __future__ import annotations

import argparse
import json

from attune.config import Profile
from attune.stages.common import BASE, GENERATED, MODELS, PREPARED, stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", required=True, help="a method with an adapter under models/, or base")
    name = parser.parse_args().method
    with stage(f"generate@{name}", "model", "generate", method=name) as (profile, run):
        images = generate(name, profile)
        run.summary({"images": len(images)})


def generate(name: str, profile: Profile):
    """Paints test prompts and writes PNGs, their index and the protocol so far."""
    import pandas as pd
    from PIL import Image

    from attune.assembly import load_policy
    from attune.evaluation.protocol import Protocol, hash_prompts
    from attune.painting import paint

    settings = profile.generate
    table = pd.read_parquet(PREPARED / "prompts.parquet")
    prompts = table.prompt[table.split == "test"].head(settings.prompts).tolist()
    if len(prompts) < settings.prompts:
        raise SystemExit(f"generate.prompts: {settings.prompts} wanted, the test split has {len(prompts)}")
    policy = load_policy(profile)
    if name != BASE:
        policy.add_adapter(profile.lora.rank, profile.seed, profile.lora.targets)
        policy.load(MODELS / name)
    index = pd.DataFrame({"prompt": prompts}).merge(
        pd.DataFrame({"ordinal": range(settings.images_per_prompt)}), how="cross"
    )
    index["file"] = [f"{row:05d}.png" for row in range(len(index))]
    images = paint(
        policy,
        index.prompt.tolist(),
        index.ordinal.tolist(),
        settings.sampling,
        profile.seed,
        f"generate {name}",
    )
    folder = GENERATED / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, image in zip(index.file, images, strict=True):
        Image.fromarray(image).save(folder / file)
    index.to_parquet(folder / "index.parquet", index=False)
    protocol = Protocol(
        prompt_set_sha=hash_prompts(prompts),
        n_prompts=len(prompts),
        images_per_prompt=settings.images_per_prompt,
        sampler="ddim",
        steps=settings.sampling.steps,
        eta=settings.sampling.eta,
        guidance_scale=settings.sampling.guidance_scale,
        resolution=images.shape[1],
        dtype=profile.model.dtype,
        seed=profile.seed,
        scorers=(),
    )
    (folder / "protocol.json").write_text(json.dumps(protocol.to_dict(), indent=2) + "\n")
    return images


if __name__ == "__main__":
    main()
