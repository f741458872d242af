"""LAION aesthetic predictor v2: linear layers on the image feature of CLIP ViT-L/14; prompts are ignored.

Source: Schuhmann 2022, improved-aesthetic-predictor (sac+logos+ava1-l14-linearMSE.pth). The layers have no
activations between them, so the score is affine in the unit feature e: 5.2366 + 17.9956 cos(e, w). It is
unbounded by taste, up to 23: a policy that optimises it will leave the range of real images (4.5 to 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import CLIPModel

from attune.clip import (
    PREPARATIONS,
    check_images,
    find_file,
    full_precision,
    image_features,
    image_size,
    load_model,
    load_strictly,
    read_tensors,
)
from attune.config import Block, Real

LAYERS = (0, 2, 4, 6, 7)  # the gaps are dropout, which does nothing here
WIDTHS = (1024, 128, 64, 16, 1)


class Config(Block):
    """Where the CLIP and its aesthetic head are, and how images are shown to them."""

    path: str = Field(description="CLIP folder or Hub id; the published head needs openai/clip-vit-large-patch14")
    head: str = Field(description="head weights, .safetensors or .pth: a file or hf://owner/repository/file")
    revision: str | None = Field(None, description="Hub commit of the CLIP; null for a local folder")
    head_revision: str | None = Field(None, description="Hub commit of the head; null for a local file")
    hidden_act: str = Field("quick_gelu", description="activation the CLIP must have")
    preprocess: Literal["pil", "tensor", "square"] = Field(
        "pil",
        description="pil: as published, no gradient; tensor: the same, differentiable; square: AlignProp's",
    )
    expected_mean: list[Real] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="mean scores outside are an error; (3, 9) for the published weights",
    )
    license: str = Field("Apache-2.0 (head), MIT (OpenAI CLIP)", description="licence of the weights")


class Head(nn.Module):
    """The linear layers, under the published names `layers.{0,2,4,6,7}`; features (B, D) to scores (B,)."""

    def __init__(self, features: int = 768, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        sizes = zip((features, *widths), widths, strict=False)
        self.layers = nn.ModuleDict({str(n): nn.Linear(*size) for n, size in zip(LAYERS, sizes, strict=True)})

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers.values():
            features = layer(features)
        return features.squeeze(-1)


def load_head(path: str, revision: str | None = None) -> Head:
    """A frozen head of any widths.

    Raises:
        ValueError: tensors are missing or unexpected, or the file holds more than tensors.
    """
    tensors = read_tensors(find_file(path, revision))
    weights = [tensors.get(f"layers.{n}.weight") for n in LAYERS]
    if any(weight is None for weight in weights):
        raise ValueError(f"{path} has no layers.{{0,2,4,6,7}}.weight, only {sorted(tensors)}")
    head = Head(weights[0].shape[1], [len(weight) for weight in weights])
    load_strictly(head, tensors, path)
    return head.eval().requires_grad_(False)


class Scorer:
    """Aesthetic score of images; a `Reward` that ignores its prompts."""

    def __init__(self, model: CLIPModel, head: Head, config: Config) -> None:
        self.model, self.head = model, head
        self.differentiable = config.preprocess != "pil"
        self.license = config.license
        self.range = tuple(config.expected_mean) if config.expected_mean else None
        self._prepare = PREPARATIONS[config.preprocess]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), on the images' device, of images (B, 3, H, W) in [0, 1]; ValueError if not."""
        check_images(images, prompts)
        with full_precision(self.model.device):
            return self.head(self._features(images)).to(images.device)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Unit CLIP features (B, D), on the images' device, by which diversity and drift are measured."""
        check_images(images)
        with full_precision(self.model.device):
            return self._features(images).to(images.device)

    def _features(self, images: Tensor) -> Tensor:
        pixels = self._prepare(images.to(self.model.device).float(), image_size(self.model))
        return image_features(self.model, pixels)


def load(config: Config, device: torch.device | str = "cpu") -> Scorer:
    """The scorer, frozen, on a device. Raises ValueError for a wrong or incomplete checkpoint."""
    model = load_model(config.path, config.revision, config.hidden_act)
    return Scorer(model.to(device), load_head(config.head, config.head_revision).to(device), config)
