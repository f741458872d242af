"""Losses several methods share, as pure functions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def denoising_error(noise_pred: Tensor, noise: Tensor) -> Tensor:
    """Squared error per sample, mean over latent dimensions, (B,)."""
    return F.mse_loss(noise_pred.float(), noise.float(), reduction="none").flatten(1).mean(1)


def preference_loss(logits: Tensor) -> Tensor:
    """-log sigmoid of each pair's logit (chosen minus rejected), (B,); ln 2 where policy equals reference.

    The mean must be taken of these logs, not inside them.
    """
    return -F.logsigmoid(logits)
