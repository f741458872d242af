"""Networks with random weights in the released shapes of the base models and of ViT-H/14, or small ones.

Those of Stable Diffusion can be written to a folder in diffusers' layout (`write_pipeline`), which the real loading
code reads; `random_bases.py` makes base models of all kinds at once on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
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

from attune.clip.open_clip import VIT_H_14, clip_config

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
    "flux": {"guidance_embeds": True},  # the rest is the default of diffusers' class
    "z_image": {"axes_lens": [1536, 512, 512]},  # likewise
}
TRANSFORMER_CLASSES = {
    "sd35m": SD3Transformer2DModel,
    "flux": FluxTransformer2DModel,
    "z_image": ZImageTransformer2DModel,
}
WRITTEN = ("sd15", "sdxl", "sd35m")  # what `write_pipeline` can write
RANK = {"sd15": 4, "sdxl": 64, "sd35m": 32, "flux": 32, "z_image": 32}  # of an adapter
BACKBONES = {"sd15": "sd", "sdxl": "sdxl", "sd35m": "sd3", "flux": "flux", "z_image": "z_image"}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
SMALL = {"sd15": {"block_out_channels": (32, 32, 64, 64)}, "sdxl": {"block_out_channels": (32, 64, 64)}}
SMALL["sd15"] |= {"attention_head_dim": 4, "sample_size": 8}
SMALL["sdxl"] |= {"attention_head_dim": (2, 4, 4), "sample_size": 8, "transformer_layers_per_block": (1, 1, 1)}
SMALL_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "sd35m": {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128, "dual_attention_layers": (0,)},
    "flux": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2},
    "z_image": {"n_layers": 1, "n_refiner_layers": 1, "dim": 256, "n_heads": 2, "n_kv_heads": 2},
}
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


def denoiser(base: str, small: bool = False) -> nn.Module:
    """The denoiser of any base: a transformer of the flow models, a UNet of the others."""
    return transformer(base, small) if base in TRANSFORMERS else unet(base, small)


def transformer(base: str, small: bool = False) -> nn.Module:
    return TRANSFORMER_CLASSES[base](**{**TRANSFORMERS[base], **(SMALL_TRANSFORMERS[base] if small else {})})


def vae(base: str, small: bool = False) -> AutoencoderKL:
    """The autoencoder; those of all flow models are of one shape."""
    own = OF_FLOW if base in TRANSFORMERS else {"scaling_factor": SCALING[base]}
    return AutoencoderKL(**{**VAE, **(SMALL_VAE if small else {})}, **own)


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, clip_sample=False
    )


def write_pipeline(base: str, folder: Path, dtype: torch.dtype, small: bool = False) -> None:
    """A pipeline folder in the released shapes and layout, with random weights."""
    if base in TRANSFORMERS:
        _write_sd3(base, folder, dtype)
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


def _write_sd3(base: str, folder: Path, dtype: torch.dtype) -> None:
    """A flow model with a transformer and two CLIPs, without a T5."""
    made(lambda: transformer(base), dtype).save_pretrained(folder / "transformer")
    made(lambda: vae(base), dtype).save_pretrained(folder / "vae")
    for number, text in (("", TEXT), ("_2", TEXT_2)):
        config = CLIPTextConfig(**text, projection_dim=text["hidden_size"])
        made(lambda c=config: CLIPTextModelWithProjection(c), dtype).save_pretrained(folder / f"text_encoder{number}")
        tokenizer().save_pretrained(folder / f"tokenizer{number}")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text("{}")


def vit_h_config(words: CLIPTokenizer, small: bool = False) -> CLIPConfig:
    """The configuration of the CLIP that PickScore, HPSv2 and the step-aware preference model are."""
    return clip_config(SMALL_VIT if small else VIT_H_14, words)


def random_clip(words: CLIPTokenizer, device: torch.device, small: bool = False) -> CLIPModel:
    """A frozen float32 ViT-H/14."""
    return made(lambda: CLIPModel(vit_h_config(words, small)), torch.float32, device)


def random_images(n: int, side: int, device: torch.device) -> Tensor:
    """Images (n, 3, side, side) in [0, 1]."""
    return torch.rand(n, 3, side, side, device=device)
