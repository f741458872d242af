"""The batches that objectives learn from: prompts, preference pairs, and single images that are liked or not."""

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

    def __getitem__(self, rows: slice) -> PromptBatch:
        return PromptBatch(self.prompts[rows], self.cond[rows])


@dataclass(frozen=True)
class ImageBatch:
    """Scaled latents (B, C, h, w) of single images for their prompts, and which of them are liked.

    Of pairs, the chosen images come first and then the rejected ones; `images_per_row` is 2.
    """

    prompts: Sequence[str]
    cond: Conditioning
    latents: Tensor
    liked: Tensor  # (B,) bool
    images_per_row: int = 1

    def draw_noise(self, schedule: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A timestep (B,) and noise (B, C, h, w) for each image."""
        return draw_noise(self.latents, len(self.latents), schedule, generator)


@dataclass(frozen=True)
class PairBatch:
    """B pairs of scaled latents (B, C, h, w) for the same prompts, and which one is preferred."""

    prompts: Sequence[str]
    cond: Conditioning
    latents_0: Tensor
    latents_1: Tensor
    label_0: Tensor  # (B,) probability that image 0 is the better: 1 or 0 of people, 0.5 for a tie, soft of a scorer
    weight: Tensor  # (B,) 1 / number of pairs that share the prompt

    def __getitem__(self, rows: slice) -> PairBatch:
        return PairBatch(
            self.prompts[rows],
            self.cond[rows],
            self.latents_0[rows],
            self.latents_1[rows],
            self.label_0[rows],
            self.weight[rows],
        )

    @property
    def chosen(self) -> Tensor:
        return torch.where(self._first_chosen, self.latents_0, self.latents_1)

    @property
    def rejected(self) -> Tensor:
        return torch.where(self._first_chosen, self.latents_1, self.latents_0)

    @property
    def p_chosen(self) -> Tensor:
        """Probability (B,) that the chosen image is the better one: 1 where people decided."""
        return torch.maximum(self.label_0, 1 - self.label_0)

    @property
    def images(self) -> ImageBatch:
        """Both images of every pair, each by itself: the chosen ones are liked, the rejected ones are not."""
        latents = torch.cat([self.chosen, self.rejected])
        liked = torch.arange(len(latents), device=latents.device) < len(self.prompts)
        return ImageBatch([*self.prompts, *self.prompts], self.cond.repeat(2), latents, liked, images_per_row=2)

    @property
    def liked_images(self) -> ImageBatch:
        """The chosen images alone."""
        chosen = self.chosen
        return ImageBatch(
            self.prompts, self.cond, chosen, torch.ones(len(chosen), dtype=torch.bool, device=chosen.device)
        )

    @property
    def _first_chosen(self) -> Tensor:
        if (self.label_0 == 0.5).any():
            raise ValueError("a tie has no chosen image; drop ties before training on chosen and rejected")
        return (self.label_0 > 0.5)[:, None, None, None]

    def draw_noise(self, schedule: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Timesteps (B,) and noise (B, C, h, w), each shared by the two images of a pair."""
        return draw_noise(self.latents_0, len(self.prompts), schedule, generator)


def draw_noise(latents: Tensor, n: int, schedule: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n timesteps of a schedule, and noise (n, C, h, w) as the latents have it, on their device."""
    t = torch.randint(len(schedule), (n,), generator=generator)
    return t, torch.randn((n, *latents.shape[1:]), generator=generator).to(latents.device)
