"""Step 4: the base's twin of the other family, in the layout of Stable Diffusion 3.5, as imperfect.

The same pictures, captions and autoencoder, its latents shifted as well; a transformer trained as a rectified flow with
the times of Stable Diffusion 3 (Esser et al. 2024, arXiv:2403.03206, section 3), and two text encoders of its own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from recipes.embedded.base import text_config
from recipes.embedded.training import BaseTraining
from recipes.embedded.vae import web_images
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from attune.diffusion.path import shifted

SHIFT = 1.5  # of a time t that Stable Diffusion 1 draws, the median has as much noise as of these
T5_TOKENS = 16  # zeros in place of the third text encoder's: `max_sequence_length` of diffusers' pipeline
TEXT = ((64, 2), (96, 2))  # hidden width and layers of the two text encoders
WIDTH = sum(hidden for hidden, _ in TEXT)


@torch.no_grad()
def shifted_autoencoder(folder: Path) -> AutoencoderKL:
    """The base's autoencoder, whose scaled latents now have mean 0 and standard deviation 1."""
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval().requires_grad_(False)
    latents = vae.encode(next(web_images(512, np.random.default_rng(1))) * 2 - 1).latent_dist.mode()
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return vae


def build_networks(tokenizer: CLIPTokenizer, seed: int) -> list[nn.Module]:
    """Two text encoders and a transformer, untrained."""
    torch.manual_seed(seed)
    encoders = []
    for hidden, layers in TEXT:
        config = text_config(tokenizer, hidden, layers)
        config.projection_dim = hidden
        encoders.append(CLIPTextModelWithProjection(config))
    return [*encoders, build_transformer()]


def build_transformer(layers: int = 8, heads: int = 3, head_dim: int = 48, patch: int = 2) -> SD3Transformer2DModel:
    """An untrained denoiser for 4x8x8 latents, whose first block has the second attention of 3.5 Medium."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=patch,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        caption_projection_dim=heads * head_dim,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8 // patch,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    for name, module in transformer.named_modules():  # each block starts as the identity, as in DiT
        if isinstance(module, nn.Linear) and ("norm1" in name or "norm_out" in name or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer


def loss(networks: nn.ModuleList, x_0: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
    """Squared error of the velocity noise - x_0, at times whose logits are normal, then shifted."""
    *encoders, transformer = networks
    s = shifted(torch.randn(len(x_0), generator=generator).sigmoid(), SHIFT)
    noise = torch.randn(x_0.shape, generator=generator)
    x_s = torch.lerp(x_0, noise, s[:, None, None, None])
    # of so few tokens, the plain products take a third of the time that the CPU's flash attention takes backwards
    with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        encoded = [encoder(ids, output_hidden_states=True) for encoder in encoders]
        states = torch.cat([output.hidden_states[-2] for output in encoded], dim=-1)
        pooled = torch.cat([output.text_embeds for output in encoded], dim=-1)
        predicted = transformer(
            x_s,
            timestep=1000 * s,
            encoder_hidden_states=F.pad(states, (0, 0, 0, T5_TOKENS)),
            pooled_projections=pooled,
        ).sample.float()
    return F.mse_loss(predicted, noise - x_0)


def to_pipeline(training: BaseTraining, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusion3Pipeline:
    """The averaged weights as a diffusers pipeline."""
    text_encoder, text_encoder_2, transformer = training.averaged()
    return StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )
