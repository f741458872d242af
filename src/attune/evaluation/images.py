"""Generated images, read from their folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def read_images(folder: Path, files: Sequence[str]) -> np.ndarray:
    """Images of one size as uint8 (B, H, W, 3). An alpha channel is dropped: scorers take RGB."""
    return np.stack([np.asarray(Image.open(folder / file).convert("RGB")) for file in files])
