"""Base models with random weights in the released shapes, made on a device instead of read.

It takes a second where reading 7 GB would take a minute. Text encoders are left out: prompts have random encodings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from shapes import BACKBONES, TRANSFORMERS, denoiser, made, scheduler, vae

from attune.backbones._flow import sampling_sigmas, size_shift
from attune.backbones._memory import ModelOffload
from attune.backbones._quantise import quantise
from attune.backbones.flux import Flux
from attune.backbones.sd import StableDiffusion
from attune.backbones.sd3 import StableDiffusion3
from attune.backbones.sdxl import StableDiffusionXL
from attune.backbones.z_image import ZImage
from attune.config.settings import Model
from attune.diffusion.path import VP, Flow, Path, logit_normal
from attune.interfaces import Backbone, Conditioning

RESOLUTION = {"sd15": 512, "sdxl": 1024, "sd35m": 1024, "flux": 1024, "z_image": 1024}
SMALL_RESOLUTION = 64
SHIFT = {"sd35m": 3.0, "z_image": 6.0}  # of their schedulers; that of FLUX depends on the size


class Random:
    """What base models with random weights have in common."""

    base: str
    encoded: dict[str, tuple[int, ...]]
    """What a prompt is encoded as: names and shapes."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype | None = None, small: bool = False):
        order = torch.channels_last if model.channels_last else torch.preserve_format
        self.model, self.device, self.dtype = model, device, dtype or getattr(torch, model.dtype)
        self.offload = ModelOffload(device, offload=False)
        network = made(lambda: denoiser(self.base, small), self.dtype, device).to(memory_format=order)
        self.denoiser: Any = network if model.quantize is None else quantise(network, model.quantize, device)
        of_vae = getattr(torch, model.vae_dtype)
        self.vae = made(lambda: vae(self.base, small), of_vae, device).to(memory_format=order)
        self.resolution = model.resolution or (SMALL_RESOLUTION if small else RESOLUTION[self.base])
        side = self.resolution // 8
        self.latent_shape = (self.vae.config["latent_channels"], side, side)
        self.path = path_of(self.base, side, device)

    def release(self) -> None:
        """Nothing is read anew, so nothing is let go."""

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        n = len(prompts)
        return Conditioning({key: torch.randn(n, *shape, device=self.device) for key, shape in self.encoded.items()})


def path_of(base: str, side: int, device: torch.device) -> Path:
    """As the scheduler of the released model has it, for images of so many latents per side."""
    if base not in TRANSFORMERS:
        return VP(scheduler().alphas_cumprod.to(device))
    if base != "flux":
        return Flow(partial(sampling_sigmas, {"shift": SHIFT[base]}), logit_normal(SHIFT[base]))
    config = {"use_dynamic_shifting": True}
    mu = size_shift(config, (side // 2) ** 2)
    return Flow(partial(sampling_sigmas, config, mu=mu), logit_normal(math.exp(mu)))


class RandomSD(Random, StableDiffusion):
    """Stable Diffusion 1.5."""

    base, encoded, prediction_type = "sd15", {"prompt_embeds": (77, 768)}, "epsilon"


class RandomXL(Random, StableDiffusionXL):
    """Stable Diffusion XL."""

    base, encoded, prediction_type = "sdxl", {"prompt_embeds": (77, 2048), "text_embeds": (1280,)}, "epsilon"


class RandomSD3(Random, StableDiffusion3):
    """Stable Diffusion 3.5 Medium, without its T5."""

    base, encoded = "sd35m", {"prompt_embeds": (77, 2048), "text_embeds": (2048,)}


class RandomFlux(Random, Flux):
    """FLUX.1-dev."""

    base, encoded = "flux", {"prompt_embeds": (512, 4096), "text_embeds": (768,)}


class RandomZImage(Random, ZImage):
    """Z-Image; of 512 tokens a prompt has 64, which is a long one."""

    base, encoded = "z_image", {"prompt_embeds": (512, 2560)}

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        own = torch.arange(512, device=self.device).expand(len(prompts), -1) < 64
        return Conditioning(super().encode_prompts(prompts).tensors | {"prompt_mask": own})


KINDS = {"sd15": RandomSD, "sdxl": RandomXL, "sd35m": RandomSD3, "flux": RandomFlux, "z_image": RandomZImage}


def random_backbone(
    base: str, model: Model, device: torch.device, dtype: torch.dtype | None = None, small: bool = False
) -> Backbone:
    """A base model by its name in `BACKBONES`, as `attune.build.load_backbone` would load one."""
    assert KINDS.keys() == BACKBONES.keys()
    return KINDS[base](model, device, dtype, small)
