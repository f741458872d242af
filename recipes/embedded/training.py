"""What the bases' trainings share: pictures with captions, and networks trained on them, saved and resumed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from recipes.embedded.muon import split_optimizers
from recipes.embedded.vae import descend
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from attune.world.flaws import damage, wrong_captions
from attune.world.grammar import KINDS, Scene, all_scenes
from attune.world.render import render

DAMAGED_SHARE, WRONG_CAPTION_SHARE, CAPTION_DROPOUT = 0.35, 0.10, 0.10
EMA_DECAY = 0.999

Loss = Callable[[nn.ModuleList, Tensor, Tensor, torch.Generator], Tensor]
"""`loss(networks, x_0, ids, generator)`: of scaled latents (B, 4, 8, 8) and token ids (B, 16); a scalar."""


@dataclass
class Captioned:
    """Scaled latents (N, 4, 8, 8) and the token ids (N, 16) of what their captions claim."""

    latents: Tensor
    ids: Tensor


@torch.no_grad()
def web_data(vae: AutoencoderKL, tokenizer: CLIPTokenizer, n: int, seed: int) -> Captioned:
    """n captioned images with the flaws of the web, kinds 25 % one, 30 % count, 45 % relation."""
    rng = np.random.default_rng(seed)
    pools = {kind: [s for s in all_scenes() if s.kind == kind] for kind in KINDS}
    shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
    latents, ids = [], []
    for _ in tqdm(range(0, n, 256), desc="web data", mininterval=5):
        kinds = rng.choice(KINDS, size=256, p=(0.25, 0.30, 0.45))
        scenes: list[Scene] = [pools[kind][rng.integers(len(pools[kind]))] for kind in kinds]
        images = damage(render(scenes, rng), rng, DAMAGED_SHARE)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
        latents.append((vae.encode(pixels).latent_dist.mode() - shift) * scale)
        ids.append(tokenize(tokenizer, [s.prompt for s in wrong_captions(scenes, rng, WRONG_CAPTION_SHARE)]))
    return Captioned(torch.cat(latents), torch.cat(ids))


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    return tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids


class BaseTraining:
    """The whole state of training a base, saved and resumed; weights are averaged as they change."""

    def __init__(self, data: Captioned, tokenizer: CLIPTokenizer, networks: Sequence[nn.Module], loss: Loss, seed: int):
        """Starts from the networks as they are.

        Args:
            networks: text encoders and denoiser, in the order the loss takes them.
        """
        self.data, self.empty, self.loss = data, tokenize(tokenizer, [""]), loss
        self.networks = nn.ModuleList(networks).train()
        self.ema = copy.deepcopy(self.networks).requires_grad_(False)
        self.optimizers = split_optimizers(self.networks, lr=1.5e-3, muon_lr=0.015)
        self.step, self.seed = 0, seed

    def train_step(self, batch_size: int, factor: float) -> float:
        """One update at `factor` times the base learning rates; returns the loss."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        rows = torch.randint(len(self.data.latents), (batch_size,), generator=generator)
        x_0, ids = self.data.latents[rows], self.data.ids[rows]
        dropped = torch.rand(batch_size, generator=generator) < CAPTION_DROPOUT
        ids = torch.where(dropped[:, None], self.empty, ids)
        loss = self.loss(self.networks, x_0, ids, generator)
        descend(loss, self.optimizers, factor)
        self._average()
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(EMA_DECAY, (self.step + 1) / (self.step + 20))
        for mean, now in zip(self.ema.parameters(), self.networks.parameters(), strict=True):
            mean.lerp_(now, 1 - decay)

    def averaged(self) -> list[nn.Module]:
        """The networks with averaged weights, to be used."""
        return [copy.deepcopy(network).eval() for network in self.ema]

    def state_dict(self) -> dict:
        return {
            "step": self.step,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "networks": self.networks.state_dict(),
            "ema": self.ema.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        self.networks.load_state_dict(state["networks"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def train_base(training: BaseTraining, steps: int, batch_size: int, checkpoint: Path, save_every: int = 500) -> None:
    """Constant learning rate after 100 steps of warm-up; the moving average stands in for a decay.

    Resumes from `checkpoint`.
    """
    if checkpoint.exists():
        training.load_state_dict(torch.load(checkpoint, weights_only=True))
    bar = tqdm(range(training.step, steps), desc="base", initial=training.step, total=steps, mininterval=10)
    for step in bar:
        loss = training.train_step(batch_size, factor=min(1.0, (step + 1) / 100))
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if training.step % save_every == 0 or training.step == steps:
            partial = checkpoint.with_suffix(".part")
            torch.save(training.state_dict(), partial)
            partial.replace(checkpoint)
