"""Images of a policy, batch by batch, each with noise of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from attune.config.settings import Sampling
from attune.diffusion.ddim import sample
from attune.diffusion.noise import noise_seed, per_row_noise

if TYPE_CHECKING:
    from attune.diffusion.policy import Policy


class NonFiniteImageError(RuntimeError):
    """A denoiser or an autoencoder gave NaN or infinite values."""


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

    Raises:
        NonFiniteImageError: an image would hold values that are no number, which 8 bits would show as black.
    """
    starts = range(0, len(prompts), sampling.batch_size)
    images = []
    for start in tqdm(starts, desc=desc, unit="batch", disable=desc is None):
        rows = slice(start, start + sampling.batch_size)
        images.append(generate_batch(policy, prompts[rows], ordinals[rows], sampling, seed))
    return np.concatenate(images)


@torch.no_grad()
def generate_batch(
    policy: Policy, prompts: Sequence[str], ordinals: Sequence[int], sampling: Sampling, seed: int
) -> np.ndarray:
    """`generate_images` of a single batch."""
    seeds = [noise_seed(prompt, int(ordinal), seed) for prompt, ordinal in zip(prompts, ordinals, strict=True)]
    cond = policy.backbone.encode_prompts(prompts)
    latents = sample(policy, cond, per_row_noise(seeds), sampling.steps, sampling.eta, sampling.guidance_scale)
    _check_finite(latents, policy, prompts, "the denoiser", "model.dtype")
    pixels = policy.backbone.decode_latents(latents).clamp(0, 1) * 255
    _check_finite(pixels, policy, prompts, "the autoencoder", "model.vae_dtype")
    return pixels.round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _check_finite(values: Tensor, policy: Policy, prompts: Sequence[str], part: str, setting: str) -> None:
    """Raises NonFiniteImageError naming the first row, (B, ...), that is not finite, its prompt, and the model."""
    finite = torch.isfinite(values).flatten(1).all(1).tolist()
    if not all(finite):
        row = finite.index(False)
        model = policy.loaded_from or "the model"
        raise NonFiniteImageError(
            f"{model}: {part} gave values that are not finite for the prompt {prompts[row]!r:.120}; "
            f"if {setting} is float16 set bfloat16 or float32, else its weights are unusable"
        )
