"""Stable Diffusion XL: two text encoders, a pooled embedding, and the picture's size as a condition.

Source: Podell et al. 2023, arXiv:2307.01952, sections 2.1 and 2.2, and diffusers' `StableDiffusionXLPipeline`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attune.backbones import _latent, _vp
from attune.backbones._backbone import LatentBackbone
from attune.backbones._diffusers import InDiffusers
from attune.config.settings import Model
from attune.diffusion.path import VP
from attune.hub import Source, fetch_folder, parse
from attune.interfaces import Conditioning, Guidance
from attune.weights import read_json

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, PreTrainedModel

INDEX = "model_index.json"
PARTS = {"denoiser": ("unet",), "text_encoders": ("text_encoder", "text_encoder_2"), "autoencoder": ("vae",)}
NOMINAL = _latent.Facts(
    denoiser=2_567_463_684,
    text_encoders=123_060_480 + 694_659_840,
    autoencoder=83_653_863,
    resolution=1024,
    adapter=1_451_520,
    activations=353_000,
    checkpointed=216_000,
)
"""Of Stable Diffusion XL 1.0."""


def facts(model: Model) -> _latent.Facts:
    """Numbers of weights and resolution, without loading: of the files where they are here, else nominal."""
    return _latent.facts(model, PARTS, NOMINAL)


def downloads(model: Model) -> list[tuple[Source, list[str]]]:
    """What loading fetches: sources and their patterns of files."""
    return [*_latent.downloads(model, PARTS), (parse(model.path), [INDEX])]


def in_diffusers(model: Model) -> InDiffusers:
    """Its names in diffusers."""
    return InDiffusers("StableDiffusionXLPipeline", "UNet2DConditionModel", "unet", "stable-diffusion-xl")


def check_settings(model: Model) -> None:
    """Raises ValueError for settings that only other base models have."""
    _vp.check_settings(model)


class StableDiffusionXL(LatentBackbone):
    """A `Backbone` read from a diffusers folder or Hub repository."""

    lora_targets: Sequence[str] = _latent.LORA_TARGETS
    guidance: Guidance = "cfg"
    released = ("encoders", "vae")

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype | None = None):
        from diffusers import UNet2DConditionModel

        super().__init__(model, device, dtype)
        schedule, self.prediction_type = _vp.load_schedule(model)
        self.path = VP(schedule.to(device))
        self.zeros_for_empty_prompt = zeros_for_empty_prompt(model)
        self.load_encoders()
        self.denoiser = self.load_denoiser(UNet2DConditionModel, "unet")
        self.resolution, self.latent_shape = _latent.image_size(model, self.vae, self.denoiser.config)

    @cached_property
    def encoders(self) -> list[tuple[CLIPTokenizer, PreTrainedModel]]:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        kinds = ((CLIPTextModel, ""), (CLIPTextModelWithProjection, "_2"))
        return [_latent.load_text(kind, self.model, number, self.offload.load_to) for kind, number in kinds]

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Penultimate hidden states of both encoders side by side, (B, L, D_1 + D_2); what the second pools, (B, D)."""
        encoded = [
            self.offload.onload(encoder)(_latent.tokenise(tokenizer, prompts, self.device), output_hidden_states=True)
            for tokenizer, encoder in self.encoders
        ]
        states = torch.cat([output.hidden_states[-2] for output in encoded], dim=-1)
        tensors = {"prompt_embeds": states, "text_embeds": encoded[-1].text_embeds}
        if self.zeros_for_empty_prompt:
            empty = torch.tensor([prompt == "" for prompt in prompts], device=self.device)
            tensors = {name: value.masked_fill(_column(empty, value), 0) for name, value in tensors.items()}
        return Conditioning(tensors)

    def is_cut(self, prompt: str) -> bool:
        return any(_latent.is_cut(tokenizer, prompt) for tokenizer, _ in self.encoders)

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        added = {
            "text_embeds": cond.tensors["text_embeds"].to(self.dtype),
            "time_ids": time_ids(self.resolution, x_t.device).expand(len(x_t), 6),
        }
        embeds = cond.tensors["prompt_embeds"].to(self.dtype)
        output = self.offload.onload(denoiser)(
            x_t.to(self.dtype), t, encoder_hidden_states=embeds, added_cond_kwargs=added
        ).sample
        return _vp.to_noise(output, self.prediction_type, x_t, self.path.level(t, x_t))

    def pipeline_parts(self) -> dict[str, Any]:
        (first, text_1), (second, text_2) = self.encoders
        return {
            "vae": self.vae,
            "text_encoder": text_1,
            "text_encoder_2": text_2,
            "tokenizer": first,
            "tokenizer_2": second,
            "unet": self.denoiser,
            "scheduler": _vp.ddim_scheduler(self.path, self.prediction_type),
            "force_zeros_for_empty_prompt": self.zeros_for_empty_prompt,
            "add_watermarker": False,
        }

    def pipeline_options(self, start: Tensor) -> dict[str, Any]:
        return {"latents": start, "eta": 0.0}


def _column(rows: Tensor, like: Tensor) -> Tensor:
    return rows.reshape(-1, *[1] * (like.ndim - 1))


@cache
def time_ids(side: int, device: torch.device) -> Tensor:
    """Original size, crop's corner, target size (6,): "a picture of exactly this size, uncropped". Sent once."""
    return torch.tensor([side, side, 0.0, 0.0, side, side], device=device)


def zeros_for_empty_prompt(model: Model) -> bool:
    """Whether the empty prompt is all zeros instead of encoded; diffusers' default is yes."""
    file = fetch_folder(parse(model.path), [INDEX]) / INDEX
    index = read_json(file) if file.exists() else {}
    return index.get("force_zeros_for_empty_prompt", True)


def load(model: Model, device: torch.device, dtype: torch.dtype | None = None) -> StableDiffusionXL:
    """A Stable Diffusion XL pipeline as a `Backbone`; `dtype` is the denoiser's, if it is not to be the model's."""
    return StableDiffusionXL(model, device, dtype)
