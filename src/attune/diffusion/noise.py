"""Where the noise of sampling comes from: generators and seeds, so that the same settings give the same images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NoiseFn = Callable[[tuple[int, ...]], Tensor]
"""Draws standard normal noise of a shape."""


def noise_seed(prompt: str, ordinal: int, seed: int) -> int:
    """Seed of the noise of one image, 0 .. 2^63 - 1.

    From the prompt's content, never from its position, batch or rank: every model sees the same noise for the
    same prompt, so pairs are real pairs whatever was sharded, resumed or left out (UniRL #236).
    """
    content = json.dumps([prompt, int(ordinal), int(seed)])
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") >> 1


def generator_noise(generator: torch.Generator) -> NoiseFn:
    """Noise from one generator."""
    return lambda shape: torch.randn(shape, generator=generator)


def per_row_noise(seeds: Sequence[int]) -> NoiseFn:
    """Noise of B rows, each from its own seed: an image does not depend on the others in its batch."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda shape: torch.stack([torch.randn(shape[1:], generator=g) for g in generators])


def to_device(device: torch.device, sample_noise: NoiseFn) -> NoiseFn:
    """The same noise, moved to a device. It is drawn on the CPU because GPUs draw other numbers from the same seed."""
    return lambda shape: sample_noise(shape).to(device)
