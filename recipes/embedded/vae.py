"""Step 1: an AutoencoderKL for 32 px images, 8x8x4 latents.

Trained on renders with the flaws of the web, so that damage survives encoding and alignment has something to
remove. Loss: edge-weighted L1 + L2, because a poor autoencoder loses shapes first, + a small KL.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from recipes.embedded.muon import split_optimizers
from tqdm import tqdm

from attune.world.flaws import damage
from attune.world.grammar import all_scenes
from attune.world.render import IMAGE_SIZE, render

KL_WEIGHT = 1e-4
LATENT_NOISE = 0.05


def build_vae() -> AutoencoderKL:
    """An untrained autoencoder: 0.6 M parameters, a factor 4 in each direction."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=IMAGE_SIZE,
    )


def web_images(batch_size: int, rng: np.random.Generator, damaged: float = 0.3) -> Iterator[torch.Tensor]:
    """Endless batches of renders, a share of them damaged; (B, 3, H, W) in [0, 1].

    Kinds are drawn evenly: relations are 96 % of the grammar and would leave hardly any of the rest.
    """
    by_kind = [[s for s in all_scenes() if s.kind == kind] for kind in ("one", "count", "relation")]
    while True:
        pools = [by_kind[k] for k in rng.integers(len(by_kind), size=batch_size)]
        images = damage(render([pool[rng.integers(len(pool))] for pool in pools], rng), rng, damaged)
        yield torch.from_numpy(images).permute(0, 3, 1, 2)


def train_vae(steps: int, batch_size: int, seed: int) -> AutoencoderKL:
    """Trains the autoencoder and sets its scaling factor to 1 / std of the latents.

    The latents get a fixed noise of 0.05 in place of a sampled posterior: with a KL this small,
    sampling it doubled the time to the same error.
    """
    torch.manual_seed(seed)
    vae = build_vae().train()
    optimizers = split_optimizers([vae], lr=1e-3, muon_lr=0.02)
    batches = web_images(batch_size, np.random.default_rng(seed))
    bar = tqdm(range(steps), desc="vae", mininterval=5)
    for step in bar:
        images = next(batches) * 2 - 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latents = vae.encode(images).latent_dist.mode()
            reconstruction = vae.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample
        error = reconstruction.float() - images
        weight = 1 + 3 * _edges(images)
        loss = (weight * (error.abs() + 2 * error.square())).mean() + KL_WEIGHT * latents.float().square().mean()
        descend(loss, optimizers, warm_cosine(step, steps))
        bar.set_postfix(loss=f"{loss.item():.4f}", mse=f"{error.square().mean().item() / 4:.5f}", refresh=False)
    vae.eval().requires_grad_(False)
    vae.quant_conv.bias.data[4:] = math.log(LATENT_NOISE**2)  # the posterior's log variance, as trained with
    vae.quant_conv.weight.data[4:] = 0
    vae.register_to_config(scaling_factor=1 / latent_std(vae, next(web_images(512, np.random.default_rng(seed + 1)))))
    return vae


def descend(loss: torch.Tensor, optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """One clipped step of every optimizer at `factor` times its base learning rate."""
    loss.backward()
    weights = [w for o in optimizers for group in o.param_groups for w in group["params"]]
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("base_lr", group["lr"]) * factor
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def latent_std(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Standard deviation of the latents of images in [0, 1]."""
    return vae.encode(images * 2 - 1).latent_dist.mode().std().item()


def warm_cosine(step: int, steps: int, warmup: int = 100) -> float:
    """Learning rate factor: linear warm-up, then a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def _edges(images: torch.Tensor) -> torch.Tensor:
    """1 near edges, 0 on flat surfaces; (B, 1, H, W)."""
    grey = images.mean(1, keepdim=True)
    contrast = F.max_pool2d(grey, 3, 1, 1) + F.max_pool2d(-grey, 3, 1, 1)
    return (contrast / 0.5).clamp(0, 1)
