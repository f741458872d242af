"""Flow-GRPO's sampling step in our terms: ours at eta 0, and a push along our noise."""

from __future__ import annotations

from torch import Tensor, where

from attune.diffusion import process
from attune.diffusion.path import Path


def flow_grpo_step(
    path: Path, velocity: Tensor, x: Tensor, s: Tensor, s_next: Tensor, second: float, noise_level: float
) -> tuple[Tensor, Tensor]:
    """Mean (B, C, h, w) and std (B, 1, 1, 1) of its step from s to s_next (B,).

    With g^2 = level^2 s / (1 - s): mean = our step at eta 0 + g^2 dt / (2 s) epsilon, std = g sqrt(-dt).

    Args:
        second: of the run's sigmas; at pure noise theirs divides by 1 - second in the place of 0.
    """
    now, to = path.level(path.n_train * s, x), path.level(path.n_train * s_next, x)
    x_0, noise = path.x0_and_noise(velocity, x, now)
    euler, no_noise = process.ddim_step(x_0, noise, now, to, eta=0.0)
    assert not no_noise.any()
    s, s_next = s.view(-1, 1, 1, 1), s_next.view(-1, 1, 1, 1)
    variance = noise_level**2 * s / (1 - where(s == 1, second, s))
    return euler + variance * (s_next - s) / (2 * s) * noise, (variance * (s - s_next)).sqrt()
