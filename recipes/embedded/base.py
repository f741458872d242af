"""Step 2: a latent diffusion model in the layout of Stable Diffusion 1.x, deliberately imperfect.

Its data have the flaws of the web: a third of the images damaged, some captions wrong. Text encoder and denoiser
are trained together on epsilon prediction with min-SNR weighting (Hang et al. 2023, arXiv:2303.09556, gamma 5)
and caption dropout for guidance; weights are an exponential moving average.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from recipes.embedded.training import BaseTraining
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from attune.world.grammar import vocabulary

MAX_TOKENS = 16
SNR_GAMMA = 5.0


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer over the words of the grammar: every word is one token, so the longest prompt has 14."""
    letters = sorted({c for word in vocabulary() for c in word})
    merges: list[tuple[str, str]] = []
    for word in vocabulary():
        # merges of earlier words apply inside this one too and come first; a new merge comes last of all
        while len(pieces := split_word(word, merges)) > 1:
            merges.append((pieces[0], pieces[1]))
    tokens = [*letters, *(c + "</w>" for c in letters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=MAX_TOKENS)


def split_word(word: str, merges: Sequence[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding of a word: the earliest merge that fits, until none does (Sennrich et al. 2016)."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    rank = {pair: order for order, pair in enumerate(merges)}
    while fitting := [pair for pair in pairwise(pieces) if pair in rank]:
        first = min(fitting, key=rank.__getitem__)
        i = list(pairwise(pieces)).index(first)
        pieces[i : i + 2] = ["".join(first)]
    return pieces


def build_text_encoder(tokenizer: CLIPTokenizer, hidden: int = 96, layers: int = 2) -> CLIPTextModel:
    """An untrained CLIP text tower over the grammar's words."""
    return CLIPTextModel(text_config(tokenizer, hidden, layers))


def text_config(tokenizer: CLIPTokenizer, hidden: int, layers: int) -> CLIPTextConfig:
    end = tokenizer.eos_token_id
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
        pad_token_id=end,
    )


def build_unet(hidden: int = 96) -> UNet2DConditionModel:
    """An untrained denoiser for 4x8x8 latents: 4 M parameters."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=hidden,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def build_networks(tokenizer: CLIPTokenizer, seed: int) -> list[nn.Module]:
    """A text encoder and a denoiser, untrained."""
    torch.manual_seed(seed)
    return [build_text_encoder(tokenizer), build_unet()]


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
        timestep_spacing="leading",
    )


def loss(networks: nn.ModuleList, x_0: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
    """Squared error of epsilon, weighted by min-SNR."""
    text_encoder, unet = networks
    alphas_cumprod = build_scheduler().alphas_cumprod
    t = torch.randint(len(alphas_cumprod), (len(x_0),), generator=generator)
    noise = torch.randn(x_0.shape, generator=generator)
    a = alphas_cumprod[t][:, None, None, None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        text = text_encoder(ids).last_hidden_state
        predicted = unet(a.sqrt() * x_0 + (1 - a).sqrt() * noise, t, text).sample.float()
    snr = (a / (1 - a)).flatten()
    weight = snr.clamp(max=SNR_GAMMA) / snr
    return (weight * F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3))).mean()


def to_pipeline(training: BaseTraining, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The averaged weights as a diffusers pipeline."""
    text, unet = training.averaged()
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
