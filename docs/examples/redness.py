"""A scorer of one's own, `function: docs.examples.redness:redness` of the scorer `python` (docs/scorers.md)."""

from collections.abc import Sequence

import numpy as np


def redness(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """How much redder than green and blue each image is, (B,) in -1 to 1, of images, uint8 (B, H, W, 3)."""
    red, green, blue = (images[..., i].mean((1, 2)) / 255 for i in range(3))
    return red - (green + blue) / 2
