"""What a base model says of its diffusion: levels of noise at each time, what it predicts, and which times it sees.

Times t are on the scale of the training timesteps on every path, 0 (image) to `n_train` (noise), as in diffusers'
schedulers and in a preference model's time embedding: whole numbers on VP, and real numbers n_train s on a flow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from attune.diffusion import process
from attune.diffusion.process import Level

if TYPE_CHECKING:
    from attune.diffusion.noise import Draws

Density = Callable[["Draws", int], Tensor]
"""`density(draws, count)`: sigmas s (count,) of a flow's training, one for each row."""


class Path(Protocol):
    """Of either family; everything that is the same for both is in `attune.diffusion.process`."""

    @property
    def n_train(self) -> int:
        """Timesteps of the training, 1000 of all published models."""
        ...

    def level(self, t: Tensor, like: Tensor) -> Level:
        """Image and noise in x_t at times t (B,): (B, 1, 1, 1) each, of the device and dtype of `like`."""
        ...

    def target(self, x_0: Tensor, noise: Tensor) -> Tensor:
        """What the model predicts, which errors are measured in."""
        ...

    def x0_and_noise(self, prediction: Tensor, x_t: Tensor, at: Level) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise that a prediction implies."""
        ...

    def sampling_times(self, steps: int) -> Tensor:
        """The steps + 1 falling times that a run visits, the last 0; a slice of k + 1 of them is a run of k steps."""
        ...

    def training_times(self, draws: Draws, count: int) -> Tensor:
        """Random times (count,) of the training's density."""
        ...


@dataclass(frozen=True)
class VP:
    """Variance-preserving diffusion of a schedule (T,); the model predicts the noise, at whole timesteps."""

    alphas_cumprod: Tensor

    @property
    def n_train(self) -> int:
        return len(self.alphas_cumprod)

    def level(self, t: Tensor, like: Tensor) -> Level:
        return process.vp_level(self.alphas_cumprod, t, like)

    def target(self, x_0: Tensor, noise: Tensor) -> Tensor:
        return noise

    def x0_and_noise(self, prediction: Tensor, x_t: Tensor, at: Level) -> tuple[Tensor, Tensor]:
        return process.predict_x0(x_t, prediction, at), prediction

    def sampling_times(self, steps: int) -> Tensor:
        return process.ddim_timesteps(self.n_train, steps)

    def training_times(self, draws: Draws, count: int) -> Tensor:
        return draws.integers(self.n_train, count)


@dataclass(frozen=True)
class Flow:
    """Flow matching on straight lines; the model predicts the velocity noise - x_0.

    In epsilon its squared errors would weigh (1 - s)^2, nothing at all at s = 1, so they are measured in velocity.
    """

    sampling_sigmas: Callable[[int], Tensor]  # of a number of steps: falling (steps + 1,), from 1 to 0
    density: Density
    n_train: int = 1000

    def level(self, t: Tensor, like: Tensor) -> Level:
        return process.flow_level(t / self.n_train, like)

    def target(self, x_0: Tensor, noise: Tensor) -> Tensor:
        return noise - x_0

    def x0_and_noise(self, prediction: Tensor, x_t: Tensor, at: Level) -> tuple[Tensor, Tensor]:
        return process.flow_to_x0_and_noise(prediction, x_t, at)

    def sampling_times(self, steps: int) -> Tensor:
        return self.sampling_sigmas(steps) * self.n_train

    def training_times(self, draws: Draws, count: int) -> Tensor:
        return self.density(draws, count) * self.n_train


def shifted(s: Tensor, shift: float) -> Tensor:
    """k s / (1 + (k - 1) s): the sigmas at which a larger image looks as noisy. Source: arXiv:2403.03206, eq. 23."""
    return shift * s / (1 + (shift - 1) * s)


def uniform_over(table: Tensor) -> Density:
    """Any sigma of a table (T,), all equally likely; of the shifted training table as Linear-DPO's code does."""
    return lambda draws, count: table[draws.integers(len(table), count)]


def logit_normal(shift: float) -> Density:
    """Sigmas whose logits are standard normal, then shifted. Source: Esser et al. 2024, arXiv:2403.03206, eq. 19."""
    return lambda draws, count: shifted(draws.noise((count,)).sigmoid(), shift)
