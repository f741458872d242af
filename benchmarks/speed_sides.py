"""What every comparison of `speed.py` is made of: where it runs, its two sides, and attune's policy on one of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from plain import RANK, move
from torch import Tensor

from attune.build import load_policy
from attune.config.settings import Model
from attune.diffusion.policy import Policy
from attune.training.step import allow_tf32

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "models/embedded"
BASE, CLIP, HPS = EMBEDDED / "base", EMBEDDED / "pickscore", EMBEDDED / "hpsv2"
LR, WEIGHT_DECAY = 1e-4, 1e-2
WORDS = ("red circle", "blue square", "green triangle", "yellow star")


@dataclass(frozen=True)
class Place:
    """The models that both sides read, and how much they are given."""

    folder: Path  # a pipeline in diffusers' layout
    dtype: str  # of frozen networks, "float32" or "bfloat16"
    resolution: int  # pixels
    n: int  # pairs, prompts or images of one call
    device: torch.device
    options: Mapping[str, Any] = field(default_factory=dict)  # of the work

    @property
    def computes(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def latent_side(self) -> int:
        """Latents per side of an image."""
        config = json.loads((self.folder / "vae/config.json").read_text())
        return self.resolution // 2 ** (len(config["block_out_channels"]) - 1)


@dataclass(frozen=True)
class Side:
    """One side of a comparison: what is called, and the weights that a call changes.

    `step` returns what must be equal on both sides.
    """

    step: Callable[[], Mapping[str, Tensor]]
    trained: Sequence[Tensor] = ()


def prompts(n: int) -> list[str]:
    """n prompts in the words of the embedded model."""
    return [f"a {WORDS[i % len(WORDS)]}" for i in range(n)]


def pixels(n: int, place: Place) -> Tensor:
    """Random images (n, 3, H, W) in [0, 1], the same on both sides."""
    shape = (n, 3, place.resolution, place.resolution)
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)).to(place.device)


def base_policy(place: Place) -> Policy:
    """The pipeline as a run of attune loads it, with all of its frozen networks in one precision."""
    allow_tf32(False)
    given = {"dtype": place.dtype, "vae_dtype": place.dtype, "resolution": place.resolution}
    return load_policy(Model(backbone="sd", path=str(place.folder), **given))


def lora_policy(place: Place) -> Policy:
    """The pipeline with an adapter as `plain.add_lora` puts one on, moved from its start."""
    policy = base_policy(place)
    policy.add_adapter(RANK, seed=0)
    move(policy.parameters())
    return policy


def loop_settings(place: Place) -> dict[str, Any]:
    """Settings of training that are the same on both sides."""
    shared = {"lr": LR, "weight_decay": WEIGHT_DECAY, "warmup": 0, "accumulation": 1, "gradient_checkpointing": False}
    return shared | {"batches": 1, "batch_size": place.n}


def scalar(value: float) -> Tensor:
    return torch.tensor([float(value)], dtype=torch.float64)
