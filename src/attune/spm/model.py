"""The step-aware preference model: PickScore's CLIP, conditioned on the timestep at which an image was predicted.

A timestep embedding modulates every vision layer (adaptive layer norm, as in DiT): it shifts and scales what
attention and MLP read and gates what they add. Gates start at 1 and the rest at 0, so at the start the scores
are those of the CLIP it came from, bit for bit, whatever t. The text tower is untouched.

Source: Liang et al. 2024 (SPO), arXiv:2406.04314, section 3.2; authors' `time_conditioned_clip.py`, whose
constructor sets all modulation biases to 1 and is saved by a later initialisation: here only gates are 1.

`StepAwareCLIP.state_dict()` is the released checkpoints' layout, prefix `model.` included.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from attune.clip.model import TextFeatures, full_precision, image_size, load_model, load_tokenizer, vision_config
from attune.clip.pixels import normalise, rounded_crop
from attune.hub import fetch_folder, parse
from attune.pretrained import build_with, misfit
from attune.weights import read_json, read_tensors, save_tensors

FREQUENCIES = 256  # width of the sinusoidal embedding
WEIGHTS, CONFIG, TOKENIZER_CONFIG = "model.safetensors", "config.json", "tokenizer_config.json"
_ADALN = ("adaLN_modulation", "t_embedder")


def timestep_embedding(t: Tensor, width: int = FREQUENCIES) -> Tensor:
    """Sinusoidal embedding of timesteps (B,), raw indices 0..T-1: (B, width), cosines first."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """Timesteps (B,) to conditions (B, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t).to(next(self.mlp.parameters()).dtype))


class StepAwareLayer(CLIPEncoderLayer):
    """A vision layer whose attention and MLP are shifted, scaled and gated by a condition (B, 1, D)."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.adaLN_modulation = _modulation(config.hidden_size, 6)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]  # only we call it
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(6, dim=-1)
        attended, _ = self.self_attn(self.layer_norm1(hidden) * (1 + scale_a) + shift_a, attention_mask=None)
        hidden = hidden + gate_a * attended
        return hidden + gate_m * self.mlp(self.layer_norm2(hidden) * (1 + scale_m) + shift_m)


def _modulation(width: int, n: int) -> nn.Sequential:
    """SiLU and a linear map of the condition to n vectors."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, n * width))


