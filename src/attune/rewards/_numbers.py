"""What scorers without a gradient share: images as files have them, and scores from outside, which are checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from attune.config.schema import ConfigError


def eight_bit(images: Tensor) -> np.ndarray:
    """Images (B, 3, H, W) in [0, 1], rounded, as uint8 (B, H, W, 3)."""
    return (images.detach().float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def checked_scores(values: Any, n: int, source: str) -> Tensor:
    """Scores (n,), float32, of a tensor, an array or a list.

    Args:
        source: what gave them, to be named in errors.

    Raises:
        ConfigError: they are not n finite numbers.
    """
    try:
        found = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    except (ValueError, TypeError):  # lists of different lengths
        found = np.asarray(None)
    if found.shape != (n,) or found.dtype.kind not in "fiu":
        kind = f"{found.dtype} of shape {found.shape}" if found.ndim else type(values).__name__
        raise ConfigError(f"{source}: {n} numbers are wanted for {n} images, not {kind}")
    with np.errstate(over="ignore"):
        scores = found.astype(np.float32)
    if not np.isfinite(scores).all():
        raise ConfigError(f"{source}: score {int(np.isfinite(scores).argmin())} of {n} is not finite")
    return torch.from_numpy(scores)
