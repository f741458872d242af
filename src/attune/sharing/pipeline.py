"""diffusers' own pipelines of a base model's parts: what a package is loaded into before it is called done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
from torch import Tensor

from attune.backbones._diffusers import InDiffusers
from attune.interfaces import Backbone


def pipeline_of(backbone: Backbone, names: InDiffusers) -> Any:
    """diffusers' pipeline around the parts of a base model, which are shared."""
    pipeline = getattr(diffusers, names.pipeline)(**backbone.pipeline_parts())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generated(
    pipeline: Any, backbone: Backbone, prompts: Sequence[str], start: Tensor, steps: int, guidance_scale: float
) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] from the latents `start`, without noise, as users of diffusers get them.

    Args:
        guidance_scale: as the pipeline calls it, see `InDiffusers.guidance_scale`.
    """
    size, own = backbone.resolution, backbone.pipeline_options(start)
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "pt", **own}
    return pipeline(list(prompts), height=size, width=size, **options).images.float().cpu()


def read_denoiser(folder: Path, names: InDiffusers) -> Any:
    """A whole denoiser as a user of diffusers loads it."""
    return getattr(diffusers, names.denoiser).from_pretrained(folder)