class StepAwareCLIP(nn.Module):
    """A CLIP with a time-conditioned vision tower, which has no effect at construction (`init_identity`)."""

    checkpointing = False  # recompute vision layers in the backward pass: less memory, same numbers

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.model = CLIPModel(config)
        vision, width = self.model.vision_model, vision_config(config).hidden_size
        depth = vision_config(config).num_hidden_layers
        # the tower's own config, not `config`'s: transformers records the attention kernel there
        vision.encoder.layers = nn.ModuleList(StepAwareLayer(vision.config) for _ in range(depth))
        vision.adaLN_modulation = _modulation(width, 2)
        self.model.t_embedder = TimestepEmbedder(width)
        self.init_identity()

    @property
    def t_embedder(self) -> TimestepEmbedder:
        """The timestep embedding; it is a part of `model` under the name that released files give it."""
        return cast(TimestepEmbedder, self.model.t_embedder)

    @torch.no_grad()
    def init_identity(self, seed: int = 0) -> None:
        """Gates 1, shifts and scales 0, random timestep embedding: scores become plain CLIP's."""
        vision = self.model.vision_model
        for layer in vision.encoder.layers:
            _zero(layer.adaLN_modulation[1])
            for gate in (2, 5):
                layer.adaLN_modulation[1].bias.unflatten(0, (6, -1))[gate] = 1.0
        _zero(vision.adaLN_modulation[1])
        generator = torch.Generator().manual_seed(seed)  # its own: the same start whatever ran before
        for linear in (module for module in self.t_embedder.mlp if isinstance(module, nn.Linear)):
            linear.weight.copy_(0.02 * torch.randn(linear.weight.shape, generator=generator, device="cpu"))
            linear.bias.zero_()

    def adaln_parameters(self) -> list[nn.Parameter]:
        """The weights that a CLIP does not have. While they are as `init_identity` sets them, t has no effect."""
        return [weight for name, weight in self.named_parameters() if any(part in name for part in _ADALN)]

    def image_features(self, pixel_values: Tensor, t: Tensor) -> Tensor:
        """Projected features (B, D), not normalised, of pixel values (B, 3, S, S) predicted at t (B,)."""
        vision = self.model.vision_model
        condition = self.t_embedder(t)
        hidden = vision.pre_layrnorm(vision.embeddings(pixel_values))
        for layer in vision.encoder.layers:
            if self.checkpointing and self.training:
                hidden = checkpoint(layer, hidden, condition[:, None], use_reentrant=False)
            else:
                hidden = layer(hidden, condition[:, None])
        shift, scale = vision.adaLN_modulation(condition).chunk(2, dim=-1)
        pooled = vision.post_layernorm(hidden[:, 0]) * (1 + scale) + shift
        return self.model.visual_projection(pooled)

    def cosine_scores(self, pixel_values: Tensor, text: Tensor, t: Tensor) -> Tensor:
        """exp(logit_scale) cos(image at t, text), (B,); text features (B, D) of unit length."""
        image = F.normalize(self.image_features(pixel_values, t), dim=-1)
        return self.model.logit_scale.exp() * (image * text).sum(-1)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, t: Tensor) -> Tensor:
        """Scores (K, B) of K candidate images per prompt.

        One call for all candidates encodes each prompt once, and is what a distributed wrapper can see.

        Args:
            pixel_values: (K, B, 3, S, S), see `training_pixels`.
            input_ids: (B, L) token ids.
            t: (B,) timesteps the images were predicted at.
        """
        return self.candidate_scores(pixel_values, self.text_features(input_ids), t)

    def text_features(self, input_ids: Tensor) -> Tensor:
        """Features (B, D), of unit length, of token ids (B, L)."""
        return F.normalize(self.model.get_text_features(input_ids=input_ids).pooler_output, dim=-1)

    def candidate_scores(self, pixel_values: Tensor, text: Tensor, t: Tensor) -> Tensor:
        """`forward`, of text features (B, D) in the place of tokens."""
        k = len(pixel_values)
        return self.cosine_scores(pixel_values.flatten(0, 1), text.repeat(k, 1), t.repeat(k)).unflatten(0, (k, -1))


def _zero(linear: nn.Linear) -> None:
    linear.weight.zero_()
    linear.bias.zero_()


# ---------------------------------------------------------------- images


def inference_pixels(images: Tensor, size: int) -> Tensor:
    """Pixel values for scoring: shortest side to `size`, bicubic without antialias, centre crop, only then a clamp.

    The authors resize the unclamped image in [-1, 1]; resizing is linear and keeps constants, so [0, 1] does
    as well.

    Args:
        images: (B, 3, H, W) as decoded, nominally in [0, 1].
        size: side of the model's input, pixels.

    Returns: normalised pixel values (B, 3, size, size).
    """
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    if scale != 1:
        images = _bicubic(images, (int(height * scale + 0.5), int(width * scale + 0.5)))
    return normalise(rounded_crop(images, size).clamp(0, 1))  # torchvision's crop, not that of CLIP's processor


def training_pixels(images: Tensor, size: int) -> Tensor:
    """Pixel values for training: clamped, squeezed to a square, clamped again; else as `inference_pixels`.

    The authors' two paths differ and both are kept: one resizes the decoder's overshoot, the other cuts it.
    """
    images = images.clamp(0, 1)
    if tuple(images.shape[-2:]) != (size, size):
        images = _bicubic(images, (size, size)).clamp(0, 1)
    return normalise(images)


def _bicubic(images: Tensor, shape: tuple[int, int]) -> Tensor:
    return F.interpolate(images, shape, mode="bicubic", align_corners=False)


# ---------------------------------------------------------------- files


