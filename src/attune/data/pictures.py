"""Every image of the data once: identified by its bytes, decoded, scored at its own size, encoded at the model's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attune.data.arrays import ArrayFile
from attune.data.images import decode, squared
from attune.data.quarantine import Rejected
from attune.data.sources import Picture
from attune.interfaces import Backbone, Reward

IMAGES_AT_ONCE, PIXELS_AT_ONCE = 64, 2**21  # 64 images, but 8 of 512 pixels or 2 of 1024: an encoder needs GBs


@dataclass(frozen=True)
class Opened:
    """An image that is good; `image` is None if everything about it is known already."""

    digest: bytes
    size: tuple[int, int]
    image: Image.Image | None


class Pictures:
    """Appends the latents of images to a file, and collects scores by (digest, prompt)."""

    def __init__(self, backbone: Backbone, scorers: Mapping[str, Reward], latents: ArrayFile, min_side: int):
        self._backbone, self._scorers, self._latents, self._min_side = backbone, scorers, latents, min_side
        self._device = next(backbone.denoiser.parameters()).device
        self._at_once = max(1, min(IMAGES_AT_ONCE, PIXELS_AT_ONCE // backbone.resolution**2))
        self._files: dict[Path, bytes] = {}
        self._bad: dict[bytes, str] = {}
        self._known: dict[bytes, tuple[int, tuple[int, int]]] = {}  # row of the latents, width and height
        self._squares: list[np.ndarray] = []
        self._unscored: list[tuple[bytes, str, Image.Image]] = []
        self.scores: dict[tuple[bytes, str], dict[str, float]] = {}

    def open(self, picture: Picture, prompt: str) -> Opened:
        """The image, decoded if anything about it is still to be found out.

        Raises:
            Rejected: `missing_image`, `undecodable`, `too_large` or `too_small`.
        """
        identity, data = self._identify(picture)
        if identity in self._bad:
            raise Rejected(self._bad[identity])
        if identity in self._known and not self._wants_score(identity, prompt):
            return Opened(identity, self._known[identity][1], None)
        try:
            if isinstance(picture, np.ndarray):
                image = Image.fromarray(picture)
            else:
                image = decode(picture.read_bytes() if data is None else data)
            if min(image.size) < self._min_side:
                raise Rejected("too_small")
        except Rejected as reason:
            self._bad[identity] = str(reason)
            raise
        return Opened(identity, image.size, image)

    def place(self, opened: Opened, prompt: str) -> int:
        """The image's row of the latents, which are written when a batch is full."""
        if opened.digest not in self._known:
            self._known[opened.digest] = (len(self._known), opened.size)
            self._squares.append(squared(opened.image, self._backbone.resolution))
            if len(self._squares) == self._at_once:
                self._encode()
        if self._wants_score(opened.digest, prompt):
            self.scores[opened.digest, prompt] = {}
            self._unscored.append((opened.digest, prompt, opened.image))
            if len(self._unscored) == self._at_once:
                self._score()
        return self._known[opened.digest][0]

    def finish(self) -> None:
        """Writes what no full batch has come together for."""
        self._encode()
        self._score()

    def _wants_score(self, identity: bytes, prompt: str) -> bool:
        return bool(self._scorers) and (identity, prompt) not in self.scores

    def _identify(self, picture: Picture) -> tuple[bytes, bytes | None]:
        """Digest and bytes; of a file that was read before, the digest alone."""
        if picture is None:
            raise Rejected("missing_image")
        if isinstance(picture, Path) and picture in self._files:
            return self._files[picture], None
        if isinstance(picture, np.ndarray):
            return digest(picture.tobytes()), None
        if isinstance(picture, bytes):
            return digest(picture), picture
        try:
            data = picture.read_bytes()
        except OSError:
            raise Rejected("missing_image") from None
        self._files[picture] = digest(data)
        return self._files[picture], data

    def _encode(self) -> None:
        if not self._squares and self._latents.rows:
            return
        if not self._squares:  # no image at all: an empty file of the right shape
            self._latents.append(torch.zeros((0, *self._backbone.latent_shape)))
            return
        images = _as_images(np.stack(self._squares), self._device)
        self._latents.append(self._backbone.encode_images(images))
        self._squares.clear()

    @torch.no_grad()
    def _score(self) -> None:
        by_size = sorted(self._unscored, key=lambda item: item[2].size)
        for _, group in groupby(by_size, key=lambda item: item[2].size):
            some = list(group)
            images = _as_images(np.stack([np.asarray(image) for _, _, image in some]), self._device)
            prompts = [prompt for _, prompt, _ in some]
            for name, scorer in self._scorers.items():
                for (identity, prompt, _), score in zip(some, scorer(images, prompts).tolist(), strict=True):
                    self.scores[identity, prompt][name] = score
        self._unscored.clear()


def digest(data: bytes) -> bytes:
    """What tells images apart: 16 bytes."""
    return hashlib.blake2b(data, digest_size=16).digest()


def _as_images(pixels: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (n, H, W, 3) to float (n, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).to(device).float() / 255
