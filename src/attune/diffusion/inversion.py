"""The noise that an image was made from, by the sampler run backwards: x_0 to x_t, and what was added on the way.

A loss on given images draws its noise; this is the noise that the model itself would begin with to paint the image.

Source: Song et al. 2021, arXiv:2010.02502, section 4.3; of preference pairs InPO (CVPR 2025, JaydenLyh/InPO a9cfc4d),
with one call a step, and SmPO (ICML 2025, JaydenLyh/SmPO 8922d54) with two, which is Heun's method. Their codes stop at
the last time of a fixed grid below t and add noise for t all the same, and tell the model the time that a step arrives
at; here the last step ends at t, and the model is told the time of what it is shown.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from attune.diffusion import process
from attune.diffusion.path import Path
from attune.diffusion.process import Level

Predict = Callable[[Tensor, Tensor], Tensor]
"""`predict(x_t, t)`: what the model predicts of the path's target."""


def inversion_times(t: Tensor, steps: int) -> Tensor:
    """Evenly spaced times (steps + 1, B) from 0 to t (B,); whole numbers where t are, which may then be equal."""
    times = t * torch.linspace(0, 1, steps + 1, device=t.device, dtype=torch.float64)[:, None]
    return times.to(t.dtype) if t.is_floating_point() else times.round().to(t.dtype)


@torch.no_grad()
def invert(
    predict: Predict, path: Path, x_0: Tensor, times: Tensor, heun: bool = False, told_arrival: bool = False
) -> Tensor:
    """x_t (B, C, h, w) at the last of the times, from clean latents, by the steps of DDIM (of a flow, Euler's).

    Args:
        times: rising (K + 1, B); the first is that of the clean image, whatever the schedule has there.
        heun: predicts again where a step arrives, and takes it from its start with the mean of both predictions.
        told_arrival: the model is told the time that a step arrives at, as in the authors' code.
    """
    x, at = x_0, Level(torch.ones_like(x_0[:, :1, :1, :1]), torch.zeros_like(x_0[:, :1, :1, :1]))
    for here, there in pairwise(times):
        to = path.level(there, x)
        predicted = predict(x, there if told_arrival else here)
        if heun:
            predicted = (predicted + predict(_step(path, predicted, x, at, to), there)) / 2
        x, at = _step(path, predicted, x, at, to), to
    return x


def _step(path: Path, predicted: Tensor, x: Tensor, at: Level, to: Level) -> Tensor:
    image, noise = path.x0_and_noise(predicted, x, at)
    return process.add_noise(image, noise, to)


def implied_noise(x_t: Tensor, x_0: Tensor, at: Level) -> Tensor:
    """The noise (B, C, h, w) that makes x_t of x_0: (x_t - alpha x_0) / sigma."""
    return (x_t - at.alpha * x_0) / at.sigma


def inverted_noise(predict: Predict, path: Path, x_0: Tensor, t: Tensor, steps: int, heun: bool = False) -> Tensor:
    """`implied_noise` of `invert` in so many steps to times t (B,), at which there is noise."""
    return implied_noise(invert(predict, path, x_0, inversion_times(t, steps), heun), x_0, path.level(t, x_0))
