"""Z-Image: a flow model of one stream of tokens, told of the prompt by a language model, Qwen3 4B.

The undistilled base, with classifier-free guidance; the empty prompt is encoded like any other. Its transformer is
told 1 - s in the place of s, predicts x_0 - noise, and takes rows as lists, because a prompt has no tokens but its own.

Source: Z-Image Team 2025, arXiv:2511.22699, and diffusers' `ZImagePipeline`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attune.backbones import _flow, _latent, _qwen3
from attune.backbones._backbone import LatentBackbone
from attune.backbones._diffusers import InDiffusers
from attune.config.settings import Model
from attune.diffusion.path import Flow
from attune.hub import Source, parse
from attune.interfaces import Conditioning, Guidance

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Qwen2Tokenizer

DENOISER = "transformer"
PARTS = {"denoiser": (DENOISER,), "text_encoders": ("text_encoder",), "autoencoder": ("vae",)}
NOMINAL = _latent.Facts(
    denoiser=6_154_908_736,
    text_encoders=4_022_468_096,
    autoencoder=83_819_683,
    resolution=1024,
    adapter=1_044_480,
    activations=2_100_000,
    checkpointed=142_000,
    multiple=16,
    channels=16,
)
"""Of Z-Image; what its activations need with checkpointing was measured, without it counted: docs/full_size.md."""
TOKENS, WIDTH = 512, 2560  # diffusers' max_sequence_length, unless model.max_sequence_length says otherwise
PATCH = _latent.UNSAID["patch_size"]  # latents per side of a token
TOKENS_OF_A_BLOCK = 32  # the transformer fills prompts up to a multiple of it
TOKENS_AT_ONCE = 4096  # of prompts: 8 of 512, whose states of all 36 layers, of which one is used, take 0.8 GB
TOO_LARGE = "65,504, and values in Z-Image at 344,000"
TURBO_SHIFT = 3.0  # of Z-Image-Turbo's scheduler; the base's is 6


def facts(model: Model) -> _latent.Facts:
    """Numbers of weights and resolution, without loading: of the files where they are here, else nominal."""
    tokens = model.max_sequence_length or TOKENS
    nominal = replace(NOMINAL, prompt=tokens * WIDTH, text=tokens * PATCH**2)
    return _latent.facts(model, PARTS, nominal, _latent.UNSAID)


def downloads(model: Model) -> list[tuple[Source, list[str]]]:
    """What loading fetches: sources and their patterns of files."""
    return _latent.downloads(model, PARTS)


def in_diffusers(model: Model) -> InDiffusers:
    """Its names in diffusers, whose pipeline writes guidance as cond + g (cond - uncond)."""
    names = ("ZImagePipeline", "ZImageTransformer2DModel", DENOISER, "z-image")
    return InDiffusers(*names, is_flow=True, guidance_off=0.0)


def times(model: Model) -> dict[str, Any]:
    """The times it is trained and sampled at, for run.json and the card. Raises ValueError if they are Turbo's."""
    found = _flow.times(model)
    check_undistilled(model, found["shift"])
    return found


def token_counts(prompts: Sequence[str], model: Model) -> tuple[int, list[int]]:
    """How many tokens of a prompt are read, and how many each has with the chat around it; by the tokenizer alone."""
    most, tokenizer = model.max_sequence_length or TOKENS, _qwen3.read_tokenizer(model)
    return most, [_qwen3.count_tokens(tokenizer, prompt, most) for prompt in prompts]


def check_settings(model: Model) -> None:
    """Raises ValueError for what can be refused before any file is here: Turbo by its name, and float16.

    Values in the first block's MLP reach 344,000, and bitsandbytes' int8 makes them float16.
    """
    if model.dtype == "float16":
        raise ValueError(f"model.dtype: float16 ends at {TOO_LARGE}; write bfloat16")
    if model.quantize == "int8":
        raise ValueError(f"model.quantize: int8 computes in float16, which ends at {TOO_LARGE}; write nf4")
    check_undistilled(model)


