"""Step 2: a latent diffusion model in the layout of Stable Diffusion 1.x, deliberately imperfect.

Its data have the flaws of the web: a third of the images damaged, some captions wrong. Text encoder and denoiser
are trained together on epsilon prediction with min-SNR weighting (Hang et al. 2023, arXiv:2303.09556, gamma 5)
and caption dropout for guidance; weights are an exponential moving average.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from recipes.embedded.muon import split_optimizers
from recipes.embedded.vae import descend
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from attune.world.flaws import damage, wrong_captions
from attune.world.grammar import KINDS, Scene, all_scenes, vocabulary
from attune.world.render import render

DAMAGED_SHARE, WRONG_CAPTION_SHARE, CAPTION_DROPOUT = 0.35, 0.10, 0.10
MAX_TOKENS = 16
SNR_GAMMA = 5.0
EMA_DECAY = 0.999


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
    latents, ids = [], []
    for _ in tqdm(range(0, n, 256), desc="web data", mininterval=5):
        kinds = rng.choice(KINDS, size=256, p=(0.25, 0.30, 0.45))
        scenes: list[Scene] = [pools[kind][rng.integers(len(pools[kind]))] for kind in kinds]
        images = damage(render(scenes, rng), rng, DAMAGED_SHARE)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
        latents.append(vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor)
        ids.append(tokenize(tokenizer, [s.prompt for s in wrong_captions(scenes, rng, WRONG_CAPTION_SHARE)]))
    return Captioned(torch.cat(latents), torch.cat(ids))


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    return tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids


class BaseTraining:
    """The whole state of training the base, saved and resumed."""

    def __init__(self, data: Captioned, tokenizer: CLIPTokenizer, seed: int):
        torch.manual_seed(seed)
        self.data, self.empty = data, tokenize(tokenizer, [""])
        self.text, self.unet = build_text_encoder(tokenizer).train(), build_unet().train()
        self.ema = copy.deepcopy(torch.nn.ModuleList([self.text, self.unet])).requires_grad_(False)
        self.optimizers = split_optimizers([self.text, self.unet], lr=1.5e-3, muon_lr=0.015)
        self.alphas_cumprod = build_scheduler().alphas_cumprod
        self.step, self.seed = 0, seed

    def train_step(self, batch_size: int, factor: float) -> float:
        """One update at `factor` times the base learning rates; returns the loss."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        rows = torch.randint(len(self.data.latents), (batch_size,), generator=generator)
        x_0, ids = self.data.latents[rows], self.data.ids[rows]
        dropped = torch.rand(batch_size, generator=generator) < CAPTION_DROPOUT
        ids = torch.where(dropped[:, None], self.empty, ids)
        t = torch.randint(len(self.alphas_cumprod), (batch_size,), generator=generator)
        noise = torch.randn(x_0.shape, generator=generator)
        a = self.alphas_cumprod[t][:, None, None, None]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            text = self.text(ids).last_hidden_state
            predicted = self.unet(a.sqrt() * x_0 + (1 - a).sqrt() * noise, t, text).sample.float()
        snr = (a / (1 - a)).flatten()
        weight = snr.clamp(max=SNR_GAMMA) / snr
        loss = (weight * F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3))).mean()
        descend(loss, self.optimizers, factor)
        self._average()
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(EMA_DECAY, (self.step + 1) / (self.step + 20))
        live = torch.nn.ModuleList([self.text, self.unet])
        for mean, now in zip(self.ema.parameters(), live.parameters(), strict=True):
            mean.lerp_(now, 1 - decay)

    def state_dict(self) -> dict:
        parts = {"text": self.text, "unet": self.unet, "ema": self.ema}
        return {
            "step": self.step,
            "optimizers": [o.state_dict() for o in self.optimizers],
            **{name: part.state_dict() for name, part in parts.items()},
        }

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        for name in ("text", "unet", "ema"):
            getattr(self, name).load_state_dict(state[name])
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


def to_pipeline(training: BaseTraining, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The averaged weights as a diffusers pipeline."""
    text, unet = (copy.deepcopy(module).eval() for module in training.ema)
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