def from_clip(source: str, tokenizer: CLIPTokenizer | None = None) -> tuple[StepAwareCLIP, CLIPTokenizer]:
    """A trainable model that scores exactly as the CLIP (PickScore) it starts from."""
    clip = load_model(source)
    model = StepAwareCLIP(clip.config)
    missing, unexpected = model.model.load_state_dict(clip.state_dict(), strict=False)
    foreign = [name for name in missing if not any(part in name for part in _ADALN)]
    if foreign or unexpected:
        raise ValueError(f"{source} does not fit its configuration: {misfit(foreign, unexpected)}")
    return model, tokenizer or load_tokenizer(source, clip.config)


def load(
    path: str | Path, clip: str | None = None, tokenizer: CLIPTokenizer | None = None
) -> tuple[StepAwareCLIP, CLIPTokenizer]:
    """A saved model and its tokenizer.

    Args:
        path: a folder written by `save`, or one file in the released layout (`.bin` or `.safetensors`).
        clip: where the configuration is that a single file lacks; ignored for a folder.
        tokenizer: if not the one beside the configuration.

    Raises:
        ValueError: tensors are missing or unexpected, the file holds more than tensors, or it comes without `clip`.
    """
    path = Path(path)
    source, file = (str(path), path / WEIGHTS) if path.is_dir() else (clip, path)
    if source is None:
        raise ValueError(f"{path} is no folder; a single file needs the CLIP that it fits")
    folder = fetch_folder(parse(source), [CONFIG])
    read_json(folder / CONFIG)  # names the file if it is none
    config = CLIPConfig.from_pretrained(folder)
    tensors = {name: value.float() for name, value in released_tensors(read_tensors(file)).items()}
    model = build_with(lambda: StepAwareCLIP(config), tensors, file)
    return model.eval(), tokenizer or load_tokenizer(source, config)


def released_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names with the prefix `model.`, without the position indices that transformers 4.27 used to save."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(".position_ids")}
    return {name if name.startswith("model.") else f"model.{name}": tensor for name, tensor in kept.items()}


def save(model: StepAwareCLIP, tokenizer: CLIPTokenizer, folder: str | Path) -> None:
    """Writes weights, configuration and tokenizer: the folder stands alone."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # clones, because safetensors refuses tensors that share storage
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    save_tensors(tensors, folder / WEIGHTS)
    # every value, defaults too: a default activation that changes would change scores silently
    model.model.config.to_json_file(folder / CONFIG, use_diff=False)
    _save_tokenizer(tokenizer, folder)


def _save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes the tokenizer without where it was loaded from and how it was last called.

    Both would only change the folder's digest: a call leaves its padding and truncation in the tokenizer, and a
    training that goes on from a checkpoint makes other calls.
    """
    fresh = copy.deepcopy(tokenizer)
    fresh.backend_tokenizer.no_padding()
    fresh.backend_tokenizer.no_truncation()
    fresh.save_pretrained(folder)
    file = folder / TOKENIZER_CONFIG
    config = {key: value for key, value in read_json(file).items() if key not in ("is_local", "local_files_only")}
    file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- the scorer


class StepAwareReward:
    """A frozen step-aware preference model as a `StepReward`; differentiable in the images."""

    differentiable = True

    def __init__(self, model: StepAwareCLIP, tokenizer: CLIPTokenizer) -> None:
        self.model = model.eval().requires_grad_(False)
        self._text = TextFeatures(model.model, tokenizer)

    def __call__(self, images: Tensor, prompts: Sequence[str], t: Tensor) -> Tensor:
        """Scores (B,), higher is better, in units where a difference d wins with probability sigmoid(d).

        Args:
            images: (B, 3, H, W) as decoded, nominally in [0, 1] but not clamped.
            prompts: B prompts.
            t: (B,) timesteps the images were predicted at; 0 for true images.

        Raises:
            ValueError: the three do not have the same length.
        """
        if not len(images) == len(prompts) == len(t):
            raise ValueError(f"{len(images)} images for {len(prompts)} prompts and {len(t)} timesteps")
        with full_precision(images.device):
            pixels = inference_pixels(images.float(), image_size(self.model.model))
            return self.model.cosine_scores(pixels, self._text(prompts), t.to(images.device))
