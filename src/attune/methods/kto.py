"""Diffusion-KTO: raise the utility of liked images, lower that of disliked ones, each image by itself.

No pair is needed: an image is judged against a reference point, the mean implicit reward of its batch, through a
utility that saturates on both sides, as Kahneman and Tversky found people's to do. Pairs are taken apart here:
the chosen image is liked, the rejected one disliked, and each has its own timestep, noise and caption dropout.

Source: Li et al. 2024, "Aligning Diffusion Models by Optimizing Human Utility", arXiv:2404.04465; authors' code:
train_kto_sd_v1.5.py, jacklishufan/diffusion-kto, whose beta has no factor 1/2. Differences: docs/methods/kto.md.
Cost per step: one policy and one reference forward, and one backward, on 2 B images.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from attune.config.schema import Float
from attune.config.settings import MethodConfig
from attune.data.batches import PairBatch
from attune.diffusion.noised import Noised, policy_and_reference_error
from attune.diffusion.policy import Policy
from attune.interfaces import Metrics


class Config(MethodConfig):
    beta: Float = Field(gt=0, description="strength of the implicit reward, no factor 1/2; authors' code: 1000")
    lambda_desirable: Float = Field(1.0, ge=0, description="weight of liked images")
    lambda_undesirable: Float = Field(1.0, ge=0, description="weight of disliked images")
    utility: Literal["kahneman_tversky", "loss_averse", "risk_seeking"] = Field(
        "kahneman_tversky", description="kahneman_tversky is the paper's choice"
    )
    caption_dropout: Float = Field(
        0.0, ge=0, lt=1, description="share trained without their prompt; authors' code: 0.2"
    )


UTILITIES = {
    "kahneman_tversky": torch.sigmoid,  # flat for great gains and great losses
    "loss_averse": F.logsigmoid,  # concave
    "risk_seeking": lambda x: -F.logsigmoid(-x),  # convex
}


def reference_point(reward: Tensor) -> Tensor:
    """z_ref, a scalar without gradient: the batch's mean implicit reward, which estimates a KL and so is not below 0.

    Source: arXiv:2404.04465, section 4; Ethayarajh et al. 2024 (KTO), arXiv:2402.01306, clamps it likewise.
    """
    return reward.detach().mean().clamp(min=0)


def kto_loss(gain: Tensor, liked: Tensor, utility: str, lambda_desirable: float, lambda_undesirable: float) -> Tensor:
    """lambda (1 - U(gain)) of liked images and lambda (1 - U(-gain)) of disliked ones, (n,).

    Args:
        gain: implicit reward minus z_ref, nats, (n,).
        liked: (n,) bool; chooses sign and lambda.
    """
    weight = torch.where(liked, lambda_desirable, lambda_undesirable)
    return weight * (1 - UTILITIES[utility](torch.where(liked, gain, -gain)))


class Method:
    consumes = "pairs"

    def __init__(self, config: Config, policy: Policy):
        self.config, self.policy = config, policy

    def minibatches(self, batch: PairBatch, generator: torch.Generator) -> Iterable[Noised]:
        t, noise = batch.draw_noise(self.policy.backbone.alphas_cumprod, generator, per_pair=2)
        cond = self.policy.drop_captions(batch.cond.repeat(2), self.config.caption_dropout, generator)
        yield Noised(torch.cat([batch.chosen, batch.rejected]), t, noise, cond, sides=2)

    def loss(self, minibatch: Noised) -> tuple[Tensor, Metrics]:
        c = self.config
        error, reference_error = policy_and_reference_error(self.policy, minibatch)
        reward = c.beta * (reference_error - error)
        liked = torch.arange(len(reward), device=reward.device) < len(minibatch)
        z_ref = reference_point(self.policy.shard.gather(reward))
        loss = kto_loss(reward - z_ref, liked, c.utility, c.lambda_desirable, c.lambda_undesirable).mean()
        return loss, {
            "loss": loss,
            "z_ref": z_ref,
            "accuracy": ((reward > z_ref) == liked).float().mean(),
            "liked_reward": reward[liked].mean(),
            "disliked_reward": reward[~liked].mean(),
        }
