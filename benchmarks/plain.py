"""What a training script is made of without attune: models read by diffusers, an adapter by peft, and a step of AdamW.

Shared by the benchmarks that put a loop in another code's order of operations beside attune.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

RANK = 4
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
MOVED = 0.02  # standard deviation of what is added to a fresh adapter, so that it changes what the network says


def frozen_unet(folder: Path, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
    """The pipeline's UNet in training mode, whose layers have no dropout."""
    return UNet2DConditionModel.from_pretrained(folder / "unet", dtype=dtype).requires_grad_(False).to(device)


def add_lora(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The UNet with an adapter on its attention, as diffusers' scripts put one on: float32 weights, alpha = rank."""
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS))
    for weight in trained_weights(unet):
        weight.data = weight.data.float()
    return unet


def trained_weights(network: nn.Module) -> list[Tensor]:
    return [weight for weight in network.parameters() if weight.requires_grad]


def move(weights: Sequence[Tensor]) -> None:
    """Adds the same normal noise to an adapter's weights wherever they lie; they must be given in the same order."""
    generator = torch.Generator().manual_seed(1)
    for weight in weights:
        weight.data += (MOVED * torch.randn(weight.shape, generator=generator)).to(weight.device)


def frozen_vae(folder: Path, dtype: torch.dtype, device: torch.device) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(folder / "vae", dtype=dtype).eval().requires_grad_(False).to(device)


def text_encoder(folder: Path, dtype: torch.dtype, device: torch.device) -> Callable[[Sequence[str]], Tensor]:
    """What gives the last hidden states (B, L, D) of prompts that are padded to the encoder's full length."""
    words = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype)
    encoder = encoder.eval().requires_grad_(False).to(device)
    length = encoder.config.max_position_embeddings

    @torch.no_grad()
    def encode(prompts: Sequence[str]) -> Tensor:
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        return encoder(words(list(prompts), **options).input_ids.to(device))[0]

    return encode


def schedule(folder: Path) -> DDIMScheduler:
    """DDIM with the offset of 1 that Stable Diffusion's pipelines are published with."""
    return DDIMScheduler.from_config(DDIMScheduler.load_config(folder / "scheduler"), steps_offset=1)


def adamw_step(
    weights: list[Tensor], loss: Callable[..., Tensor], lr: float, weight_decay: float, max_grad_norm: float | None
) -> Callable[..., float]:
    """A step of a training script: loss, backward, clipping unless there is no limit, AdamW; it returns the loss.

    What the step is given is given to `loss`.
    """
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=weight_decay)

    def step(*given: Any) -> float:
        found = loss(*given)
        found.backward()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(weights, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return found.item()

    return step
