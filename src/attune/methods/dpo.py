"""Diffusion-DPO: raise the likelihood of chosen images over rejected ones, relative to the base.

A diffusion model's likelihood is bounded by its denoising error, so the DPO log-ratio of an image becomes
(minus) how much better than the reference the policy denoises it. Both images of a pair share the timestep
and the noise, so the difference comes from the images and not from the noise. The loss of the margin is a choice
(`loss`), and so is how much labels are trusted (`label_smoothing`, `ai_feedback`).

Source: Wallace et al. 2023, "Diffusion Model Alignment Using Direct Preference Optimization",
arXiv:2311.12908, eq. 14 (its beta T w(t) is absorbed in `beta`, as in the authors' code).
Cost per step: one policy and one reference forward, and one backward, on 2 B images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor

from attune.config.schema import Float
from attune.config.settings import AIFeedback, Lora, MovingReference
from attune.data.batches import PairBatch
from attune.diffusion.losses import implicit_reward, smoothed
from attune.diffusion.noise import Draws
from attune.diffusion.noised import NoisedBatch
from attune.distributed import Part
from attune.interfaces import Metrics
from attune.methods._pair_losses import PairLossConfig, pair_errors, pair_loss

if TYPE_CHECKING:
    from attune.diffusion.policy import Policy


LOSS_AT_REFERENCE = math.log(2)
"""The loss while the policy equals its reference, of the default `loss`."""


class Config(PairLossConfig):
    """Defaults: the paper's training of SD 1.5, 2,000 steps of 2,048 pairs, section 5.1 and the authors' code."""

    lora: Lora | None = Field(None, description="null = train every weight, in float32, as the paper does")
    lr: Float = Field(2.048e-5, gt=0, description="learning rate; paper: 1e-8 times the 2,048 pairs of a step")
    warmup: int = Field(500, ge=0, description="optimizer steps of linear warm-up; authors' code: 500")
    batches: int = Field(512_000, ge=1, description="batches of pairs; paper: 2,000 steps")
    batch_size: int = Field(8, ge=1, description="pairs per batch")
    accumulation: int = Field(256, ge=1, description="batches per optimizer step; paper: 2,048 pairs to a step")
    gradient_checkpointing: bool = Field(True, description="saves memory: activations are computed twice")
    beta: Float = Field(
        2000.0, gt=0, description="strength of the KL penalty; the loss uses beta / 2. Paper: 2000 SD 1.5, 5000 SDXL"
    )
    caption_dropout: Float = Field(
        0.2, ge=0, lt=1, description="share of pairs trained without their prompt; authors' code: 0.2"
    )
    label_smoothing: Float = Field(
        0.0, ge=0, lt=0.5, description="share of labels taken to be wrong (conservative DPO); paper: 0"
    )
    ai_feedback: AIFeedback | None = Field(
        None, description="labels from a scorer beside people's or instead of them; null = people's alone"
    )

    reference: MovingReference | None = Field(
        None, description="lets the reference follow the policy, as Linear-DPO does; null = frozen, as the paper has it"
    )

    @property
    def trained_on(self) -> tuple[str, ...]:
        return (self.ai_feedback.scorer,) if self.ai_feedback else ()


class Method:
    consumes = "pairs"
    needs = ()

    def __init__(self, config: Config, policy: Policy):
        self.config, self.policy = config, policy
        if config.reference is not None:
            policy.move_reference(config.reference.ema_decay, config.reference.warmup)

    def minibatches(self, batch: PairBatch, draws: Draws) -> Iterable[Part[NoisedBatch]]:
        t, noise = batch.draw_noise(self.policy.backbone.path, draws)
        cond = self.policy.drop_captions(batch.cond, self.config.caption_dropout, draws)
        yield Part(NoisedBatch.pairs(batch.chosen, batch.rejected, t, noise, cond, batch.p_chosen), draws.n)

    def loss(self, minibatch: NoisedBatch) -> tuple[Tensor, Metrics]:
        error, reference_error, options = pair_errors(self.policy, minibatch, self.config)
        chosen, rejected = implicit_reward(error, reference_error, self.config.beta).chunk(2)
        margin = chosen - rejected
        p_chosen = smoothed(minibatch.p_chosen, self.config.label_smoothing)
        loss = pair_loss(self.config, error, margin, p_chosen)
        return loss, {
            "loss": loss,
            "margin": margin.mean(),
            "accuracy": (margin > 0).float().mean(),
            "chosen_reward": chosen.mean(),
            "rejected_reward": rejected.mean(),
            **options,
        }
