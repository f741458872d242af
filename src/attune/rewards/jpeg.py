"""How small, or how large, an image is as a JPEG: a reward that no network computes and that has no gradient.

Source: Black et al. 2023 (DDPO), arXiv:2305.13301, section 5.1; authors' code: `jpeg_compressibility` and
`jpeg_incompressibility` of kvablack/ddpo-pytorch. It tells whether a training works, and nothing about taste.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from attune.clip.pixels import check_images
from attune.config.settings import ScorerConfig
from attune.rewards._numbers import eight_bit


class Config(ScorerConfig):
    """How images are compressed, and which are good."""

    quality: int = Field(95, ge=1, le=100, description="of Pillow's JPEG; authors' code: 95")
    sign: Literal["compressibility", "incompressibility"] = Field(
        "compressibility", description="minus or plus the size in kB (1,000 bytes): small or large files are good"
    )


def size(image: np.ndarray, quality: int) -> float:
    """Size in kB of an image, uint8 (H, W, 3)."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=quality)
    return file.tell() / 1000


class Scorer:
    """Size of images as files; a `Reward` that ignores its prompts."""

    differentiable = False
    license = "part of this repository"

    def __init__(self, config: Config) -> None:
        self.expected_range = config.range_of_mean({})
        self._quality, self._sign = config.quality, -1 if config.sign == "compressibility" else 1

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), on the images' device, of images (B, 3, H, W) in [0, 1]; ValueError if not."""
        check_images(images, prompts)
        sizes = [self._sign * size(image, self._quality) for image in eight_bit(images)]
        return torch.tensor(sizes, dtype=torch.float32, device=images.device)


def load(config: Config, device: torch.device | str = "cpu") -> Scorer:
    """The scorer; it computes on the CPU and answers on the images' device."""
    return Scorer(config)
