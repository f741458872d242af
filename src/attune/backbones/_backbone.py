"""What all base models here do alike: where their networks are held, and images to latents and back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attune.backbones import _latent
from attune.backbones._memory import ModelOffload
from attune.config.settings import Model

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL


class LatentBackbone:
    """The part of a `Backbone` that does not depend on its kind; everything is frozen and in evaluation mode.

    Text encoders and autoencoder are cached properties, which `release` lets go of: the next use reads them again.
    """

    prediction_type: str
    released: Sequence[str]
    """Names of these properties."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype | None):
        self.model, self.device = model, device
        self.dtype = dtype or getattr(torch, model.dtype)  # of the denoiser
        self.offload = ModelOffload(device, model.offload)

    @cached_property
    def vae(self) -> AutoencoderKL:
        return _latent.load_vae(self.model, self.offload.load_to, may_shift=self.prediction_type == "flow")

    def load_encoders(self) -> None:
        """Reads them at once: what is wrong with their files is said before the denoiser is read."""
        for name in self.released:
            getattr(self, name)

    def load_denoiser(self, kind: type[Any], part: str) -> Any:
        """The denoiser, of a class of diffusers and in a folder."""
        return _latent.load_denoiser(kind, part, self.model, self.dtype, self.offload.load_to)

    def release(self) -> None:
        for name in self.released:
            vars(self).pop(name, None)

    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return _latent.encode(self.offload.onload(self.vae), images, generator)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return _latent.decode(self.offload.onload(self.vae), latents)
