"""The oracle of the embedded world: the utility by which its simulated human chooses, in [0, 1].

It is computed, not learnt, and not differentiable, so no method can have trained against it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from attune.clip.pixels import check_images
from attune.config.settings import ScorerConfig
from attune.world.oracle import VERDICT_FIELDS, judge, scores


class Config(ScorerConfig):
    """The oracle has no weights; only the expected range can be set."""


class Scorer:
    """Oracle scores of images for prompts of the embedded grammar; a `Reward`."""

    differentiable = False
    license = "part of this repository"

    def __init__(self, config: Config) -> None:
        self.expected_range = config.range_of_mean({})

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: images leave [0, 1], or a prompt is not in the grammar.
        """
        return torch.from_numpy(scores(_arrays(images, prompts), prompts)).to(images.device, torch.float32)

    def parts(self, images: Tensor, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Every other field of the oracle's verdict, (B,) each. Arguments and errors as for scores."""
        verdicts = judge(_arrays(images, prompts), prompts)
        names = [name for name in VERDICT_FIELDS if name != "score"]
        return {name: np.array([getattr(verdict, name) for verdict in verdicts]) for name in names}


def _arrays(images: Tensor, prompts: Sequence[str]) -> np.ndarray:
    check_images(images, prompts)
    return images.detach().float().permute(0, 2, 3, 1).cpu().numpy()


def load(config: Config, device: torch.device | str = "cpu") -> Scorer:
    """The scorer; it computes on the CPU and answers on the images' device."""
    return Scorer(config)
