"""Diffusion-DPO: raise the likelihood of chosen images over rejected ones, relative to the base.

A diffusion model's likelihood is bounded by its denoising error, so the DPO log-ratio of an image becomes
(minus) how much better than the reference the policy denoises it. Both images of a pair share the timestep
and the noise, so the difference measures the pictures and not the draw. The loss of the margin is a choice
(`loss`), and so is how far labels are believed (`label_smoothing`, `ai_feedback`).

Source: Wallace et al. 2023, "Diffusion Model Alignment Using Direct Preference Optimization",
arXiv:2311.12908, eq. 14 (its beta T w(t) is absorbed in `beta`, as in the authors' code).
Cost per step: one policy and one reference forward, and one backward, on 2 B images.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from attune.config.schema import Float
from attune.config.settings import AIFeedback, MethodConfig
from attune.data.batches import PairBatch
from attune.diffusion.losses import expected_loss, hinge_loss, implicit_reward, ipo_loss, preference_loss, smoothed
from attune.diffusion.noised import Noised, policy_and_reference_error
from attune.diffusion.policy import Policy
from attune.interfaces import Metrics


class Config(MethodConfig):
    beta: Float = Field(gt=0, description="KL strength; the loss uses beta / 2. Paper: 2000 (SD 1.5), 5000 (SDXL)")
    caption_dropout: Float = Field(
        0.0, ge=0, lt=1, description="share trained without their prompt; authors' code: 0.2"
    )
    loss: Literal["sigmoid", "ipo", "hinge"] = Field("sigmoid", description="of the margin; sigmoid is the paper's")
    label_smoothing: Float = Field(0.0, ge=0, lt=0.5, description="share of labels taken to be flipped (cDPO)")
    ai_feedback: AIFeedback | None = Field(None, description="labels from a scorer, hard or soft; null = people's")


LOSSES = {"sigmoid": preference_loss, "ipo": ipo_loss, "hinge": hinge_loss}


class Method:
    consumes = "pairs"

    def __init__(self, config: Config, policy: Policy):
        self.config, self.policy = config, policy
        self.trained_on = (config.ai_feedback.scorer,) if config.ai_feedback else ()  # gains there are not held out

    def minibatches(self, batch: PairBatch, generator: torch.Generator) -> Iterable[Noised]:
        t, noise = batch.draw_noise(self.policy.backbone.alphas_cumprod, generator)
        cond = self.policy.drop_captions(batch.cond, self.config.caption_dropout, generator)
        yield Noised.pairs(batch.chosen, batch.rejected, t, noise, cond, batch.p_chosen)

    def loss(self, minibatch: Noised) -> tuple[Tensor, Metrics]:
        error, reference_error = policy_and_reference_error(self.policy, minibatch)
        chosen, rejected = implicit_reward(error, reference_error, self.config.beta).chunk(2)
        margin = chosen - rejected
        p_chosen = smoothed(minibatch.p_chosen, self.config.label_smoothing)
        loss = expected_loss(LOSSES[self.config.loss], margin, p_chosen).mean()
        return loss, {
            "loss": loss,
            "margin": margin.mean(),
            "accuracy": (margin > 0).float().mean(),
            "chosen_reward": chosen.mean(),
            "rejected_reward": rejected.mean(),
        }
