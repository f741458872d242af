"""Scores of images for their prompts, taken at the images' own size in batches: the columns of `data.score_with`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from attune.data.ingest.encoder import is_full
from attune.data.ingest.reader import DecodedImage, to_tensor
from attune.interfaces import Reward


class ImageScores(Protocol):
    """What `Ingest` asks of a scorer."""

    def wants(self, digest: bytes, prompt: str) -> bool: ...

    def add(self, image: DecodedImage, prompt: str) -> None: ...

    def scores(self, digest: bytes, prompt: str) -> Mapping[str, float]: ...

    def flush(self) -> None: ...


class ImageScorer:
    """Collects the scores of every image and prompt, each combination once."""

    def __init__(self, scorers: Mapping[str, Reward], device: torch.device):
        self._scorers, self._device = scorers, device
        self._pending_pixels = 0
        self._pending: list[tuple[bytes, str, Image.Image]] = []
        self._scores: dict[tuple[bytes, str], dict[str, float]] = {}  # (digest, prompt) -> scorer -> score

    def wants(self, digest: bytes, prompt: str) -> bool:
        """Whether that image has still to be scored for that prompt."""
        return bool(self._scorers) and (digest, prompt) not in self._scores

    def add(self, image: DecodedImage, prompt: str) -> None:
        """Scores the image when its batch is full. One that is still wanted must come with its pixels."""
        if self.wants(image.digest, prompt):
            width, height = image.size
            if is_full(len(self._pending) + 1, self._pending_pixels + width * height):
                self.flush()
            self._scores[image.digest, prompt] = {}
            self._pending.append((image.digest, prompt, image.pixels))
            self._pending_pixels += width * height

    def scores(self, digest: bytes, prompt: str) -> Mapping[str, float]:
        """Scorer -> score; empty without scorers."""
        return self._scores.get((digest, prompt), {})

    @torch.no_grad()
    def flush(self) -> None:
        """Scores the images of a batch that is not full, those of the same size together."""
        by_size = sorted(self._pending, key=lambda item: item[2].size)
        for _, group in groupby(by_size, key=lambda item: item[2].size):
            items = list(group)
            images = to_tensor(np.stack([np.asarray(image) for _, _, image in items]), self._device)
            prompts = [prompt for _, prompt, _ in items]
            for name, scorer in self._scorers.items():
                for (digest, prompt, _), score in zip(items, scorer(images, prompts).tolist(), strict=True):
                    self._scores[digest, prompt][name] = score
        self._pending.clear()
        self._pending_pixels = 0
