"""Generation of images: attune's, and diffusers' own pipeline (DDIM, guidance 5), with and without an adapter.

The pipeline is given the latents that attune starts from. It holds an adapter beside its weights, through peft
(`load_lora_weights`). Prompts are encoded in each call on both sides; safety checker and progress bar are off.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from plain import frozen_unet, frozen_vae, schedule
from speed_sides import Place, Side, base_policy, lora_policy, prompts
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from attune.config.settings import Sampling
from attune.diffusion.generate import generate_batch
from attune.diffusion.noise import noise_seed, per_row_noise

SEED, GUIDANCE = 0, 5.0


@contextmanager
def saved_lora(place: Place) -> Iterator[str | None]:
    """A folder with an adapter, if the row has one; made before a base is read, as two of them would be the peak."""
    with tempfile.TemporaryDirectory() as folder:
        if place.options["lora"]:
            lora_policy(place).save(Path(folder))
        yield folder if place.options["lora"] else None


def ours(place: Place) -> Side:
    """With options: `steps`, and whether there is a `lora`."""
    sampling = Sampling(steps=place.options["steps"], eta=0, guidance_scale=GUIDANCE, batch_size=place.n)
    with saved_lora(place) as folder:
        policy = base_policy(place)
        if folder:
            policy.load(folder)

    def step() -> Mapping[str, Tensor]:
        images = generate_batch(policy, prompts(place.n), range(place.n), sampling, SEED)
        return {"images": torch.from_numpy(images).float()}

    return Side(step)


def in_order_of_diffusers(place: Place) -> Side:
    """Options as of `ours`."""
    with saved_lora(place) as folder:
        pipeline = pipeline_of(place)
        if folder:
            pipeline.load_lora_weights(folder)
    seeds = [noise_seed(prompt, i, SEED) for i, prompt in enumerate(prompts(place.n))]
    start = per_row_noise(seeds)((place.n, 4, place.latent_side, place.latent_side))
    size = {"height": place.resolution, "width": place.resolution}
    run = {"num_inference_steps": place.options["steps"], "guidance_scale": GUIDANCE, "eta": 0.0, "output_type": "np"}

    def step() -> Mapping[str, Tensor]:
        latents = start.to(place.device, place.computes)
        images = pipeline(prompts(place.n), latents=latents, **size, **run).images
        return {"images": torch.from_numpy((images * 255).round())}

    return Side(step)


def pipeline_of(place: Place) -> StableDiffusionPipeline:
    """diffusers' pipeline of the base."""
    pipeline = StableDiffusionPipeline(
        unet=frozen_unet(place.folder, place.computes, place.device),
        vae=frozen_vae(place.folder, place.computes, place.device),
        text_encoder=CLIPTextModel.from_pretrained(place.folder / "text_encoder", dtype=place.computes),
        tokenizer=CLIPTokenizer.from_pretrained(place.folder / "tokenizer"),
        scheduler=schedule(place.folder),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(place.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
