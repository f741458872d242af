"""Images as the source has them, identified by their bytes and decoded only when their pixels are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attune.data.images import decode
from attune.data.quarantine import RejectedRow
from attune.data.rows import ImageRef


@dataclass(frozen=True)
class DecodedImage:
    """A usable image, 8-bit RGB at its own size; `image` is None where its pixels were not needed."""

    digest: bytes
    size: tuple[int, int]  # width, height
    image: Image.Image | None

    @property
    def pixels(self) -> Image.Image:
        """The image. Raises ValueError where its pixels were not asked for."""
        if self.image is None:
            raise ValueError("the image was read without its pixels")
        return self.image


class ImageReader:
    """Reads and decodes images. Equal bytes are one image, whichever files or rows they come from.

    It remembers the digest of every file, the size of every good image and why an image was rejected, so that a
    file is read once for its digest and an image is decoded again only where its pixels are needed again.
    """

    def __init__(self, min_side: int):
        self._min_side = min_side  # pixels
        self._digests: dict[Path, bytes] = {}
        self._sizes: dict[bytes, tuple[int, int]] = {}
        self._rejected: dict[bytes, str] = {}

    def read(self, ref: ImageRef, needs_pixels: Callable[[bytes], bool]) -> DecodedImage:
        """The image, decoded if it is new or `needs_pixels` of its digest.

        Raises:
            RejectedRow: `missing_image`, `undecodable`, `too_large` or `too_small`.
        """
        identity, data = self._identify(ref)
        if identity in self._rejected:
            raise RejectedRow(self._rejected[identity])
        if identity in self._sizes and not needs_pixels(identity):
            return DecodedImage(identity, self._sizes[identity], None)
        try:
            image = self._decode(ref, data)
        except RejectedRow as reason:
            self._rejected[identity] = str(reason)
            raise
        self._sizes[identity] = image.size
        return DecodedImage(identity, image.size, image)

    def _decode(self, ref: ImageRef, data: bytes | None) -> Image.Image:
        if isinstance(ref, np.ndarray):
            image = Image.fromarray(ref)
        elif data is None and isinstance(ref, Path):
            image = decode(ref.read_bytes())
        elif data is not None:
            image = decode(data)
        else:
            raise RejectedRow("missing_image")
        if min(image.size) < self._min_side:
            raise RejectedRow("too_small")
        return image

    def _identify(self, ref: ImageRef) -> tuple[bytes, bytes | None]:
        """Digest and encoded bytes; the bytes are None for pixels and for a file whose digest is known."""
        if ref is None:
            raise RejectedRow("missing_image")
        if isinstance(ref, Path) and ref in self._digests:
            return self._digests[ref], None
        if isinstance(ref, np.ndarray):
            return digest(ref.tobytes()), None
        if isinstance(ref, bytes):
            return digest(ref), ref
        try:
            data = ref.read_bytes()
        except OSError:
            raise RejectedRow("missing_image") from None
        self._digests[ref] = digest(data)
        return self._digests[ref], data


def digest(data: bytes) -> bytes:
    """The identity of an image, or of anything else that is compared by its bytes: 16 bytes."""
    return hashlib.blake2b(data, digest_size=16).digest()


def to_tensor(pixels: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (n, H, W, 3) to float (n, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).to(device).float() / 255
