"""CLIP as all scorers use it: loading, and features.

One layer below `rewards` and `spm`, which know nothing of each other. Everything is float32, unless a scorer's `dtype`
has its matrix products in bfloat16 (`in_dtype`).

Shapes: images (B, 3, H, W) in [0, 1]; pixel values (B, 3, S, S), normalised, S = `image_size(model)`;
features (B, D).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from attune import pretrained
from attune.clip.pixels import Prepare
from attune.hub import parse

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer


ScorerDtype = Annotated[
    Literal["float32", "bfloat16"],
    Field(description="of the CLIP's matrix products; bfloat16 is faster and halves its memory, for other last digits"),
]
"""What a scorer that is a CLIP computes in, see `in_dtype`."""


# ---------------------------------------------------------------- loading


def load_model(source: str, hidden_act: str | None = None) -> CLIPModel:
    """A frozen float32 CLIP in eval mode.

    Args:
        source: a local folder, or `owner/name@commit` on the Hub.
        hidden_act: activation both towers must have. Worth stating: ViT-H/14 is "gelu", OpenAI's ViT-L/14
            "quick_gelu", transformers defaults to the latter, and the wrong one scores plausibly but wrongly.

    Raises:
        ValueError: weights are missing, left over or not finite, the activation is not the expected one, or a pickle
            holds more than tensors.
        FileNotFoundError: no such folder, or no weights in it.
        HubError: it could not be downloaded.
    """
    from transformers import CLIPModel

    model = pretrained.load_pretrained(CLIPModel, parse(source), torch.float32, strict=True)
    check_activation(model.config, hidden_act, source)
    return model


def load_tokenizer(source: str, config: CLIPConfig | None = None) -> CLIPTokenizer:
    """The tokenizer of a local folder, or of `owner/name@commit` on the Hub.

    Args:
        config: of the CLIP that the tokenizer must fit; None if that is checked where the model is made.

    Raises:
        ValueError: it does not fit; and as `pretrained.load_tokenizer`.
    """
    from transformers import CLIPTokenizer

    tokenizer = pretrained.load_tokenizer(CLIPTokenizer, parse(source))
    if config is not None:
        pretrained.check_clip_tokenizer(tokenizer, text_config(config), source)
    return tokenizer


def in_dtype(model: CLIPModel, dtype: str, device: torch.device | str) -> CLIPModel:
    """The CLIP on a device, linear and convolutional layers in "float32" or "bfloat16"; to be called in `precision`.

    Norms, embeddings, softmax and the sums that run from layer to layer stay float32, and so do features once they are
    projected: a bfloat16 has three digits, of which a cosine between 0.2 and 0.3 could not spare one.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(getattr(torch, dtype))
    return model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` without its first argument


def precision(model: CLIPModel) -> torch.autocast:
    """A context in which a scorer's CLIP computes as `in_dtype` has set it up, whatever its caller's autocast says."""
    half = model.visual_projection.weight.dtype == torch.bfloat16
    return torch.autocast(model.device.type, torch.bfloat16, enabled=half, cache_enabled=False)


def check_activation(config: CLIPConfig, hidden_act: str | None, source: str) -> None:
    """Raises ValueError unless both towers use `hidden_act` (None: anything goes)."""
    found = {text_config(config).hidden_act, vision_config(config).hidden_act}
    if hidden_act is not None and found != {hidden_act}:
        raise ValueError(f"{source} has hidden_act {sorted(found)}, expected {hidden_act!r}")


def text_config(config: CLIPConfig) -> Any:
    """The text tower's configuration, which transformers types as what it may be given as: a dict or None too."""
    return config.text_config


def vision_config(config: CLIPConfig) -> Any:
    """The vision tower's configuration; as `text_config`."""
    return config.vision_config


# ---------------------------------------------------------------- features


def image_size(model: CLIPModel) -> int:
    """Side S of the square images the vision tower takes, pixels."""
    return vision_config(model.config).image_size


def tokenise(tokenizer: CLIPTokenizer, prompts: Sequence[str], context_length: int) -> Tensor:
    """Token ids (B, L), L the longest prompt's but at most `context_length`; truncation keeps the end token.

    Padding and attention masks change nothing: attention is causal and a feature is read at its first end
    token.
    """
    return tokenizer(
        list(prompts), padding="longest", truncation=True, max_length=context_length, return_tensors="pt"
    ).input_ids


def text_features(model: CLIPModel, tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Projected text features (B, D), of unit length."""
    ids = tokenise(tokenizer, prompts, text_config(model.config).max_position_embeddings)
    return F.normalize(model.get_text_features(input_ids=ids.to(model.device)).pooler_output.float(), dim=-1)


def image_features(model: CLIPModel, pixel_values: Tensor, unit: bool = True) -> Tensor:
    """Projected image features (B, D), of unit length if `unit`; differentiable."""
    features = model.get_image_features(pixel_values=pixel_values).pooler_output.float()
    return F.normalize(features, dim=-1) if unit else features


def prepared_features(model: CLIPModel, prepare: Prepare, images: Tensor) -> Tensor:
    """Unit features (B, D), on the model's device, of images as `prepare` shows them to it."""
    return image_features(model, prepare(images.to(model.device).float(), image_size(model)))


class TextFeatures:
    """Unit text features (B, D) of a frozen CLIP, each prompt encoded once.

    Prompts are encoded one by one: a batch's padded length moves the last bits, and a resumed run, whose
    cache is cold, must see the same bits as one that never stopped.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        clean: Callable[[str], str] = str,
        capacity: int = 16384,  # 64 MB at D = 1024; when full the cache starts afresh
    ) -> None:
        self._model, self._tokenizer, self._clean, self._capacity = model, tokenizer, clean, capacity
        self._rows: dict[str, Tensor] = {}

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        return torch.stack([self._row(prompt) for prompt in prompts])

    @torch.no_grad()
    def _row(self, prompt: str) -> Tensor:
        if prompt not in self._rows:
            if len(self._rows) >= self._capacity:
                self._rows.clear()
            self._rows[prompt] = text_features(self._model, self._tokenizer, [self._clean(prompt)])[0]
        return self._rows[prompt]


def full_precision(device: torch.device) -> torch.autocast:
    """A context in which a scorer computes in float32 whatever its caller's autocast says."""
    return torch.autocast(device.type, enabled=False)
