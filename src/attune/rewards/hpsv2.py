"""HPSv2: a CLIP ViT-H/14 fine-tuned on human rankings of generated images; v2.0 and v2.1 differ in weights.

Source: Wu et al. 2023, arXiv:2306.09341; authors' code `hpsv2`. The score is the bare cosine, 0.2 to 0.34
(tables print it times 100). It compares images of one prompt; v2.0 and v2.1 are never comparable.

The weights come in open_clip's layout, one file of fused and transposed tensors. `key_map` lists what each of
them is in transformers' `CLIPModel`; loading and saving both read that one table.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import ftfy
import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from attune.clip import (
    TextFeatures,
    check_activation,
    check_images,
    find_file,
    full_precision,
    image_features,
    image_size,
    load_strictly,
    load_tokenizer,
    normalise,
    read_json,
    read_tensors,
    square_pixels,
)
from attune.config import Block, Real


class Config(Block):
    """Where HPSv2 is and how images are shown to it."""

    path: str = Field(
        description="open_clip weights, .pt or .safetensors, e.g. hf://xswu/HPSv2/HPS_v2.1_compressed.pt; a "
        ".json of the same stem beside it gives the architecture if it is not ViT-H/14"
    )
    revision: str | None = Field(None, description="Hub commit of the weights; null for a local file")
    tokenizer: str = Field(description="folder or Hub id; laion/CLIP-ViT-H-14-laion2B-s32B-b79K for published weights")
    tokenizer_revision: str | None = Field(None, description="Hub commit of the tokenizer")
    hidden_act: str = Field("gelu", description="activation the model must have")
    preprocess: Literal["hps", "square"] = Field("hps", description="hps: as published; square: AlignProp's")
    antialias: bool = Field(
        True, description="resize as torchvision >= 0.17 does (true) or as at publication; never mix the two"
    )
    expected_mean: list[Real] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="mean scores outside are an error; (0.15, 0.36) for the published weights",
    )
    license: str = Field("Apache-2.0", description="licence of the weights")


VIT_H_14 = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
    "hidden_act": "gelu",
}

# ---------------------------------------------------------------- weights: open_clip <-> transformers

_SINGLE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.proj": "visual_projection.weight",
}
_NORMS = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # sic
    "visual.ln_post": "vision_model.post_layernorm",
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TRANSPOSED = ("text_projection", "visual.proj")  # open_clip multiplies x @ P, a Linear x @ P.T
_BUFFERS = ("attn_mask", "position_ids")  # constants that some files carry along


def key_map(vision_layers: int, text_layers: int) -> dict[str, tuple[str, ...]]:
    """Each open_clip tensor's name in `CLIPModel`; three names where open_clip fuses query, key and value."""
    names = {ours: (theirs,) for ours, theirs in _SINGLE.items()}
    pairs = dict(_NORMS)
    for tower, ours, layers in (("visual.", "vision_model", vision_layers), ("", "text_model", text_layers)):
        for n in range(layers):
            block, layer = f"{tower}transformer.resblocks.{n}", f"{ours}.encoder.layers.{n}"
            pairs |= {f"{block}.{a}": f"{layer}.{b}" for a, b in _BLOCK.items()}
            for kind in ("weight", "bias"):
                names[f"{block}.attn.in_proj_{kind}"] = tuple(f"{layer}.self_attn.{x}_proj.{kind}" for x in "qkv")
    return names | {f"{a}.{kind}": (f"{b}.{kind}",) for a, b in pairs.items() for kind in ("weight", "bias")}


def from_open_clip(tensors: Mapping[str, Tensor], vision_layers: int, text_layers: int) -> dict[str, Tensor]:
    """open_clip's tensors as `CLIPModel`'s, float32.

    Raises:
        ValueError: naming every tensor that is missing or unknown.
    """
    tensors = {re.sub(r"^(module\.|model\.)+", "", name): tensor for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(_BUFFERS)}
    names = key_map(vision_layers, text_layers)
    if names.keys() != tensors.keys():
        missing, unknown = sorted(names.keys() - tensors.keys()), sorted(tensors.keys() - names.keys())
        raise ValueError(f"not the expected open_clip weights: missing {missing}, unexpected {unknown}")
    result = {}
    for name, targets in names.items():
        tensor = tensors[name].float()
        parts = (tensor.t() if name in _TRANSPOSED else tensor,) if len(targets) == 1 else tensor.chunk(3)
        result |= dict(zip(targets, parts, strict=True))
    return result


def to_open_clip(model: CLIPModel) -> dict[str, Tensor]:
    """The inverse: a `CLIPModel`'s tensors under open_clip's names, contiguous, sharing no memory."""
    tensors, config = model.state_dict(), model.config
    names = key_map(config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers)
    result = {}
    for name, sources in names.items():
        parts = [tensors[source] for source in sources]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        tensor = tensor.t() if name in _TRANSPOSED else tensor
        result[name] = tensor.clone(memory_format=torch.contiguous_format)
    return result


