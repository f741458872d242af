"""Supervised fine-tuning: keep denoising the images people chose or liked.

The baseline every preference method must beat. Loss: mean squared error of epsilon, or of a flow's velocity, on those
images, no guidance. Cost per step: one policy forward and backward on B images.

Source of `min_snr`: Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", arXiv:2303.09556,
section 3.4.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor

from attune.config.schema import Float
from attune.config.settings import Lora
from attune.data.batches import ImageBatch
from attune.diffusion.noise import Draws
from attune.diffusion.noised import NoisedBatch, policy_error
from attune.diffusion.process import Level
from attune.distributed import Part
from attune.interfaces import Metrics
from attune.methods._given_images import GivenImagesConfig

if TYPE_CHECKING:
    from attune.diffusion.policy import Policy


class Config(GivenImagesConfig):
    """Defaults: no paper is followed; SPO's adapter and learning rate on 500 steps of 64 images."""

    lora: Lora | None = Field(Lora(rank=4), description="adapter; null = train every weight, in float32")
    lr: Float = Field(6e-5, gt=0, description="learning rate; SPO's")
    batches: int = Field(8000, ge=1, description="batches; 500 optimizer steps as accumulation stands")
    batch_size: int = Field(4, ge=1, description="liked images per batch, or pairs, whose chosen images are used")
    accumulation: int = Field(16, ge=1, description="batches per optimizer step; 64 images to a step")
    caption_dropout: Float = Field(
        0.0, ge=0, lt=1, description="share of images trained without their prompt; 0.1 is usual in pre-training"
    )
    min_snr: Float | None = Field(
        None,
        gt=0,
        description="gamma: times with a higher signal-to-noise ratio weigh gamma / ratio; paper: 5. Not of flows",
    )


def min_snr_weight(at: Level, gamma: float) -> Tensor:
    """min(SNR, gamma) / SNR of images at their levels, (B,): what their error of epsilon weighs."""
    return (gamma * at.sigma2 / at.alpha2).clamp(max=1).flatten()


class Method:
    consumes = "liked images"
    needs = ()

    def __init__(self, config: Config, policy: Policy):
        if config.min_snr is not None and policy.backbone.prediction_type == "flow":
            raise ValueError("min_snr: is for models that predict noise; a flow's times have model.density")
        self.config, self.policy = config, policy

    def minibatches(self, batch: ImageBatch, draws: Draws) -> Iterable[Part[NoisedBatch]]:
        t, noise = batch.draw_noise(self.policy.backbone.path, draws)
        cond = self.policy.drop_captions(batch.cond, self.config.caption_dropout, draws)
        yield Part(NoisedBatch(batch.latents, t, noise, cond), draws.n)

    def loss(self, minibatch: NoisedBatch) -> tuple[Tensor, Metrics]:
        error = policy_error(self.policy, minibatch, self.config.embedded_guidance)
        if self.config.min_snr is not None:
            at = self.policy.backbone.path.level(minibatch.t, minibatch.x_0)
            error = error * min_snr_weight(at, self.config.min_snr)
        loss = error.mean()
        return loss, {"loss": loss}
