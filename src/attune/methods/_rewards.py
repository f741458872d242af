"""Which scorers a method is trained on, and with what weights: what all methods that optimise scorers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from pydantic import Field, field_validator
from torch import Tensor

from attune.config.schema import Float
from attune.config.settings import MethodConfig

REWARDS = (
    "scorers of the profile and their weights in the sum r; a scorer of weight 0 is only logged, and stays held out"
)
"""The description of `rewards`, whose default differs from method to method."""


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
