"""DiffusionNFT: learning from one's own images by the forward process; the good ones attract, the others repel.

Images are drawn of each prompt by the sampler without noise and scored by any reward. Each is noised again, and two
predictions are made of the policy's v and that of a slow copy of it, v_old:

    v+ = b v + (1 - b) v_old        v- = (1 + b) v_old - b v

v+ is pulled to the image with weight r, v- with weight 1 - r, r in [0, 1] being the image's standing among those of its
prompt. So a bad image pushes the policy away from it, without probabilities of steps, and with any sampler.

Source: Zheng et al. 2025, "DiffusionNFT: Online Diffusion Reinforcement with Forward Process", arXiv:2509.16117;
authors' code: NVlabs/DiffusionNFT 24af555.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attune.diffusion.path import Path
from attune.diffusion.process import Level


def standing(advantage: Tensor, clip: float) -> Tensor:
    """r (n,) in [0, 1]: clip(A / clip, -1, 1) / 2 + 1/2; 1/2 of an image like the mean of its prompt's."""
    return (advantage / clip).clamp(-1, 1) / 2 + 0.5


def weighed_error(image: Tensor, x_0: Tensor) -> Tensor:
    """Squared error of a predicted image over its mean absolute error without a gradient, (n,); means over dimensions.

    That makes errors at all times weigh alike; the divisor is 1e-5 at least.
    """
    scale = (image.double() - x_0.double()).abs().flatten(1).mean(1).clamp(min=1e-5).detach()
    return ((image - x_0) ** 2).flatten(1).mean(1) / scale


def nft_loss(
    path: Path, predicted: Tensor, old: Tensor, x_t: Tensor, at: Level, x_0: Tensor, r: Tensor, beta: float
) -> Tensor:
    """(r L+ + (1 - r) L-) / b, (n,): weighed errors of the images that v+ and v- imply. Eq. 6 of the paper.

    Without a gradient where the policy is the old one and r = 1/2.

    Args:
        predicted: the policy's v, or of other models its noise.
        old: that of the slow copy, without a gradient.
    """
    positive, negative = beta * predicted + (1 - beta) * old, (1 + beta) * old - beta * predicted
    pulled, pushed = (weighed_error(path.x0_and_noise(v, x_t, at)[0], x_0) for v in (positive, negative))
    return (r * pulled + (1 - r) * pushed) / beta


def divergence(predicted: Tensor, reference: Tensor) -> Tensor:
    """Squared difference of predictions, mean over dimensions, (n,)."""
    return ((predicted - reference) ** 2).flatten(1).mean(1)
