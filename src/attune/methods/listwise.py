"""Listwise preferences: all scored images of a prompt at a time, by a regression (LAIR) or by their order.

A pair says which of two images is better; scores of several say more. With the advantage s_i = e_ref,i - e_i, how much
better than the reference the policy denoises image i (squared errors, mean over latent dimensions), and rewards r:

    LAIR            L = -sum_i w_i s_i + (lambda / N) sum_i s_i^2,  w = softmax(r / tau) - 1 / N
    Plackett-Luce   L = -sum_i log( exp(R_i) / sum_{j >= i} exp(R_j) ),  R = (beta / 2) s, best image first

LAIR's minimum is at s_i = N w_i / (2 lambda), so it needs no reference to stay near; Plackett-Luce of two images is
Diffusion-DPO. The images of a prompt share the timestep and the noise.

Source: LAIR, arXiv:2605.26491; Plackett 1975 and Luce 1959, of language models Rafailov et al. 2023, arXiv:2305.18290,
appendix A.3. Neither has public code. Cost per step: one policy and one reference forward, and one backward, on all
images of B prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from attune.config.schema import Float
from attune.config.settings import Lora
from attune.data.batches import GroupBatch
from attune.diffusion.losses import implicit_reward
from attune.diffusion.noise import Draws
from attune.diffusion.noised import NoisedBatch, policy_and_reference_error
from attune.distributed import Part
from attune.interfaces import Metrics
from attune.methods._given_images import GivenImagesConfig

if TYPE_CHECKING:
    from attune.diffusion.policy import Policy


class Config(GivenImagesConfig):
    """Defaults: Diffusion-DPO's training of SD 1.5, whose 2,048 pairs are 1,024 prompts of four images."""

    lora: Lora | None = Field(None, description="null = train every weight, in float32")
    lr: Float = Field(2.048e-5, gt=0, description="learning rate; Diffusion-DPO's")
    warmup: int = Field(500, ge=0, description="optimizer steps of linear warm-up; Diffusion-DPO's")
    batches: int = Field(512_000, ge=1, description="batches of prompts")
    batch_size: int = Field(4, ge=1, description="prompts per batch, each with all images of its group")
    accumulation: int = Field(256, ge=1, description="batches per optimizer step")
    gradient_checkpointing: bool = Field(True, description="saves memory: activations are computed twice")
    scorer: str = Field("pickscore", description="a name in data.score_with, by whose scores images are better")
    images: int = Field(4, ge=3, description="images of a prompt at a time, at most; a prompt with more is two groups")
    loss: Literal["lair", "plackett_luce"] = Field(
        "lair", description="lair learns from differences of scores, plackett_luce from their order"
    )
    temperature: Float = Field(
        1.0, gt=0, description="tau of lair: score difference counted as 1; PickScore 1, cosines about 0.01"
    )
    ridge: Float = Field(
        100.0, gt=0, description="lambda of lair: the more, the nearer to the reference; nothing is published"
    )
    beta: Float = Field(2000.0, gt=0, description="of plackett_luce, which uses beta / 2, as dpo does")
    caption_dropout: Float = Field(0.2, ge=0, lt=1, description="share of prompts trained without their words")

    @property
    def trained_on(self) -> tuple[str, ...]:
        return (self.scorer,)


def lair_loss(advantage: Tensor, rewards: Tensor, temperature: float, ridge: float) -> Tensor:
    """-sum w s + (lambda / N) sum s^2 of one prompt's N images, a scalar; 0 at the reference, where its gradient is -w.

    Args:
        advantage: s (N,), reference's error minus the policy's.
        rewards: r (N,).
    """
    weight = torch.softmax(rewards / temperature, 0) - 1 / len(rewards)
    return -(weight * advantage).sum() + ridge * advantage.square().mean()


def plackett_luce_loss(implicit_rewards: Tensor, rewards: Tensor) -> Tensor:
    """-log of the probability that the images of one prompt are ranked as they are, a scalar; log N! at the reference.

    Of equal rewards the one that comes first is taken to be better.
    """
    ranked = implicit_rewards[rewards.argsort(descending=True, stable=True)]
    return (ranked.flip(0).logcumsumexp(0).flip(0) - ranked).sum()


@dataclass(frozen=True)
class NoisedGroups:
    """Noised images, the images of a prompt side by side, and their rewards; `sizes` are the images of each prompt."""

    noised: NoisedBatch
    rewards: Tensor
    sizes: Sequence[int]


class Method:
    consumes = "groups"
    needs = ()

    def __init__(self, config: Config, policy: Policy):
        self.config, self.policy = config, policy

    def minibatches(self, batch: GroupBatch, draws: Draws) -> Iterable[Part[NoisedGroups]]:
        t, noise = batch.draw_noise(self.policy.backbone.path, draws)
        cond = self.policy.drop_captions(batch.cond, self.config.caption_dropout, draws)
        rows = batch.prompt_rows
        noised = NoisedBatch(batch.latents, t[rows.to(t.device)], noise[rows], cond[rows])
        yield Part(NoisedGroups(noised, batch.scores_by(self.config.scorer), batch.sizes), draws.n)

    def loss(self, minibatch: NoisedGroups) -> tuple[Tensor, Metrics]:
        error, reference_error = policy_and_reference_error(
            self.policy, minibatch.noised, self.config.embedded_guidance
        )
        advantage, rewards = (
            (values.split(minibatch.sizes)) for values in (reference_error - error, minibatch.rewards)
        )
        loss = torch.stack([self._of_group(*each) for each in zip(advantage, rewards, strict=True)]).mean()
        right = torch.stack([in_order(*each) for each in zip(advantage, rewards, strict=True)])
        return loss, {"loss": loss, "accuracy": right.mean(), "advantage": (reference_error - error).mean()}

    def _of_group(self, advantage: Tensor, rewards: Tensor) -> Tensor:
        c = self.config
        if c.loss == "lair":
            return lair_loss(advantage, rewards, c.temperature, c.ridge)
        return plackett_luce_loss(implicit_reward(-advantage, torch.zeros_like(advantage), c.beta), rewards)


def in_order(advantage: Tensor, rewards: Tensor) -> Tensor:
    """Share of a prompt's pairs of images that advantage and rewards order alike, of those with different rewards."""
    ours, theirs = (values[:, None] - values for values in (advantage, rewards))
    return (ours[theirs > 0] > 0).float().mean() if bool((theirs > 0).any()) else ours.new_zeros(())
