"""SPIN-Diffusion: self-play. Tell real images from those that the policy itself sampled an iteration ago.

Each iteration is a game against the last: for the same prompt, the chosen image is the data's (that of
a pair, or a liked one), and the rejected one is sampled from the opponent, the policy as it was when the iteration
began, which is also the frozen reference.
No image need be compared by people: the data must only be better than the model's samples. An iteration is one
training; the next one continues from its model (`start`), and so plays against it.

Source: Yuan et al. 2024, "Self-Play Fine-Tuning of Diffusion Models for Text-to-Image Generation",
arXiv:2402.10210, algorithm 1 and eq. 4.9 in epsilon form (its beta_t is absorbed in `beta` / 2, as in Diffusion-DPO).
Opponents are sampled batch by batch and never stored, which is as cheap while no image is used twice.
Cost per step: `steps` denoiser samples, doubled by guidance, on B prompts; then one policy and one reference
forward, and one backward, on 2 B images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import Tensor

from attune.config.schema import Float
from attune.config.settings import Lora
from attune.data.batches import ImageBatch
from attune.diffusion.ddim import sample
from attune.diffusion.losses import implicit_reward, preference_loss
from attune.diffusion.noise import Draws
from attune.diffusion.noised import NoisedBatch, policy_and_reference_error
from attune.distributed import Part
from attune.interfaces import Conditioning, Metrics
from attune.methods._given_images import GivenImagesConfig

if TYPE_CHECKING:
    from attune.diffusion.policy import Policy


LOSS_AT_REFERENCE = math.log(2)
"""The loss while the policy equals its reference."""


class Config(GivenImagesConfig):
    """Defaults: the paper's first of three iterations on SD 1.5, 50 steps of 2,048 images.

    Its second has 500 steps at beta 5000, its third 200 at beta 5000 and lr 5e-8.
    """

    lora: Lora | None = Field(None, description="null = train every weight, in float32, as the paper does")
    lr: Float = Field(2e-5, gt=0, description="learning rate; paper: 2e-5, 2e-5 and 5e-8 in its three iterations")
    warmup: int = Field(200, ge=0, description="optimizer steps of linear warm-up; paper: 200")
    schedule: Literal["constant", "linear"] = Field(
        "linear", description="after warm-up; linear: down to 0 over the remaining batches, as in the paper"
    )
    batches: int = Field(12_800, ge=1, description="batches; paper: 50, 500 and 200 steps (50 here)")
    batch_size: int = Field(8, ge=1, description="liked images per batch, or pairs, whose chosen images are used")
    accumulation: int = Field(256, ge=1, description="batches per optimizer step; paper: 2,048 images to a step")
    gradient_checkpointing: bool = Field(True, description="saves memory: activations are computed twice")
    beta: Float = Field(
        2000.0, gt=0, description="strength of the KL penalty; the loss uses beta / 2. Paper: 2000, 5000 and 5000"
    )
    caption_dropout: Float = Field(0.0, ge=0, lt=1, description="share of pairs trained without their prompt")
    steps: int = Field(
        50, ge=1, le=999, description="DDIM steps of the opponent's images; not in the paper, 50 is diffusers' default"
    )
    eta: Float = Field(0.0, ge=0, le=1, description="noise of the opponent's images: 0 deterministic, 1 ancestral")
    guidance_scale: Float = Field(
        7.5, ge=0, description="classifier-free guidance of the opponent's images, 1 = off; paper: 7.5"
    )


class Method:
    consumes = "liked images"
    needs = ()

    def __init__(self, config: Config, policy: Policy):
        self.config, self.policy = config, policy

    def minibatches(self, batch: ImageBatch, draws: Draws) -> Iterable[Part[NoisedBatch]]:
        real, opponents = batch.latents, self.opponents(batch.cond, draws)
        t, noise = batch.draw_noise(self.policy.backbone.path, draws)
        cond = self.policy.drop_captions(batch.cond, self.config.caption_dropout, draws)
        yield Part(NoisedBatch.pairs(real, opponents, t, noise, cond), draws.n)

    def opponents(self, cond: Conditioning, draws: Draws) -> Tensor:
        """Latents (B, C, h, w) sampled from the policy as it was at the start of this iteration."""
        c = self.config
        with self.policy.reference():
            return sample(self.policy, cond, draws.noise, c.steps, c.eta, c.guidance_scale)

    def loss(self, minibatch: NoisedBatch) -> tuple[Tensor, Metrics]:
        error, reference_error = policy_and_reference_error(self.policy, minibatch, self.config.embedded_guidance)
        real, opponent = implicit_reward(error, reference_error, self.config.beta).chunk(2)
        margin = real - opponent
        loss = preference_loss(margin).mean()
        return loss, {
            "loss": loss,
            "margin": margin.mean(),
            "accuracy": (margin > 0).float().mean(),
            "real_reward": real.mean(),
            "opponent_reward": opponent.mean(),
        }
