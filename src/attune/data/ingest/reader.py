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
from attune.data.local import MAX_IMAGE_BYTES, read_regular
from attune.data.quarantine import RejectedRow
from attune.data.rows import BadImage, ImageRef

MAX_RATIO = 100  # of the sides: a scorer enlarges the shorter one to its own size, and the longer one with it


@dataclass(frozen=True)
class DecodedImage:
    """A usable image, 8-bit RGB at its own size; `image` is None where its pixels were not needed."""

    digest: bytes  # of its bytes
    content: bytes  # of its pixels: the same for one image in two files that differ
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

    It remembers the digest of every file, the size and pixels' digest of every good image and why an image was
    rejected, so that a file is read once for its digest and an image is decoded again only where its pixels are needed
    again.
    """

    def __init__(self, min_side: int):
        self._min_side = min_side  # pixels
        self._digests: dict[Path, bytes] = {}
        self._good: dict[bytes, tuple[bytes, tuple[int, int]]] = {}  # digest -> that of its pixels, size
        self._rejected: dict[bytes, tuple[str, str]] = {}  # digest -> reason, detail

    def read(self, ref: ImageRef, needs_pixels: Callable[[bytes], bool]) -> DecodedImage:
        """The image, decoded if it is new or `needs_pixels` of its digest.

        Raises:
            RejectedRow: `missing_image`, `undecodable`, `too_large`, `too_small`, `too_narrow` or `pixel_range`, or the
                reason of a `BadImage`.
        """
        identity, data = self._identify(ref)
        if identity in self._rejected:
            raise RejectedRow(*self._rejected[identity])
        if identity in self._good and not needs_pixels(identity):
            return DecodedImage(identity, *self._good[identity], None)
        if data is None and isinstance(ref, Path):
            data = read_regular(ref)
        try:
            image = self._decode(ref, data)
        except RejectedRow as reason:
            self._rejected[identity] = str(reason), reason.detail
            raise
        if identity not in self._good:
            content = digest(repr(image.size).encode(), image.tobytes())
            self._good[identity] = content, image.size
        return DecodedImage(identity, *self._good[identity], image)

    def _decode(self, ref: ImageRef, data: bytes | None) -> Image.Image:
        image = Image.fromarray(ref) if isinstance(ref, np.ndarray) else decode(data or b"")
        if min(image.size) < self._min_side:
            raise RejectedRow("too_small", f"{image.width} x {image.height} pixels; data.min_side is {self._min_side}")
        if max(image.size) > MAX_RATIO * min(image.size):
            raise RejectedRow("too_narrow", f"{image.width} x {image.height} pixels; at most {MAX_RATIO} to 1 are read")
        return image

    def _identify(self, ref: ImageRef) -> tuple[bytes, bytes | None]:
        """Digest and encoded bytes; the bytes are None for pixels and for a file whose digest is known."""
        if ref is None:
            raise RejectedRow("missing_image", "the source has none")
        if isinstance(ref, BadImage):
            raise RejectedRow(ref.reason, ref.detail)
        if isinstance(ref, Path) and ref in self._digests:
            return self._digests[ref], None
        if isinstance(ref, np.ndarray):
            return digest(ref.tobytes()), None
        if isinstance(ref, bytes):
            if len(ref) > MAX_IMAGE_BYTES:
                raise RejectedRow("too_large", f"{len(ref)} bytes; {MAX_IMAGE_BYTES} are read at most")
            return digest(ref), ref
        data = read_regular(ref)
        self._digests[ref] = digest(data)
        return self._digests[ref], data


def digest(*parts: bytes) -> bytes:
    """The identity of an image, or of anything else that is compared by its bytes: 16 bytes."""
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(part)
    return whole.digest()


def to_tensor(pixels: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (n, H, W, 3) to float (n, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).to(device).float().div_(255)
