"""The latents of images: cropped to the model's square and encoded in batches of a bounded number of pixels."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from attune.data.ingest.reader import to_tensor
from attune.interfaces import Backbone

MAX_IMAGES, MAX_PIXELS = 64, 2**21  # of a batch: 64 images, but 8 of 512 px or 2 of 1024 px; an encoder needs GBs


def is_full(images: int, pixels: int) -> bool:
    """Whether a batch of so many images, of so many pixels in all, may not grow any more."""
    return images > MAX_IMAGES or (images > 1 and pixels > MAX_PIXELS)


def encode(backbone: Backbone, squares: Iterable[np.ndarray]) -> tuple[Tensor, list[int]]:
    """Latents (n, C, h, w) on the CPU of images, uint8 (side, side, 3), and which of them are not finite.

    They are kept in the precision of the autoencoder that has made them. One of half precision can overflow; the
    latents of such an image are zeros.
    """
    device, dtype = next(backbone.denoiser.parameters()).device, getattr(torch, backbone.model.vae_dtype)
    found: list[Tensor] = [torch.zeros((0, *backbone.latent_shape), dtype=dtype)]
    pending: list[np.ndarray] = []

    def flush() -> None:
        found.append(backbone.encode_images(to_tensor(np.stack(pending), device)).to(dtype).cpu())
        pending.clear()

    for square in squares:
        if is_full(n := len(pending) + 1, n * backbone.resolution**2):
            flush()
        pending.append(square)
    if pending:
        flush()
    latents = torch.cat(found if len(found) == 1 else found[1:])
    finite = torch.isfinite(latents).flatten(1).all(1)
    return torch.where(finite[:, None, None, None], latents, 0.0), (~finite).nonzero().flatten().tolist()
