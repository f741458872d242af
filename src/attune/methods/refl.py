"""ReFL: raise the reward of the clean image that one random late sampling step predicts.

Sampling runs without a graph to a step drawn from the last quarter; the prediction of x_0 made there, and no later
step, is decoded and scored. One backward pass through one denoiser call, whatever the number of steps.

Source: Xu et al. 2023, "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation",
arXiv:2304.05977, algorithm 1; authors' code: ReFL.py. As there, the paper's second
term, the pre-training loss, is left out.
Cost per batch of B prompts: denoiser calls on B samples (doubled by guidance) up to the drawn step, the last of them
with a backward pass, and one decoding and scoring with theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from pydantic import Field, model_validator
from torch import Tensor

from attune.config.schema import Float
from attune.config.settings import Lora
from attune.data.batches import PromptBatch
from attune.diffusion.ddim import predict_x0
from attune.diffusion.noise import Draws
from attune.distributed import Part
from attune.interfaces import Metrics, Reward
from attune.methods._reward_backprop import (
    RewardConfig,
    Trajectory,
    first_gradient_step,
    require_differentiable,
    rollout_no_grad,
    weighted_reward,
)
from attune.methods._rewards import REWARDS

if TYPE_CHECKING:
    from attune.diffusion.policy import Policy


class Config(RewardConfig):
    """Defaults: the authors' ReFL.py, which tunes SD 1.4; its batch is of 2 x 4 prompts on each of 8 GPUs."""

    lora: Lora | None = Field(None, description="null = train every weight, in float32, as the authors do")
    lr: Float = Field(1e-5, gt=0, description="learning rate; authors' code: 1e-5")
    batches: int = Field(800, ge=1, description="batches of prompts; 100 optimizer steps as in the authors' code")
    batch_size: int = Field(8, ge=1, description="prompts per batch")
    accumulation: int = Field(8, ge=1, description="batches per optimizer step; 64 prompts to a step")
    rewards: dict[str, Float] = Field({"imagereward": 1.0}, min_length=1, description=f"{REWARDS}. Paper: ImageReward")
    target: Float = Field(2.0, description="the loss is max(0, target - r); authors' code: 2")
    loss_coeff: Float = Field(0.001, gt=0, description="factor of the loss; authors' code: 0.001")
    steps: int = Field(40, ge=1, le=999, description="DDIM steps N; authors' code: 40")
    guidance_scale: Float = Field(
        1.0, ge=0, description="classifier-free guidance in every step, 1 = off; authors' code: off"
    )
    truncation_range: list[Float] = Field(
        [0.75, 1.0],
        min_length=2,
        max_length=2,
        description="[lowest, highest]: the one step with a gradient is drawn uniformly between these shares of the N "
        "steps; authors' code: the last 10 of 40",
    )

    @model_validator(mode="after")
    def _truncates_inside_the_run(self) -> Config:
        low, high = self.truncation_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"truncation_range: {[low, high]} lies outside the run; 0 is its start and 1 its end")
        return self


def hinge_loss(reward: Tensor, target: float) -> Tensor:
    """max(0, target - r), (B,): images that score better than the target stop pulling."""
    return (target - reward).clamp(min=0)


class Method:
    consumes = "prompts"
    needs = ("rewards",)

    def __init__(self, config: Config, policy: Policy, rewards: Mapping[str, Reward]):
        require_differentiable(rewards, config)
        self.config, self.policy, self.rewards = config, policy, rewards

    def minibatches(self, batch: PromptBatch, draws: Draws) -> Iterable[Part[Trajectory]]:
        c = self.config
        low, high = c.truncation_range
        step = first_gradient_step(lambda: low + (high - low) * torch.rand((), generator=draws.shared).item(), c.steps)
        yield Part(rollout_no_grad(self.policy, batch, c, c.steps - step, draws.noise), draws.n)

    def loss(self, minibatch: Trajectory) -> tuple[Tensor, Metrics]:
        c, m = self.config, minibatch
        x_0 = predict_x0(self.policy, m.x_t, m.timesteps[0], m.cond, c.guidance_scale, c.checkpoint_steps)
        reward, metrics = weighted_reward(self.policy, x_0, m.prompts, self.rewards, c)
        loss = c.loss_coeff * hinge_loss(reward, c.target).mean()
        return loss, {"loss": loss, **metrics}
