"""Supervised fine-tuning: keep denoising the images people chose.

The baseline every preference method must beat. Loss: mean squared error of epsilon on chosen images, no
guidance. Cost per step: one policy forward and backward on B images.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pydantic import Field
from torch import Tensor

from attune.config.schema import Float
from attune.config.settings import MethodConfig
from attune.data.batches import PairBatch
from attune.diffusion.noised import Noised, policy_error
from attune.diffusion.policy import Policy
from attune.interfaces import Metrics


class Config(MethodConfig):
    caption_dropout: Float = Field(0.0, ge=0, lt=1, description="share trained without their prompt; usual: 0.1")


class Method:
    consumes = "pairs"

    def __init__(self, config: Config, policy: Policy):
        self.config, self.policy = config, policy

    def minibatches(self, batch: PairBatch, generator: torch.Generator) -> Iterable[Noised]:
        t, noise = batch.draw_noise(self.policy.backbone.alphas_cumprod, generator)
        cond = self.policy.drop_captions(batch.cond, self.config.caption_dropout, generator)
        yield Noised(batch.chosen, t, noise, cond)

    def loss(self, minibatch: Noised) -> tuple[Tensor, Metrics]:
        loss = policy_error(self.policy, minibatch).mean()
        return loss, {"loss": loss}
