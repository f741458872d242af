"""LAION aesthetic predictor v2: linear layers on the image feature of CLIP ViT-L/14; prompts are ignored.

Source: Schuhmann 2022, improved-aesthetic-predictor (sac+logos+ava1-l14-linearMSE.pth). The layers have no
activations between them, so the score is affine in the unit feature e: 5.2366 + 17.9956 cos(e, w). It is
unbounded by taste, up to 23: a policy that optimises it will leave the range of real images (4.5 to 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from pydantic import Field
from torch import Tensor
from transformers import CLIPModel

from attune.clip.model import PREPARATIONS, check_images, full_precision, load_model, prepared_features
from attune.config.settings import Commit, Preprocess, ScorerConfig, Sha256
from attune.hub import find_file, read_tensors
from attune.rewards._head import Head, head_of

PUBLISHED = {"sac+logos+ava1-l14-linearMSE": (3, 9), "aesthetic-model": (3, 9)}


class Config(ScorerConfig):
    """Where the CLIP and its aesthetic head are, and how images are shown to them."""

    path: str = Field(description="CLIP folder or Hub id; the published head needs openai/clip-vit-large-patch14")
    head: str = Field(description="head weights, .safetensors or .pth: a file or hf://owner/repository/file")
    revision: Commit | None = Field(None, description="Hub commit of the CLIP; null for a local folder")
    head_revision: Commit | None = Field(None, description="Hub commit of the head; null for a local file")
    head_sha256: Sha256 | None = Field(None, description="what the head must hash to; the published one 21dd590f...")
    hidden_act: str = Field("quick_gelu", description="activation the CLIP must have")
    preprocess: Preprocess = "pil"
    license: str = Field("Apache-2.0 (head), MIT (OpenAI CLIP)", description="licence of the weights")


def load_head(path: str, revision: str | None = None, sha256: str | None = None) -> Head:
    """A frozen head of any widths; ValueError if the file is not one, or not the one that hashes to `sha256`."""
    return head_of(read_tensors(find_file(path, revision, sha256)), path)


class Scorer:
    """Aesthetic score of images; a `Reward` that ignores its prompts."""

    def __init__(self, model: CLIPModel, head: Head, config: Config) -> None:
        self.model, self.head = model, head
        self.differentiable = config.preprocess != "pil"
        self.license = config.license
        self.range = config.sane_mean(PUBLISHED)
        self._image = partial(prepared_features, model, PREPARATIONS[config.preprocess])

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), on the images' device, of images (B, 3, H, W) in [0, 1]; ValueError if not."""
        check_images(images, prompts)
        with full_precision(self.model.device):
            return self.head(self._image(images)).to(images.device)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Unit CLIP features (B, D), on the images' device, by which diversity and drift are measured."""
        check_images(images)
        with full_precision(self.model.device):
            return self._image(images).to(images.device)


def load(config: Config, device: torch.device | str = "cpu") -> Scorer:
    """The scorer, frozen, on a device. Raises ValueError for a wrong or incomplete checkpoint."""
    head = load_head(config.head, config.head_revision, config.head_sha256)
    model = load_model(config.path, config.revision, config.hidden_act)
    return Scorer(model.to(device), head.to(device), config)
