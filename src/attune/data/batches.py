"""What objectives are fed: typed batches of prompts and of preference pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attune.interfaces import Conditioning


@dataclass(frozen=True)
class PromptBatch:
    """B prompts and their encoding."""

    prompts: Sequence[str]
    cond: Conditioning


@dataclass(frozen=True)
class PairBatch:
    """B pairs of scaled latents (B, C, h, w) for the same prompts, and which one people preferred."""

    prompts: Sequence[str]
    cond: Conditioning
    latents_0: Tensor
    latents_1: Tensor
    label_0: Tensor  # (B,) 1 if image 0 was chosen, 0 if image 1, 0.5 for a tie
    weight: Tensor  # (B,) 1 / number of pairs that share the prompt

    @property
    def chosen(self) -> Tensor:
        return torch.where(self._first_chosen, self.latents_0, self.latents_1)

    @property
    def rejected(self) -> Tensor:
        return torch.where(self._first_chosen, self.latents_1, self.latents_0)

    @property
    def _first_chosen(self) -> Tensor:
        if (self.label_0 == 0.5).any():
            raise ValueError("a tie has no chosen image; drop ties before training on chosen and rejected")
        return (self.label_0 > 0.5)[:, None, None, None]

    def draw_noise(self, schedule: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One timestep (B,) and one noise (B, C, h, w) per pair."""
        t = torch.randint(len(schedule), (len(self.prompts),), generator=generator)
        return t, torch.randn(self.latents_0.shape, generator=generator).to(self.latents_0.device)
