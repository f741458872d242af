"""The diffusion process as pure functions: noising, the general sampling step and its transition density.

x_t = alpha x_0 + sigma noise, on either of two paths: variance-preserving (VP, Stable Diffusion 1 to XL), where
alpha^2 = alphas_cumprod[t] and sigma^2 = 1 - alpha^2, or the straight line of flow matching (Stable Diffusion 3, FLUX),
where alpha = 1 - s and sigma = s. Latents are (B, C, h, w); a `Level` broadcasts against them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Level(NamedTuple):
    """How much of the image and how much noise there is in x_t, as squares; each broadcasts against latents.

    Squares, because a VP schedule states them. Those of a flow lose nothing: the root of a rounded square is exact.
    """

    alpha2: Tensor
    sigma2: Tensor

    @property
    def alpha(self) -> Tensor:
        return self.alpha2.sqrt()

    @property
    def sigma(self) -> Tensor:
        return self.sigma2.sqrt()


def vp_level(alphas_cumprod: Tensor, t: Tensor, like: Tensor) -> Level:
    """The level at whole timesteps t of a schedule, in the dtype of `like`: (B, 1, 1, 1) each.

    Source: Ho et al. 2020, arXiv:2006.11239, eq. 4.
    """
    a_t = alphas_cumprod.to(like.device)[t].to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
    return Level(a_t, 1 - a_t)


def flow_level(s: Tensor, like: Tensor) -> Level:
    """The level at s, 0 (image) to 1 (noise), of a straight line, in the dtype of `like`: (B, 1, 1, 1) each.

    Source: Liu et al. 2022, arXiv:2209.03003, eq. 1; with the noise at 1, Esser et al. 2024, arXiv:2403.03206, eq. 13.
    """
    s = s.to(like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1))
    return Level((1 - s) ** 2, s**2)


def add_noise(x_0: Tensor, noise: Tensor, at: Level) -> Tensor:
    """x_t = alpha x_0 + sigma noise."""
    return at.alpha * x_0 + at.sigma * noise


def predict_x0(x_t: Tensor, noise_pred: Tensor, at: Level) -> Tensor:
    """The clean latents a noise prediction implies. Source: Song et al. 2021, arXiv:2010.02502, eq. 9."""
    return (x_t - at.sigma * noise_pred) / at.alpha


def velocity_to_noise(velocity: Tensor, x_t: Tensor, at: Level) -> Tensor:
    """Epsilon from a VP model's v = alpha noise - sigma x_0. Source: Salimans and Ho 2022, arXiv:2202.00512, app. D."""
    return at.alpha * velocity + at.sigma * x_t


def flow_to_x0_and_noise(velocity: Tensor, x_t: Tensor, at: Level) -> tuple[Tensor, Tensor]:
    """Clean latents and noise from a flow's velocity noise - x_0; nothing is divided by, so s = 0 and 1 are allowed."""
    return x_t - at.sigma * velocity, x_t + at.alpha * velocity


def ddim_timesteps(n_train: int, steps: int) -> Tensor:
    """The steps + 1 timesteps of a DDIM run on a VP schedule, spacing "leading" with offset 1, and 0 as the last.

    951, 901, ..., 1, 0 for 20 of 1000. Raises ValueError if they are too many.
    """
    if not 1 <= steps < n_train:  # with n_train steps the offset of 1 would leave the schedule
        raise ValueError(f"sampling steps must lie in 1..{n_train - 1}, got {steps}")
    visited = torch.arange(steps - 1, -1, -1) * (n_train // steps) + 1
    return torch.cat([visited, torch.zeros(1, dtype=visited.dtype)])


def time_after(times: Tensor, t: Tensor) -> Tensor:
    """For each t, above the last of `times`, the first of these falling times that lies below it; same shape as t."""
    times = times.to(t.device)
    return times[torch.searchsorted(-times, -t.contiguous(), right=True)]


def ddim_step(x_0: Tensor, noise: Tensor, at: Level, to: Level, eta: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents at level `to`, given those at level `at` and what they predict.

    std = eta (sigma' / sigma) sqrt(sigma^2 - (alpha sigma' / alpha')^2), the root being the noise between the levels;
    mean = alpha' x_0 + sqrt(sigma'^2 - std^2) noise. The marginals of the path are kept at every eta; eta 0 is the
    Euler step of a flow. std is 0 where `to` is the image itself (sigma' = 0). `at` may be pure noise (alpha = 0).

    Source: Song et al. 2021, arXiv:2010.02502, eq. 7, 12 and 16; of any path, Kingma et al. 2021, arXiv:2107.00630,
    eq. 20 to 24. The squares' sums are 1 on VP, which leaves eq. 16 as it is printed, to the last bit.

    Args:
        x_0: predicted clean latents (B, C, h, w).
        noise: predicted noise.

    Returns: mean (B, C, h, w); std broadcastable to it.
    """
    between = (at.alpha2 + at.sigma2) - at.alpha2 / to.alpha2 * (to.alpha2 + to.sigma2)
    std = eta * (to.sigma2 / at.sigma2 * between).clamp(min=0).sqrt()
    mean = to.alpha * x_0 + (to.sigma2 - std**2).clamp(min=0).sqrt() * noise
    return mean, std


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log density of x, **mean over latent dimensions**, nats per dimension, (B,); std must be above 0.

    The mean, not the sum, is the convention of the DDPO and SPO code: importance ratios are the D-th root of
    true density ratios, and SPO's clip range of 0.1 only makes sense with it.
    """
    density = -((x - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)
