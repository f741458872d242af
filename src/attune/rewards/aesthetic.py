"""LAION aesthetic predictor v2: linear layers on the image feature of CLIP ViT-L/14; prompts are ignored.

Source: Schuhmann 2022, improved-aesthetic-predictor (sac+logos+ava1-l14-linearMSE.pth). The layers have no
activations between them, so the score is affine in the unit feature e: 5.2366 + 17.9956 cos(e, w). It is
bounded by the layers alone, at 23: a policy that optimises it will leave the range of real images (4.5 to 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from attune.clip.model import ScorerDtype, full_precision, in_dtype, load_model, precision, prepared_features
from attune.clip.pixels import PREPARATIONS, check_images
from attune.config.settings import Location, Preprocess, ScorerConfig, Sha256
from attune.hub import fetch_file, parse
from attune.rewards._head import Head, head_of
from attune.weights import read_tensors

if TYPE_CHECKING:
    from transformers import CLIPModel

PUBLISHED = {"sac+logos+ava1-l14-linearMSE": (3, 9), "aesthetic-model": (3, 9)}


class Config(ScorerConfig):
    """Where the CLIP and its aesthetic head are, and how images are shown to them."""

    path: Location = Field(description="the CLIP; the published head needs openai/clip-vit-large-patch14")
    head: Location = Field(description="the head, a file .safetensors or .pth")
    head_sha256: Sha256 | None = Field(None, description="what the head must hash to; the published one 21dd590f...")
    hidden_act: str = Field("quick_gelu", description="activation the CLIP must have")
    preprocess: Preprocess = "pil"
    dtype: ScorerDtype = "float32"
    license: str = Field("Apache-2.0 (head), MIT (OpenAI CLIP)", description="licence of the weights")


def load_head(source: str, sha256: str | None = None) -> Head:
    """A frozen head of any widths; ValueError if the file is not one, or not the one that hashes to `sha256`."""
    return head_of(read_tensors(fetch_file(parse(source), sha256)), source)


class Scorer:
    """Aesthetic score of images; a `Reward` that ignores its prompts."""

    def __init__(self, model: CLIPModel, head: Head, config: Config) -> None:
        self.model, self.head = model, head
        self.differentiable = config.preprocess != "pil"
        self.license = config.license
        self.expected_range = config.range_of_mean(PUBLISHED)
        self._image = partial(prepared_features, model, PREPARATIONS[config.preprocess])

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), on the images' device, of images (B, 3, H, W) in [0, 1]; ValueError if not."""
        check_images(images, prompts)
        with precision(self.model):
            features = self._image(images)
        with full_precision(features.device):
            return self.head(features).to(images.device)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Unit CLIP features (B, D), on the images' device, by which diversity and drift are measured."""
        check_images(images)
        with precision(self.model):
            return self._image(images).to(images.device)


def load(config: Config, device: torch.device | str = "cpu") -> Scorer:
    """The scorer, frozen, on a device. Raises ValueError for a wrong or incomplete checkpoint."""
    head = load_head(config.head, config.head_sha256)
    model = load_model(config.path, config.hidden_act)
    model = in_dtype(model, config.dtype, device)
    return Scorer(model, head.to(device), config)
