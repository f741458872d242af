"""SPIN-Diffusion: self-play. Tell real images from those the model painted itself an iteration ago.

Each iteration is a game against the last: for the same prompt, the chosen image is the data's, the rejected one
is painted by the opponent, the policy as it was when the iteration began, which is also the frozen reference.
Nobody need have compared two images: the data must only be better than what the model paints. An iteration is one
training; the next one goes on from its model (`start`), and so plays against it.

Source: Yuan et al. 2024, "Self-Play Fine-Tuning of Diffusion Models for Text-to-Image Generation",
arXiv:2402.10210, algorithm 1 and eq. 4.9 in epsilon form (its beta_t is absorbed in `beta` / 2, as in Diffusion-DPO).
Opponents are painted batch by batch and never stored, which is as cheap while no image is used twice.
Cost per step: `steps` denoiser samples, doubled by guidance, on B prompts; then one policy and one reference
forward, and one backward, on 2 B images.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pydantic import Field
from torch import Tensor

from attune.config.schema import Float
from attune.config.settings import MethodConfig
from attune.data.batches import PairBatch
from attune.diffusion import ddim as sampling
from attune.diffusion.losses import implicit_reward, preference_loss
from attune.diffusion.noised import Noised, policy_and_reference_error
from attune.diffusion.policy import Policy
from attune.interfaces import Conditioning, Metrics


class Config(MethodConfig):
    beta: Float = Field(gt=0, description="KL strength; the loss uses beta / 2. Paper: 2000, then 5000")
    caption_dropout: Float = Field(0.0, ge=0, lt=1, description="shard trained without their prompt")
    steps: int = Field(ge=1, le=999, description="DDIM steps of the opponent's images")
    eta: Float = Field(0.0, ge=0, le=1, description="of the opponent's images: 0 deterministic, 1 ancestral")
    guidance_scale: Float = Field(ge=0, description="of the opponent's images; 7.5 in the paper")


class Method:
    consumes = "pairs"

    def __init__(self, config: Config, policy: Policy):
        self.config, self.policy = config, policy

    def minibatches(self, batch: PairBatch, generator: torch.Generator) -> Iterable[Noised]:
        real, opponents = batch.chosen, self.paint(batch.cond, generator)
        t, noise = batch.draw_noise(self.policy.backbone.alphas_cumprod, generator)
        cond = self.policy.drop_captions(batch.cond, self.config.caption_dropout, generator)
        yield Noised.pairs(real, opponents, t, noise, cond)

    def paint(self, cond: Conditioning, generator: torch.Generator) -> Tensor:
        """Latents (B, C, h, w) of the policy as it was at the start of this iteration."""
        c, shard, n = self.config, self.policy.shard, len(cond)
        draw = shard.local_noise(sampling.normal(generator), n)
        with self.policy.reference():
            ours = sampling.sample(self.policy, cond[shard.rows(n)], draw, c.steps, c.eta, c.guidance_scale)
        return shard.gather(ours[: shard.count(n)])

    def loss(self, minibatch: Noised) -> tuple[Tensor, Metrics]:
        error, reference_error = policy_and_reference_error(self.policy, minibatch)
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
