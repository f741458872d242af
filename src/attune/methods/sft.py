"""Supervised fine-tuning: keep denoising the images people chose.

The baseline every preference method must beat. Loss: mean squared error of epsilon on chosen images, no
guidance. Cost per step: one policy forward and backward on B images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from attune.config import TrainingConfig
from attune.data.batches import PairBatch
from attune.diffusion import process
from attune.diffusion.losses import denoising_error
from attune.diffusion.policy import Policy
from attune.interfaces import Conditioning, Metrics


class Config(TrainingConfig):
    """Nothing beyond the loop's own settings."""


@dataclass(frozen=True)
class Noised:
    """Chosen latents pushed to timestep t by `noise`."""

    x_0: Tensor
    t: Tensor
    noise: Tensor
    cond: Conditioning


class Method:
    consumes = "pairs"

    def __init__(self, config: Config, policy: Policy):
        self.config, self.policy = config, policy

    def minibatches(self, batch: PairBatch, generator: torch.Generator) -> Iterable[Noised]:
        t, noise = batch.draw_noise(self.policy.backbone.alphas_cumprod, generator)
        yield Noised(batch.chosen, t, noise, batch.cond)

    def loss(self, minibatch: Noised) -> tuple[Tensor, Metrics]:
        m = minibatch
        a_t = process.at(self.policy.backbone.alphas_cumprod, m.t, m.x_0)
        x_t = process.add_noise(m.x_0, m.noise, a_t)
        loss = denoising_error(self.policy.predict_noise(x_t, m.t, m.cond), m.noise).mean()
        return loss, {"loss": loss}
