"""DDIM sampling of a policy, in one function: whole runs, and the parts that truncated backpropagation needs.

Source: Song et al. 2021, arXiv:2010.02502, eq. 12 and 16. The loop takes its noise from the caller, so that a part
of a run can be computed again with the same noise.
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


def timesteps_to_zero(policy: Policy, steps: int) -> Tensor:
    """The steps + 1 timesteps a run visits: 951, 901, ..., 1, 0 for 20 of 1000. Raises ValueError if they are too many.

    A run of k of these steps is a slice of k + 1: `[: k + 1]` are the first k steps, `[-k - 1 :]` the last k.
    """
    visited = process.ddim_timesteps(len(policy.backbone.alphas_cumprod), steps)
    return torch.cat([visited, torch.zeros(1, dtype=visited.dtype)])


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
        timesteps: long (k + 1,), falling; a slice of `timesteps_to_zero`.
        noise: k tensors like x_t, drawn only as they are needed; None adds no noise, which is right for eta 0 alone.
        eta: 0 deterministic, 1 ancestral.
        guidance_scale: of classifier-free guidance, 1 = off.
        checkpoint_steps: keep only latents between steps; each step is computed again in the backward pass.
    """

    def step(x_t: Tensor, t: Tensor, t_prev: Tensor, z: Tensor | None) -> Tensor:
        noise_pred = policy.predict_noise(x_t, t.expand(len(x_t)), cond, guidance_scale)
        mean, std = process.ddim_step(x_t, noise_pred, _a(policy, t, x_t), _a(policy, t_prev, x_t), eta)
        return mean if z is None else mean + std * z

    pairs = list(pairwise(timesteps))
    for (t, t_prev), z in zip(pairs, repeat(None, len(pairs)) if noise is None else noise, strict=True):
        x_t = maybe_checkpoint(checkpoint_steps, step, x_t, t, t_prev, z)
    return x_t


def predict_x0(
    policy: Policy, x_t: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float, checkpoint_steps: bool = False
) -> Tensor:
    """The clean latents (B, C, h, w) that one noise prediction at timestep t, a scalar, implies."""

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        return policy.predict_noise(x_t, t.expand(len(x_t)), cond, guidance_scale)

    return process.predict_x0(x_t, maybe_checkpoint(checkpoint_steps, predict, x_t, t), _a(policy, t, x_t))


@torch.no_grad()
def sample(
    policy: Policy, cond: Conditioning, sample_noise: NoiseFn, steps: int, eta: float, guidance_scale: float
) -> Tensor:
    """Latents (B, C, h, w) for B rows of conditioning, from pure noise; with eta 0 only the start is drawn."""
    sample_noise = to_device(policy.device, sample_noise)
    x_t = sample_noise((len(cond), *policy.backbone.latent_shape))
    noise = (sample_noise(tuple(x_t.shape)) for _ in range(steps)) if eta > 0 else None
    timesteps = timesteps_to_zero(policy, steps)
    with policy.merged():
        return ddim(policy, x_t, timesteps, cond, noise, eta=eta, guidance_scale=guidance_scale)


def maybe_checkpoint(wanted: bool, f: Callable[..., Tensor], *values: Any) -> Tensor:
    """f(*values), whose inner activations are computed again in the backward pass if `wanted` and there is one."""
    return checkpoint(f, *values, use_reentrant=False) if wanted and torch.is_grad_enabled() else f(*values)


def _a(policy: Policy, t: Tensor, like: Tensor) -> Tensor:
    """alphas_cumprod at a scalar timestep, (1, 1, 1, 1)."""
    return process.extract(policy.backbone.alphas_cumprod, t.expand(1), like)
