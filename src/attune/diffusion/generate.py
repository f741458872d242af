"""Images of a policy, batch by batch, each with noise of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from attune.config.settings import Sampling
from attune.diffusion.ddim import sample
from attune.diffusion.noise import noise_seed, per_row_noise

if TYPE_CHECKING:
    from attune.diffusion.policy import Policy


@torch.no_grad()
def generate_images(
    policy: Policy,
    prompts: Sequence[str],
    ordinals: Sequence[int],
    sampling: Sampling,
    seed: int,
    desc: str | None,
) -> np.ndarray:
    """Images of prompts, uint8 (n, H, W, 3).

    The noise depends on prompt, ordinal and seed alone, so every model sees the same noise for the same
    prompt, in whatever batch or order.

    Args:
        ordinals: (n,), tell images of the same prompt apart.
        desc: name of the progress bar; None for no bar.
    """
    images = []
    starts = range(0, len(prompts), sampling.batch_size)
    for start in tqdm(starts, desc=desc, unit="batch", disable=desc is None):
        some = list(prompts[start : start + sampling.batch_size])
        seeds = [noise_seed(p, int(o), seed) for p, o in zip(some, ordinals[start:], strict=False)]
        cond = policy.backbone.encode_prompts(some)
        latents = sample(policy, cond, per_row_noise(seeds), sampling.steps, sampling.eta, sampling.guidance_scale)
        pixels = policy.backbone.decode_latents(latents).clamp(0, 1) * 255
        images.append(pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(images)
