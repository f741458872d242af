"""The latents of images: each image once, cropped to the model's square, encoded in batches, appended to a file."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import numpy as np
import torch

from attune.data.arrays import ArrayFile
from attune.data.images import resize_center_crop
from attune.data.ingest.reader import DecodedImage, to_tensor
from attune.interfaces import Backbone

MAX_IMAGES, MAX_PIXELS = 64, 2**21  # of a batch: 64 images, but 8 of 512 px or 2 of 1024 px; an encoder needs GBs


def is_full(images: int, pixels: int) -> bool:
    """Whether a batch of so many images, of so many pixels in all, may not grow any more."""
    return images > MAX_IMAGES or (images > 1 and pixels > MAX_PIXELS)


class ImageRows(Protocol):
    """What `Ingest` asks of an encoder: a row for every image, known by its digest."""

    @property
    def bad_rows(self) -> Collection[int]: ...

    def __contains__(self, digest: bytes) -> bool: ...

    def row(self, image: DecodedImage) -> int: ...

    def flush(self) -> None: ...


class ImageEncoder:
    """Gives every image a row of the latents file and encodes it when its batch is full.

    An autoencoder in half precision can overflow; the latents of such an image are zeros, and their row is in
    `bad_rows`.
    """

    def __init__(self, backbone: Backbone, latents: ArrayFile):
        self._backbone, self._latents = backbone, latents
        self._device = next(backbone.denoiser.parameters()).device
        self._rows: dict[bytes, int] = {}  # by digest
        self.bad_rows: set[int] = set()  # of the latents: those that are not finite, written as zeros
        self._pending: list[np.ndarray] = []  # squares, uint8 (side, side, 3)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._rows

    def row(self, image: DecodedImage) -> int:
        """The image's row of the latents. An image that has none yet must come with its pixels."""
        if image.digest not in self._rows:
            if is_full(n := len(self._pending) + 1, n * self._backbone.resolution**2):
                self.flush()
            self._rows[image.digest] = len(self._rows)
            self._pending.append(resize_center_crop(image.pixels, self._backbone.resolution))
        return self._rows[image.digest]

    def flush(self) -> None:
        """Writes the images of a batch that is not full; without any image at all, no rows of the right shape."""
        if self._pending:
            images = to_tensor(np.stack(self._pending), self._device)
            latents = self._backbone.encode_images(images)
            finite = torch.isfinite(latents).flatten(1).all(1)
            self.bad_rows.update(self._latents.rows + int(row) for row in (~finite).nonzero())
            self._latents.append(torch.where(finite[:, None, None, None], latents, 0.0))
            self._pending.clear()
        elif not self._latents.rows:
            self._latents.append(torch.zeros((0, *self._backbone.latent_shape)))
