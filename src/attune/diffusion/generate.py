"""Painting images with a policy, batch by batch, each image's noise its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from attune.config.settings import Sampling
from attune.diffusion.ddim import per_row_normal, sample
from attune.diffusion.policy import Policy
from attune.evaluation.protocol import noise_seed


@torch.no_grad()
def paint(
    policy: Policy,
    prompts: Sequence[str],
    ordinals: Sequence[int],
    sampling: Sampling,
    seed: int,
    title: str | None,
) -> np.ndarray:
    """Images of prompts, uint8 (n, H, W, 3); `ordinals` tell images of the same prompt apart.

    The noise depends on prompt, ordinal and seed alone, so every model sees the same noise for the same
    prompt, in whatever batch or order. `title` names the progress bar; None for none.
    """
    images = []
    starts = range(0, len(prompts), sampling.batch_size)
    for start in tqdm(starts, desc=title, unit="batch", disable=title is None):
        some = list(prompts[start : start + sampling.batch_size])
        seeds = [noise_seed(p, int(o), seed) for p, o in zip(some, ordinals[start:], strict=False)]
        cond = policy.backbone.encode_prompts(some)
        latents = sample(policy, cond, per_row_normal(seeds), sampling.steps, sampling.eta, sampling.guidance_scale)
        pixels = policy.backbone.decode_latents(latents).clamp(0, 1) * 255
        images.append(pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(images)
