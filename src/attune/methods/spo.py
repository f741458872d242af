"""SPO: step-by-step preference optimisation with a step-aware preference model (SPM).

At every denoising step the policy proposes k candidates for the next latents; the SPM judges what each would
become (its one-step prediction x_0, decoded, at that t); the best and the worst make a preference pair for
that step alone. A *random* candidate continues the trajectory, so the next step is judged from an ordinary
state and not from a lucky one.

Source: Liang et al. 2024, "Aesthetic Post-Training Diffusion Models from Generic Preferences with Step-by-step
Preference Optimization", arXiv:2406.04314, algorithm 1 and eq. 8; authors' code: train_spo.py, RockeyCoss/SPO.
Differences from that code: gradients are clipped (theirs exhausts an iterator and never clips; set
`max_grad_norm: null` for parity), and chosen and rejected, which share x_t, share one forward.
Cost per prompt, N steps, k candidates, the first s plain: s + (N - s) k denoiser samples, doubled by
guidance, and (N - s) k decodings and judgements; then one policy and one reference forward per kept step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from attune.config.schema import Float
from attune.config.settings import MethodConfig
from attune.data.batches import PromptBatch
from attune.diffusion import ddim as sampling
from attune.diffusion import process
from attune.diffusion.losses import preference_loss
from attune.diffusion.policy import Policy
from attune.interfaces import Conditioning, Metrics, StepReward


class Config(MethodConfig):
    beta: Float = Field(gt=0, description="strength of the margin in log-ratio; 10 in the paper")
    clip: Float = Field(gt=0, lt=1, description="ratios are clamped to 1 +- clip; 0.1 in the paper")
    candidates: int = Field(ge=2, description="k proposals per step; 4 for SD 1.5, 2 for SDXL")
    threshold: Float = Field(ge=0, lt=1, description="keep a pair if softmax gap exceeds this; 0.3 SD 1.5, 0.4 SDXL")
    steps: int = Field(ge=2, description="DDIM steps N of a rollout, eta 1; 20 in the paper")
    start_step: int = Field(ge=0, description="first steps without candidates; 4 in the paper")
    inner_steps: int = Field(0, ge=0, description="steps each candidate runs on before it is judged; 3 for SDXL")
    guidance_scale: Float = Field(ge=0, description="guidance in rollout and loss; 5 in the paper")
    minibatch_size: int = Field(ge=1, description="step pairs per minibatch")
    continuation: Literal["random", "chosen", "rejected"] = Field(
        "random", description="the candidate a rollout goes on from; the others are the paper's ablation"
    )

    @model_validator(mode="after")
    def _candidates_are_drawn(self) -> Config:
        if self.start_step >= self.steps:
            raise ValueError("start_step must be less than steps, or no candidate is ever drawn")
        return self


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
        columns = (torch.cat([getattr(part, name) for part in parts]) for name in ("chosen", "rejected", "t"))
        return StepPairs(x_t, *columns, Conditioning.cat([part.cond for part in parts]))


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
    trained_on = ("pickscore",)  # the preference model starts from it, so gains there are not held out

    def __init__(self, config: Config, policy: Policy, judge: StepReward):
        self.config, self.policy, self.judge = config, policy, judge
        self.schedule = policy.backbone.alphas_cumprod
        self.timesteps = process.ddim_timesteps(len(self.schedule), config.steps)

    def minibatches(self, batch: PromptBatch, generator: torch.Generator) -> Iterable[StepPairs]:
        shard, n = self.policy.shard, len(batch.prompts)

        def choose(k: int, ours: int) -> Tensor:
            return torch.randint(k, (n,), generator=generator)[shard.rows(n)]

        draw = shard.local_noise(sampling.normal(generator), n)
        pairs = self.rollout(batch[shard.rows(n)], draw, choose)
        pairs = pairs if shard.world_size == 1 else self.gathered(pairs[: None if shard.count(n) else 0])
        order = torch.randperm(len(pairs), generator=generator)
        for rows in order.split(self.config.minibatch_size):
            if len(rows):  # the judge may have been sure of nothing
                yield pairs[rows]

    @torch.no_grad()
    def rollout(self, batch: PromptBatch, draw: sampling.Normal, choose: Callable[[int, int], Tensor]) -> StepPairs:
        """Runs the policy on a batch of prompts and collects the step pairs its judge is sure about."""
        c, n, draw = self.config, len(batch.prompts), sampling.on(self.policy.device, draw)
        x, group, kept = draw((n, *self.policy.backbone.latent_shape)), [], []
        for i, t in enumerate(self.timesteps):
            branches = i >= c.start_step and (i - c.start_step) % (c.inner_steps + 1) == 0
            noise_pred = self.predict(x, t, batch.cond)
            if branches and group:  # the candidates made so far are judged here, and one of them goes on
                a_t = process.at(self.schedule, t.expand(len(x)), x)
                pairs, best, worst = self.judged(batch, group, process.predict_x0(x, noise_pred, a_t), t)
                goes_on = {"random": lambda: choose(c.candidates, n), "chosen": best.cpu, "rejected": worst.cpu}
                survivor = goes_on[c.continuation]() * n + torch.arange(n)
                kept += pairs
                x, noise_pred, group = x[survivor], noise_pred[survivor], []
            mean, std = self.transition(x, noise_pred, t)
            if branches:
                mean, std = mean.repeat(c.candidates, 1, 1, 1), std.repeat(c.candidates, 1, 1, 1)
            x_prev = mean + std * draw(tuple(mean.shape))
            if i >= c.start_step:
                group.append((x, t, x_prev))
            x = x_prev
        pairs, _, _ = self.judged(batch, group, x, torch.zeros_like(t))
        return StepPairs.cat(kept + pairs)

    def gathered(self, ours: StepPairs) -> StepPairs:
        """The pairs of all processes, in the order of one: by step, then by prompt."""
        gather = self.policy.shard.gather
        halves = ours.x_t.tensor_split(2) if self.config.inner_steps else [ours.x_t]
        columns = [torch.cat(list(map(gather, halves))), *map(gather, (ours.chosen, ours.rejected, ours.t))]
        cond = Conditioning({name: gather(value) for name, value in ours.cond.tensors.items()})
        pairs = StepPairs(*columns, cond)
        return pairs[pairs.t.argsort(descending=True, stable=True)]

    def judged(self, batch: PromptBatch, group: list, x_0: Tensor, t: Tensor) -> tuple[list[StepPairs], Tensor, Tensor]:
        """The pairs of every step of a group of candidates, decided by how their x_0 look at time t.

        With them, for each prompt, which candidate was best and which worst (B,).
        """
        k, n = self.config.candidates, len(batch.prompts)
        images = map(self.policy.backbone.decode_latents, x_0.chunk(k))  # one candidate at a time: pixels are large
        scores = torch.stack([self.judge(candidate, batch.prompts, t.expand(n)) for candidate in images])
        best, worst, sure = compare(scores, self.config.threshold)
        rows = sure.nonzero().flatten()
        chosen, rejected = best[rows] * n + rows, worst[rows] * n + rows
        pairs = []
        for x_t, step_t, x_prev in group:
            shared = len(x_t) == n and self.config.inner_steps == 0
            start = [rows] if shared else [rows, rows] if len(x_t) == n else [chosen, rejected]
            t_rows = step_t.expand(len(rows))
            pairs.append(StepPairs(x_t[torch.cat(start)], x_prev[chosen], x_prev[rejected], t_rows, batch.cond[rows]))
        return pairs, best, worst

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Guided epsilon for rows of x_t that may be k candidates of each prompt."""
        cond = cond.repeat(len(x_t) // len(cond))
        return self.policy.predict_noise(x_t, t.expand(len(x_t)), cond, self.config.guidance_scale)

    def transition(self, x_t: Tensor, noise_pred: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of x_prev at eta 1, where a std of zero cannot occur."""
        t = t.expand(len(x_t))
        t_prev = process.previous_timestep(t, len(self.schedule), self.config.steps)
        a_t, a_prev = process.at(self.schedule, t, x_t), process.at(self.schedule, t_prev, x_t)
        return process.ddim_step(x_t, noise_pred, a_t, a_prev, eta=1.0)

    def log_probs(self, m: StepPairs) -> tuple[Tensor, Tensor]:
        """Log-probabilities (n,) of the chosen and the rejected step, from one forward if they share x_t."""
        copies = len(m.x_t) // len(m.t)
        t, cond = m.t.repeat(copies), m.cond.repeat(copies)
        noise_pred = self.policy.predict_noise(m.x_t, t, cond, self.config.guidance_scale)
        mean, std = self.transition(m.x_t, noise_pred, t)
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
