"""Models with random weights in the released shapes of SD 1.5, SDXL, SD 3.5 Medium and ViT-H/14, or small ones.

Written to a folder in diffusers' layout (`write_pipeline`), which the real loading code reads, or made at once on a
device (`RandomSD`, `RandomXL`, `random_clip`), which takes a second where reading 7 GB would take a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from attune.backbones._memory import Turns
from attune.backbones.sd import StableDiffusion
from attune.backbones.sdxl import StableDiffusionXL
from attune.clip.open_clip import VIT_H_14, clip_config
from attune.config.settings import Model
from attune.diffusion.path import VP
from attune.interfaces import Backbone, Conditioning

M = TypeVar("M", bound=nn.Module)
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
    },
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "sd35m": {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
}
BACKBONES = {"sd15": "sd", "sdxl": "sdxl", "sd35m": "sd3"}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
SMALL = {"sd15": {"block_out_channels": (32, 32, 64, 64)}, "sdxl": {"block_out_channels": (32, 64, 64)}}
SMALL["sd15"] |= {"attention_head_dim": 4, "sample_size": 8}
SMALL["sdxl"] |= {"attention_head_dim": (2, 4, 4), "sample_size": 8, "transformer_layers_per_block": (1, 1, 1)}
SMALL_VAE = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
SMALL_VIT = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
    "hidden_act": "gelu",
}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
TEXT_2 = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
SCALING = {"sd15": 0.18215, "sdxl": 0.13025}
OF_FLOW = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
OF_FLOW |= {"use_quant_conv": False, "use_post_quant_conv": False}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
FIRST, LAST = "<|startoftext|>", "<|endoftext|>"


def tokenizer() -> CLIPTokenizer:
    """CLIP's number of tokens, of which only the letters are ever used."""
    letters = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    words = [*letters, *(f"{a}{b}{c}</w>" for a in LETTERS for b in LETTERS for c in 2 * LETTERS)]
    unused = (f"<unused{n}>" for n in range(49406))
    vocab = {token: i for i, token in enumerate(list(dict.fromkeys([*words, *unused]))[:49406])}
    return CLIPTokenizer(vocab=vocab | {FIRST: 49406, LAST: 49407}, merges=[], model_max_length=77)


def made(build: Callable[[], M], dtype: torch.dtype, device: torch.device | str = "cpu") -> M:
    """A frozen module with its own random start, made in a dtype on a device and never anywhere else."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return build().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def unet(base: str, small: bool = False) -> UNet2DConditionModel:
    return UNet2DConditionModel(**{**UNETS[base], **(SMALL[base] if small else {})})


def vae(base: str, small: bool = False) -> AutoencoderKL:
    return AutoencoderKL(**{**VAE, **(SMALL_VAE if small else {})}, scaling_factor=SCALING[base])


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, clip_sample=False
    )


def write_pipeline(base: str, folder: Path, dtype: torch.dtype, small: bool = False) -> None:
    """A pipeline folder in the released shapes and layout, with random weights."""
    if base in TRANSFORMERS:
        _write_flow(base, folder, dtype)
        return
    made(lambda: unet(base, small), dtype).save_pretrained(folder / "unet")
    made(lambda: vae(base, small), dtype).save_pretrained(folder / "vae")
    made(lambda: CLIPTextModel(CLIPTextConfig(**TEXT)), dtype).save_pretrained(folder / "text_encoder")
    tokenizer().save_pretrained(folder / "tokenizer")
    if base == "sdxl":
        config = CLIPTextConfig(**TEXT_2, projection_dim=1280)
        made(lambda: CLIPTextModelWithProjection(config), dtype).save_pretrained(folder / "text_encoder_2")
        tokenizer().save_pretrained(folder / "tokenizer_2")
    scheduler().save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text("{}")


def _write_flow(base: str, folder: Path, dtype: torch.dtype) -> None:
    """A flow model with a transformer and two CLIPs, without a T5."""
    made(lambda: SD3Transformer2DModel(**TRANSFORMERS[base]), dtype).save_pretrained(folder / "transformer")
    made(lambda: AutoencoderKL(**VAE, **OF_FLOW), dtype).save_pretrained(folder / "vae")
    for number, text in (("", TEXT), ("_2", TEXT_2)):
        config = CLIPTextConfig(**text, projection_dim=text["hidden_size"])
        made(lambda c=config: CLIPTextModelWithProjection(c), dtype).save_pretrained(folder / f"text_encoder{number}")
        tokenizer().save_pretrained(folder / f"tokenizer{number}")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text("{}")


class _Random:
    """A base model made on a device instead of read; prompts have random encodings."""

    def _make(self, base: str, model: Model, device: torch.device, dtype: torch.dtype | None, small: bool) -> None:
        order = torch.channels_last if model.channels_last else torch.preserve_format
        self.model, self.device, self.dtype = model, device, dtype or getattr(torch, model.dtype)
        self.turn = Turns(device, offload=False)
        self.path, self.prediction_type = VP(scheduler().alphas_cumprod.to(device)), "epsilon"
        self.denoiser = made(lambda: unet(base, small), self.dtype, device).to(memory_format=order)
        self.vae = made(lambda: vae(base, small), getattr(torch, model.vae_dtype), device).to(memory_format=order)
        size = self.denoiser.config["sample_size"] if model.resolution is None else model.resolution // 8
        self.resolution, self.latent_shape = 8 * size, (4, size, size)

    def release(self) -> None:
        """Nothing is read anew, so nothing is let go."""


class RandomSD(_Random, StableDiffusion):
    """Stable Diffusion 1.5."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype | None = None, small: bool = False):
        self._make("sd15", model, device, dtype, small)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning({"prompt_embeds": torch.randn(len(prompts), 77, 768, device=self.device)})


class RandomXL(_Random, StableDiffusionXL):
    """Stable Diffusion XL."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype | None = None, small: bool = False):
        self._make("sdxl", model, device, dtype, small)
        self.time_ids = torch.tensor([*[self.resolution] * 2, 0.0, 0.0, *[self.resolution] * 2], device=device)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        embeds, pooled = ((len(prompts), 77, 2048), (len(prompts), 1280))
        tensors = {"prompt_embeds": torch.randn(embeds, device=self.device)}
        return Conditioning(tensors | {"text_embeds": torch.randn(pooled, device=self.device)})


def random_backbone(
    base: str, model: Model, device: torch.device, dtype: torch.dtype | None = None, small: bool = False
) -> Backbone:
    """SD 1.5 ("sd15") or SDXL ("sdxl"), as `attune.build.load_backbone` would load one."""
    return {"sd15": RandomSD, "sdxl": RandomXL}[base](model, device, dtype, small)


def vit_h_config(words: CLIPTokenizer, small: bool = False) -> CLIPConfig:
    """The configuration of the CLIP that PickScore, HPSv2 and the step-aware preference model are."""
    return clip_config(SMALL_VIT if small else VIT_H_14, words)


def random_clip(words: CLIPTokenizer, device: torch.device, small: bool = False) -> CLIPModel:
    """A frozen float32 ViT-H/14."""
    return made(lambda: CLIPModel(vit_h_config(words, small)), torch.float32, device)


def random_images(n: int, side: int, device: torch.device) -> Tensor:
    """Images (n, 3, side, side) in [0, 1]."""
    return torch.rand(n, 3, side, side, device=device)
