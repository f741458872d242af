"""SPO: step-by-step preference optimisation with a step-aware preference model (SPM).

At every denoising step the policy proposes k candidates for the next latents. The SPM scores what each would
become (its one-step prediction x_0, decoded, at that t); the best and the worst make a preference pair for
that step alone. A *random* candidate continues the trajectory, so that the next step starts from an ordinary
state and not from a selected one.

Source: Liang et al. 2024, "Aesthetic Post-Training Diffusion Models from Generic Preferences with Step-by-step
Preference Optimization", arXiv:2406.04314, algorithm 1 and eq. 8; authors' code: train_spo.py, RockeyCoss/SPO.
Differences from that code: gradients are clipped (theirs exhausts an iterator and never clips; set
`max_grad_norm: null` for parity), and chosen and rejected, which share x_t, share one forward.
Cost per prompt, N steps, k candidates, the first s without: s + (N - s) k denoiser samples, doubled by
guidance, and (N - s) k decodings and scorings; then one policy and one reference forward per kept step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from attune.config.schema import Float
from attune.config.settings import Lora, MethodConfig
from attune.data.batches import PromptBatch
from attune.diffusion import process
from attune.diffusion.losses import preference_loss
from attune.diffusion.noise import Draws, NoiseFn, to_device
from attune.distributed import Part
from attune.interfaces import Conditioning, Metrics, StepReward

if TYPE_CHECKING:
    from attune.diffusion.policy import Policy


LOSS_AT_REFERENCE = math.log(2)
"""The loss while the policy equals its reference."""
JUDGED_AT_ONCE = 64  # images; a ViT-H/14 takes 1 GB for their activations


class Config(MethodConfig):
    """Defaults: the paper's training of SD 1.5, section 4.1: 10 epochs of 4,000 prompts, 40 to an optimizer step."""

    lora: Lora | None = Field(Lora(rank=4), description="adapter; paper: rank 4 SD 1.5, 64 SDXL. null = train all")
    lr: Float = Field(6e-5, gt=0, description="learning rate; paper: 6e-5 SD 1.5, 1e-5 SDXL")
    batches: int = Field(4000, ge=1, description="rollouts; paper: 10 epochs of 4,000 prompts, 10 to a rollout here")
    batch_size: int = Field(10, ge=1, description="prompts per rollout")
    accumulation: int = Field(4, ge=1, description="minibatches per optimizer step")
    weight_decay: Float = Field(1e-4, ge=0, description="of AdamW; authors' code: 1e-4")
    beta: Float = Field(10.0, gt=0, description="factor of the margin of log-ratios; paper: 10")
    clip: Float = Field(0.1, gt=0, lt=1, description="importance ratios are clamped to 1 +- clip; authors' code: 0.1")
    candidates: int = Field(4, ge=2, description="candidates k for each step; authors' code: 4 SD 1.5, 2 SDXL")
    threshold: Float = Field(
        0.3, ge=0, lt=1, description="a pair is kept if the softmax gap exceeds this; authors' code: 0.3, SDXL 0.4"
    )
    steps: int = Field(20, ge=2, description="DDIM steps N of a rollout, at eta 1; paper: 20")
    start_step: int = Field(4, ge=0, description="first steps, which have no candidates; authors' code: 4")
    inner_steps: int = Field(
        0, ge=0, description="steps that each candidate continues before it is scored; authors' code: 0, SDXL 3"
    )
    guidance_scale: Float = Field(
        5.0, ge=0, description="classifier-free guidance in rollout and loss, 1 = off; paper: 5"
    )
    minibatch_size: int = Field(10, ge=1, description="step pairs per minibatch")
    continuation: Literal["random", "chosen", "rejected"] = Field(
        "random", description="the candidate that a rollout continues from; the others are the paper's ablation"
    )

    @model_validator(mode="after")
    def _has_steps_with_candidates(self) -> Config:
        if self.start_step >= self.steps:
            raise ValueError("start_step must be less than steps, or there are no candidates")
        return self


class Transition(NamedTuple):
    """One step of a rollout of n prompts: rows of x_prev are k candidates of each prompt, candidate-major.

    Rows of x_t are n where the candidates share it, and k n where they have diverged.
    """

    x_t: Tensor
    t: Tensor  # scalar
    x_prev: Tensor


