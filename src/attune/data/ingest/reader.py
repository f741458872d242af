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
        """The image, decoded if it is new or `needs_pixels` of its digest. One that has been read already is checked.

        Raises:
            RejectedRow: `missing_image`, `undecodable`, `too_large`, `too_small`, `too_narrow` or `pixel_range`, or the
                reason of a `BadImage`.
        """
        if isinstance(ref, DecodedImage):
            check_sides(ref.size, self._min_side)
            return ref
        identity, data = self._identify(ref)
        if identity in self._rejected:
            raise RejectedRow(*self._rejected[identity])
        if identity in self._good and not needs_pixels(identity):
            return DecodedImage(identity, *self._good[identity], None)
        try:
            image = decode_ref(ref, data)
            check_sides(image.size, self._min_side)
        except RejectedRow as reason:
            self._rejected[identity] = str(reason), reason.detail
            raise
        if identity not in self._good:
            self._good[identity] = content_digest(image), image.size
        return DecodedImage(identity, *self._good[identity], image)

    def _identify(self, ref: ImageRef) -> tuple[bytes, bytes | None]:
        """Digest and encoded bytes; the bytes are None for pixels and for a file whose digest is known."""
        if isinstance(ref, Path) and ref in self._digests:
            return self._digests[ref], None
        identity, data = identify(ref)
        if isinstance(ref, Path):
            self._digests[ref] = identity
        return identity, data


def identify(ref: ImageRef) -> tuple[bytes, bytes | None]:
    """Digest and encoded bytes of an image; None of one whose bytes are not there: pixels, or it has been read.

    Raises:
        RejectedRow: there is none, for a reason.
    """
    if isinstance(ref, DecodedImage):
        return ref.digest, None
    if ref is None:
        raise RejectedRow("missing_image", "the source has none")
    if isinstance(ref, BadImage):
        raise RejectedRow(ref.reason, ref.detail)
    if isinstance(ref, np.ndarray):
        return digest(ref.tobytes()), None
    if isinstance(ref, Path):
        ref = read_regular(ref)
    elif len(ref) > MAX_IMAGE_BYTES:
        raise RejectedRow("too_large", f"{len(ref)} bytes; {MAX_IMAGE_BYTES} are read at most")
    return digest(ref), ref


def decode_ref(ref: ImageRef, data: bytes | None = None) -> Image.Image:
    """An image that `identify` has accepted, whatever its size; `data` are its bytes, if they have been read.

    Raises:
        RejectedRow: it cannot be decoded, or one side is too long for the other.
    """
    if isinstance(ref, DecodedImage):
        image = ref.pixels
    elif isinstance(ref, np.ndarray):
        image = Image.fromarray(ref)
    else:
        whole = data or (read_regular(ref) if isinstance(ref, Path) else ref)
        image = decode(whole if isinstance(whole, bytes) else b"")
    if max(image.size) > MAX_RATIO * min(image.size):
        raise RejectedRow("too_narrow", f"{image.width} x {image.height} pixels; at most {MAX_RATIO} to 1 are read")
    return image


def check_sides(size: tuple[int, int], min_side: int) -> None:
    """Raises RejectedRow for an image with a side below `min_side`."""
    if min(size) < min_side:
        raise RejectedRow("too_small", f"{size[0]} x {size[1]} pixels; data.min_side is {min_side}")


def content_digest(image: Image.Image) -> bytes:
    """What identifies the pixels of an image."""
    return digest(repr(image.size).encode(), image.tobytes())


def digest(*parts: bytes) -> bytes:
    """The identity of an image, or of anything else that is compared by its bytes: 16 bytes."""
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(part)
    return whole.digest()


def to_tensor(pixels: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (n, H, W, 3) to float (n, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).to(device).float().div_(255)
