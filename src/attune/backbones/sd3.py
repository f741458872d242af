"""Stable Diffusion 3.5 (and 3): a flow model with a transformer, told of the prompt by two CLIPs and perhaps a T5.

Without `model.t5` its third text encoder, of 4.8 billion weights, is left out, as its authors allow; the transformer
is then shown zeros in the place of its 256 tokens. Guidance is classifier-free; the empty prompt is encoded like any
other.

Source: Esser et al. 2024, arXiv:2403.03206, sections 4 and 5, and diffusers' `StableDiffusion3Pipeline`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attune.backbones import _flow, _latent, _t5
from attune.backbones._backbone import LatentBackbone
from attune.backbones._diffusers import InDiffusers
from attune.config.settings import Model
from attune.hub import Source, parse
from attune.interfaces import Conditioning, Guidance

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DENOISER = "transformer"
PARTS = {"denoiser": (DENOISER,), "text_encoders": ("text_encoder", "text_encoder_2"), "autoencoder": ("vae",)}
NOMINAL = _latent.Facts(
    denoiser=2_243_171_520 + 226_492_416,  # with its table of positions, which is in the file
    text_encoders=123_650_304 + 694_659_840,
    autoencoder=83_819_683,
    resolution=1024,
    adapter=746_496,
    activations=473_000,
    checkpointed=349_000,
    text=1_093,
    multiple=16,
    channels=16,
)
"""Of Stable Diffusion 3.5 Medium; 3 Medium has 2.1 billion."""
LARGE = replace(
    NOMINAL, denoiser=8_056_627_520 + 89_653_248, adapter=1_473_792, activations=None, checkpointed=None, text=0
)
"""Of Stable Diffusion 3.5 Large; what its activations need has not been measured."""
T5_TOKENS, T5_WIDTH = 256, 4096  # diffusers' max_sequence_length, unless model.max_sequence_length says otherwise


def parts(model: Model) -> Mapping[str, Sequence[str]]:
    """`PARTS`, with the T5 if it is wanted."""
    return PARTS | {"text_encoders": (*PARTS["text_encoders"], *(["text_encoder_3"] if model.t5 else []))}


def facts(model: Model) -> _latent.Facts:
    """Numbers of weights and resolution, without loading: of the files where they are here, else nominal."""
    nominal = LARGE if "large" in _latent.own_name(model) else NOMINAL
    if model.t5:
        prompt = _t5.tokens(model, T5_TOKENS) * T5_WIDTH
        nominal = replace(nominal, text_encoders=nominal.text_encoders + _t5.WEIGHTS, prompt=prompt)
    return _latent.facts(model, parts(model), nominal)


def downloads(model: Model) -> list[tuple[Source, list[str]]]:
    """What loading fetches: sources and their patterns of files."""
    return _latent.downloads(model, parts(model))


def in_diffusers(model: Model) -> InDiffusers:
    """Its names in diffusers, whose pipeline must be told that there is no T5, if there is none."""
    names = ("StableDiffusion3Pipeline", "SD3Transformer2DModel", DENOISER, "stable-diffusion-3")
    return InDiffusers(*names, is_flow=True, left_out=() if model.t5 else ("text_encoder_3", "tokenizer_3"))


def times(model: Model) -> dict[str, Any]:
    """The times it is trained and sampled at, for run.json and the card."""
    return _flow.times(model)


def check_settings(model: Model) -> None:
    """Raises ValueError for Stable Diffusion 3.5 Large Turbo, known by its name: its files say what Large's do."""
    _latent.refuse_distilled(model, "turbo", "train stabilityai/stable-diffusion-3.5-large, or -medium")


