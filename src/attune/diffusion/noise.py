"""Where random numbers come from: generators and seeds, so that the same settings give the same images and trainings.

They are drawn on the CPU, because GPUs draw other numbers from the same seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attune.distributed import Shard

NoiseFn = Callable[[tuple[int, ...]], Tensor]
"""Draws standard normal noise of a shape."""


def noise_seed(prompt: str, ordinal: int, seed: int) -> int:
    """Seed of the noise of one image, 0 .. 2^63 - 1.

    From the prompt's content, never from its position, batch or rank: every model sees the same noise for the
    same prompt, so pairs are real pairs whatever was sharded, resumed or left out (UniRL #236).
    """
    content = json.dumps([prompt, int(ordinal), int(seed)])
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") >> 1


def per_row_noise(seeds: Sequence[int]) -> NoiseFn:
    """Noise of B rows, each from its own seed: an image does not depend on the others in its batch."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda shape: _noise(generators, shape)


def to_device(device: torch.device, sample_noise: NoiseFn) -> NoiseFn:
    """The same noise, moved to a device."""
    return lambda shape: sample_noise(shape).to(device)


def keyed_generator(*key: int) -> torch.Generator:
    """The generator of all that is drawn under a key, such as (seed, batch) or (seed, batch, row)."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class Draws:
    """The random choices of a batch of n rows in a training; row i of batch b draws from (seed, b, i) alone.

    So a process draws for its own rows and no others, and gets what a single process would draw for them. Where a row
    has k values, as two images or several candidates, results are (k m, ...) of m rows here, copy by copy.
    """

    n: int  # rows of the batch in all processes
    rows: Sequence[torch.Generator]  # one for each row of this process
    shared: torch.Generator  # for what is chosen once for the whole batch, by all processes alike

    @staticmethod
    def of_batch(seed: int, batch: int, n: int, shard: Shard) -> Draws:
        """The draws of this process for batch number `batch` of a training."""
        rows = [keyed_generator(seed, batch, row) for row in range(n)[shard.rows(n)]]
        return Draws(n, rows, keyed_generator(seed, batch))

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal noise of a shape (k m, ...)."""
        return _noise(self.rows, shape)

    def integers(self, high: int, count: int) -> Tensor:
        """Integers (count,) of 0 .. high - 1; count is k m."""
        return _by_row(self.rows, count, lambda k, g: torch.randint(high, (k,), generator=g))

    def uniform(self, count: int) -> Tensor:
        """Numbers (count,) of [0, 1); count is k m."""
        return _by_row(self.rows, count, lambda k, g: torch.rand(k, generator=g))


def _noise(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    return _by_row(generators, shape[0], lambda k, g: torch.randn((k, *shape[1:]), generator=g))


def _by_row(
    generators: Sequence[torch.Generator], count: int, draw: Callable[[int, torch.Generator], Tensor]
) -> Tensor:
    """What `draw` gives for k values of each of m rows: (k m, ...), copy by copy.

    Raises:
        ValueError: `count` is no multiple of m.
    """
    k, rest = divmod(count, len(generators))
    if rest:
        raise ValueError(f"{count} values for {len(generators)} rows: not as many for one row as for another")
    return torch.stack([draw(k, g) for g in generators], dim=1).flatten(0, 1)