def clip_config(layout: Mapping, tokenizer: CLIPTokenizer) -> CLIPConfig:
    """transformers' configuration of an open_clip model layout (`hidden_act` added; gelu if absent).

    Args:
        layout: as `VIT_H_14`.
        tokenizer: says where text features are read: at its end token.

    Raises:
        ValueError: the tokenizer has another vocabulary.
    """
    vision, text = layout["vision_cfg"], layout["text_cfg"]
    if len(tokenizer) != text["vocab_size"]:
        raise ValueError(f"a tokenizer of {len(tokenizer)} tokens for a model of {text['vocab_size']}")
    shared = {"hidden_act": layout.get("hidden_act", "gelu"), "projection_dim": layout["embed_dim"]}
    return CLIPConfig(
        projection_dim=layout["embed_dim"],
        vision_config={
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            **shared,
        },
        text_config={
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            **shared,
        },
    )


def layout_of(config: CLIPConfig) -> dict:
    """The open_clip model layout of a configuration: the inverse of `clip_config`.

    Raises:
        ValueError: it has no such layout (MLPs not four times as wide, two activations).
    """
    vision, text = config.vision_config, config.text_config
    wide = all(tower.intermediate_size == 4 * tower.hidden_size for tower in (vision, text))
    if not wide or vision.hidden_act != text.hidden_act:
        raise ValueError("open_clip's layout needs MLPs four times as wide as the model and one activation")
    return {
        "embed_dim": config.projection_dim,
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "patch_size": vision.patch_size,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
        },
        "hidden_act": vision.hidden_act,
    }


def load_open_clip(file: Path, tokenizer: CLIPTokenizer) -> CLIPModel:
    """A frozen `CLIPModel` from an open_clip file and the layout beside it (ViT-H/14 if there is none)."""
    layout = read_json(file.with_suffix(".json")) if file.with_suffix(".json").exists() else VIT_H_14
    tensors = read_tensors(file)
    tensors = tensors.get("state_dict", tensors)  # whatever else a training checkpoint holds is ignored
    model = CLIPModel(clip_config(layout, tokenizer))
    depth = layout["vision_cfg"]["layers"], layout["text_cfg"]["layers"]
    load_strictly(model, from_open_clip(tensors, *depth), file)
    return model.eval().requires_grad_(False)


def save_open_clip(model: CLIPModel, file: Path) -> None:
    """Writes `file` (.safetensors) and its layout (.json), as `load_open_clip` reads them."""
    save_file(to_open_clip(model), file, metadata={"format": "pt"})
    text = json.dumps(layout_of(model.config), indent=2) + "\n"
    file.with_suffix(".json").write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- the scorer


def clean_text(prompt: str) -> str:
    """What open_clip does before tokenising: mends encoding, unescapes HTML, collapses blanks, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    return re.sub(r"\s+", " ", text).strip().lower()


def hps_pixels(images: Tensor, size: int, antialias: bool = True) -> Tensor:
    """HPSv2's preprocessing, differentiable: longest side to `size`, bicubic, black padding, normalised.

    Overshoot of the resize is kept. The authors' code forgets to pad where the longest side already fits.
    """
    scale = size / max(images.shape[-2:])
    height, width = (round(side * scale) for side in images.shape[-2:])
    if scale != 1:
        images = F.interpolate(images, (height, width), mode="bicubic", align_corners=False, antialias=antialias)
    top, left = (size - height) // 2, (size - width) // 2
    return normalise(F.pad(images, (left, size - width - left, top, size - height - top)))


class Scorer:
    """HPSv2 of images for prompts; a differentiable `Reward`."""

    differentiable = True

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, config: Config) -> None:
        self.model, self.config = model, config
        self.license = config.license
        self.range = tuple(config.expected_mean) if config.expected_mean else None
        self._text = TextFeatures(model, tokenizer, clean_text)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), on the images' device, of images (B, 3, H, W) in [0, 1]; ValueError if not."""
        check_images(images, prompts)
        with full_precision(self.model.device):
            pixels = self._pixels(images.to(self.model.device).float(), image_size(self.model))
            return (image_features(self.model, pixels) * self._text(prompts)).sum(-1).to(images.device)

    def _pixels(self, images: Tensor, size: int) -> Tensor:
        if self.config.preprocess == "square":
            return square_pixels(images, size)
        return hps_pixels(images, size, self.config.antialias)


def load(config: Config, device: torch.device | str = "cpu") -> Scorer:
    """The scorer, frozen, on a device. Raises ValueError for a wrong or incomplete checkpoint."""
    tokenizer = load_tokenizer(config.tokenizer, config.tokenizer_revision)
    model = load_open_clip(find_file(config.path, config.revision), tokenizer)
    check_activation(model, config.hidden_act, config.path)
    return Scorer(model.to(device), tokenizer, config)
