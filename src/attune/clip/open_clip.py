"""CLIP in open_clip's layout, one file of fused and transposed tensors, to and from transformers' `CLIPModel`.

`key_map` lists what each tensor is there; loading and saving both read that one table.
Source: open_clip's `model.py`; HPSv2 is released in this layout.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attune.clip.model import check_activation, text_config, vision_config
from attune.pretrained import build_with, misfit
from attune.weights import read_json, read_tensors, save_tensors

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

VIT_H_14: dict[str, Any] = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
    "hidden_act": "gelu",
}

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
    names: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in _SINGLE.items()}
    pairs = dict(_NORMS)
    for tower, ours, layers in (("visual.", "vision_model", vision_layers), ("", "text_model", text_layers)):
        for n in range(layers):
            block, layer = f"{tower}transformer.resblocks.{n}", f"{ours}.encoder.layers.{n}"
            pairs |= {f"{block}.{a}": f"{layer}.{b}" for a, b in _BLOCK.items()}
            for kind in ("weight", "bias"):
                names[f"{block}.attn.in_proj_{kind}"] = tuple(f"{layer}.self_attn.{x}_proj.{kind}" for x in "qkv")
    return names | {f"{a}.{kind}": (f"{b}.{kind}",) for a, b in pairs.items() for kind in ("weight", "bias")}


def from_open_clip(tensors: Mapping[str, Tensor], vision_layers: int, text_layers: int) -> dict[str, Tensor]:
    """open_clip's tensors as `CLIPModel`'s, float32 and contiguous; query, key and value share one storage.

    Raises:
        ValueError: naming every tensor that is missing or unknown.
    """
    # rebound, so that a half-precision file is let go tensor by tensor
    tensors = {re.sub(r"^(module\.|model\.)+", "", name): tensor for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(_BUFFERS)}
    names = key_map(vision_layers, text_layers)
    if names.keys() != tensors.keys():
        wrong = misfit(names.keys() - tensors.keys(), tensors.keys() - names.keys())
        raise ValueError(f"not the expected open_clip weights: {wrong}")
    result: dict[str, Tensor] = {}
    for name, targets in names.items():
        tensor = tensors.pop(name).float()
        parts = (tensor.t().contiguous() if name in _TRANSPOSED else tensor,) if len(targets) == 1 else tensor.chunk(3)
        result |= dict(zip(targets, parts, strict=True))
    return result


def to_open_clip(model: CLIPModel) -> dict[str, Tensor]:
    """The inverse: a `CLIPModel`'s tensors under open_clip's names, contiguous, sharing no memory."""
    tensors, config = model.state_dict(), model.config
    names = key_map(vision_config(config).num_hidden_layers, text_config(config).num_hidden_layers)
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
        ValueError: the tokenizer has another vocabulary, or another end token.
    """
    from transformers import CLIPConfig

    vision, text = layout["vision_cfg"], layout["text_cfg"]
    if len(tokenizer) != text["vocab_size"]:
        raise ValueError(
            f"{tokenizer.name_or_path}: a tokenizer of {len(tokenizer)} tokens for a model of {text['vocab_size']}"
        )
    if tokenizer.eos_token_id != text["vocab_size"] - 1:  # open_clip reads a text's feature at its highest id
        raise ValueError(f"{tokenizer.name_or_path}: its tokenizer ends texts with another token than the last")
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
    vision, text = vision_config(config), text_config(config)
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


def load_open_clip(file: Path, tokenizer: CLIPTokenizer, hidden_act: str | None = None) -> CLIPModel:
    """A frozen float32 `CLIPModel` from an open_clip file and the layout beside it (ViT-H/14 if there is none).

    Raises:
        ValueError: the tokenizer has another vocabulary, the layout another activation than `hidden_act` (None:
            anything goes), or the file other tensors than the layout says.
    """
    from transformers import CLIPModel

    layout = read_json(file.with_suffix(".json")) if file.with_suffix(".json").exists() else VIT_H_14
    config = clip_config(layout, tokenizer)
    check_activation(config, hidden_act, str(file))
    depth = layout["vision_cfg"]["layers"], layout["text_cfg"]["layers"]
    tensors = from_open_clip(_state_dict(file), *depth)
    return build_with(lambda: CLIPModel(config), tensors, file).eval().requires_grad_(False)


def _state_dict(file: Path) -> dict[str, Tensor]:
    """The weights alone, whatever else a training checkpoint holds."""
    tensors = read_tensors(file)
    return tensors.get("state_dict", tensors)


def save_open_clip(model: CLIPModel, file: Path) -> None:
    """Writes `file` (.safetensors) and its layout (.json), as `load_open_clip` reads them."""
    save_tensors(to_open_clip(model), file)
    text = json.dumps(layout_of(model.config), indent=2) + "\n"
    file.with_suffix(".json").write_text(text, encoding="utf-8")
