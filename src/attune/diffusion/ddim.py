"""Drawing images from a policy: DDIM, with noise that belongs to a prompt and not to its place in a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attune.diffusion import process
from attune.diffusion.policy import Policy
from attune.interfaces import Conditioning

Normal = Callable[[tuple[int, ...]], Tensor]
"""Draws standard normal noise of a shape."""


def normal(generator: torch.Generator) -> Normal:
    """Noise from one generator."""
    return lambda shape: torch.randn(shape, generator=generator)


def per_row_normal(seeds: Sequence[int]) -> Normal:
    """Noise of B rows, each from its own seed: the same image whatever else is in the batch."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda shape: torch.stack([torch.randn(shape[1:], generator=g) for g in generators])


def on(device: torch.device, draw: Normal) -> Normal:
    """The same noise on a device: drawn on the CPU, so that every machine draws the same."""
    return lambda shape: draw(shape).to(device)


@torch.no_grad()
def sample(policy: Policy, cond: Conditioning, draw: Normal, steps: int, eta: float, guidance_scale: float) -> Tensor:
    """Latents (B, C, h, w) for B rows of conditioning, DDIM from pure noise; with eta 0 no more noise is drawn."""
    sampler, draw = Sampler(policy, steps, eta, guidance_scale), on(policy.device, draw)
    x_t = draw((len(cond), *policy.backbone.latent_shape))
    noise = (draw(tuple(x_t.shape)) for _ in range(steps)) if eta > 0 else repeat(None, steps)
    return sampler.walk(x_t, sampler.timesteps, cond, noise)


@dataclass(frozen=True)
class Unfinished:
    """A DDIM run with k steps to go, whose noise is drawn already; without a graph."""

    x_t: Tensor  # (B, C, h, w)
    noise: Tensor  # (k, B, C, h, w)
    cond: Conditioning

    def __len__(self) -> int:
        return len(self.noise)

    def of(self, rows: slice) -> Unfinished:
        """The run of those images alone."""
        return Unfinished(self.x_t[rows], self.noise[:, rows], self.cond[rows])


@dataclass(frozen=True)
class Sampler:
    """DDIM in two parts, so that a gradient may flow through the second one alone.

    The noise predictions of `begin` carry no graph, and so its latents carry none; `finish` and `estimate` detach
    nothing: gradients reach every prediction they make, and the latents each of them saw.
    """

    policy: Policy
    steps: int
    eta: float
    guidance_scale: float
    checkpointed: bool = False  # keep only latents between steps; each step is computed again in the backward pass

    @property
    def timesteps(self) -> Tensor:
        return process.ddim_timesteps(len(self.policy.backbone.alphas_cumprod), self.steps)

    @torch.no_grad()
    def begin(self, cond: Conditioning, draw: Normal, left: int) -> Unfinished:
        """All but the last `left` (1..steps) steps from pure noise; draws in the order of `sample` with eta > 0."""
        draw = on(self.policy.device, draw)
        x_t = draw((len(cond), *self.policy.backbone.latent_shape))
        done = self.steps - left
        x_t = self.walk(x_t, self.timesteps[:done], cond, (draw(tuple(x_t.shape)) for _ in range(done)))
        return Unfinished(x_t, torch.stack([draw(tuple(x_t.shape)) for _ in range(left)]), cond)

    def finish(self, run: Unfinished) -> Tensor:
        """The final latents (B, C, h, w)."""
        return self.walk(run.x_t, self.timesteps[-len(run) :], run.cond, run.noise)

    def estimate(self, run: Unfinished) -> Tensor:
        """The clean latents (B, C, h, w) that the next prediction alone implies."""
        t = self.timesteps[-len(run)]
        noise_pred = self._remembered(self._predict, run.x_t, t, run.cond)
        return process.predict_x0(run.x_t, noise_pred, self._a(t, run.x_t))

    def add_noise(self, x_0: Tensor, noise: Tensor, left: int) -> Tensor:
        """x_t of the step after which `left` - 1 remain."""
        return process.add_noise(x_0, noise, self._a(self.timesteps[-left], x_0))

    def walk(self, x_t: Tensor, timesteps: Tensor, cond: Conditioning, noise: Iterable[Tensor | None]) -> Tensor:
        """Latents after a step at each of the timesteps, which adds its noise (B, C, h, w), if there is one."""
        for t, fresh in zip(timesteps, noise, strict=True):
            x_t = self._remembered(self._step, x_t, t, cond, fresh)
        return x_t

    def _step(self, x_t: Tensor, t: Tensor, cond: Conditioning, noise: Tensor | None) -> Tensor:
        t_prev = process.previous_timestep(t, len(self.policy.backbone.alphas_cumprod), self.steps)
        noise_pred = self._predict(x_t, t, cond)
        mean, std = process.ddim_step(x_t, noise_pred, self._a(t, x_t), self._a(t_prev, x_t), self.eta)
        return mean if noise is None else mean + std * noise

    def _predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.policy.predict_noise(x_t, t.expand(len(x_t)), cond, self.guidance_scale)

    def _a(self, t: Tensor, like: Tensor) -> Tensor:
        return process.at(self.policy.backbone.alphas_cumprod, t.expand(1), like)

    def _remembered(self, f: Callable[..., Tensor], *values: Any) -> Tensor:
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(f, *values, use_reentrant=False)
        return f(*values)
