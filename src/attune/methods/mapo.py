"""MaPO: raise the likelihood of chosen images, and widen its margin over rejected ones, without a reference.

Where the base model is far from what people like, a reference keeps the policy there. MaPO compares the policy's
own errors instead: a score that falls from 1 to 0 as the denoising error grows stands for the likelihood, and a
plain denoising loss on chosen images keeps the policy able to denoise.

Source: Hong et al. 2024, "Margin-aware Preference Optimization for Aligning Diffusion Models without Reference",
arXiv:2406.06424. Score, loss and defaults follow the authors' code, utils.py `compute_loss`, mapo-t2i/mapo.
Cost per step: one policy forward and one backward on 2 B images; no reference forward.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from attune.config.schema import Float
from attune.config.settings import Lora
from attune.data.batches import PairBatch
from attune.diffusion.losses import preference_loss
from attune.diffusion.noise import Draws
from attune.diffusion.noised import NoisedBatch, policy_error
from attune.distributed import Part
from attune.interfaces import Metrics
from attune.methods._given_images import GivenImagesConfig

if TYPE_CHECKING:
    from attune.diffusion.policy import Policy


class Config(GivenImagesConfig):
    """Defaults: the authors' LoRA script for SDXL, 2,000 steps of 128 pairs; they have none for SD 1.5."""

    lora: Lora | None = Field(
        Lora(rank=8), description="adapter; authors' code (SDXL): rank 8. null = train every weight"
    )
    lr: Float = Field(1e-5, gt=0, description="learning rate; authors' code (SDXL): 1e-5")
    batches: int = Field(64_000, ge=1, description="batches of pairs; authors' code (SDXL): 2,000 steps")
    batch_size: int = Field(4, ge=1, description="pairs per batch")
    accumulation: int = Field(32, ge=1, description="batches per optimizer step; authors' code (SDXL): 128 pairs")
    gradient_checkpointing: bool = Field(True, description="saves memory: activations are computed twice")
    beta: Float = Field(
        0.1, gt=0, description="weight of the margin's loss beside the denoising loss; authors' code (SDXL): 0.1"
    )
    snr: Float = Field(
        0.5, gt=0, description="constant in place of the signal-to-noise ratio, scales the error; authors' code: 0.5"
    )
    caption_dropout: Float = Field(
        0.0, ge=0, lt=1, description="share of pairs trained without their prompt; authors' code: 0"
    )


def score(error: Tensor, snr: float) -> Tensor:
    """phi = x / (exp(x) - 1) with x = snr e, (n,): 1 without error, 1 - x / 2 for small ones, 0 in the limit.

    Written with exp(-x), which a large error does not overflow.
    """
    x = snr * error
    return x * torch.exp(-x) / -torch.expm1(-x)


def mapo_loss(chosen_error: Tensor, margin: Tensor, beta: float) -> Tensor:
    """e_chosen - beta log sigmoid(m), (B,), of the margin m = T (phi_chosen - phi_rejected).

    T, the number of training timesteps, is in the margin because the one t drawn stands for all of them.
    """
    return chosen_error + beta * preference_loss(margin)


class Method:
    consumes = "pairs"
    needs = ()

    def __init__(self, config: Config, policy: Policy):
        self.config, self.policy = config, policy

    def minibatches(self, batch: PairBatch, draws: Draws) -> Iterable[Part[NoisedBatch]]:
        t, noise = batch.draw_noise(self.policy.backbone.path, draws)
        cond = self.policy.drop_captions(batch.cond, self.config.caption_dropout, draws)
        yield Part(NoisedBatch.pairs(batch.chosen, batch.rejected, t, noise, cond), draws.n)

    def loss(self, minibatch: NoisedBatch) -> tuple[Tensor, Metrics]:
        error = policy_error(self.policy, minibatch, self.config.embedded_guidance)
        chosen_error, rejected_error = error.chunk(2)
        phi_chosen, phi_rejected = score(error, self.config.snr).chunk(2)
        margin = self.policy.backbone.path.n_train * (phi_chosen - phi_rejected)
        loss = mapo_loss(chosen_error, margin, self.config.beta).mean()
        return loss, {
            "loss": loss,
            "margin": margin.mean(),
            "accuracy": (margin > 0).float().mean(),
            "chosen_error": chosen_error.mean(),
            "rejected_error": rejected_error.mean(),
        }
