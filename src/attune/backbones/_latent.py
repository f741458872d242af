"""What latent diffusion models in diffusers' layout have in common: reading their parts, and their autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedModel

from attune.config.settings import Model, is_hub_id
from attune.diffusion.process import extract, velocity_to_noise

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def load_part(kind: type[Any], model: Model, subfolder: str, dtype: torch.dtype, device: torch.device) -> Any:
    """One network of a pipeline, frozen and in evaluation mode.

    Raises:
        ValueError: a weight is missing from the files or has another shape; it would be random.
        OSError: there is no such folder, or no safetensors file in it.
    """
    return _load(kind, model.path, dtype, device, subfolder=subfolder, revision=model.revision, variant=model.variant)


def load_vae(model: Model, device: torch.device) -> AutoencoderKL:
    """The pipeline's autoencoder, or the one that `model.vae` puts in its place."""
    dtype = getattr(torch, model.vae_dtype)
    if model.vae is None:
        vae = load_part(AutoencoderKL, model, "vae", dtype, device)
    else:
        vae = _load(AutoencoderKL, model.vae, dtype, device, revision=model.vae_revision)
    if vae.config.latents_mean is not None:
        raise ValueError(
            f"{model.vae or model.path}: an autoencoder with latents_mean and latents_std is not supported"
        )
    return vae


def load_text(
    kind: type[PreTrainedModel], model: Model, number: str, dtype: torch.dtype, device: torch.device
) -> tuple[CLIPTokenizer, PreTrainedModel]:
    """A tokenizer and its text encoder; `number` is what their folders' names end in."""
    tokenizer = CLIPTokenizer.from_pretrained(model.path, subfolder=f"tokenizer{number}", revision=model.revision)
    return tokenizer, load_part(kind, model, f"text_encoder{number}", dtype, device)


def tokenise(tokenizer: CLIPTokenizer, prompts: Sequence[str], device: torch.device) -> Tensor:
    """Token ids (B, L), padded to the encoder's full length as the tokenizer's own configuration says."""
    return tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)


def load_schedule(model: Model) -> tuple[Tensor, str]:
    """alphas_cumprod (T,) float32, and what the denoiser predicts: epsilon or v_prediction."""
    check_place(model.path)
    scheduler = DDIMScheduler.from_pretrained(model.path, subfolder="scheduler", revision=model.revision)
    predicts = scheduler.config.prediction_type
    if predicts not in ("epsilon", "v_prediction"):
        raise ValueError(f"{model.path}: prediction_type {predicts!r} is not supported")
    if scheduler.alphas_cumprod[-1] <= 0:
        raise ValueError(f"{model.path}: a schedule that ends in pure noise (zero SNR) has no x_0 there to predict")
    return scheduler.alphas_cumprod, predicts


def image_size(model: Model, vae: AutoencoderKL, denoiser: UNet2DConditionModel) -> tuple[int, tuple[int, int, int]]:
    """Resolution in pixels and shape of latents: as configured, else what the denoiser was trained at.

    Raises:
        ValueError: the autoencoder cannot make latents of that size, or none that fit the denoiser.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels per latent
    channels = denoiser.config.in_channels
    if vae.config.latent_channels != channels:
        raise ValueError(f"model.vae has {vae.config.latent_channels} latent channels, the denoiser {channels}")
    resolution = model.resolution or denoiser.config.sample_size * factor
    if resolution % factor:
        raise ValueError(f"model.resolution: {resolution} is not a multiple of {factor}, the pixels of a latent")
    return resolution, (channels, resolution // factor, resolution // factor)


def check_place(path: str) -> None:
    """Raises FileNotFoundError for a path that is nothing at all, before the hub is asked for it."""
    if not Path(path).exists() and not is_hub_id(path):
        raise FileNotFoundError(f"{path!r} is neither a folder nor a hub id")


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] to scaled latents, float32; a posterior sample if given a generator, else its mode.

    The generator may be of the CPU wherever the autoencoder lies.
    """
    posterior = vae.encode((images * 2 - 1).to(vae.device, vae.dtype)).latent_dist
    latents = posterior.mode() if generator is None else posterior.sample(generator)
    return latents.float() * vae.config.scaling_factor


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Scaled latents to images (B, 3, H, W), float32, nominally in [0, 1]; carries a graph."""
    return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample.float() / 2 + 0.5


def to_noise(output: Tensor, predicts: str, x_t: Tensor, alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """A denoiser's output as epsilon, in the dtype of x_t."""
    output = output.to(x_t.dtype)
    return output if predicts == "epsilon" else velocity_to_noise(output, x_t, extract(alphas_cumprod, t, x_t))


def _load(kind: type[Any], path: str, dtype: torch.dtype, device: torch.device, **where: Any) -> nn.Module:
    check_place(path)
    name_of_dtype = "dtype" if issubclass(kind, PreTrainedModel) else "torch_dtype"
    options = {name_of_dtype: dtype, "use_safetensors": True, "output_loading_info": True}
    where = {key: value for key, value in where.items() if value is not None}
    module, info = kind.from_pretrained(path, **where, **options)
    absent = sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])])
    if absent:
        part = "/".join([path, *filter(None, [where.get("subfolder")])])
        raise ValueError(f"{part}: {len(absent)} weights are missing or do not fit, first {absent[0]}")
    return module.eval().requires_grad_(False).to(device)
