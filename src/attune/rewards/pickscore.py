"""PickScore: a CLIP ViT-H/14 fine-tuned to predict which of two images a person picks.

Source: Kirstain et al. 2023, arXiv:2305.01569, eq. 1: score = exp(logit_scale) * cos(image, text); the
authors' demo code. Some code bases drop the scale (about 100) or divide by 26; here scores are as published,
19 to 24.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from pydantic import Field
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from attune.clip.model import (
    PREPARATIONS,
    TextFeatures,
    check_images,
    full_precision,
    load_model,
    load_tokenizer,
    prepared_features,
)
from attune.config.settings import Commit, Preprocess, ScorerConfig

PUBLISHED = {"PickScore_v1": (17, 25)}


class Config(ScorerConfig):
    """Where PickScore is and how images are shown to it."""

    path: str = Field(description="CLIP folder or Hub id; the published one is yuvalkirstain/PickScore_v1")
    revision: Commit | None = Field(None, description="Hub commit; null for a local folder")
    tokenizer: str | None = Field(
        None,
        description="folder or Hub id if not `path`; the authors use laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    )
    tokenizer_revision: Commit | None = Field(None, description="Hub commit of the tokenizer")
    hidden_act: str = Field("gelu", description="activation the checkpoint must have")
    preprocess: Preprocess = "pil"
    license: str = Field("MIT (authors' repository; the Hub card names none)", description="licence of the weights")


class Scorer:
    """PickScore of images for prompts; a `Reward`."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, config: Config) -> None:
        self.model = model
        self.differentiable = config.preprocess != "pil"
        self.license = config.license
        self.range = config.sane_mean(PUBLISHED)
        self._image = partial(prepared_features, model, PREPARATIONS[config.preprocess])
        self._text = TextFeatures(model, tokenizer)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), on the images' device, of images (B, 3, H, W) in [0, 1]; ValueError if not."""
        check_images(images, prompts)
        with full_precision(self.model.device):
            cosine = (self._image(images) * self._text(prompts)).sum(-1)
            return (self.model.logit_scale.exp() * cosine).to(images.device)


def load(config: Config, device: torch.device | str = "cpu") -> Scorer:
    """The scorer, frozen, on a device. Raises ValueError for a wrong or incomplete checkpoint."""
    model = load_model(config.path, config.revision, config.hidden_act)
    other = config.tokenizer, config.tokenizer_revision
    tokenizer = load_tokenizer(*(other if config.tokenizer else (config.path, config.revision)))
    return Scorer(model.to(device), tokenizer, config)