class ZImage(LatentBackbone):
    """A `Backbone` read from a diffusers folder or Hub repository."""

    lora_targets: Sequence[str] = _latent.LORA_TARGETS
    prediction_type = "flow"
    guidance: Guidance = "cfg"
    released = ("text_encoder", "vae")

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype | None = None):
        from diffusers import ZImageTransformer2DModel

        check_settings(model)
        super().__init__(model, device, dtype)
        self.tokens = model.max_sequence_length or TOKENS
        self.path = load_path(model)
        self.tokenizer, self.text_encoder = self._load_text()
        self.load_encoders()
        self.denoiser = self.load_denoiser(ZImageTransformer2DModel, DENOISER)
        config = {**self.denoiser.config, **_latent.UNSAID}
        self.resolution, self.latent_shape = _latent.image_size(model, self.vae, config, DENOISER)
        place = parse(model.path) / DENOISER / "config.json"
        check_transformer(config, self.text_encoder.config.hidden_size, place)
        check_positions(config["axes_lens"], self.tokens, self.latent_shape[-1], self.resolution)

    @cached_property
    def text_encoder(self) -> PreTrainedModel:
        return self._load_text()[1]

    def _load_text(self) -> tuple[Qwen2Tokenizer, PreTrainedModel]:
        return _qwen3.load(self.model, self.offload.load_to)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Hidden states before the last layer (B, L, D), zero after a prompt's end, and where they are its own (B, L).

        L is the same for all prompts, so that they can be put together; the transformer is shown their own alone.
        """
        texts = _qwen3.as_chat(self.tokenizer, prompts)
        tokens = self.tokenizer(
            texts, padding="max_length", max_length=self.tokens, truncation=True, return_tensors="pt"
        ).to(self.device)
        own, encoder = tokens.attention_mask.bool(), self.offload.onload(self.text_encoder)
        parts = (part.split(max(1, TOKENS_AT_ONCE // self.tokens)) for part in (tokens.input_ids, own))
        states = torch.cat(
            [encoder(ids, mask, output_hidden_states=True).hidden_states[-2] for ids, mask in zip(*parts, strict=True)]
        )
        return Conditioning({"prompt_embeds": states.masked_fill(~own[..., None], 0), "prompt_mask": own})

    def is_cut(self, prompt: str) -> bool:
        return _qwen3.count_tokens(self.tokenizer, prompt, self.tokens) > self.tokens

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        embeds, lengths = cond.tensors["prompt_embeds"].to(self.dtype), cond.tensors["prompt_mask"].sum(1).tolist()
        prompts = [row[:length] for row, length in zip(embeds, lengths, strict=True)]
        images = list(x_t.to(self.dtype).unsqueeze(2))  # (C, 1, h, w) each: one frame
        last = self.path.n_train
        output = self.offload.onload(denoiser)(images, (last - t) / last, prompts).sample
        return -torch.stack(output).squeeze(2).to(x_t.dtype)

    def pipeline_parts(self) -> dict[str, Any]:
        return {
            "vae": self.vae,
            "text_encoder": self.text_encoder,
            "tokenizer": self.tokenizer,
            "transformer": self.denoiser,
            "scheduler": _flow.load_scheduler(self.model),
        }

    def pipeline_options(self, start: Tensor) -> dict[str, Any]:
        return {"latents": start, "max_sequence_length": self.tokens}


def load(model: Model, device: torch.device, dtype: torch.dtype | None = None) -> ZImage:
    """A Z-Image pipeline as a `Backbone`; `dtype` is the denoiser's, if it is not to be the model's."""
    return ZImage(model, device, dtype)


# ---------------------------------------------------------------- path


def load_path(model: Model) -> Flow:
    """Sampling at the sigmas of diffusers' pipeline; training as any flow model's, see `_flow.load_path`.

    The pipeline gives its scheduler evenly spaced sigmas, and a mu, of which one with a fixed shift makes no use.

    Raises:
        ValueError: the scheduler is of another family, its sigmas are none, or it is of Z-Image-Turbo.
        FileNotFoundError: there is no scheduler.
    """
    path = _flow.load_path(model)
    config, _ = _latent.scheduler_config(model)
    check_undistilled(model, config.get("shift"))
    return replace(path, sampling_sigmas=partial(_flow.sampling_sigmas, config, mu=0.0))


def check_undistilled(model: Model, shift: float | None = None) -> None:
    """Raises ValueError if this is Z-Image-Turbo, by its name or by its scheduler's shift; the networks are alike.

    Source: Z-Image's README, which gives Turbo no fine-tunability, and ai-toolkit, which trains it beside an adapter
    that is taken off again.
    """
    sign = f"its scheduler's shift is {TURBO_SHIFT}, as Z-Image-Turbo's" if shift == TURBO_SHIFT else None
    remedy = "train Tongyi-MAI/Z-Image; a copy without distillation has De-Turbo in its name"
    _latent.refuse_distilled(model, "turbo", remedy, sign)


# ---------------------------------------------------------------- what the transformer can be given


def check_transformer(config: Mapping[str, Any], width: int, file: Source) -> None:
    """Raises ValueError unless a transformer takes prompts of a width and cuts images into patches of 2 x 2 latents."""
    patches = list(zip(config["all_patch_size"], config["all_f_patch_size"], strict=True))
    if (PATCH, 1) not in patches:
        raise ValueError(f"{file}: patches {patches!s:.60} without ({PATCH}, 1), which diffusers' pipeline takes")
    if config["cap_feat_dim"] != width:
        raise ValueError(f"{file}: cap_feat_dim {config['cap_feat_dim']!r:.40}, but its text encoder has {width}")
    if config["siglip_feat_dim"] is not None:
        raise ValueError(f"{file}: a Z-Image-Omni (siglip_feat_dim), which is also shown images, is not supported")


def check_positions(most: Sequence[int], tokens: int, latents: int, resolution: int) -> None:
    """Raises ValueError unless there are positions for a prompt's tokens and an image's patches.

    Args:
        most: positions of prompts, image after them included; of rows; of columns.
        tokens: of a prompt, at most.
        latents: per side of an image of `resolution` pixels.
    """
    pixels, patches = resolution // latents * PATCH, min(most[1:])
    if latents % PATCH or latents // PATCH > patches:
        raise ValueError(
            f"model.resolution: {resolution} is not a multiple of {pixels} up to {pixels * patches}, which Z-Image "
            "has positions for"
        )
    longest = (most[0] - 2) // TOKENS_OF_A_BLOCK * TOKENS_OF_A_BLOCK
    if tokens > longest:
        raise ValueError(f"model.max_sequence_length: {tokens}, but there are positions for {longest} tokens")
