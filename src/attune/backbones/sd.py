"""Stable Diffusion 1.x and 2.x: one text encoder, epsilon or v-prediction.

The embedded model has this layout too, so the laptop and the GPU box run the same lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attune.backbones import _latent, _vp
from attune.backbones._backbone import LatentBackbone
from attune.backbones._diffusers import InDiffusers
from attune.config.settings import Model
from attune.diffusion.path import VP
from attune.hub import Source
from attune.interfaces import Conditioning, Guidance

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, PreTrainedModel

PARTS = {"denoiser": ("unet",), "text_encoders": ("text_encoder",), "autoencoder": ("vae",)}
NOMINAL = _latent.Facts(
    denoiser=859_520_964,
    text_encoders=123_060_480,
    autoencoder=83_653_863,
    resolution=512,
    adapter=199_296,
    activations=213_000,
    checkpointed=137_000,
)
"""Of Stable Diffusion 1.5; 2.x has 866 million and 340 million."""


def facts(model: Model) -> _latent.Facts:
    """Numbers of weights and resolution, without loading: of the files where they are here, else nominal."""
    return _latent.facts(model, PARTS, NOMINAL)


def downloads(model: Model) -> list[tuple[Source, list[str]]]:
    """What loading fetches: sources and their patterns of files."""
    return _latent.downloads(model, PARTS)


def in_diffusers(model: Model) -> InDiffusers:
    """Its names in diffusers."""
    return InDiffusers("StableDiffusionPipeline", "UNet2DConditionModel", "unet", "stable-diffusion")


def check_settings(model: Model) -> None:
    """Raises ValueError for settings that only other base models have."""
    _vp.check_settings(model)


class StableDiffusion(LatentBackbone):
    """A `Backbone` read from a diffusers folder or Hub repository."""

    lora_targets: Sequence[str] = _latent.LORA_TARGETS
    guidance: Guidance = "cfg"
    released = ("text_encoder", "vae")

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype | None = None):
        from diffusers import UNet2DConditionModel

        super().__init__(model, device, dtype)
        schedule, self.prediction_type = _vp.load_schedule(model)
        self.path = VP(schedule.to(device))
        self.tokenizer, self.text_encoder = self._load_text()
        self.load_encoders()
        self.denoiser = self.load_denoiser(UNet2DConditionModel, "unet")
        self.resolution, self.latent_shape = _latent.image_size(model, self.vae, self.denoiser.config)

    @cached_property
    def text_encoder(self) -> PreTrainedModel:
        return self._load_text()[1]

    def _load_text(self) -> tuple[CLIPTokenizer, PreTrainedModel]:
        from transformers import CLIPTextModel

        return _latent.load_text(CLIPTextModel, self.model, "", self.offload.load_to)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """The last hidden states of the text encoder, (B, L, D)."""
        ids = _latent.tokenise(self.tokenizer, prompts, self.device)
        return Conditioning({"prompt_embeds": self.offload.onload(self.text_encoder)(ids).last_hidden_state})

    def is_cut(self, prompt: str) -> bool:
        return _latent.is_cut(self.tokenizer, prompt)

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        embeds = cond.tensors["prompt_embeds"].to(self.dtype)
        output = self.offload.onload(denoiser)(x_t.to(self.dtype), t, encoder_hidden_states=embeds).sample
        return _vp.to_noise(output, self.prediction_type, x_t, self.path.level(t, x_t))

    def pipeline_parts(self) -> dict[str, Any]:
        parts = {"vae": self.vae, "text_encoder": self.text_encoder, "tokenizer": self.tokenizer, "unet": self.denoiser}
        nobody = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return parts | nobody | {"scheduler": _vp.ddim_scheduler(self.path, self.prediction_type)}

    def pipeline_options(self, start: Tensor) -> dict[str, Any]:
        return {"latents": start, "eta": 0.0}


def load(model: Model, device: torch.device, dtype: torch.dtype | None = None) -> StableDiffusion:
    """A Stable Diffusion pipeline as a `Backbone`; `dtype` is the denoiser's, if it is not to be the model's."""
    return StableDiffusion(model, device, dtype)
