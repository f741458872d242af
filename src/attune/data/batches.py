"""The batches that objectives learn from: prompts, pairs, single images that are liked or not, and scored groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attune.diffusion.noise import Draws
from attune.diffusion.path import Path
from attune.interfaces import Conditioning


@dataclass(frozen=True)
class PromptBatch:
    """B prompts and their encoding."""

    prompts: Sequence[str]
    cond: Conditioning


@dataclass(frozen=True)
class ImageBatch:
    """Scaled latents (B, C, h, w) of single images for their prompts, and which of them are liked.

    Of pairs, the chosen images come first and then the rejected ones.
    """

    prompts: Sequence[str]
    cond: Conditioning
    latents: Tensor
    liked: Tensor  # (B,) bool

    def draw_noise(self, path: Path, draws: Draws) -> tuple[Tensor, Tensor]:
        """A timestep (B,) and noise (B, C, h, w) for each image."""
        return draw_noise(self.latents, path, draws)


@dataclass(frozen=True)
class PairBatch:
    """B pairs of scaled latents (B, C, h, w) for the same prompts, and which one is preferred."""

    prompts: Sequence[str]
    cond: Conditioning
    latents_0: Tensor
    latents_1: Tensor
    label_0: Tensor  # (B,) probability that image 0 is the better: 1 or 0 of people, 0.5 for a tie, soft of a scorer
    weight: Tensor  # (B,) 1 / number of pairs that share the prompt

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
        return ImageBatch([*self.prompts, *self.prompts], self.cond.repeat(2), latents, liked)

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

    def draw_noise(self, path: Path, draws: Draws) -> tuple[Tensor, Tensor]:
        """Timesteps (B,) and noise (B, C, h, w), each shared by the two images of a pair."""
        return draw_noise(self.latents_0, path, draws)


@dataclass(frozen=True)
class GroupBatch:
    """B prompts with several images each, side by side: scaled latents (M, C, h, w), M = sum(sizes), and scores."""

    prompts: Sequence[str]
    cond: Conditioning  # B rows
    latents: Tensor
    sizes: Sequence[int]  # images of each prompt
    scores: Mapping[str, Tensor]  # scorer -> (M,)

    @property
    def prompt_rows(self) -> Tensor:
        """The prompt (M,) of every image, as a row of the batch."""
        sizes = torch.tensor(self.sizes, device=self.latents.device, dtype=torch.long)
        return torch.repeat_interleave(sizes)

    def scores_by(self, scorer: str) -> Tensor:
        """Scores (M,). Raises ValueError if the data have none by that scorer."""
        if scorer not in self.scores:
            raise ValueError(f"scorer: no scores by {scorer!r} in the data; name it in data.score_with")
        return self.scores[scorer]

    def draw_noise(self, path: Path, draws: Draws) -> tuple[Tensor, Tensor]:
        """Timesteps (B,) and noise (B, C, h, w), each shared by the images of a prompt."""
        shape = (len(self.prompts), *self.latents.shape[1:])
        return path.training_times(draws, len(self.prompts)), draws.noise(shape).to(self.latents.device)


def draw_noise(latents: Tensor, path: Path, draws: Draws) -> tuple[Tensor, Tensor]:
    """A time of the path's training (n,) and noise (n, C, h, w) for each of n latents, the noise on their device."""
    return path.training_times(draws, len(latents)), draws.noise(tuple(latents.shape)).to(latents.device)
