"""FLUX.1-dev and models of its shape: a flow model with a transformer, which is told its guidance as a number.

The prompt is read by a T5 and, as one vector, by a CLIP. Latents are packed, two by two to a token, while the
transformer is called; everywhere else they are (B, 16, h, w). FLUX.1-schnell, which was distilled to four steps without
guidance, is refused: training on single noise levels, which all methods here do, takes its few steps from it.

Source: diffusers' `FluxPipeline` and https://github.com/black-forest-labs/flux (there is no paper); of distilled
guidance, Meng et al. 2022, arXiv:2210.03142.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attune.backbones import _flow, _latent, _t5
from attune.backbones._backbone import LatentBackbone
from attune.backbones._diffusers import InDiffusers
from attune.config.settings import Model
from attune.hub import Source, fetch_folder, parse
from attune.interfaces import Conditioning, Guidance
from attune.weights import read_json

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, PreTrainedModel, T5Tokenizer

DENOISER, KIND = "transformer", "FluxTransformer2DModel"
PARTS = {"denoiser": (DENOISER,), "text_encoders": ("text_encoder", "text_encoder_2"), "autoencoder": ("vae",)}
T5_TOKENS, T5_WIDTH = 512, 4096  # diffusers' max_sequence_length, unless model.max_sequence_length says otherwise
INSTEAD = "take FLUX.1-dev, or another base"  # of FLUX.1-schnell
SIDE = _latent.UNSAID["patch_size"]  # latents per side of a token
NOMINAL = _latent.Facts(
    denoiser=11_901_408_320,
    text_encoders=123_060_480 + _t5.WEIGHTS,
    autoencoder=83_819_683,
    resolution=1024,
    guidance="embedded",
    adapter=1_634_304,
    checkpointed=122_000,
    multiple=16,
    channels=16,
)
"""Of FLUX.1-dev; what its activations need without checkpointing has not been measured."""


def facts(model: Model) -> _latent.Facts:
    """Numbers of weights and resolution, without loading: of the files where they are here, else nominal."""
    tokens = _t5.tokens(model, T5_TOKENS)
    nominal = replace(NOMINAL, prompt=tokens * T5_WIDTH, text=tokens * SIDE**2)
    return _latent.facts(model, PARTS, nominal, _latent.UNSAID)


def downloads(model: Model) -> list[tuple[Source, list[str]]]:
    """What loading fetches: sources and their patterns of files."""
    return _latent.downloads(model, PARTS)


def in_diffusers(model: Model) -> InDiffusers:
    """Its names in diffusers."""
    return InDiffusers("FluxPipeline", KIND, DENOISER, "flux-1-dev", is_flow=True)


def check_settings(model: Model) -> None:
    """Raises ValueError for FLUX.1-schnell by its name, before any file is here; see `denoiser_config`."""
    _latent.refuse_distilled(model, "schnell", INSTEAD)


def times(model: Model) -> dict[str, Any]:
    """The times it is trained and sampled at, for run.json and the card."""
    found = facts(model)
    return _flow.times(model, (found.resolution // found.multiple) ** 2)


class Flux(LatentBackbone):
    """A `Backbone` read from a diffusers folder or Hub repository."""

    lora_targets: Sequence[str] = _latent.JOINT_LORA_TARGETS
    prediction_type = "flow"
    guidance: Guidance = "embedded"
    released = ("clip", "t5", "vae")

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype | None = None):
        from diffusers import FluxTransformer2DModel

        super().__init__(model, device, dtype)
        check_settings(model)
        config = denoiser_config(model)  # what is no good is said before 24 GB are read
        self.resolution, self.latent_shape = self._image_size(config)
        self.path = _flow.load_path(model, self._tokens)
        self._check_widths(config)
        self.denoiser = self.load_denoiser(FluxTransformer2DModel, DENOISER)

    @cached_property
    def clip(self) -> tuple[CLIPTokenizer, PreTrainedModel]:
        from transformers import CLIPTextModel

        return _latent.load_text(CLIPTextModel, self.model, "", self.offload.load_to)

    @cached_property
    def t5(self) -> tuple[T5Tokenizer, PreTrainedModel]:
        return _t5.load(self.model, "_2", T5_TOKENS, self.offload.load_to)

    @property
    def _tokens(self) -> int:
        """Tokens of an image, by which the scheduler shifts."""
        return (self.latent_shape[-1] // SIDE) ** 2

    def _image_size(self, config: Mapping[str, Any]) -> tuple[int, tuple[int, int, int]]:
        """Resolution and shape of latents. Raises ValueError unless latents can be packed."""
        given = {**config, **_latent.UNSAID}
        resolution, shape = _latent.image_size(self.model, self.vae, given, DENOISER, packed=SIDE**2)
        if shape[-1] % SIDE:
            pixels = resolution // shape[-1] * SIDE
            raise ValueError(f"model.resolution: {resolution} is not a multiple of {pixels}, the pixels of a token")
        return resolution, shape

    def _check_widths(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError unless the text encoders have as many numbers as the transformer takes."""
        found = {
            "pooled_projection_dim": ("text_encoder", self.clip[1].config.hidden_size),
            "joint_attention_dim": ("text_encoder_2", self.t5[1].config.d_model),
        }
        for key, (part, width) in found.items():
            if config[key] != width:
                place = parse(self.model.path) / part
                raise ValueError(f"{place}: vectors of {width} numbers, {key} of the transformer is {config[key]}")

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """The last hidden states of the T5, (B, L, D), and what the CLIP pools, (B, D')."""
        (clip_tokenizer, clip), (t5_tokenizer, t5) = self.clip, self.t5
        pooled = self.offload.onload(clip)(_latent.tokenise(clip_tokenizer, prompts, self.device)).pooler_output
        states = _t5.encode(t5_tokenizer, self.offload.onload(t5), prompts, self.device)
        return Conditioning({"prompt_embeds": states, "text_embeds": pooled})

    def is_cut(self, prompt: str) -> bool:
        """By the T5: what the CLIP leaves off is not lost."""
        return _latent.is_cut(self.t5[0], prompt)

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        embeds, (rows, columns) = cond.tensors["prompt_embeds"].to(self.dtype), x_t.shape[-2:]
        output = self.offload.onload(denoiser)(
            packed(x_t.to(self.dtype)),
            timestep=t / self.path.n_train,
            guidance=cond.tensors["guidance"],
            pooled_projections=cond.tensors["text_embeds"].to(self.dtype),
            encoder_hidden_states=embeds,
            txt_ids=text_positions(embeds.shape[1], x_t.device),
            img_ids=image_positions(rows // SIDE, columns // SIDE, x_t.device),
        ).sample
        return unpacked(output, rows // SIDE).to(x_t.dtype)

    def pipeline_parts(self) -> dict[str, Any]:
        (clip_tokenizer, clip), (t5_tokenizer, t5) = self.clip, self.t5
        return {
            "vae": self.vae,
            "text_encoder": clip,
            "text_encoder_2": t5,
            "tokenizer": clip_tokenizer,
            "tokenizer_2": t5_tokenizer,
            "transformer": self.denoiser,
            "scheduler": _flow.load_scheduler(self.model, self._tokens),
        }

    def pipeline_options(self, start: Tensor) -> dict[str, Any]:
        return {"latents": packed(start), "max_sequence_length": _t5.tokens(self.model, T5_TOKENS)}


def denoiser_config(model: Model) -> Mapping[str, Any]:
    """The configuration of the transformer.

    Raises:
        ValueError: it is of another class, or not told its guidance.
        FileNotFoundError: there is none.
    """
    place = parse(model.path) / DENOISER
    file = fetch_folder(place, ["config.json"]) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{place}: there is no config.json")
    known = read_json(file)
    if (name := known.get("_class_name", KIND)) != KIND:
        raise ValueError(f"{file} describes a {name!s:.60}, not a {KIND}")
    config = {"in_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768, **known}
    if config.get("guidance_embeds") is not True:
        raise ValueError(
            f"{file}: guidance_embeds is not true, so this model is not told its guidance, as FLUX.1-schnell, which "
            f"{_latent.DISTILLED}; {INSTEAD}"
        )
    return config


def packed(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) as tokens (B, h w / 4, 4 C), row by row; a token's channels lie as (C, 2, 2)."""
    return F.pixel_unshuffle(latents, SIDE).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, rows: int) -> Tensor:
    """Tokens of so many rows as latents: what `packed` was given."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, -1)), SIDE)


@cache
def image_positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """(0, row, column) of each token (rows x columns, 3)."""
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return F.pad(places, (1, 0)).to(device, torch.float32)


@cache
def text_positions(count: int, device: torch.device) -> Tensor:
    """Zeros (count, 3): the order of a prompt's tokens is in what the T5 makes of them."""
    return torch.zeros(count, 3, device=device)


def load(model: Model, device: torch.device, dtype: torch.dtype | None = None) -> Flux:
    """A FLUX pipeline as a `Backbone`; `dtype` is the denoiser's, if it is not to be the model's."""
    return Flux(model, device, dtype)
