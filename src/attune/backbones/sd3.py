"""Stable Diffusion 3.5 (and 3): a flow model with a transformer, told of the prompt by two CLIPs.

Its third text encoder, a T5 of 4.8 billion weights, is left out, as its authors allow; the transformer is then shown
256 tokens of zeros in its place. Guidance is classifier-free; the empty prompt is encoded like any other.

Source: Esser et al. 2024, arXiv:2403.03206, sections 4 and 5, and diffusers' `StableDiffusion3Pipeline`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attune.backbones import _flow, _latent
from attune.backbones._diffusers import InDiffusers
from attune.backbones._memory import Turns, release
from attune.config.settings import Model
from attune.hub import Source, parse
from attune.interfaces import Conditioning

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import CLIPTokenizer, PreTrainedModel

DENOISER = "transformer"
PARTS = {"denoiser": (DENOISER,), "text_encoders": ("text_encoder", "text_encoder_2"), "autoencoder": ("vae",)}
NOMINAL = _latent.Facts(
    denoiser=2_243_171_520 + 226_492_416,  # with its table of positions, which is in the file
    text_encoders=123_650_304 + 694_659_840,
    autoencoder=83_819_683,
    resolution=1024,
    adapter=746_496,
    multiple=16,
    channels=16,
)
"""Of Stable Diffusion 3.5 Medium; what its activations need has not been measured."""
T5_TOKENS = 256  # diffusers' max_sequence_length, unless model.max_sequence_length says otherwise


def facts(model: Model) -> _latent.Facts:
    """Numbers of weights and resolution, without loading: of the files where they are here, else nominal."""
    return _latent.facts(model, PARTS, NOMINAL)


def downloads(model: Model) -> list[tuple[Source, list[str]]]:
    """What loading fetches: sources and their patterns of files."""
    return _latent.downloads(model, PARTS)


def in_diffusers(model: Model) -> InDiffusers:
    """Its names in diffusers, whose pipeline must be told that there is no T5."""
    names = ("StableDiffusion3Pipeline", "SD3Transformer2DModel", DENOISER, "stable-diffusion-3")
    return InDiffusers(*names, is_flow=True, left_out=("text_encoder_3", "tokenizer_3"))


def times(model: Model) -> dict[str, Any]:
    """The times it is trained and sampled at, for run.json and the card."""
    return _flow.times(model)


class StableDiffusion3:
    """A `Backbone` read from a diffusers folder or Hub repository; everything frozen and in evaluation mode."""

    # of images and of text; those of images are also in the second attention of 3.5 Medium's first blocks
    lora_targets: Sequence[str] = (*_latent.LORA_TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    prediction_type = "flow"

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype | None = None):
        from diffusers import SD3Transformer2DModel

        self.model, self.device = model, device
        self.dtype = dtype or getattr(torch, model.dtype)  # of the denoiser
        self.turn = Turns(device, model.offload)
        self.path = _flow.load_path(model)
        self.encoders = self._load_encoders()
        self.vae = self._load_vae()
        self.denoiser = _latent.load_denoiser(SD3Transformer2DModel, DENOISER, model, self.dtype, self.turn.start)
        self.resolution, self.latent_shape = _latent.image_size(model, self.vae, self.denoiser, DENOISER)
        self._check_size()

    # Both are set above, so that files that are no good are an error at once; after `release` they are read again.

    @cached_property
    def encoders(self) -> list[tuple[CLIPTokenizer, PreTrainedModel]]:
        return self._load_encoders()

    @cached_property
    def vae(self) -> AutoencoderKL:
        return self._load_vae()

    def _load_encoders(self) -> list[tuple[CLIPTokenizer, PreTrainedModel]]:
        from transformers import CLIPTextModelWithProjection

        return [_latent.load_text(CLIPTextModelWithProjection, self.model, n, self.turn.start) for n in ("", "_2")]

    def _load_vae(self) -> AutoencoderKL:
        return _latent.load_vae(self.model, self.turn.start, may_shift=True)

    def _check_size(self) -> None:
        """Raises ValueError unless latents can be cut into patches, for as many of which there are positions."""
        patch, most = (self.denoiser.config[key] for key in ("patch_size", "pos_embed_max_size"))
        latents = self.latent_shape[-1]
        if latents % patch or latents // patch > most:
            pixels = self.resolution // latents * patch
            raise ValueError(
                f"model.resolution: {self.resolution} is not a multiple of {pixels} up to {pixels * most}, which is "
                f"what {parse(self.model.path) / DENOISER} has positions for"
            )

    def release(self) -> None:
        release(self, "encoders", "vae")

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Penultimate hidden states of both CLIPs side by side, (B, L, D_1 + D_2), and what they pool, (B, D_1 + D_2).

        The zeros around them, which are most of what the transformer sees, are added when it is called.
        """
        encoded = [
            self.turn(encoder)(_latent.tokenise(tokenizer, prompts, self.device), output_hidden_states=True)
            for tokenizer, encoder in self.encoders
        ]
        states = torch.cat([output.hidden_states[-2] for output in encoded], dim=-1)
        pooled = torch.cat([output.text_embeds for output in encoded], dim=-1)
        return Conditioning({"prompt_embeds": states, "text_embeds": pooled})

    def is_cut(self, prompt: str) -> bool:
        return any(_latent.is_cut(tokenizer, prompt) for tokenizer, _ in self.encoders)

    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return _latent.encode(self.turn(self.vae), images, generator)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return _latent.decode(self.turn(self.vae), latents)

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        embeds = cond.tensors["prompt_embeds"].to(self.dtype)
        more, zeros = self.denoiser.config["joint_attention_dim"] - embeds.shape[-1], self.model.max_sequence_length
        wide = F.pad(embeds, (0, more, 0, T5_TOKENS if zeros is None else zeros))
        pooled = cond.tensors["text_embeds"].to(self.dtype)
        output = self.turn(denoiser)(
            x_t.to(self.dtype), timestep=t, encoder_hidden_states=wide, pooled_projections=pooled
        ).sample
        return output.to(x_t.dtype)

    def pipeline_parts(self) -> dict[str, Any]:
        (first, text_1), (second, text_2) = self.encoders
        return {
            "vae": self.vae,
            "text_encoder": text_1,
            "text_encoder_2": text_2,
            "tokenizer": first,
            "tokenizer_2": second,
            "transformer": self.denoiser,
            "scheduler": _flow.load_scheduler(self.model),
            **dict.fromkeys(in_diffusers(self.model).left_out),
        }

    def pipeline_options(self, start: Tensor) -> dict[str, Any]:
        tokens = self.model.max_sequence_length
        return {"latents": start, "max_sequence_length": T5_TOKENS if tokens is None else tokens}


def load(model: Model, device: torch.device, dtype: torch.dtype | None = None) -> StableDiffusion3:
    """A Stable Diffusion 3 pipeline as a `Backbone`; `dtype` is the denoiser's, if it is not to be the model's."""
    return StableDiffusion3(model, device, dtype)
