"""The images that the preference model is trained on: one-step predictions of images noised to a timestep.

Source: Liang et al. 2024 (SPO), arXiv:2406.04314, section 3.2 and eq. 8; authors' `SPMTask.get_noised_imgs`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from attune.diffusion.process import add_noise, extract, predict_x0
from attune.interfaces import Conditioning

PredictNoise = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""`predict_noise(x_t, t, cond)`: the guided prediction of the frozen base."""


def one_step_latents(
    predict_noise: PredictNoise,
    alphas_cumprod: Tensor,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    cond: Conditioning,
) -> Tensor:
    """Noises clean latents to t and predicts them back in one step: (B, C, h, w).

    Deterministic: of a DDIM step only the predicted x_0 is used, so no noise but `noise` enters.

    Args:
        predict_noise: guided epsilon of the frozen base.
        alphas_cumprod: (T,).
        x_0: scaled latents (B, C, h, w).
        t: (B,), indices 0..T-1.
        noise: (B, C, h, w); both images of a pair must be given the same.
        cond: conditioning of the B prompts.
    """
    a_t = extract(alphas_cumprod, t, x_0)
    x_t = add_noise(x_0, noise, a_t)
    return predict_x0(x_t, predict_noise(x_t, t, cond), a_t)
