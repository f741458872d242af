"""Drawing images from a policy: DDIM, with noise that belongs to a prompt and not to its place in a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attune.diffusion import process
from attune.diffusion.policy import Policy
from attune.interfaces import Conditioning

Normal = Callable[[tuple[int, ...]], Tensor]
"""Draws standard normal noise of a shape."""


def normal(generator: torch.Generator) -> Normal:
    """Noise from one generator."""
    return lambda shape: torch.randn(shape, generator=generator)


def per_row_normal(seeds: Sequence[int]) -> Normal:
    """Noise of B rows, each from its own seed: the same image whatever else is in the batch."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda shape: torch.stack([torch.randn(shape[1:], generator=g) for g in generators])


def on(device: torch.device, draw: Normal) -> Normal:
    """The same noise on a device: drawn on the CPU, so that every machine draws the same."""
    return lambda shape: draw(shape).to(device)


@torch.no_grad()
def sample(policy: Policy, cond: Conditioning, draw: Normal, steps: int, eta: float, guidance_scale: float) -> Tensor:
    """Latents (B, C, h, w) for B rows of conditioning, DDIM from pure noise."""
    schedule, draw = policy.backbone.alphas_cumprod, on(policy.device, draw)
    x_t = draw((len(cond), *policy.backbone.latent_shape))
    for t in process.ddim_timesteps(len(schedule), steps):
        rows = t.expand(len(cond))
        noise_pred = policy.predict_noise(x_t, rows, cond, guidance_scale)
        t_prev = process.previous_timestep(rows, len(schedule), steps)
        mean, std = process.ddim_step(
            x_t, noise_pred, process.at(schedule, rows, x_t), process.at(schedule, t_prev, x_t), eta
        )
        x_t = mean + std * draw(tuple(mean.shape)) if eta > 0 else mean
    return x_t
