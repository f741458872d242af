"""DiffusionNFT: learning from one's own images by the forward process; the good ones attract, the others repel.

Images are drawn of each prompt by the sampler without noise and scored by any reward. Each is noised again, and two
predictions are made of the policy's v and that of a slow copy of it, v_old:

    v+ = b v + (1 - b) v_old        v- = (1 + b) v_old - b v

v+ is pulled to the image with weight r, v- with weight 1 - r, r in [0, 1] being the image's standing among those of its
prompt. So a bad image pushes the policy away from it, without probabilities of steps, and with any sampler.

Source: Zheng et al. 2025, "DiffusionNFT: Online Diffusion Reinforcement with Forward Process", arXiv:2509.16117;
authors' code: NVlabs/DiffusionNFT 24af555. Differences from that code: docs/methods/nft.md.
Cost per image, N steps: N denoiser samples (doubled by guidance), one decoding, one scoring; then each time that it is
noised one policy forward and backward and two without a gradient, of the slow copy and of the base model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from attune.config.schema import Float
from attune.config.settings import Lora
from attune.data.batches import PromptBatch
from attune.diffusion import process
from attune.diffusion.ddim import sample
from attune.diffusion.noise import Draws
from attune.diffusion.path import Path
from attune.diffusion.process import Level
from attune.distributed import Part
from attune.interfaces import Conditioning, Metrics, Reward
from attune.methods._rewards import REWARDS, ScorersConfig, score_latents, standardised, weighted_sum

if TYPE_CHECKING:
    from attune.diffusion.policy import Policy


class Config(ScorersConfig):
    """Defaults: the authors' code for Stable Diffusion 3.5 Medium, 48 prompts of 24 images to a rollout."""

    lora: Lora | None = Field(Lora(rank=32), description="adapter; authors' code: rank 32. null = train every weight")
    lr: Float = Field(3e-4, gt=0, description="learning rate; authors' code: 3e-4")
    batches: int = Field(1000, ge=1, description="rollouts; authors: up to 5,000")
    batch_size: int = Field(48, ge=1, description="prompts per rollout; authors' code: 48")
    accumulation: int = Field(4, ge=1, description="minibatches per optimizer step")
    weight_decay: Float = Field(1e-4, ge=0, description="of AdamW; authors' code: 1e-4")
    rewards: dict[str, Float] = Field(
        {"pickscore": 1.0}, min_length=1, description=f"{REWARDS}. They need no gradient. Paper: several at a time"
    )
    images_per_prompt: int = Field(24, ge=2, description="images of each prompt in a rollout; authors' code: 24")
    steps: int = Field(10, ge=1, le=999, description="steps of a rollout, without noise; authors' code: 10")
    guidance_scale: Float = Field(1.0, ge=0, description="classifier-free guidance in rollouts, 1 = off; paper: off")
    passes: int = Field(1, ge=1, description="how often each image is noised and learnt from; authors' code: 10")
    beta: Float = Field(1.0, gt=0, le=1, description="how far v+ and v- lie from the slow copy's v; authors: 1 or 0.1")
    advantage_clip: Float = Field(5.0, gt=0, description="an advantage of so much has r = 1; authors' code: 5")
    kl_coeff: Float = Field(
        1e-4, ge=0, description="weight of the squared difference to the base model, for adapters; authors' code: 1e-4"
    )
    old_decay: Float = Field(
        0.5, ge=0, le=1, description="of the slow copy, per optimizer step: 0 = the policy itself; authors: up to 0.5"
    )
    minibatch_size: int = Field(16, ge=1, description="images per minibatch; so many are sampled at a time, too")

    @property
    def preprocess(self) -> None:
        """Scorers are shown images as their own blocks say: a gradient is not asked for."""


def standing(advantage: Tensor, clip: float) -> Tensor:
    """r (n,) in [0, 1]: clip(A / clip, -1, 1) / 2 + 1/2; 1/2 of an image like the mean of its prompt's."""
    return (advantage / clip).clamp(-1, 1) / 2 + 0.5


def weighed_error(image: Tensor, x_0: Tensor) -> Tensor:
    """Squared error of a predicted image over its mean absolute error without a gradient, (n,); means over dimensions.

    That makes errors at all times weigh alike; the divisor is 1e-5 at least.
    """
    scale = (image.double() - x_0.double()).abs().flatten(1).mean(1).clamp(min=1e-5).detach()
    return ((image - x_0) ** 2).flatten(1).mean(1) / scale


def nft_loss(
    path: Path, predicted: Tensor, old: Tensor, x_t: Tensor, at: Level, x_0: Tensor, r: Tensor, beta: float
) -> Tensor:
    """(r L+ + (1 - r) L-) / b, (n,): weighed errors of the images that v+ and v- imply. Eq. 6 of the paper.

    Without a gradient where the policy is the old one and r = 1/2.

    Args:
        predicted: the policy's v, or of other models its noise.
        old: that of the slow copy, without a gradient.
    """
    positive, negative = beta * predicted + (1 - beta) * old, (1 + beta) * old - beta * predicted
    pulled, pushed = (weighed_error(path.x0_and_noise(v, x_t, at)[0], x_0) for v in (positive, negative))
    return (r * pulled + (1 - r) * pushed) / beta


