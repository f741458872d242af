"""PickScore: a CLIP ViT-H/14 fine-tuned to predict which of two images a person picks.

Source: Kirstain et al. 2023, arXiv:2305.01569, eq. 1: score = exp(logit_scale) * cos(image, text); the
authors' demo code. Some code bases drop the scale (about 100) or divide by 26; here scores are as published,
19 to 24.
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
)
from attune.clip.pixels import PREPARATIONS, check_images
from attune.config.settings import Location, Preprocess, ScorerConfig

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

PUBLISHED = {"PickScore_v1": (17, 25)}


class Config(ScorerConfig):
    """Where PickScore is and how images are shown to it."""

    path: Location = Field(description="a CLIP; the published one is yuvalkirstain/PickScore_v1")
    tokenizer: Location | None = Field(
        None, description="if not the one beside `path`; the authors use laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    )
    hidden_act: str = Field("gelu", description="activation the checkpoint must have")
    preprocess: Preprocess = "pil"
    dtype: ScorerDtype = "float32"
    license: str = Field("MIT (authors' repository; the Hub card names none)", description="licence of the weights")


class Scorer:
    """PickScore of images for prompts; a `Reward`."""

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
            return (self.model.logit_scale.exp() * cosine).to(images.device)


def load(config: Config, device: torch.device | str = "cpu") -> Scorer:
    """The scorer, frozen, on a device. Raises ValueError for a wrong or incomplete checkpoint."""
    model = load_model(config.path, config.hidden_act)
    model = in_dtype(model, config.dtype, device)
    return Scorer(model, load_tokenizer(config.tokenizer or config.path, model.config), config)
