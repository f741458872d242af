"""Diffusion-KTO: raise the utility of liked images, lower that of disliked ones, each image by itself.

No pair is needed, and there may be more likes than dislikes: an image's implicit reward is compared with a reference
point, the mean over its batch, through a utility that saturates for great gains and losses (Kahneman and Tversky's
model of people). A pair counts as two images: the chosen one is liked, the rejected one disliked. Each image has its
own timestep, noise and caption dropout.

Source: Li et al. 2024, "Aligning Diffusion Models by Optimizing Human Utility", arXiv:2404.04465; authors' code:
train_kto_sd_v1.5.py, jacklishufan/diffusion-kto, whose beta has no factor 1/2. Differences: docs/methods/kto.md.
Cost per step: one policy and one reference forward, and one backward, on B images, 2 B of B pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from attune.config.schema import Float
from attune.config.settings import Lora
from attune.data.batches import ImageBatch
from attune.diffusion.noise import Draws
from attune.diffusion.noised import NoisedBatch, policy_and_reference_error
from attune.distributed import Part
from attune.interfaces import Metrics
from attune.methods._given_images import GivenImagesConfig

if TYPE_CHECKING:
    from attune.diffusion.policy import Policy


class Config(GivenImagesConfig):
    """Defaults: the authors' exps/example.sh for SD 1.5, 20,000 steps of 2,048 images."""

    lora: Lora | None = Field(None, description="null = train every weight, in float32, as the authors do")
    lr: Float = Field(1e-7, gt=0, description="learning rate; authors' code: 1e-7")
    warmup: int = Field(200, ge=0, description="optimizer steps of linear warm-up; authors' code: 200")
    batches: int = Field(2_560_000, ge=1, description="batches; authors' code: 20,000 steps")
    batch_size: int = Field(8, ge=1, description="images per batch, or pairs, which are two images each")
    accumulation: int = Field(128, ge=1, description="batches per optimizer step; of pairs 2,048 images to a step")
    gradient_checkpointing: bool = Field(True, description="saves memory: activations are computed twice")
    beta: Float = Field(
        1000.0, gt=0, description="strength of the implicit reward, without a factor 1/2; authors' code: 1000"
    )
    lambda_desirable: Float = Field(
        1.6, ge=0, description="weight of liked images; the authors draw a liked image four times of five"
    )
    lambda_undesirable: Float = Field(0.4, ge=0, description="weight of disliked images, drawn once of five times")
    utility: Literal["kahneman_tversky", "loss_averse", "risk_seeking"] = Field(
        "kahneman_tversky", description="utility function of gains and losses; kahneman_tversky is the paper's choice"
    )
    caption_dropout: Float = Field(
        0.2, ge=0, lt=1, description="share of images trained without their prompt; authors' code: 0.2"
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


RECOMMENDED_BALANCE = (1.0, 4 / 3)
"""Weight of all liked images over that of all disliked ones: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.2."""
FAR_BALANCE = (0.5, 4.0)
"""Beyond it the plan says so. The authors of Diffusion-KTO draw four liked images to one disliked, which is 4."""


def advice(config: Config, liked: int, disliked: int) -> str | None:
    """What to say of data with so many liked and disliked images; None if their weights are balanced well enough."""
    against = disliked * config.lambda_undesirable
    balance = liked * config.lambda_desirable / against if against else math.inf
    if FAR_BALANCE[0] <= balance <= FAR_BALANCE[1] or not liked or not disliked:
        return None
    return (
        f"{liked} liked images of weight {config.lambda_desirable:g} against {disliked} disliked ones of weight "
        f"{config.lambda_undesirable:g} are {balance:.3g} to 1; {RECOMMENDED_BALANCE[0]:g} to "
        f"{RECOMMENDED_BALANCE[1]:.3g} is recommended: set lambda_desirable and lambda_undesirable"
    )


class Method:
    consumes = "images"
    needs = ()

    def __init__(self, config: Config, policy: Policy):
        self.config, self.policy = config, policy

    def minibatches(self, batch: ImageBatch, draws: Draws) -> Iterable[Part[NoisedBatch]]:
        t, noise = batch.draw_noise(self.policy.backbone.path, draws)
        cond = self.policy.drop_captions(batch.cond, self.config.caption_dropout, draws)
        yield Part(NoisedBatch(batch.latents, t, noise, cond, liked=batch.liked), draws.n)

    def loss(self, minibatch: NoisedBatch) -> tuple[Tensor, Metrics]:
        c = self.config
        error, reference_error = policy_and_reference_error(self.policy, minibatch, c.embedded_guidance)
        reward = c.beta * (reference_error - error)
        liked = minibatch.liked
        if liked is None:
            raise ValueError("KTO learns from images with verdicts, and this minibatch has none")
        rewards, likes = self.policy.shard.gather(reward), self.policy.shard.gather(liked.float()) > 0
        z_ref = reference_point(rewards)
        loss = kto_loss(reward - z_ref, liked, c.utility, c.lambda_desirable, c.lambda_undesirable).mean()
        return loss, {
            "loss": loss,
            "z_ref": z_ref,
            "accuracy": ((reward > z_ref) == liked).float().mean(),
            "liked_reward": mean_or_zero(rewards[likes]),
            "disliked_reward": mean_or_zero(rewards[~likes]),
        }


def mean_or_zero(values: Tensor) -> Tensor:
    """The mean; 0 of a batch that happens to have no image of the kind."""
    return values.mean() if len(values) else values.new_zeros(())
