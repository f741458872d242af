"""CLIPScore: how well an image fits its prompt, 100 * max(cos(image, text), 0), by an untuned CLIP.

Source: Hessel et al. 2021, arXiv:2104.08718, whose factor is 2.5 where torchmetrics and most tables have 100. Scores of
different CLIPs are not comparable, so the name of the CLIP is a setting. Diversity and drift are measured by its image
features, because the encoder was not tuned on human preferences.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from attune.clip.model import (
    ScorerDtype,
    TextFeatures,
    in_dtype,
    load_model,
    load_tokenizer,
    precision,
    prepared_features,
    vision_config,
)
from attune.clip.pixels import PREPARATIONS, check_images
from attune.config.settings import Location, Preprocess, ScorerConfig

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

_USUAL = (15, 40)
PUBLISHED = {
    f"clip-vit-{name}": _USUAL for name in ("base-patch32", "base-patch16", "large-patch14", "large-patch14-336")
}


class Config(ScorerConfig):
    """Which CLIP it is, where it is, and how images are shown to it."""

    model: str = Field(
        pattern=r"^ViT-\w+/\d+(@\d+)?$",
        description="name of the CLIP, part of the score's own: ViT-L/14, ViT-B/32; with @ its size if not 224",
    )
    path: Location = Field(description="that CLIP, e.g. openai/clip-vit-large-patch14")
    hidden_act: str = Field("quick_gelu", description="activation the CLIP must have; OpenAI's all have quick_gelu")
    preprocess: Preprocess = "pil"
    dtype: ScorerDtype = "float32"
    license: str = Field("MIT", description="licence of the weights")


class Scorer:
    """CLIPScore of images for prompts; a `Reward`, without a gradient where the cosine is negative."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, config: Config) -> None:
        self.model = model
        self.differentiable = config.preprocess != "pil"
        self.license = config.license
        self.expected_range = config.range_of_mean(PUBLISHED)
        self._image = partial(prepared_features, model, PREPARATIONS[config.preprocess])
        self._text = TextFeatures(model, tokenizer)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), on the images' device, of images (B, 3, H, W) in [0, 1]; ValueError if not."""
        check_images(images, prompts)
        with precision(self.model):
            cosine = (self._image(images) * self._text(prompts)).sum(-1)
            return (100 * cosine.clamp(min=0)).to(images.device)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Unit CLIP features (B, D), on the images' device, by which diversity and drift are measured."""
        check_images(images)
        with precision(self.model):
            return self._image(images).to(images.device)


def load(config: Config, device: torch.device | str = "cpu") -> Scorer:
    """The scorer, frozen, on a device.

    Raises:
        ValueError: a wrong or incomplete checkpoint, or one of another patch or image size than its name says.
    """
    model = load_model(config.path, config.hidden_act)
    patch, _, size = config.model.split("/")[1].partition("@")
    vision = vision_config(model.config)
    if (vision.patch_size, vision.image_size) != (int(patch), int(size or 224)):
        raise ValueError(f"{config.path} is no {config.model}: patches {vision.patch_size}, images {vision.image_size}")
    model = in_dtype(model, config.dtype, device)
    return Scorer(model, load_tokenizer(config.path, model.config), config)
