"""Stage generate@<method>: held-out images, under the same prompts and noise for every model."""

from __future__ import annotations

import argparse
import json

from attune.config.profile import Profile
from attune.paths import GENERATED, MODELS, PREPARED
from attune.stages.common import BASE, stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", required=True, help="a run trained into models/, base, or a name for --adapter")
    parser.add_argument("--adapter", help="a LoRA file, a folder, or owner/name[/file][@revision] on the hub")
    parser.add_argument("--revision", help="hub commit of --adapter, if not written behind an @")
    given = parser.parse_args()
    name, source = given.method, str(MODELS / given.method)
    if given.adapter:
        source = given.adapter if given.revision is None else f"{given.adapter}@{given.revision}"
    with stage(f"generate@{name}", "model", "generate", method=name) as (profile, run):
        images = generate(name, profile, None if name == BASE else source)
        run.summary({"images": len(images)})


def generate(name: str, profile: Profile, source: str | None):
    """Paints test prompts and writes PNGs, their index and the protocol so far.

    Args:
        source: what was learnt, `place[@revision]`; None = the base as it is.
    """
    from PIL import Image

    from attune.build import load_policy
    from attune.diffusion.generate import generate_images

    index = held_out_index(profile)
    policy = load_policy(profile)
    if source is not None:
        place, _, revision = source.partition("@")
        policy.load(place, revision or None)
    prompts, ordinals = index.prompt.tolist(), index.ordinal.tolist()
    images = generate_images(policy, prompts, ordinals, profile.generate.sampling, profile.seed, f"generate {name}")
    folder = GENERATED / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, image in zip(index.file, images, strict=True):
        Image.fromarray(image).save(folder / file)
    index.to_parquet(folder / "index.parquet", index=False)
    protocol = protocol_so_far(profile, index.prompt.unique().tolist(), images.shape[1])
    (folder / "protocol.json").write_text(json.dumps(protocol.to_dict(), indent=2) + "\n")
    return images


def held_out_index(profile: Profile):
    """A row per image to paint: prompt, ordinal, file."""
    import pandas as pd

    settings = profile.generate
    table = pd.read_parquet(PREPARED / "prompts.parquet")
    prompts = table.prompt[table.split == "test"].head(settings.prompts).tolist()
    if len(prompts) < settings.prompts:
        raise SystemExit(f"generate.prompts: {settings.prompts} wanted, the test split has {len(prompts)}")
    ordinals = pd.DataFrame({"ordinal": range(settings.images_per_prompt)})
    index = pd.DataFrame({"prompt": prompts}).merge(ordinals, how="cross")
    index["file"] = [f"{row:05d}.png" for row in range(len(index))]
    return index


def protocol_so_far(profile: Profile, prompts: list[str], resolution: int):
    """How these images were made; evaluate adds who scored them."""
    from attune.evaluation.protocol import Protocol, hash_prompts

    settings = profile.generate
    return Protocol(
        prompt_set_sha=hash_prompts(prompts),
        n_prompts=len(prompts),
        images_per_prompt=settings.images_per_prompt,
        sampler="ddim",
        steps=settings.sampling.steps,
        eta=settings.sampling.eta,
        guidance_scale=settings.sampling.guidance_scale,
        resolution=resolution,
        dtype=profile.model.dtype,
        seed=profile.seed,
        scorers=(),
    )


if __name__ == "__main__":
    main()
