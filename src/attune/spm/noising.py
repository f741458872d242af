"""The images that the preference model is trained on: one-step predictions of images noised to a timestep.

Source: Liang et al. 2024 (SPO), arXiv:2406.04314, section 3.2 and eq. 8; authors' `SPMTask.get_noised_imgs`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from attune.diffusion.path import Path
from attune.diffusion.process import add_noise
from attune.interfaces import Conditioning

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""`predict(x_t, t, cond)`: the guided prediction of the frozen base."""


def one_step_latents(
    predict: Predict,
    path: Path,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    cond: Conditioning,
) -> Tensor:
    """Noises clean latents to t and predicts them back in one step: (B, C, h, w).

    Deterministic: of a DDIM step only the predicted x_0 is used, so no noise but `noise` enters.

    Args:
        predict: guided prediction of the frozen base.
        path: of the base.
        x_0: scaled latents (B, C, h, w).
        t: (B,), times of the path.
        noise: (B, C, h, w); both images of a pair must be given the same.
        cond: conditioning of the B prompts.
    """
    at = path.level(t, x_0)
    x_t = add_noise(x_0, noise, at)
    return path.x0_and_noise(predict(x_t, t, cond), x_t, at)[0]
