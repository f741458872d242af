"""AlignProp: backpropagate a differentiable reward through a random number of the last sampling steps.

An image is sampled by DDIM; the reward's gradient flows through the decoder and the last K of the N denoising
steps into the adapter, K drawn anew for each batch. There is no preference, no value function and no reference, so
nothing keeps the policy from exploiting whatever the reward overrates (docs/methods/alignprop.md).

Source: Prabhudesai et al. 2023, "Aligning Text-to-Image Diffusion Models with Reward Backpropagation",
arXiv:2310.03739, algorithm 1; authors' code: `pipeline_step_with_grad`.
Cost per batch of B prompts: N denoiser calls on B samples (doubled by guidance), K of them with a backward pass, and
one decoding and scoring with theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from attune.config.schema import Float
from attune.config.settings import Lora
from attune.data.batches import PromptBatch
from attune.diffusion.noise import Draws
from attune.distributed import Part
from attune.interfaces import Metrics, Reward
from attune.methods._reward_backprop import (
    CHECKPOINT_STEPS,
    RewardConfig,
    Trajectory,
    first_gradient_step,
    require_differentiable,
    rollout,
    rollout_no_grad,
    weighted_reward,
)
from attune.methods._rewards import REWARDS

if TYPE_CHECKING:
    from attune.diffusion.policy import Policy


class Config(RewardConfig):
    """Defaults: the authors' configuration for the aesthetic score on SD 1.5."""

    lora: Lora | None = Field(Lora(rank=4), description="adapter; authors' code: rank 4. null = train every weight")
    lr: Float = Field(1e-3, gt=0, description="learning rate; authors' code: 1e-3")
    batches: int = Field(1600, ge=1, description="batches of prompts; 100 optimizer steps as accumulation stands")
    batch_size: int = Field(8, ge=1, description="prompts per batch")
    accumulation: int = Field(16, ge=1, description="batches per optimizer step; authors' code: 128 prompts to a step")
    weight_decay: Float = Field(1e-4, ge=0, description="of AdamW; authors' code: 1e-4")
    rewards: dict[str, Float] = Field(
        {"aesthetic": 1.0}, min_length=1, description=f"{REWARDS}. Authors' code: the aesthetic score, or HPSv2"
    )
    preprocess: Literal["tensor", "square"] = Field(
        "square",
        description="how images are resized for the scorers: square = squeezed to a square by bilinear interpolation, "
        "as the authors' code does; tensor = as published, but differentiable",
    )
    target: Float | None = Field(
        10.0,
        description="the loss is |r - target|: 10 for the aesthetic score, 1 for HPSv2 (1 - r), as in the authors' "
        "code; null = maximise r itself, loss -r",
    )
    loss_coeff: Float = Field(0.01, gt=0, description="factor of the loss; authors' code: 0.01")
    guidance_scale: Float = Field(5.0, ge=0, description="classifier-free guidance in every step, 1 = off; paper: 5")
    truncation: Literal["gaussian", "uniform", "fixed"] = Field(
        "gaussian", description="how the first step with a gradient is drawn, anew for each batch"
    )
    truncation_range: list[Float] = Field(
        [0.84, 0.1],
        description="where gradients begin, in shares of the N steps. gaussian: [mean, standard deviation]; uniform: "
        "[lowest, highest]; fixed: [1 - K / N]. Authors' code: [0.84, 0.1], [0, 1] or [0.98]",
    )
    checkpoint_steps: bool = Field(True, description=CHECKPOINT_STEPS)

    @model_validator(mode="after")
    def _truncates_inside_the_run(self) -> Config:
        wanted, given = 1 if self.truncation == "fixed" else 2, self.truncation_range
        if len(given) != wanted:
            plural = "s" if wanted > 1 else ""
            raise ValueError(f"truncation_range: {self.truncation} takes {wanted} number{plural}, given {given}")
        low, high = given[0], given[-1]
        if not (0 <= low < 1 and 0 <= high <= 1) or (self.truncation == "uniform" and low >= high):
            raise ValueError(f"truncation_range: {given} lies outside the run; 0 is its start and 1 its end")
        return self


def truncation_step(truncation: str, truncation_range: Sequence[float], steps: int, generator: torch.Generator) -> int:
    """Index (0..steps - 1) of the first step with a gradient; K = steps - index, so 0 is the whole chain.

    What falls outside the run is drawn again, as by the authors. Their lowest index is 1, so their K is never N.
    """
    first, last = truncation_range[0], truncation_range[-1]
    sample_share = {
        "fixed": lambda: first,
        "gaussian": lambda: first + last * torch.randn((), generator=generator).item(),
        "uniform": lambda: first + (last - first) * torch.rand((), generator=generator).item(),
    }[truncation]
    return first_gradient_step(sample_share, steps)


def reward_loss(reward: Tensor, target: float | None) -> Tensor:
    """What is minimised, (B,), of rewards (B,): |r - target|, or -r without a target."""
    return -reward if target is None else (reward - target).abs()


class Method:
    consumes = "prompts"
    needs = ("rewards",)

    def __init__(self, config: Config, policy: Policy, rewards: Mapping[str, Reward]):
        require_differentiable(rewards, config)
        self.config, self.policy, self.rewards = config, policy, rewards

    def minibatches(self, batch: PromptBatch, draws: Draws) -> Iterable[Part[Trajectory]]:
        c = self.config
        k = c.steps - truncation_step(c.truncation, c.truncation_range, c.steps, draws.shared)
        yield Part(rollout_no_grad(self.policy, batch, c, k, draws.noise), draws.n)

    def loss(self, minibatch: Trajectory) -> tuple[Tensor, Metrics]:
        c = self.config
        latents = rollout(self.policy, minibatch, c)
        reward, metrics = weighted_reward(self.policy, latents, minibatch.prompts, self.rewards, c)
        loss = c.loss_coeff * reward_loss(reward, c.target).mean()
        return loss, {"loss": loss, **metrics, "gradient_steps": minibatch.noise.shape[1]}
