"""Sampling of a policy, in one function: whole runs, and the parts that truncated backpropagation needs.

The step is `process.ddim_step`, on every path: Song et al. 2021, arXiv:2010.02502, eq. 12 and 16. The loop takes its
noise from the caller, so that a part of a run can be computed again with the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise, repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attune.diffusion import process
from attune.diffusion.noise import NoiseFn, to_device
from attune.interfaces import Conditioning

if TYPE_CHECKING:
    from attune.diffusion.policy import Policy


def ddim(
    policy: Policy,
    x_t: Tensor,
    timesteps: Tensor,
    cond: Conditioning,
    noise: Iterable[Tensor] | None,
    *,
    eta: float,
    guidance_scale: float,
    checkpoint_steps: bool = False,
) -> Tensor:
    """Latents (B, C, h, w) after the steps from each timestep to the next.

    Nothing is detached: with gradients on, they reach every prediction, and through the latents those before it.
    To backpropagate through the last steps only, call this twice, the first time under `torch.no_grad()`.

    Args:
        x_t: latents at timesteps[0], (B, C, h, w).
        timesteps: (k + 1,), falling; a slice of the path's `sampling_times`.
        noise: k tensors like x_t, drawn only as they are needed; None adds no noise, which is right for eta 0 alone.
        eta: 0 deterministic, 1 ancestral.
        guidance_scale: of classifier-free guidance, 1 = off.
        checkpoint_steps: keep only latents between steps; each step is computed again in the backward pass.
    """

    def step(x_t: Tensor, t: Tensor, t_prev: Tensor, z: Tensor | None) -> Tensor:
        predicted = policy.predict(x_t, t.expand(len(x_t)), cond, guidance_scale)
        at, to = path.level(t, x_t), path.level(t_prev, x_t)
        mean, std = process.ddim_step(*path.x0_and_noise(predicted, x_t, at), at, to, eta)
        return mean if z is None else mean + std * z

    path, pairs = policy.backbone.path, list(pairwise(timesteps))
    for (t, t_prev), z in zip(pairs, repeat(None, len(pairs)) if noise is None else noise, strict=True):
        x_t = maybe_checkpoint(checkpoint_steps, step, x_t, t, t_prev, z)
    return x_t


def predict_x0(
    policy: Policy, x_t: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float, checkpoint_steps: bool = False
) -> Tensor:
    """The clean latents (B, C, h, w) that one prediction at time t, a scalar, implies."""

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        return policy.predict(x_t, t.expand(len(x_t)), cond, guidance_scale)

    path, predicted = policy.backbone.path, maybe_checkpoint(checkpoint_steps, predict, x_t, t)
    return path.x0_and_noise(predicted, x_t, path.level(t, x_t))[0]


@torch.no_grad()
def sample(
    policy: Policy, cond: Conditioning, sample_noise: NoiseFn, steps: int, eta: float, guidance_scale: float
) -> Tensor:
    """Latents (B, C, h, w) for B rows of conditioning, from pure noise; with eta 0 only the start is drawn."""
    sample_noise = to_device(policy.device, sample_noise)
    x_t = sample_noise((len(cond), *policy.backbone.latent_shape))
    noise = (sample_noise(tuple(x_t.shape)) for _ in range(steps)) if eta > 0 else None
    timesteps = policy.backbone.path.sampling_times(steps)
    with policy.merged():
        return ddim(policy, x_t, timesteps, cond, noise, eta=eta, guidance_scale=guidance_scale)


def maybe_checkpoint(wanted: bool, f: Callable[..., Tensor], *values: Any) -> Tensor:
    """f(*values), whose inner activations are computed again in the backward pass if `wanted` and there is one."""
    return checkpoint(f, *values, use_reentrant=False) if wanted and torch.is_grad_enabled() else f(*values)
