"""DRaFT: maximise a differentiable reward by its gradient through the last K sampling steps.

DRaFT-K backpropagates through a fixed number of steps; K = N is the whole chain. DRaFT-LV (`n_renoised`) lowers the
variance of K = 1: each finished image is noised again to the last timestep, several times, and the last step is
repeated from there, so that one sampling run gives several gradients.

Source: Clark et al. 2023, "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", arXiv:2309.17400,
algorithm 1. Cost per batch of B prompts: N denoiser calls on B samples (doubled by guidance), K of them with a
backward pass, one decoding and scoring with theirs; DRaFT-LV: one call more, and all that has a gradient on (1 + n) B.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from pydantic import Field, model_validator
from torch import Tensor

from attune.config.schema import Float
from attune.config.settings import Lora
from attune.data.batches import PromptBatch
from attune.diffusion import process
from attune.diffusion.noise import Draws, NoiseFn, to_device
from attune.distributed import Part
from attune.interfaces import Conditioning, Metrics, Reward
from attune.methods._reward_backprop import (
    RewardConfig,
    Trajectory,
    require_differentiable,
    rollout,
    rollout_no_grad,
    weighted_reward,
)
from attune.methods._rewards import REWARDS

if TYPE_CHECKING:
    from attune.diffusion.policy import Policy


class Config(RewardConfig):
    """Defaults: DRaFT-1 as in the paper's algorithm; what it says of the optimizer could not be checked."""

    lora: Lora | None = Field(
        Lora(rank=4),
        description="adapter; rank as in AlignProp's code, not checked against the paper; null = train all",
    )
    lr: Float = Field(1e-3, gt=0, description="learning rate; as in AlignProp's code, not checked against the paper")
    batches: int = Field(1600, ge=1, description="batches of prompts; 100 optimizer steps as accumulation stands")
    batch_size: int = Field(8, ge=1, description="prompts per batch")
    accumulation: int = Field(16, ge=1, description="batches per optimizer step; 128 prompts, as in AlignProp's code")
    rewards: dict[str, Float] = Field(
        {"aesthetic": 1.0}, min_length=1, description=f"{REWARDS}. Paper: the aesthetic score, HPSv2 or PickScore"
    )
    eta: Float = Field(0.0, ge=0, le=1, description="noise of the DDIM steps: 0 deterministic, 1 ancestral")
    guidance_scale: Float = Field(7.5, ge=0, description="classifier-free guidance in every step, 1 = off; paper: 7.5")
    backprop_steps: int = Field(1, ge=1, description="K, the last steps with a gradient; `steps` is the whole chain")
    n_renoised: int = Field(
        0,
        ge=0,
        description="DRaFT-LV: copies of each image, noised again, whose last step is trained as well; paper: 2",
    )

    @model_validator(mode="after")
    def _has_that_many_steps(self) -> Config:
        if self.backprop_steps > self.steps:
            raise ValueError(f"backprop_steps: there are only {self.steps} steps")
        if self.n_renoised and self.backprop_steps != 1:
            raise ValueError("n_renoised: images are noised by one step, so backprop_steps must be 1")
        return self


@torch.no_grad()
def with_renoised(policy: Policy, trajectory: Trajectory, config: Config, sample_noise: NoiseFn) -> Trajectory:
    """A trajectory with one step to go, and copies of its finished images one step of noise away (DRaFT-LV).

    The n x B copies come after the B originals, copy by copy.
    """
    n, sample_noise = config.n_renoised, to_device(policy.device, sample_noise)
    x_0 = rollout(policy, trajectory, config).repeat(n, 1, 1, 1)
    at = policy.backbone.path.level(trajectory.timesteps[:1], x_0)
    x_t = process.add_noise(x_0, sample_noise(tuple(x_0.shape)), at)
    noise = sample_noise(tuple(x_0.shape))[:, None]
    return replace(
        trajectory,
        x_t=torch.cat([trajectory.x_t, x_t]),
        noise=torch.cat([trajectory.noise, noise]),
        cond=Conditioning.cat([trajectory.cond, trajectory.cond.repeat(n)]),
        prompts=list(trajectory.prompts) * (1 + n),
    )


class Method:
    consumes = "prompts"
    needs = ("rewards",)

    def __init__(self, config: Config, policy: Policy, rewards: Mapping[str, Reward]):
        require_differentiable(rewards, config)
        self.config, self.policy, self.rewards = config, policy, rewards

    def minibatches(self, batch: PromptBatch, draws: Draws) -> Iterable[Part[Trajectory]]:
        c = self.config
        trajectory = rollout_no_grad(self.policy, batch, c, c.backprop_steps, draws.noise)
        yield Part(with_renoised(self.policy, trajectory, c, draws.noise) if c.n_renoised else trajectory, draws.n)

    def loss(self, minibatch: Trajectory) -> tuple[Tensor, Metrics]:
        latents = rollout(self.policy, minibatch, self.config)
        reward, metrics = weighted_reward(self.policy, latents, minibatch.prompts, self.rewards, self.config)
        loss = -reward.mean()
        return loss, {"loss": loss, **metrics}
