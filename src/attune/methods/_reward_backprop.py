"""Backpropagation of a differentiable reward through DDIM sampling: what AlignProp, DRaFT and ReFL have in common.

A batch of prompts is sampled without a graph up to the step where gradients begin (`rollout_no_grad`). The rest is
computed in the loss, from noise that was drawn before, and decoded and scored with a graph (`weighted_reward`).
Latents are never detached, so the gradient also runs through what later predictions saw of earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attune.config.schema import Float
from attune.data.batches import PromptBatch
from attune.diffusion.ddim import ddim
from attune.diffusion.noise import NoiseFn, to_device
from attune.interfaces import Backbone, Conditioning, Metrics, Reward
from attune.methods._rewards import ScorersConfig, weighted_sum

if TYPE_CHECKING:
    from attune.diffusion.policy import Policy

# a pixel's gradient is about 1e-6, and a decoder in float16 has none below 6e-8; a power of two costs no digit
DECODER_GRADIENT_SCALE = 2.0**12
CHECKPOINTED_PIXELS = 512**2  # decoded at a time with a graph, where the decoder's activations are not kept


# descriptions of fields whose defaults differ from method to method
CHECKPOINT_STEPS = "saves memory: only latents are kept between steps; each step with a gradient is then computed twice"
CHECKPOINT_DECODER = (
    "saves memory: no activations of the decoder are kept, 3 GB for each image of 512 px in half precision and 6 in "
    "float32; images are decoded again in the backward pass"
)


class RewardConfig(ScorersConfig):
    """Settings that the methods of this family share."""

    preprocess: Literal["tensor", "square"] = Field(
        "tensor",
        description="how images are resized for the scorers: tensor = as published, but differentiable; square = "
        "squeezed to a square by bilinear interpolation, as AlignProp's code does",
    )
    steps: int = Field(50, ge=1, le=999, description="DDIM steps N of each image")
    eta: Float = Field(1.0, ge=0, le=1, description="noise of the DDIM steps: 0 deterministic, 1 ancestral")
    guidance_scale: Float = Field(ge=0, description="classifier-free guidance in every step, 1 = off")
    checkpoint_steps: bool = Field(False, description=CHECKPOINT_STEPS)
    checkpoint_decoder: bool = Field(False, description=CHECKPOINT_DECODER)


@dataclass(frozen=True)
class Trajectory:
    """Sampling runs of n prompts with k steps to go, without a graph; the noise of these steps is drawn already."""

    x_t: Tensor  # (n, C, h, w)
    timesteps: Tensor  # (k + 1,), from the present one to 0
    noise: Tensor  # (n, k, C, h, w)
    cond: Conditioning
    prompts: Sequence[str]


def first_gradient_step(sample_share: Callable[[], float], steps: int) -> int:
    """Index (0..steps - 1) of the first step with a gradient, from a share of the run: 0 is its start and 1 its end.

    A share outside [0, 1) is drawn again. Shares of `steps` are rounded down, after a margin for 0.57 * 100 = 56.99...
    """
    while not 0 <= (share := sample_share()) < 1:
        pass
    return min(int(share * steps + 1e-6), steps - 1)


@torch.no_grad()
def rollout_no_grad(
    policy: Policy, batch: PromptBatch, config: RewardConfig, k: int, sample_noise: NoiseFn
) -> Trajectory:
    """All but the last k (1..steps) DDIM steps from pure noise."""
    sample_noise, cond = to_device(policy.device, sample_noise), batch.cond
    path = policy.backbone.path
    timesteps, shape = path.sampling_times(config.steps), (len(cond), *policy.backbone.latent_shape)
    x_T = sample_noise(shape)
    fresh = (sample_noise(shape) for _ in range(config.steps - k))
    with policy.merged():
        x_t = ddim(policy, x_T, timesteps[:-k], cond, fresh, eta=config.eta, guidance_scale=config.guidance_scale)
    noise = torch.stack([sample_noise(shape) for _ in range(k)], dim=1)
    return Trajectory(x_t, timesteps[-k - 1 :], noise, cond, list(batch.prompts))


def rollout(policy: Policy, trajectory: Trajectory, config: RewardConfig) -> Tensor:
    """The final latents (n, C, h, w), with a graph where gradients are on."""
    return ddim(
        policy,
        trajectory.x_t,
        trajectory.timesteps,
        trajectory.cond,
        trajectory.noise.unbind(1),
        eta=config.eta,
        guidance_scale=config.guidance_scale,
        checkpoint_steps=config.checkpoint_steps,
    )


def weighted_reward(
    policy: Policy, latents: Tensor, prompts: Sequence[str], rewards: Mapping[str, Reward], config: RewardConfig
) -> tuple[Tensor, Metrics]:
    """The weighted sum of scores (n,) of decoded latents, with a graph, and what to log about it."""
    decoded = decode(policy.backbone, latents, config.checkpoint_decoder)
    images, scores = decoded.clamp(0, 1), {}
    for name, weight in config.rewards.items():
        with torch.set_grad_enabled(weight != 0 and torch.is_grad_enabled()):
            scores[name] = rewards[name](images, prompts)
    reward = weighted_sum(scores, config.rewards)
    return reward, {
        "reward": reward.mean(),
        **{f"reward_{name}": score.mean() for name, score in scores.items()},
        "clamped": ((decoded < 0) | (decoded > 1)).float().mean(),
    }


def decode(backbone: Backbone, latents: Tensor, checkpoint_decoder: bool) -> Tensor:
    """Images (n, 3, H, W), float32, nominally in [0, 1]; gradients are scaled up while they pass the decoder.

    Args:
        checkpoint_decoder: keep no activations of the decoder; images are decoded again in the backward pass, as many
            at a time as have the pixels of one of 512 px.
    """
    if checkpoint_decoder and latents.requires_grad:
        rows = latents.split(max(1, CHECKPOINTED_PIXELS // backbone.resolution**2))
        images = torch.cat([checkpoint(backbone.decode_latents, row, use_reentrant=False) for row in rows])
    else:
        images = backbone.decode_latents(latents)
    if latents.requires_grad:
        images.register_hook(lambda gradient: gradient * DECODER_GRADIENT_SCALE)
        latents.register_hook(lambda gradient: gradient / DECODER_GRADIENT_SCALE)
    return images


def require_differentiable(rewards: Mapping[str, Reward], config: RewardConfig) -> None:
    """Raises ValueError if a scorer with a weight has no gradient."""
    for name in config.trained_on:
        if not rewards[name].differentiable:
            raise ValueError(
                f"rewards.{name}: no gradient flows through this scorer; where it has one, "
                f"scorers.{name}.preprocess must be another, and weight 0 only watches it"
            )
