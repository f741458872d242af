"""DDPO: denoising diffusion policy optimisation, the policy gradient of any reward of finished images.

Several images are drawn of each prompt, every step with noise. An image's reward, compared with those of its prompt's
other images, is the advantage of all steps that led to it: steps of good images are made likelier, by a ratio to the
policy that drew them, which is clipped. A reward needs no gradient: the size of a file will do, a function of one's
own, or a service (docs/scorers.md).

Source: Black et al. 2023, "Training Diffusion Models with Reinforcement Learning", arXiv:2305.13301, eq. 6 (DDPO_IS)
with the clip of Schulman et al. 2017 (PPO), arXiv:1707.06347, eq. 7; authors' code: kvablack/ddpo-pytorch.
Differences from that code: docs/methods/ddpo.md. Nothing is remembered from one rollout to the next, so a training that
was interrupted goes on bit for bit.
Cost per image, N steps of which K are trained on: N + K denoiser samples, and in each inner epoch K with a backward
pass, all doubled by guidance; one decoding and one scoring. `kl_coeff` adds K samples of the reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from attune.config.schema import Float
from attune.config.settings import Lora
from attune.data.batches import PromptBatch
from attune.diffusion import process
from attune.diffusion.noise import Draws, NoiseFn, to_device
from attune.distributed import Part
from attune.interfaces import Conditioning, Metrics, Reward
from attune.methods._rewards import REWARDS, Baseline, ScorersConfig, score_latents, standardised, weighted_sum

if TYPE_CHECKING:
    from attune.diffusion.policy import Policy


class Config(ScorersConfig):
    """Defaults: the authors' code for the eight GPUs they had: 256 images to a rollout, four optimizer steps each."""

    lora: Lora | None = Field(Lora(rank=4), description="adapter; authors' code: rank 4. null = train every weight")
    lr: Float = Field(3e-4, gt=0, description="learning rate; authors' code: 3e-4, for an adapter")
    batches: int = Field(100, ge=1, description="rollouts; authors' code: 100")
    batch_size: int = Field(16, ge=1, description="prompts per rollout; 16 of 16 images are the authors' 256")
    accumulation: int = Field(100, ge=1, description="minibatches per optimizer step; authors' code: 64 images' steps")
    weight_decay: Float = Field(1e-4, ge=0, description="of AdamW; authors' code: 1e-4")
    rewards: dict[str, Float] = Field(
        {"aesthetic": 1.0}, min_length=1, description=f"{REWARDS}. They need no gradient. Paper: one of four alone"
    )
    images_per_prompt: int = Field(
        16, ge=1, description="images of each prompt in a rollout, by which its mean is judged; authors: the last 16"
    )
    advantages: Baseline = Field(
        "prompt",
        description="rewards less the mean and over the standard deviation of: prompt = the same prompt's images, as "
        "the authors' code; prompt_mean = its mean, the whole rollout's deviation, as Flow-GRPO; batch = the rollout",
    )
    min_count: int = Field(
        2, ge=1, description="a prompt with fewer images in the rollout is judged by the rollout; authors' code: 16"
    )
    advantage_clip: Float = Field(5.0, gt=0, description="advantages are clamped to +- this; authors' code: 5")
    clip: Float = Field(1e-4, gt=0, lt=1, description="importance ratios are clamped to 1 +- clip; authors' code: 1e-4")
    kl_coeff: Float = Field(
        0.0, ge=0, description="weight of the divergence from the reference, per latent dimension; authors: none, 0"
    )
    steps: int = Field(50, ge=1, le=999, description="DDIM steps N of a rollout, at eta 1; paper: 50")
    guidance_scale: Float = Field(
        5.0, ge=0, description="classifier-free guidance in rollout and loss, 1 = off; paper: 5"
    )
    timestep_fraction: Float = Field(
        1.0, gt=0, le=1, description="share of an image's steps that are trained on, drawn anew; authors' code: 1"
    )
    inner_epochs: int = Field(1, ge=1, description="how often a rollout is trained on; authors' code: 1")
    minibatch_size: int = Field(32, ge=1, description="steps per minibatch; so many images are sampled at a time, too")

    @property
    def preprocess(self) -> None:
        """Scorers are shown images as their own blocks say: a gradient is not asked for."""


