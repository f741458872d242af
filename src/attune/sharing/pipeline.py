"""diffusers' own pipelines of a base model's parts: what a package is loaded into before it is called done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from attune.backbones.sd import StableDiffusion
from attune.backbones.sdxl import StableDiffusionXL
from attune.interfaces import Backbone


def pipeline_of(backbone: Backbone) -> Any:
    """diffusers' pipeline around the parts of a base model, which are shared.

    Raises:
        ValueError: diffusers' pipeline of this kind of base model is not known here.
    """
    if isinstance(backbone, StableDiffusionXL):
        (first, text_1), (second, text_2) = backbone.encoders
        pipeline: Any = StableDiffusionXLPipeline(
            vae=backbone.vae,
            text_encoder=text_1,
            text_encoder_2=text_2,
            tokenizer=first,
            tokenizer_2=second,
            unet=backbone.denoiser,
            scheduler=_scheduler(backbone),
            force_zeros_for_empty_prompt=backbone.zeros_for_empty_prompt,
            add_watermarker=False,
        )
    elif isinstance(backbone, StableDiffusion):
        pipeline = StableDiffusionPipeline(
            vae=backbone.vae,
            text_encoder=backbone.text_encoder,
            tokenizer=backbone.tokenizer,
            unet=backbone.denoiser,
            scheduler=_scheduler(backbone),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    else:
        raise ValueError(f"model.backbone: a package of {type(backbone).__name__} cannot be checked with diffusers yet")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generated(pipeline: Any, prompts: Sequence[str], start: Tensor, steps: int, guidance_scale: float) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] from the latents `start` by DDIM without noise, as users of diffusers get them."""
    size = start.shape[-1] * pipeline.vae_scale_factor
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "eta": 0.0, "output_type": "pt"}
    return pipeline(list(prompts), height=size, width=size, latents=start, **options).images.float().cpu()


def read_unet(folder: Path) -> Any:
    """A whole denoiser as a user of diffusers loads it."""
    return UNet2DConditionModel.from_pretrained(folder)


def _scheduler(backbone: StableDiffusion | StableDiffusionXL) -> DDIMScheduler:
    """Our sampler's times and levels."""
    return DDIMScheduler(
        num_train_timesteps=backbone.path.n_train,
        prediction_type=backbone.prediction_type,
        trained_betas=_betas(backbone.path.alphas_cumprod),
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _betas(alphas_cumprod: Tensor) -> Any:
    """The schedule that has these products: beta_t = 1 - a_t / a_(t-1)."""
    products = alphas_cumprod.cpu().double()
    before = torch.cat([torch.ones(1, dtype=torch.float64), products[:-1]])
    return (1 - products / before).numpy()
