"""A step of DPO with a LoRA: attune's, and the same in the order of diffusers' script and of the authors' code.

Order of operations of diffusers' `examples/research_projects/diffusion_dpo/train_diffusion_dpo.py`: in each step images
are encoded eight at a time, and captions once; chosen and rejected images go through the UNet together, under autocast
with the adapter in float32; then adapters are disabled for the reference, and enabled again. Of the authors' `train.py`
(SalesforceAIResearch/DiffusionDPO): images are encoded at once, and the reference is a second UNet.
attune encodes images and captions once, when data are prepared: its step reads latents and embeddings.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from dpo_memory import plain_loss
from gpu_rows import draws_of, trained
from plain import adamw_step, add_lora, frozen_unet, frozen_vae, move, schedule, text_encoder, trained_weights
from speed_sides import LR, WEIGHT_DECAY, Place, Side, loop_settings, lora_policy, pixels, prompts, scalar
from torch import Tensor

from attune.data.batches import PairBatch
from attune.methods import dpo

BETA = 250.0  # of diffusers' form; attune's has a factor of 2
AT_ONCE = 8  # images that diffusers' script encodes at a time


def ours(place: Place) -> Side:
    """attune's method and training step, on prepared pairs."""
    policy, n = lora_policy(place), place.n
    backbone, generator = policy.backbone, torch.Generator().manual_seed(0)
    images = pixels(2 * n, place).split(place.options.get("at_once", AT_ONCE))
    latents = torch.cat([backbone.encode_images(part, generator) for part in images])
    cond, ones = backbone.encode_prompts(prompts(n)), torch.ones(n, device=place.device)
    backbone.release()  # as a training does
    pairs = PairBatch(prompts(n), cond, *latents.chunk(2), ones, ones)
    config = dpo.Config(lora=None, beta=2 * BETA, caption_dropout=0, **loop_settings(place))
    step = trained(dpo.Method(config, policy), policy, pairs, n)
    return Side(lambda: {"loss": scalar(step()["loss"])}, policy.parameters())


def in_order_of_diffusers(place: Place) -> Side:
    """With options: `encodes` false leaves out what attune does when it prepares data."""
    return _plain(place, second_unet=False)


def in_order_of_the_authors(place: Place) -> Side:
    return _plain(place, second_unet=True)


def _plain(place: Place, second_unet: bool) -> Side:
    n, dtype, device, options = place.n, place.computes, place.device, place.options
    reference = frozen_unet(place.folder, dtype, device) if second_unet else None
    unet = add_lora(frozen_unet(place.folder, dtype, device))
    weights = trained_weights(unet)
    move(weights)
    alphas, draws = schedule(place.folder).alphas_cumprod.to(device), draws_of(n)
    prepared = _encoder(place)
    if not options.get("encodes", True):
        once = prepared()
        prepared = lambda: once  # noqa: E731

    def loss() -> Tensor:
        latents, embeds = prepared()
        t, noise = draws.integers(len(alphas), n).to(device), draws.noise((n, *latents.shape[1:])).to(device)
        return plain_loss(unet, alphas, (latents.float(), noise, t, embeds), dtype, BETA, reference)

    step = adamw_step(weights, loss, LR, WEIGHT_DECAY, max_grad_norm=1.0)
    return Side(lambda: {"loss": scalar(step())}, weights)


def _encoder(place: Place) -> Callable[[], tuple[Tensor, Tensor]]:
    """What encodes both images of each pair, (2n, C, h, w), and the captions, (n, L, D)."""
    vae = frozen_vae(place.folder, place.computes, place.device)
    encode = text_encoder(place.folder, place.computes, place.device)
    images = 2 * pixels(2 * place.n, place).to(place.computes) - 1

    @torch.no_grad()
    def encoded() -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)  # the same latents in every step
        parts = images.split(place.options.get("at_once", AT_ONCE))
        latents = torch.cat([vae.encode(part).latent_dist.sample(generator) for part in parts])
        return latents * vae.config.scaling_factor, encode(prompts(place.n))

    return encoded