def ddpo_loss(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """max(-A r, -A clamp(r, 1 - clip, 1 + clip)), (n,); r = exp(log p - log p_old). -A where the policies are equal.

    Past the clip a step gets no gradient where it has moved the right way, and all of it where it has moved the wrong.
    """
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def gaussian_kl(mean: Tensor, reference_mean: Tensor, std: Tensor) -> Tensor:
    """KL divergence of two steps of the same std, mean over latent dimensions, nats per dimension, (n,)."""
    return ((mean - reference_mean) ** 2 / (2 * std**2)).flatten(1).mean(1)


@dataclass(frozen=True)
class Steps:
    """Single denoising steps of images, n rows."""

    x_t: Tensor  # (n, C, h, w)
    x_prev: Tensor  # what was drawn
    t: Tensor  # (n,)
    cond: Conditioning
    advantage: Tensor  # (n,) of the image
    old_log_prob: Tensor  # (n,) by the policy that made the rollout
    rewards: Metrics  # means over the whole rollout, to be logged


@dataclass(frozen=True)
class Rollout:
    """What all processes have drawn of a batch of P prompts, G images of each."""

    states: Tensor  # (P, G, T + 1, C, h, w): x_t of each of the T steps that add noise, and where the last arrived
    times: Tensor  # (T,) of these steps
    cond: Conditioning  # (P,)
    advantage: Tensor  # (P, G)
    rewards: Metrics

    def __getitem__(self, rows: Tensor) -> Steps:
        """The steps at rows (n, 3) of prompt, image and step; their probabilities are still to be filled in."""
        prompt, image, step = rows.unbind(1)
        x_t, x_prev = (self.states[prompt, image, at] for at in (step, step + 1))
        unknown = torch.full_like(x_t[:, 0, 0, 0], torch.nan)
        return Steps(
            x_t, x_prev, self.times[step], self.cond[prompt], self.advantage[prompt, image], unknown, self.rewards
        )


class Method:
    consumes = "prompts"
    needs = ("rewards",)

    def __init__(self, config: Config, policy: Policy, rewards: Mapping[str, Reward]):
        self.config, self.policy = config, policy
        self.scorers = {name: rewards[name] for name in config.rewards}
        self.path = policy.backbone.path
        self.times = self.path.sampling_times(config.steps)
        # the last step of a flow ends at the image itself, without noise, and has no probability
        self.noisy_steps = int((self.path.level(self.times[1:], torch.zeros(1)).sigma2 > 0).sum())
        if not self.noisy_steps:
            raise ValueError("steps must be at least 2: the last step of this model adds no noise, so nothing is tried")

    def minibatches(self, batch: PromptBatch, draws: Draws) -> Iterable[Part[Steps]]:
        """The steps of a rollout, shuffled anew in every inner epoch.

        Their probabilities are computed before the first update, from the very minibatches of the first epoch, and
        not while sampling, where other shapes and a merged adapter round otherwise: the latter by 2e-5 in the embedded
        world, a fifth of the default clip.
        """
        c, shard = self.config, self.policy.shard
        with self.policy.merged():
            rollout = self.rollout(batch, draws)
        rows = self.trained_steps(draws).to(rollout.states.device)
        shuffled = [torch.randperm(len(rows), generator=draws.shared) for _ in range(c.inner_epochs)]
        old = rollout.advantage.new_zeros(len(rows))
        for part in shuffled[0].split(c.minibatch_size):
            with torch.no_grad():
                log_prob, _, _ = self.log_prob(rollout[rows[part[shard.rows(len(part))]]])
            old[part] = self.policy.shard.gather_n(log_prob, len(part))
        for part in (part for order in shuffled for part in order.split(c.minibatch_size)):
            own = part[shard.rows(len(part))]
            yield Part(replace(rollout[rows[own]], old_log_prob=old[own]), len(part))

    @torch.no_grad()
    def rollout(self, batch: PromptBatch, draws: Draws) -> Rollout:
        """Draws images, has them scored, and compares them; the same whichever process draws which prompt's."""
        c = self.config
        # as many at a time in all processes, because in each step they may call a network of which each holds a piece
        copies = torch.arange(c.images_per_prompt).split(max(1, c.minibatch_size // draws.n))
        drawn = [self.images(batch, len(part), draws.noise) for part in copies]

        def of_all(parts: Iterable[Tensor]) -> Tensor:
            return self.policy.shard.gather_n(torch.cat(list(parts)).transpose(0, 1), draws.n)

        states = of_all(states for states, _ in drawn)
        scores = {name: of_all(found[name] for _, found in drawn) for name in c.rewards}
        cond = Conditioning(
            {name: self.policy.shard.gather_n(value, draws.n) for name, value in batch.cond.tensors.items()}
        )
        shard = self.policy.shard
        prompts = [p for own in shard.all_gather_object(list(batch.prompts)[: shard.count(draws.n)]) for p in own]
        reward = weighted_sum(scores, c.rewards)  # (P, G)
        shown_for = [prompt for prompt in prompts for _ in range(c.images_per_prompt)]
        advantage = standardised(reward.flatten(), shown_for, c.advantages, c.min_count).view_as(reward)
        means: Metrics = {"reward": reward.mean(), **{f"reward_{name}": score.mean() for name, score in scores.items()}}
        times = self.times[: self.noisy_steps].to(states.device)
        return Rollout(states, times, cond, advantage.clamp(-c.advantage_clip, c.advantage_clip), means)

    def images(self, batch: PromptBatch, k: int, sample_noise: NoiseFn) -> tuple[Tensor, dict[str, Tensor]]:
        """k images of each of m prompts: their states (k, m, T + 1, C, h, w), and their scores (k, m) by scorer."""
        sample_noise, cond = to_device(self.policy.device, sample_noise), batch.cond.repeat(k)
        states = [sample_noise((len(cond), *self.policy.backbone.latent_shape))]
        for t in self.times[:-1]:
            mean, std = self.transition(states[-1], t.expand(len(cond)), cond)
            states.append(mean + std * sample_noise(tuple(mean.shape)))
        kept = torch.stack(states[: self.noisy_steps + 1], 1)
        scores = score_latents(self.policy.backbone, states[-1], list(batch.prompts) * k, self.scorers)
        return kept.unflatten(0, (k, -1)), {name: found.unflatten(0, (k, -1)) for name, found in scores.items()}

    def trained_steps(self, draws: Draws) -> Tensor:
        """Rows (n, 3) of prompt, image and step: of each image so many of its steps as `timestep_fraction` says."""
        images, steps = self.config.images_per_prompt, self.noisy_steps
        kept = max(1, int(steps * self.config.timestep_fraction + 1e-6))
        shuffled = draws.uniform(images * steps * len(draws.rows)).view(images, steps, -1).argsort(1)
        chosen = self.policy.shard.gather_n(shuffled[:, :kept].permute(2, 0, 1), draws.n)  # (P, G, kept)
        prompt, image, _ = torch.ones_like(chosen).nonzero().unbind(1)
        return torch.stack([prompt, image, chosen.flatten()], 1)

    def transition(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        """Mean and std of x_prev at eta 1, from times t (n,); the std is above 0 in all `noisy_steps`."""
        predicted = self.policy.predict(x_t, t, cond, self.config.guidance_scale)
        at, to = self.path.level(t, x_t), self.path.level(process.time_after(self.times, t), x_t)
        return process.ddim_step(*self.path.x0_and_noise(predicted, x_t, at), at, to, eta=1.0)

    def log_prob(self, m: Steps) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability (n,) of what was drawn, and the mean and std of what it was drawn from."""
        mean, std = self.transition(m.x_t, m.t, m.cond)
        return process.gaussian_log_prob(m.x_prev, mean, std), mean, std

    def loss(self, minibatch: Steps) -> tuple[Tensor, Metrics]:
        c = self.config
        log_prob, mean, std = self.log_prob(minibatch)
        log_ratio = log_prob - minibatch.old_log_prob
        loss, kl = ddpo_loss(log_ratio, minibatch.advantage, c.clip).mean(), {}
        if c.kl_coeff:
            with self.policy.reference():
                reference_mean, _ = self.transition(minibatch.x_t, minibatch.t, minibatch.cond)
            kl = {"kl": gaussian_kl(mean, reference_mean, std).mean()}
            loss = loss + c.kl_coeff * kl["kl"]
        return loss, {
            "loss": loss,
            **minibatch.rewards,
            "ratio": log_ratio.exp().mean(),
            "approx_kl": 0.5 * (log_ratio**2).mean(),
            "clipped": ((log_ratio.exp() - 1).abs() > c.clip).float().mean(),
            **kl,
        }