@dataclass(frozen=True)
class StepPairs:
    """Preference pairs of single denoising steps, n rows. Without inner steps both sides share x_t."""

    x_t: Tensor  # (n, C, h, w), or (2n, ...) chosen || rejected where they differ
    chosen: Tensor  # x_prev of the preferred candidate
    rejected: Tensor
    t: Tensor  # (n,)
    cond: Conditioning

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, rows: Tensor | slice) -> StepPairs:
        x_t = self.x_t[rows] if len(self.x_t) == len(self) else torch.cat([half[rows] for half in self.x_t.chunk(2)])
        return StepPairs(x_t, self.chosen[rows], self.rejected[rows], self.t[rows], self.cond[rows])

    @staticmethod
    def cat(parts: list[StepPairs]) -> StepPairs:
        if any(len(part.x_t) > len(part.t) for part in parts):  # any: a part may have no rows at all
            halves = [part.x_t.chunk(2) for part in parts]
            x_t = torch.cat([h[0] for h in halves] + [h[1] for h in halves])
        else:
            x_t = torch.cat([part.x_t for part in parts])
        chosen = torch.cat([part.chosen for part in parts])
        rejected = torch.cat([part.rejected for part in parts])
        t = torch.cat([part.t for part in parts])
        return StepPairs(x_t, chosen, rejected, t, Conditioning.cat([part.cond for part in parts]))


