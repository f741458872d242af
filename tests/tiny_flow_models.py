"""Small flow models with random weights, written as diffusers' pipelines, and what their tests do alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

import tiny
from attune.diffusion.ddim import sample
from attune.diffusion.policy import Policy
from tiny import loud

PROMPTS = ["a cat", "two owls and a dog that is far too long for the tokenizer"]
SD3_LATENTS, FLUX_LATENTS = (1.5305, 0.0609), (0.3611, 0.1159)  # scaling and shift of the released autoencoders


# ---------------------------------------------------------------- pipelines


def _networks(transformer: nn.Module, scaling: float, shift: float) -> dict[str, nn.Module]:
    """A pipeline's transformer and autoencoder."""
    latents = {"scaling_factor": scaling, "shift_factor": shift, "use_quant_conv": False, "use_post_quant_conv": False}
    return {"transformer": loud(transformer), "vae": loud(tiny.autoencoder(**latents))}


def t5(width: int) -> tuple[T5Tokenizer, T5EncoderModel]:
    """A T5 of the kind that pipelines have, gated, and its tokenizer of letters; the model's number is rounded up."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in tiny.LETTERS)]
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    kinds = {"feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 8, "is_encoder_decoder": False}
    encoder = T5EncoderModel(T5Config(vocab_size=len(pieces) + 2, **sizes, **kinds))
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512), loud(encoder)


def write_sd3_pipeline(folder: Path, with_t5: bool = False) -> str:
    """A Stable Diffusion 3.5 folder in diffusers' layout, with or without a T5; one block has a second attention."""
    torch.manual_seed(6)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=8 + 12,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    first = tiny.TEXT | tiny.ENDS | {"num_hidden_layers": 2, "projection_dim": 8}
    second = tiny.second_text(hidden_size=24, projection_dim=12, num_hidden_layers=2)
    StableDiffusion3Pipeline(
        **_networks(transformer, *SD3_LATENTS),
        text_encoder=loud(CLIPTextModelWithProjection(CLIPTextConfig(**first))),
        text_encoder_2=loud(CLIPTextModelWithProjection(CLIPTextConfig(**second))),
        tokenizer=tiny.tokenizer(folder / "tokenizer"),
        tokenizer_2=tiny.second_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **dict(zip(("tokenizer_3", "text_encoder_3"), t5(48) if with_t5 else (None, None), strict=True)),
    ).save_pretrained(folder)
    return str(folder)


def write_flux_pipeline(folder: Path) -> str:
    """A FLUX.1-dev folder in diffusers' layout; four of its latent channels are a token of 16."""
    torch.manual_seed(7)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    tokenizer_2, text_encoder_2 = t5(32)
    FluxPipeline(
        **_networks(transformer, *FLUX_LATENTS),
        text_encoder=loud(CLIPTextModel(CLIPTextConfig(**tiny.TEXT, **tiny.ENDS))),
        text_encoder_2=text_encoder_2,
        tokenizer=tiny.tokenizer(folder / "tokenizer"),
        tokenizer_2=tokenizer_2,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    ).save_pretrained(folder)
    return str(folder)


def chat_tokenizer() -> Qwen2Tokenizer:
    """One token for each byte, and those around what is said in a chat, as Qwen3's template puts them."""
    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    special = {"additional_special_tokens": tokens[-2:], "eos_token": "<|im_end|>"}
    vocab = {token: i for i, token in enumerate(tokens)}
    return Qwen2Tokenizer(vocab=vocab, merges=[], chat_template=template, **special)


def write_z_image_pipeline(folder: Path) -> str:
    """A Z-Image folder in diffusers' layout; as the released one, its text encoder has room for more tokens."""
    torch.manual_seed(8)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=128,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[16, 24, 24],
        axes_lens=[256, 16, 16],
    )
    text = {key: tiny.TEXT[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    text |= {"num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 272}
    ZImagePipeline(
        **_networks(transformer, *FLUX_LATENTS),
        text_encoder=loud(Qwen3Model(Qwen3Config(**text))),
        tokenizer=chat_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    ).save_pretrained(folder)
    return str(folder)


# ---------------------------------------------------------------- what their tests do alike


def change(file: Path, **values: Any) -> Path:
    """Writes other values into a JSON file; returns it."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return file


def read(kind: type[Any], folder: str, **parts: Any) -> Any:
    """diffusers' own pipeline, without progress bars."""
    pipeline = kind.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def adapted(backbone: Any, targets: str | Sequence[str] = "attention") -> Policy:
    """A policy with an adapter that is still at its start."""
    policy = Policy(backbone, backbone.encode_prompts([""]))
    policy.add_adapter(rank=2, seed=0, targets=targets)
    return policy


def noise(seed: int = 5, n: int = 2, side: int = 8) -> Tensor:
    """Latents to start from."""
    return torch.randn(n, 4, side, side, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def drawn(backbone: Any, start: Tensor, guidance_scale: float, prompts: Sequence[str] = PROMPTS) -> Tensor:
    """Images of the base model from latents, in seven steps of our sampler."""
    policy = Policy(backbone, backbone.encode_prompts([""]))
    latents = sample(policy, backbone.encode_prompts(prompts), lambda shape: start, 7, 0.0, guidance_scale)
    return backbone.decode_latents(latents).clamp(0, 1)


@torch.no_grad()
def assert_latents_are_those_of(vae: Any, backbone: Any, scaling: float, shift: float) -> None:
    """Shifted and scaled as diffusers' pipelines do with an autoencoder, both ways."""
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    mode = vae.encode(images * 2 - 1).latent_dist.mode()
    assert torch.equal(backbone.encode_images(images), (mode - shift) * scaling)
    expected = vae.decode(noise() / scaling + shift).sample / 2 + 0.5
    torch.testing.assert_close(backbone.decode_latents(noise()), expected)