class StableDiffusion3(LatentBackbone):
    """A `Backbone` read from a diffusers folder or Hub repository."""

    # those of images are also in the second attention of 3.5 Medium's first blocks
    lora_targets: Sequence[str] = _latent.JOINT_LORA_TARGETS
    prediction_type = "flow"
    guidance: Guidance = "cfg"
    released = ("encoders", "vae")

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype | None = None):
        from diffusers import SD3Transformer2DModel

        check_settings(model)
        super().__init__(model, device, dtype)
        self.path = _flow.load_path(model)
        self.load_encoders()
        self.denoiser = self.load_denoiser(SD3Transformer2DModel, DENOISER)
        self.resolution, self.latent_shape = _latent.image_size(model, self.vae, self.denoiser.config, DENOISER)
        self._check_size()
        self._check_widths()

    @cached_property
    def encoders(self) -> list[tuple[PreTrainedTokenizerBase, PreTrainedModel]]:
        from transformers import CLIPTextModelWithProjection

        clips = [
            _latent.load_text(CLIPTextModelWithProjection, self.model, n, self.offload.load_to) for n in ("", "_2")
        ]
        return [*clips, *([_t5.load(self.model, "_3", T5_TOKENS, self.offload.load_to)] if self.model.t5 else [])]

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

    def _check_widths(self) -> None:
        """Raises ValueError unless the text encoders have as many numbers as the transformer takes.

        Of the CLIPs' tokens it may take more, which are zeros.
        """
        clips, config = [clip.config for _, clip in self.encoders[:2]], self.denoiser.config
        pooled, wide = (sum(getattr(clip, key) for clip in clips) for key in ("projection_dim", "hidden_size"))
        takes, most, place = config["pooled_projection_dim"], config["joint_attention_dim"], parse(self.model.path)
        if pooled != takes or wide > most:
            of_clips = f"the CLIPs' tokens have {wide} numbers, pooled {pooled}"
            said = f"joint_attention_dim of the transformer is {most}, pooled_projection_dim {takes}"
            raise ValueError(f"{place / 'text_encoder'}, {place / 'text_encoder_2'}: {of_clips}; {said}")
        if self.model.t5 and (found := self.encoders[2][1].config.d_model) != most:
            place = place / "text_encoder_3"
            raise ValueError(f"{place}: d_model is {found}, joint_attention_dim of the transformer {most}")

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Penultimate hidden states of both CLIPs side by side, (B, L, D_1 + D_2), and what they pool, (B, D_1 + D_2).

        The T5's last ones, (B, L_3, D_3), are apart from them, if it is wanted. The zeros around, which without a T5
        are most of what the transformer sees, are added when it is called.
        """
        encoded = [
            self.offload.onload(encoder)(_latent.tokenise(tokenizer, prompts, self.device), output_hidden_states=True)
            for tokenizer, encoder in self.encoders[:2]
        ]
        states = torch.cat([output.hidden_states[-2] for output in encoded], dim=-1)
        tensors = {
            "prompt_embeds": states,
            "text_embeds": torch.cat([output.text_embeds for output in encoded], dim=-1),
        }
        for tokenizer, t5 in self.encoders[2:]:
            tensors["t5_embeds"] = _t5.encode(tokenizer, self.offload.onload(t5), prompts, self.device)
        return Conditioning(tensors)

    def is_cut(self, prompt: str) -> bool:
        """By the T5, if there is one: what the CLIPs leave off is then not lost."""
        deciding = self.encoders[2:] or self.encoders
        return any(_latent.is_cut(tokenizer, prompt) for tokenizer, _ in deciding)

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        embeds = cond.tensors["prompt_embeds"].to(self.dtype)
        more, of_t5 = self.denoiser.config["joint_attention_dim"] - embeds.shape[-1], cond.tensors.get("t5_embeds")
        if of_t5 is None:
            wide = F.pad(embeds, (0, more, 0, _t5.tokens(self.model, T5_TOKENS)))
        else:
            wide = torch.cat([F.pad(embeds, (0, more)), of_t5.to(self.dtype)], dim=1)
        pooled = cond.tensors["text_embeds"].to(self.dtype)
        output = self.offload.onload(denoiser)(
            x_t.to(self.dtype), timestep=t, encoder_hidden_states=wide, pooled_projections=pooled
        ).sample
        return output.to(x_t.dtype)

    def pipeline_parts(self) -> dict[str, Any]:
        parts = {"vae": self.vae, "transformer": self.denoiser, "scheduler": _flow.load_scheduler(self.model)}
        for number, (tokenizer, encoder) in zip(("", "_2", "_3"), self.encoders, strict=False):  # the third is the T5
            parts |= {f"tokenizer{number}": tokenizer, f"text_encoder{number}": encoder}
        return parts | dict.fromkeys(in_diffusers(self.model).left_out)

    def pipeline_options(self, start: Tensor) -> dict[str, Any]:
        return {"latents": start, "max_sequence_length": _t5.tokens(self.model, T5_TOKENS)}


def load(model: Model, device: torch.device, dtype: torch.dtype | None = None) -> StableDiffusion3:
    """A Stable Diffusion 3 pipeline as a `Backbone`; `dtype` is the denoiser's, if it is not to be the model's."""
    return StableDiffusion3(model, device, dtype)
