"""The diffusion process as pure functions: forward noising, DDIM and its transition density.

Notation: a_t = alphas_cumprod[t]. All functions take a_t as a tensor that broadcasts against latents (see
`extract`), latents are (B, C, h, w), timesteps long (B,).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def extract(alphas_cumprod: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """a_t for each row, shaped to broadcast against `like`: (B, 1, 1, 1)."""
    return alphas_cumprod.to(like.device)[t].to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def add_noise(x_0: Tensor, noise: Tensor, a_t: Tensor) -> Tensor:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise. Source: Ho et al. 2020, arXiv:2006.11239, eq. 4."""
    return a_t.sqrt() * x_0 + (1 - a_t).sqrt() * noise


def predict_x0(x_t: Tensor, noise_pred: Tensor, a_t: Tensor) -> Tensor:
    """The clean latents a noise prediction implies. Source: Song et al. 2021, arXiv:2010.02502, eq. 9."""
    return (x_t - (1 - a_t).sqrt() * noise_pred) / a_t.sqrt()


def velocity_to_noise(velocity: Tensor, x_t: Tensor, a_t: Tensor) -> Tensor:
    """Epsilon from a v-prediction. Source: Salimans and Ho 2022, arXiv:2202.00512, appendix D."""
    return a_t.sqrt() * velocity + (1 - a_t).sqrt() * x_t


def ddim_timesteps(n_train: int, steps: int) -> Tensor:
    """Timesteps of a DDIM run, first to last, spacing "leading" with offset 1: 951, 901, ..., 1 for 20 of 1000."""
    if not 1 <= steps < n_train:  # with n_train steps the offset of 1 would leave the schedule
        raise ValueError(f"sampling steps must lie in 1..{n_train - 1}, got {steps}")
    return torch.arange(steps - 1, -1, -1) * (n_train // steps) + 1


def previous_timestep(t: Tensor, n_train: int, steps: int) -> Tensor:
    """The timestep a DDIM step from t arrives at, never below 0."""
    return (t - n_train // steps).clamp(min=0)


def ddim_step(x_t: Tensor, noise_pred: Tensor, a_t: Tensor, a_prev: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x_prev given x_t. Source: Song et al. 2021, arXiv:2010.02502, eq. 12 and 16.

    Returns: mean (B, C, h, w); std broadcastable to it, 0 when eta is 0.
    """
    std = eta * ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)).clamp(min=0).sqrt()
    x_0 = predict_x0(x_t, noise_pred, a_t)
    mean = a_prev.sqrt() * x_0 + (1 - a_prev - std**2).clamp(min=0).sqrt() * noise_pred
    return mean, std


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log density of x, **mean over latent dimensions**, nats per dimension, (B,).

    The mean, not the sum, is the convention of the DDPO and SPO code: importance ratios are the D-th root of
    true density ratios, and SPO's clip range of 0.1 only makes sense with it.
    """
    density = -((x - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)