def divergence(predicted: Tensor, reference: Tensor) -> Tensor:
    """Squared difference of predictions, mean over dimensions, (n,)."""
    return ((predicted - reference) ** 2).flatten(1).mean(1)


@dataclass(frozen=True)
class OwnImages:
    """Images of the policy, n rows: latents, their prompts, their standing r (n,), and how they are noised."""

    x_0: Tensor
    cond: Conditioning
    r: Tensor
    t: Tensor
    noise: Tensor
    rewards: Metrics  # means over the whole rollout, to be logged

    def __getitem__(self, rows: Tensor) -> OwnImages:
        tensors = (self.r[rows], self.t[rows.to(self.t.device)], self.noise[rows], self.rewards)
        return OwnImages(self.x_0[rows], self.cond[rows], *tensors)


class Method:
    consumes = "prompts"
    needs = ("rewards",)

    def __init__(self, config: Config, policy: Policy, rewards: Mapping[str, Reward]):
        self.config, self.policy = config, policy
        self.scorers = {name: rewards[name] for name in config.rewards}
        self.path = policy.backbone.path
        if config.kl_coeff and config.lora is None:
            raise ValueError("kl_coeff: the base model is only there beside an adapter; set it to 0 with lora: null")
        policy.move_reference(config.old_decay, warmup=True)

    def minibatches(self, batch: PromptBatch, draws: Draws) -> Iterable[Part[OwnImages]]:
        """The images of a rollout, shuffled and noised anew in every pass."""
        c, shard = self.config, self.policy.shard
        latents, r, means = self.rollout(batch, draws)
        prompt = torch.arange(draws.n, device=r.device).repeat_interleave(c.images_per_prompt)
        of_prompts = {name: self.policy.shard.gather_n(value, draws.n) for name, value in batch.cond.tensors.items()}
        cond = Conditioning(of_prompts)[prompt]
        for _ in range(c.passes):
            own = len(draws.rows) * c.images_per_prompt
            t = self.of_all(self.path.training_times(draws, own), draws.n)
            noise = self.of_all(draws.noise((own, *latents.shape[1:])), draws.n).to(latents.device)
            images = OwnImages(latents, cond, r, t, noise, means)
            for part in torch.randperm(len(r), generator=draws.shared).split(c.minibatch_size):
                yield Part(images[part[shard.rows(len(part))].to(r.device)], len(part))

    @torch.no_grad()
    def rollout(self, batch: PromptBatch, draws: Draws) -> tuple[Tensor, Tensor, Metrics]:
        """Latents of all processes' images, prompt by prompt, their standing, and the rewards' means."""
        c, k = self.config, self.config.images_per_prompt
        copies = torch.arange(k).split(max(1, c.minibatch_size // draws.n))
        with self.policy.reference(), self.policy.merged():  # by the slow copy, as the authors do
            drawn = [
                sample(self.policy, batch.cond.repeat(len(part)), draws.noise, c.steps, 0.0, c.guidance_scale)
                for part in copies
            ]
        own = torch.cat(drawn)
        found = score_latents(self.policy.backbone, own, list(batch.prompts) * k, self.scorers)
        scores = {name: self.of_all(score, draws.n).view(-1, k) for name, score in found.items()}
        reward = weighted_sum(scores, c.rewards)  # (P, k)
        names = [str(row) for row in range(len(reward)) for _ in range(k)]  # two rows of one prompt are two groups
        advantage = standardised(reward.flatten(), names, "prompt_mean", min_count=2)
        means: Metrics = {"reward": reward.mean(), **{f"reward_{name}": score.mean() for name, score in scores.items()}}
        return self.of_all(own, draws.n), standing(advantage, c.advantage_clip), means

    def of_all(self, own: Tensor, n: int) -> Tensor:
        """Values (k m, ...) of this process's m prompts, copy by copy, as those of all n prompts, prompt by prompt."""
        return self.policy.shard.gather_n(
            own.unflatten(0, (self.config.images_per_prompt, -1)).transpose(0, 1), n
        ).flatten(0, 1)

    def loss(self, minibatch: OwnImages) -> tuple[Tensor, Metrics]:
        c, m = self.config, minibatch
        at = self.path.level(m.t, m.x_0)
        x_t = process.add_noise(m.x_0, m.noise, at)
        predicted = self.policy.predict(x_t, m.t, m.cond)
        with self.policy.reference():
            old = self.policy.predict(x_t, m.t, m.cond)
        loss = c.advantage_clip * nft_loss(self.path, predicted, old, x_t, at, m.x_0, m.r, c.beta).mean()
        metrics: Metrics = {"moved": divergence(predicted, old).mean()}
        if c.kl_coeff:
            with self.policy.base():
                base = self.policy.predict(x_t, m.t, m.cond)
            metrics["kl"] = divergence(predicted, base).mean()
            loss = loss + c.kl_coeff * metrics["kl"]
        return loss.float(), {"loss": loss, **m.rewards, **metrics}
