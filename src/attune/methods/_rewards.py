"""Which scorers a method is trained on, and with what weights: what all methods that optimise scorers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from pydantic import Field, field_validator
from torch import Tensor

from attune.config.schema import Float
from attune.config.settings import MethodConfig
from attune.interfaces import Backbone, Reward

REWARDS = (
    "scorers of the profile and their weights in the sum r; a scorer of weight 0 is only logged, and stays held out"
)
"""The description of `rewards`, whose default differs from method to method."""
SCORED_AT_ONCE = 64  # images; a ViT-H/14 takes 1 GB for their activations
Baseline = Literal["prompt", "prompt_mean", "batch"]
EPS = {"prompt": 1e-6, "prompt_mean": 1e-4, "batch": 1e-8}
"""Added to the standard deviation, as in ddpo-pytorch, in Flow-GRPO (yifan123/flow_grpo), and in ddpo-pytorch."""


class ScorersConfig(MethodConfig):
    """The setting that names them."""

    rewards: dict[str, Float] = Field(min_length=1, description=REWARDS)

    @field_validator("rewards")
    @classmethod
    def _something_is_maximised(cls, rewards: dict[str, float]) -> dict[str, float]:
        if not any(rewards.values()):
            raise ValueError("every weight is 0, so nothing would be trained on")
        return rewards

    @property
    def trained_on(self) -> tuple[str, ...]:
        return tuple(name for name, weight in self.rewards.items() if weight)


def weighted_sum(scores: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The sum (n,) of weight times score (n,); scores of weight 0 are not looked at, not even if they are infinite."""
    parts = (weight * scores[name] for name, weight in weights.items() if weight)
    return cast(Tensor, sum(parts))  # there is a part: the Config refuses weights that are all 0


def score_latents(
    backbone: Backbone, latents: Tensor, prompts: Sequence[str], scorers: Mapping[str, Reward]
) -> dict[str, Tensor]:
    """Scores (n,) by scorer of latents (n, C, h, w), decoded, each for its prompt."""
    scores: dict[str, list[Tensor]] = {name: [] for name in scorers}
    for part in torch.arange(len(prompts)).split(SCORED_AT_ONCE):
        images = backbone.decode_latents(latents[part]).clamp(0, 1)
        for name, found in scores.items():
            found.append(scorers[name](images, [prompts[i] for i in part]))
    return {name: torch.cat(found) for name, found in scores.items()}


def standardised(rewards: Tensor, prompts: Sequence[str], by: Baseline, min_count: int) -> Tensor:
    """Advantages (n,) of rewards (n,): (r - mean) / (std + eps), means and deviations over the images of a prompt.

    Computed in float64, so that equal rewards have an advantage of exactly 0.

    Args:
        prompts: of each image.
        by: whose mean and standard deviation, see `ddpo.Config.advantages`.
        min_count: prompts of fewer images have those of all n.
    """
    r = rewards.double()
    mean, std = r.mean().repeat(len(r)), r.std(correction=0).repeat(len(r))
    for prompt in dict.fromkeys(prompts) if by != "batch" else ():
        rows = torch.tensor([other == prompt for other in prompts], device=r.device)
        if rows.sum() >= min_count:
            mean[rows] = r[rows].mean()
            std[rows] = r[rows].std(correction=0) if by == "prompt" else std[rows]
    return ((r - mean) / (std + EPS[by])).float()
