"""HPSv2: a CLIP ViT-H/14 fine-tuned on human rankings of generated images; v2.0 and v2.1 differ in weights.

Source: Wu et al. 2023, arXiv:2306.09341; authors' code `hpsv2`. The score is the bare cosine, 0.2 to 0.34
(tables print it times 100). It compares images of one prompt; v2.0 and v2.1 are never comparable.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import ftfy
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from attune.clip.model import (
    ScorerDtype,
    TextFeatures,
    in_dtype,
    load_tokenizer,
    precision,
    prepared_features,
    text_config,
)
from attune.clip.open_clip import load_open_clip
from attune.clip.pixels import check_images, normalise, square_pixels
from attune.config.settings import Location, ScorerConfig, Sha256
from attune.hub import fetch_file, parse
from attune.pretrained import check_clip_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

PUBLISHED = {"HPS_v2_compressed": (0.15, 0.36), "HPS_v2.1_compressed": (0.15, 0.36)}


class Config(ScorerConfig):
    """Where HPSv2 is and how images are shown to it."""

    version: Literal["2.0", "2.1"] = Field(description="of the weights; scores of different versions never mix")
    path: Location = Field(
        description="open_clip weights, .pt or .safetensors, e.g. xswu/HPSv2/HPS_v2.1_compressed.pt; a "
        ".json of the same stem beside it gives the architecture if it is not ViT-H/14"
    )
    sha256: Sha256 | None = Field(None, description="what the weights must hash to")
    tokenizer: Location = Field(description="for published weights laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    hidden_act: str = Field("gelu", description="activation the model must have")
    preprocess: Literal["hps", "square"] = Field("hps", description="hps: as published; square: AlignProp's")
    dtype: ScorerDtype = "float32"
    antialias: bool = Field(
        True, description="resize as torchvision >= 0.17 does (true) or as at publication; never mix the two"
    )
    license: str = Field("Apache-2.0", description="licence of the weights")

    @model_validator(mode="after")
    def _is_the_version_it_says(self) -> Config:
        for version, name in (("2.0", "HPS_v2_compressed"), ("2.1", "HPS_v2.1_compressed")):
            if name in self.path and self.version != version:
                raise ValueError(f"version is {self.version}, but {name} is {version}")
        return self


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
        self.model = model
        self.license = config.license
        self.expected_range = config.range_of_mean(PUBLISHED)
        prepare = square_pixels if config.preprocess == "square" else partial(hps_pixels, antialias=config.antialias)
        self._image = partial(prepared_features, model, prepare)
        self._text = TextFeatures(model, tokenizer, clean_text)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), on the images' device, of images (B, 3, H, W) in [0, 1]; ValueError if not."""
        check_images(images, prompts)
        with precision(self.model):
            return (self._image(images) * self._text(prompts)).sum(-1).to(images.device)


def load(config: Config, device: torch.device | str = "cpu") -> Scorer:
    """The scorer, frozen, on a device. Raises ValueError for a wrong or incomplete checkpoint."""
    file = fetch_file(parse(config.path), config.sha256)
    tokenizer = load_tokenizer(config.tokenizer)
    model = load_open_clip(file, tokenizer, config.hidden_act)
    check_clip_tokenizer(tokenizer, text_config(model.config), config.tokenizer)
    model = in_dtype(model, config.dtype, device)
    return Scorer(model, tokenizer, config)
