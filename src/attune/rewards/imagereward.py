"""ImageReward 1.0: a BLIP text encoder with cross-attention to the image, trained on human rankings.

Source: Xu et al. 2023, arXiv:2304.05977; authors' code `ImageReward.py`, `score_gard`. Score = (head(h) - mean) / std,
h the first token's last state, mean and std of the training set: about 0 for Stable Diffusion 1.4, -2 to 2.

The released file is BLIP's layout; `renamed` is what each tensor is called in transformers, tensor for tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from attune.clip.model import full_precision
from attune.clip.pixels import check_images, clip_pixels, clip_pixels_pil, rounded_crop
from attune.config.settings import Location, ScorerConfig, Sha256
from attune.hub import fetch_file, parse
from attune.pretrained import build_with, check_tokenizer, load_tokenizer
from attune.rewards._head import LAYERS, Head
from attune.weights import read_json, read_tensors

if TYPE_CHECKING:
    from transformers import BertTokenizer

MEAN, STD = 0.16717362830052426, 1.0333394966054072
CONTEXT = 35  # tokens, [CLS] and [SEP] included
PREPARATIONS = {"pil": clip_pixels_pil, "tensor": clip_pixels}
PUBLISHED = {"ImageReward": (-2, 2)}


class Config(ScorerConfig):
    """Where ImageReward is and how images are shown to it."""

    path: Location = Field(
        description="released weights, .pt or .safetensors, e.g. zai-org/ImageReward/ImageReward.pt; a .json of "
        'the same stem beside it, {"head_width": n}, gives the attention heads\' width if it is not 64'
    )
    sha256: Sha256 | None = Field(None, description="what the weights must hash to")
    tokenizer: Location = Field(description="BERT's; for published weights google-bert/bert-base-uncased")
    preprocess: Literal["pil", "tensor"] = Field(
        "pil", description="pil: as published, no gradient; tensor: the same, differentiable"
    )
    license: str = Field("Apache-2.0", description="licence of the weights")


# ---------------------------------------------------------------- weights

_UNUSED = (
    "blip.vision_proj.",
    "blip.text_proj.",
    "blip.text_encoder.embeddings.position_ids",
)  # of BLIP's pre-training
_NAMES = (
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.fc([12])\.", r"vision.encoder.layers.\1.mlp.fc\2."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head.layers."),
)


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The released tensors under `Model`'s names, float32; those of no use here are left out."""
    kept = {name: tensor.float() for name, tensor in tensors.items() if not name.startswith(_UNUSED)}
    for pattern, name in _NAMES:
        kept = {re.sub(pattern, name, key): tensor for key, tensor in kept.items()}
    return kept


class Model(nn.Module):
    """BLIP's two encoders and the head, under transformers' names."""

    def __init__(self, vision: Mapping[str, Any], text: Mapping[str, Any], widths: Sequence[int]) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.vision = BlipVisionModel(BlipVisionConfig(**vision, layer_norm_eps=1e-6, hidden_act="gelu"))
        # is_decoder is what gives its layers the cross-attention; it attends in both directions all the same
        text_config = BlipTextConfig(**text, encoder_hidden_size=vision["hidden_size"], is_decoder=True)
        self.text = BlipTextModel(text_config, add_pooling_layer=False)
        self.head = Head(text["hidden_size"], widths)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Rewards (B,), not standardised, of pixel values (B, 3, S, S) for tokens and their mask (B, L)."""
        image = self.vision(pixel_values=pixel_values).last_hidden_state
        text = self.text(input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=image)
        return self.head(text.last_hidden_state[:, 0])


def layout_of(tensors: Mapping[str, Tensor], head_width: int = 64) -> dict[str, Any]:
    """`Model`'s arguments, read off the shapes of its tensors.

    Args:
        head_width: of attention heads, the one size that no shape shows; 64 in the released model.

    Raises:
        ValueError: a tensor that would show a size is missing.
    """

    def shape(name: str) -> torch.Size:
        if name not in tensors:
            raise ValueError(f"no ImageReward weights: {name} is missing, found {sorted(tensors)[:5]} ...")
        return tensors[name].shape

    def depth(layers: str) -> int:
        return len({name.removeprefix(layers).split(".")[0] for name in tensors if name.startswith(layers)})

    _, positions, width = shape("vision.embeddings.position_embedding")
    patch = shape("vision.embeddings.patch_embedding.weight")[-1]
    vocabulary, text_width = shape("text.embeddings.word_embeddings.weight")
    vision = {
        "hidden_size": width,
        "intermediate_size": shape("vision.encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": depth("vision.encoder.layers."),
        "num_attention_heads": width // head_width,
        "patch_size": patch,
        "image_size": patch * round((positions - 1) ** 0.5),
    }
    text = {
        "vocab_size": vocabulary,
        "hidden_size": text_width,
        "intermediate_size": shape("text.encoder.layer.0.intermediate.dense.weight")[0],
        "num_hidden_layers": depth("text.encoder.layer."),
        "num_attention_heads": text_width // head_width,
        "max_position_embeddings": shape("text.embeddings.position_embeddings.weight")[0],
    }
    widths = [shape(f"head.layers.{n}.weight")[0] for n in LAYERS]
    return {"vision": vision, "text": text, "widths": widths}


def load_weights(file: Path) -> Model:
    """A frozen float32 model from a file in the released layout. Raises ValueError naming misfitting tensors."""
    layout = read_json(file.with_suffix(".json")) if file.with_suffix(".json").exists() else {}
    tensors = renamed(read_tensors(file))
    sizes = layout_of(tensors, **layout)
    return build_with(lambda: Model(**sizes), tensors, file).eval().requires_grad_(False)


def load_bert_tokenizer(source: str) -> BertTokenizer:
    """BERT's tokenizer with BLIP's two tokens at the end: 30,524 in all."""
    from transformers import BertTokenizer

    tokenizer = load_tokenizer(BertTokenizer, parse(source))
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    return tokenizer


# ---------------------------------------------------------------- the scorer


class Scorer:
    """ImageReward of images for prompts; a `Reward`."""

    def __init__(self, model: Model, tokenizer: BertTokenizer, config: Config) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.differentiable = config.preprocess != "pil"
        self.license = config.license
        self.expected_range = config.range_of_mean(PUBLISHED)
        self._prepare = PREPARATIONS[config.preprocess]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), on the images' device, of images (B, 3, H, W) in [0, 1]; ValueError if not."""
        check_images(images, prompts)
        device = self.model.vision.device
        with full_precision(device):
            size: Any = self.model.vision.config.image_size
            pixels = self._prepare(images.to(device).float(), size, rounded_crop)
            tokens = self.tokenizer(
                list(prompts), padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
            ).to(device)
            return ((self.model(pixels, tokens.input_ids, tokens.attention_mask) - MEAN) / STD).to(images.device)


def load(config: Config, device: torch.device | str = "cpu") -> Scorer:
    """The scorer, frozen, on a device. Raises ValueError for a wrong or incomplete checkpoint."""
    file = fetch_file(parse(config.path), config.sha256)
    tokenizer = load_bert_tokenizer(config.tokenizer)
    model = load_weights(file)
    check_tokenizer(tokenizer, model.text.config.vocab_size, config.tokenizer)
    return Scorer(model.to(device), tokenizer, config)
