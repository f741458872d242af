"""Stable Diffusion 1.x and 2.x: one text encoder, epsilon or v-prediction.

The embedded model has this layout too, so the laptop and the GPU box run the same lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from attune.diffusion.process import at, velocity_to_noise
from attune.interfaces import Conditioning

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class StableDiffusion:
    """A `Backbone` read from a diffusers folder or hub id; everything frozen and in evaluation mode."""

    lora_targets: Sequence[str] = LORA_TARGETS

    def __init__(self, path: str, revision: str | None, dtype: torch.dtype, device: torch.device):
        parts = {"pretrained_model_name_or_path": path, "revision": revision}
        self.tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer", revision=revision)
        self.text_encoder = _frozen(
            CLIPTextModel.from_pretrained(path, subfolder="text_encoder", revision=revision, dtype=dtype),
            device,
        )
        # a half-precision autoencoder paints black squares; it is small, so it stays in float32
        self.vae = _frozen(AutoencoderKL.from_pretrained(**parts, subfolder="vae", torch_dtype=torch.float32), device)
        self.denoiser: nn.Module = _frozen(
            UNet2DConditionModel.from_pretrained(**parts, subfolder="unet", torch_dtype=dtype), device
        )
        scheduler = DDIMScheduler.from_pretrained(**parts, subfolder="scheduler")
        self.alphas_cumprod: Tensor = scheduler.alphas_cumprod
        self.prediction_type = scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"{path}: prediction_type {self.prediction_type!r} is not supported")
        size = self.denoiser.config.sample_size
        self.latent_shape = (self.denoiser.config.in_channels, size, size)
        self.device, self.dtype = device, dtype

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        ids = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids
        return Conditioning({"prompt_embeds": self.text_encoder(ids.to(self.device)).last_hidden_state})

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        posterior = self.vae.encode((images * 2 - 1).to(self.vae.dtype)).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return latents * self.vae.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample / 2 + 0.5

    def predict_noise(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        embeds = cond.tensors["prompt_embeds"].to(self.dtype)
        output = denoiser(x_t.to(self.dtype), t, encoder_hidden_states=embeds).sample.to(x_t.dtype)
        if self.prediction_type == "epsilon":
            return output
        return velocity_to_noise(output, x_t, at(self.alphas_cumprod, t, x_t))


def load(path: str, revision: str | None, dtype: torch.dtype, device: torch.device) -> StableDiffusion:
    """A Stable Diffusion pipeline folder or hub id as a `Backbone`."""
    if not Path(path).exists() and revision is None and "/" not in path:
        raise FileNotFoundError(f"model.path {path!r} is neither a folder nor a hub id")
    return StableDiffusion(path, revision, dtype, device)


def _frozen(module: nn.Module, device: torch.device) -> nn.Module:
    return module.eval().requires_grad_(False).to(device)