def compare(scores: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Best and worst candidate (B,) of scores (k, B), and whether their softmax gap exceeds the threshold.

    The softmax is over the two extremes only, so the gap is tanh((best - worst) / 2).
    """
    best, worst = scores.max(0), scores.min(0)
    return best.indices, worst.indices, torch.tanh((best.values - worst.values) / 2) > threshold


def spo_loss(log_ratio_chosen: Tensor, log_ratio_rejected: Tensor, beta: float, clip: float) -> Tensor:
    """-log sigmoid(beta [log clip(r_chosen) - log clip(r_rejected)]), (n,); r = exp(log p - log p_ref).

    The clip is applied to each side alone and always: a side outside 1 +- clip gets no gradient.
    """
    clipped = [r.exp().clamp(1 - clip, 1 + clip).log() for r in (log_ratio_chosen, log_ratio_rejected)]
    return preference_loss(beta * (clipped[0] - clipped[1]))


class Method:
    consumes = "prompts"
    needs = ("preference_model",)

    def __init__(self, config: Config, policy: Policy, preference_model: StepReward):
        self.config, self.policy, self.preference_model = config, policy, preference_model
        self.path = policy.backbone.path
        self.times = self.path.sampling_times(config.steps)
        # the last step of a flow is no choice: it ends at the image itself, without noise
        self.noisy_steps = int((self.path.level(self.times[1:], torch.zeros(1)).sigma2 > 0).sum())
        if config.start_step >= self.noisy_steps:
            raise ValueError(f"start_step must be less than {self.noisy_steps}, the steps of this model that add noise")

    def minibatches(self, batch: PromptBatch, draws: Draws) -> Iterable[Part[StepPairs]]:
        shard = self.policy.shard
        with self.policy.merged():
            pairs = self.rollout(batch, draws.noise, draws.integers)
        # which pairs there are is known after the rollout, so the processes share them out anew
        pairs = pairs if shard.world_size == 1 else self.gathered(pairs[: None if shard.count(draws.n) else 0])
        order = torch.randperm(len(pairs), generator=draws.shared)
        for rows in order.split(self.config.minibatch_size):
            if len(rows):  # there are no pairs if the preference model is confident of none
                yield Part(pairs[rows[shard.rows(len(rows))]], len(rows))

    @torch.no_grad()
    def rollout(self, batch: PromptBatch, sample_noise: NoiseFn, choose: Callable[[int, int], Tensor]) -> StepPairs:
        """Samples images of a batch of n prompts, and collects the step pairs that are confidently ordered.

        A segment begins with a step whose k candidates branch off a shared x_t, and has `inner_steps` more steps.

        Args:
            choose: (k, n) -> index (n,) of the candidate that continues, where that is random.
        """
        c, n, sample_noise = self.config, len(batch.prompts), to_device(self.policy.device, sample_noise)
        x_t = sample_noise((n, *self.policy.backbone.latent_shape))
        segment: list[Transition] = []
        kept: list[StepPairs] = []
        for i, t in enumerate(self.times[:-1]):
            noisy = c.start_step <= i < self.noisy_steps
            branches = noisy and (i - c.start_step) % (c.inner_steps + 1) == 0
            predicted = self.predict(x_t, t, batch.cond)
            if branches and segment:  # its candidates are scored by this prediction, and one of them continues
                x_0, _ = self.path.x0_and_noise(predicted, x_t, self.path.level(t, x_t))
                pairs, best, worst = self.scored(batch, segment, x_0, t)
                continues = {"random": lambda: choose(c.candidates, n), "chosen": best.cpu, "rejected": worst.cpu}
                next_state = continues[c.continuation]() * n + torch.arange(n)
                kept += pairs
                x_t, predicted, segment = x_t[next_state], predicted[next_state], []
            mean, std = self.transition(x_t, predicted, t.expand(len(x_t)))
            if branches:
                mean, std = mean.repeat(c.candidates, 1, 1, 1), std.repeat(c.candidates, 1, 1, 1)
            x_prev = mean + std * sample_noise(tuple(mean.shape))
            if noisy:
                segment.append(Transition(x_t, t, x_prev))
            x_t = x_prev
        # where the last step of a flow ends is what was predicted at t; a Z-Image of 10 steps is there from 400 to 0
        judged_at = torch.zeros_like(t) if self.noisy_steps == self.config.steps else t
        pairs, _, _ = self.scored(batch, segment, x_t, judged_at)
        return StepPairs.cat(kept + pairs)

    def gathered(self, ours: StepPairs) -> StepPairs:
        """The pairs of all processes, in the order that one process would have them: by step, then by prompt."""
        gather = self.policy.shard.gather
        halves = ours.x_t.tensor_split(2) if self.config.inner_steps else [ours.x_t]
        x_t = torch.cat(list(map(gather, halves)))
        chosen, rejected, t = map(gather, (ours.chosen, ours.rejected, ours.t))
        cond = Conditioning({name: gather(value) for name, value in ours.cond.tensors.items()})
        pairs = StepPairs(x_t, chosen, rejected, t, cond)
        return pairs[pairs.t.argsort(descending=True, stable=True)]

    def scored(
        self, batch: PromptBatch, segment: Sequence[Transition], x_0: Tensor, t: Tensor
    ) -> tuple[list[StepPairs], Tensor, Tensor]:
        """The step pairs of a segment, by the scores at time t of what its candidates become, x_0 (k n, C, h, w).

        Returns: pairs for each step of the segment; for each prompt its best and its worst candidate, (n,).
        """
        k, n = self.config.candidates, len(batch.prompts)
        images, prompts = self.policy.backbone.decode_latents(x_0), list(batch.prompts) * k
        parts = (slice(start, start + JUDGED_AT_ONCE) for start in range(0, k * n, JUDGED_AT_ONCE))
        scores = [self.preference_model(images[part], prompts[part], t.expand(len(images[part]))) for part in parts]
        best, worst, confident = compare(torch.cat(scores).unflatten(0, (k, n)), self.config.threshold)
        rows = confident.nonzero().flatten()
        chosen, rejected = best[rows] * n + rows, worst[rows] * n + rows
        pairs = []
        for x_t, step_t, x_prev in segment:
            shared = len(x_t) == n and self.config.inner_steps == 0
            start = [rows] if shared else [rows, rows] if len(x_t) == n else [chosen, rejected]
            t_rows = step_t.expand(len(rows))
            pairs.append(StepPairs(x_t[torch.cat(start)], x_prev[chosen], x_prev[rejected], t_rows, batch.cond[rows]))
        return pairs, best, worst

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Guided prediction for rows of x_t that may be k candidates of each prompt."""
        cond = cond.repeat(len(x_t) // len(cond))
        return self.policy.predict(x_t, t.expand(len(x_t)), cond, self.config.guidance_scale)

    def transition(self, x_t: Tensor, predicted: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of x_prev at eta 1, from times t (n,); the std is above 0 in all `noisy_steps`."""
        at, to = self.path.level(t, x_t), self.path.level(process.time_after(self.times, t), x_t)
        return process.ddim_step(*self.path.x0_and_noise(predicted, x_t, at), at, to, eta=1.0)

    def log_probs(self, m: StepPairs) -> tuple[Tensor, Tensor]:
        """Log-probabilities (n,) of the chosen and the rejected step, from one forward if they share x_t."""
        copies = len(m.x_t) // len(m.t)
        t, cond = m.t.repeat(copies), m.cond.repeat(copies)
        predicted = self.policy.predict(m.x_t, t, cond, self.config.guidance_scale)
        mean, std = self.transition(m.x_t, predicted, t)
        means, stds = (mean.chunk(2), std.chunk(2)) if copies == 2 else ([mean, mean], [std, std])
        return (
            process.gaussian_log_prob(m.chosen, means[0], stds[0]),
            process.gaussian_log_prob(m.rejected, means[1], stds[1]),
        )

    def loss(self, minibatch: StepPairs) -> tuple[Tensor, Metrics]:
        chosen, rejected = self.log_probs(minibatch)
        with self.policy.reference():
            reference_chosen, reference_rejected = self.log_probs(minibatch)
        log_ratio_chosen, log_ratio_rejected = chosen - reference_chosen, rejected - reference_rejected
        loss = spo_loss(log_ratio_chosen, log_ratio_rejected, self.config.beta, self.config.clip).mean()
        margin = self.config.beta * (log_ratio_chosen - log_ratio_rejected)
        clipped = (log_ratio_chosen.exp() - 1).abs() > self.config.clip
        return loss, {
            "loss": loss,
            "margin": margin.mean(),
            "accuracy": (margin > 0).float().mean(),
            "ratio_chosen": log_ratio_chosen.exp().mean(),
            "ratio_rejected": log_ratio_rejected.exp().mean(),
            "clipped": clipped.float().mean(),
        }
