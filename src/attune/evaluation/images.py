"""Generated images, read from their folder; and small copies of images for pages."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIDES = (256, 192, 128, 96, 64)  # pixels of a picture's longer side: the largest whose file is small enough
SMALL = 96  # pixels: images up to here are kept as they are, without loss


def read_images(folder: Path, files: Sequence[str]) -> np.ndarray:
    """Images of one size as uint8 (B, H, W, 3). An alpha channel is dropped: scorers take RGB."""
    return np.stack([np.asarray(Image.open(folder / file).convert("RGB")) for file in files])


def thumbnail_uri(image: Image.Image | Path, most_bytes: int) -> str:
    """A small copy of an image as a data URI: WebP, lossless where the image is tiny, and smaller if it has to be."""
    source = Image.open(image).convert("RGB") if isinstance(image, Path) else image.convert("RGB")
    data = b""
    for side in SIDES:
        small = source.copy()
        small.thumbnail((side, side))
        with io.BytesIO() as file:
            small.save(file, "WEBP", quality=82, lossless=max(small.size) <= SMALL and small.size == source.size)
            data = file.getvalue()
        if len(data) <= most_bytes:
            break
    return "data:image/webp;base64," + base64.b64encode(data).decode()
