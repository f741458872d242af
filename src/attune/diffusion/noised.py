"""Noised images and a policy's error on them: where every method that learns from given images starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attune.diffusion import process
from attune.diffusion.losses import denoising_error
from attune.interfaces import Conditioning

if TYPE_CHECKING:
    from attune.diffusion.policy import Policy


@dataclass(frozen=True)
class NoisedBatch:
    """Clean latents, and the timesteps and noise to be added, of n images or n pairs.

    Of pairs, all tensors but `p_chosen` hold the preferred images first and then the others, (2n, ...).
    """

    x_0: Tensor
    t: Tensor
    noise: Tensor
    cond: Conditioning
    p_chosen: Tensor | float = 1.0  # (n,) of pairs: probability that the preferred image is the better one
    liked: Tensor | None = None  # bool, of every image; None where that does not matter

    @staticmethod
    def pairs(
        preferred: Tensor, other: Tensor, t: Tensor, noise: Tensor, cond: Conditioning, p_chosen: Tensor | float = 1.0
    ) -> NoisedBatch:
        """Both images of a pair (n, ...) under one timestep, noise and conditioning."""
        x_0 = torch.cat([preferred, other])
        return NoisedBatch(x_0, t.repeat(2), noise.repeat(2, 1, 1, 1), cond.repeat(2), p_chosen)


def prediction_and_target(policy: Policy, m: NoisedBatch, embedded_guidance: float = 1.0) -> tuple[Tensor, Tensor]:
    """What the policy predicts of each image, and what it should, in the path's target, (n, C, h, w).

    Args:
        embedded_guidance: what a denoiser that is told its guidance is told.

    Raises:
        ValueError: it is not 1, and the denoiser is not told its guidance.
    """
    if embedded_guidance != 1 and policy.backbone.guidance != "embedded":
        name = policy.backbone.model.backbone
        raise ValueError(f"embedded_guidance: {embedded_guidance:g}, but {name} is not told its guidance; set it to 1")
    path = policy.backbone.path
    x_t = process.add_noise(m.x_0, m.noise, path.level(m.t, m.x_0))
    return policy.predict(x_t, m.t, m.cond, embedded_guidance), path.target(m.x_0, m.noise)


def policy_error(policy: Policy, m: NoisedBatch, embedded_guidance: float = 1.0) -> Tensor:
    """Squared error of `prediction_and_target` of each image; mean over latent dimensions, (n,)."""
    return denoising_error(*prediction_and_target(policy, m, embedded_guidance))


def policy_and_reference_error(policy: Policy, m: NoisedBatch, embedded_guidance: float = 1.0) -> tuple[Tensor, Tensor]:
    """`policy_error`, and without a graph that of the reference on the same noised images."""
    error = policy_error(policy, m, embedded_guidance)
    with policy.reference():
        return error, policy_error(policy, m, embedded_guidance)
