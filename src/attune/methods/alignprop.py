"""AlignProp and its family: the gradient of a differentiable reward, sent back through the sampler.

An image is painted by DDIM; the reward's gradient flows through the decoder and the last K of the N denoising
steps into the adapter. Noise predictions before that cut are constants; latents are never detached, so the gradient
also runs through what later predictions saw of earlier ones. No preference, no value function, no reference: nothing
holds the policy back either, and it will find whatever the reward overrates (docs/methods/alignprop.md).

Source: Prabhudesai et al. 2023, "Aligning Text-to-Image Diffusion Models with Reward Backpropagation",
arXiv:2310.03739, algorithm 1; authors' code: `pipeline_step_with_grad`. Options of the same engine: DRaFT-K, a fixed
K, and DRaFT-LV, K = 1 on re-noised copies as well (Clark et al. 2023, arXiv:2309.17400, algorithm 1); ReFL, the x_0
that one random late step predicts (Xu et al. 2023, arXiv:2304.05977, algorithm 1).
Cost per batch of B prompts: N denoiser calls on B samples (doubled by guidance), K of them with a backward pass, and
one decoding and scoring with theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attune.config.schema import Float
from attune.config.settings import MethodConfig
from attune.data.batches import PromptBatch
from attune.diffusion import ddim as sampling
from attune.diffusion.policy import Policy
from attune.interfaces import Conditioning, Metrics, Reward

# a pixel's gradient is about 1e-6, and a decoder in float16 has none below 6e-8; a power of two costs no digit
DECODER_SCALE = 2.0**12


class Config(MethodConfig):
    rewards: dict[str, Float] = Field(
        min_length=1, description="scorer of the profile -> weight in the sum; 0 = only watched, and thus held out"
    )
    preprocess: Literal["tensor", "square"] = Field(
        "tensor",
        description="how scorers that can are shown images in training: as published but with a gradient, or the "
        "authors' bilinear square",
    )
    loss: Literal["raise", "distance", "hinge"] = Field(
        "raise", description="of the sum r: -r, |r - target| or max(0, target - r)"
    )
    target: Float | None = Field(
        None, description="AlignProp: 10 (aesthetic, distance), 1 (HPS, distance: 1 - r); ReFL: 2 (hinge)"
    )
    coefficient: Float = Field(0.01, gt=0, description="factor of the loss; AlignProp 0.01, ReFL 0.001")
    steps: int = Field(ge=1, le=999, description="DDIM steps N; 50 in the paper, 40 in ReFL")
    eta: Float = Field(1.0, ge=0, le=1, description="of DDIM; 1 in the paper")
    guidance_scale: Float = Field(ge=0, description="guidance in every step; 5 in the paper")
    cut: Literal["gaussian", "uniform", "fixed"] = Field(
        "gaussian", description="how the first step with a gradient is drawn, anew for each batch"
    )
    cut_at: list[Float] = Field(
        [0.84, 0.1],
        description="shares of N. gaussian: mean, standard deviation; uniform: lowest, highest; fixed: [1 - K / N]. "
        "Paper: [0.84, 0.1], [0, 1] or [0.98]; ReFL: uniform [0.75, 1]",
    )
    through: Literal["chain", "x_0"] = Field(
        "chain", description="x_0: the prediction of the first step with a gradient, and no later step; ReFL"
    )
    renoised: int = Field(0, ge=0, description="DRaFT-LV's re-noised copies of each image, with K = 1; 2 in its paper")
    checkpointed: bool = Field(
        False, description="saves memory: keeps latents between steps only, and decodes image by image"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        wanted = 1 if self.cut == "fixed" else 2
        if len(self.cut_at) != wanted:
            raise ValueError(f"cut_at: {self.cut} takes {wanted} number{'s' * (wanted > 1)}, given {self.cut_at}")
        low, high = self.cut_at[0], self.cut_at[-1]
        if not (0 <= low < 1 and 0 <= high <= 1) or (self.cut == "uniform" and low >= high):
            raise ValueError(f"cut_at: {self.cut_at} lies outside the run; 0 is its start and 1 its end")
        if (self.target is None) != (self.loss == "raise"):
            raise ValueError(f"target: loss {self.loss!r} takes {'none' if self.loss == 'raise' else 'one'}")
        if not any(self.rewards.values()):
            raise ValueError("rewards: every weight is 0, so nothing would be trained on")
        last_alone = self.cut == "fixed" and low * self.steps + 1e-6 >= self.steps - 1
        if self.renoised and not (last_alone and self.through == "chain"):
            raise ValueError("renoised: needs cut fixed at 1 - 1 / steps, the last step alone, through the chain")
        return self


@dataclass(frozen=True)
class Rollout:
    """Images that lack their last steps, and their prompts; one prompt per row."""

    run: sampling.Unfinished
    prompts: Sequence[str]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: slice) -> Rollout:
        return Rollout(self.run.of(rows), self.prompts[rows])


def first_with_gradient(cut: str, cut_at: Sequence[float], steps: int, generator: torch.Generator) -> int:
    """Index (0..steps - 1) of the first step with a gradient; K = steps - index, so 0 is the whole chain.

    What falls outside is drawn again, as by the authors, whose lowest value is 1, however: their K is never N.
    Shares of `steps` are rounded down, after a margin for 0.57 * 100 = 56.99...
    """
    draw = {
        "fixed": lambda: cut_at[0],
        "gaussian": lambda: cut_at[0] + cut_at[1] * torch.randn((), generator=generator).item(),
        "uniform": lambda: cut_at[0] + (cut_at[1] - cut_at[0]) * torch.rand((), generator=generator).item(),
    }[cut]
    while not 0 <= (share := draw()) < 1:
        pass
    return min(int(share * steps + 1e-6), steps - 1)


def reward_loss(reward: Tensor, loss: str, target: float | None) -> Tensor:
    """What is minimised, (B,), of rewards (B,): -r, |r - target|, or max(0, target - r)."""
    if loss == "raise":
        return -reward
    return (reward - target).abs() if loss == "distance" else (target - reward).clamp(min=0)


class Method:
    consumes = "prompts"

    def __init__(self, config: Config, policy: Policy, rewards: Mapping[str, Reward]):
        for name, weight in config.rewards.items():
            if weight and not rewards[name].differentiable:
                raise ValueError(
                    f"rewards.{name}: no gradient flows through this scorer; where it has one, "
                    f"scorers.{name}.preprocess must be another, and weight 0 only watches it"
                )
        self.config, self.policy, self.rewards = config, policy, rewards
        self.trained_on = tuple(name for name, weight in config.rewards.items() if weight)
        self.sampler = sampling.Sampler(policy, config.steps, config.eta, config.guidance_scale, config.checkpointed)

    def minibatches(self, batch: PromptBatch, generator: torch.Generator) -> Iterable[Rollout]:
        c, draw = self.config, sampling.on(self.policy.device, sampling.normal(generator))
        left = c.steps - first_with_gradient(c.cut, c.cut_at, c.steps, generator)
        run = self.begin(batch.cond, draw, left)
        if c.renoised:
            run = self.with_renoised(run, draw)
        yield Rollout(run, list(batch.prompts) * (1 + c.renoised))

    def begin(self, cond: Conditioning, draw: sampling.Normal, left: int) -> sampling.Unfinished:
        """The part without a gradient, for all prompts: each process runs it for its own."""
        shard, n = self.policy.shard, len(cond)
        ours = self.sampler.begin(cond[shard.rows(n)], shard.local_noise(draw, n), left).of(slice(shard.count(n)))
        noise = shard.gather(ours.noise.transpose(0, 1)).transpose(0, 1)
        return sampling.Unfinished(shard.gather(ours.x_t), noise, cond)

    @torch.no_grad()
    def with_renoised(self, run: sampling.Unfinished, draw: sampling.Normal) -> sampling.Unfinished:
        """The run with one step to go, and copies of its finished images one step of noise away (DRaFT-LV)."""
        n, shard, images = self.config.renoised, self.policy.shard, len(run.x_t)
        ours = self.sampler.finish(run.of(shard.rows(images)))
        x_0 = shard.gather(ours[: shard.count(images)]).repeat(n, 1, 1, 1)
        x_t = self.sampler.add_noise(x_0, draw(tuple(x_0.shape)), left=1)
        noise = torch.cat([run.noise, draw(tuple(x_0.shape))[None]], 1)
        return sampling.Unfinished(torch.cat([run.x_t, x_t]), noise, Conditioning.cat([run.cond, run.cond.repeat(n)]))

    def loss(self, minibatch: Rollout) -> tuple[Tensor, Metrics]:
        c, run = self.config, minibatch.run
        latents = self.sampler.finish(run) if c.through == "chain" else self.sampler.estimate(run)
        decoded = self.decode(latents)
        scores = self.score(decoded.clamp(0, 1), minibatch.prompts)
        reward = sum(weight * scores[name] for name, weight in c.rewards.items() if weight)
        loss = c.coefficient * reward_loss(reward, c.loss, c.target).mean()
        return loss, {
            "loss": loss,
            "reward": reward.mean(),
            **{f"reward_{name}": score.mean() for name, score in scores.items()},
            "clamped": ((decoded < 0) | (decoded > 1)).float().mean(),
            "gradient_steps": len(run) if c.through == "chain" else 1,
        }

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), float32, nominally in [0, 1]; gradients are scaled up while they pass the decoder."""
        decode = self.policy.backbone.decode_latents
        if self.config.checkpointed:
            images = torch.cat([checkpoint(decode, row, use_reentrant=False) for row in latents.split(1)])
        else:
            images = decode(latents)
        if latents.requires_grad:
            images.register_hook(lambda gradient: gradient * DECODER_SCALE)
            latents.register_hook(lambda gradient: gradient / DECODER_SCALE)
        return images

    def score(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Scores (B,) by each scorer, with a graph where it is trained on."""
        scores = {}
        for name, weight in self.config.rewards.items():
            with torch.set_grad_enabled(weight != 0 and torch.is_grad_enabled()):
                scores[name] = self.rewards[name](images, prompts)
        return scores
