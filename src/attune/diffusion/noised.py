"""Images under noise, and how well a policy sees through it: what every method that denoises data starts from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attune.diffusion import process
from attune.diffusion.losses import denoising_error
from attune.diffusion.policy import Policy
from attune.interfaces import Conditioning


@dataclass(frozen=True)
class Noised:
    """Clean latents, and the timesteps and noise they are seen through: n rows, which are images or pairs.

    Of pairs, all tensors but `p_chosen` hold the preferred images first and then the others, (2n, ...).
    """

    x_0: Tensor
    t: Tensor
    noise: Tensor
    cond: Conditioning
    sides: int = 1  # images in a row: 2 = pairs
    p_chosen: Tensor | float = 1.0  # (n,) of pairs: probability that the preferred image is the better one

    @staticmethod
    def pairs(
        preferred: Tensor, other: Tensor, t: Tensor, noise: Tensor, cond: Conditioning, p_chosen: Tensor | float = 1.0
    ) -> Noised:
        """Both images of a pair (n, ...) under one timestep, noise and conditioning."""
        x_0 = torch.cat([preferred, other])
        return Noised(x_0, t.repeat(2), noise.repeat(2, 1, 1, 1), cond.repeat(2), 2, p_chosen)

    def __len__(self) -> int:
        return len(self.t) // self.sides

    def __getitem__(self, rows: slice) -> Noised:
        every = torch.arange(len(self.t)).view(self.sides, -1)[:, rows].flatten()
        p_chosen = self.p_chosen[rows] if isinstance(self.p_chosen, Tensor) else self.p_chosen
        cond = self.cond[every]
        return Noised(self.x_0[every], self.t[every], self.noise[every], cond, self.sides, p_chosen)


def policy_error(policy: Policy, m: Noised) -> Tensor:
    """Squared error of the policy's noise prediction for each image, mean over latent dimensions."""
    x_t = process.add_noise(m.x_0, m.noise, process.at(policy.backbone.alphas_cumprod, m.t, m.x_0))
    return denoising_error(policy.predict_noise(x_t, m.t, m.cond), m.noise)


def policy_and_reference_error(policy: Policy, m: Noised) -> tuple[Tensor, Tensor]:
    """`policy_error`, and without a graph that of the reference on the same noised images."""
    error = policy_error(policy, m)
    with policy.reference():
        return error, policy_error(policy, m)
