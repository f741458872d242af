"""What a base model is in diffusers: names of its classes and folders, which are known before any file is here.

A package, a model card and the plan ask this of a backbone's file. Each has `in_diffusers(model)`, and its class the
methods `pipeline_parts` and `pipeline_options`; one without them works, but has no package.
"""

from __future__ import annotations

from dataclasses import dataclass

from attune.config import plugins
from attune.config.settings import Model


@dataclass(frozen=True)
class InDiffusers:
    """Names of a base model there and on the Hub."""

    pipeline: str  # class
    denoiser: str  # class
    part: str  # its folder, its argument of the pipeline and the first part of its LoRA's names: unet or transformer
    tag: str  # on the Hub, and as architecture in the header of a LoRA
    is_flow: bool = False  # else variance-preserving, sampled by DDIM
    left_out: tuple[str, ...] = ()  # parts of the pipeline that are not loaded, which it must be told
    guidance_off: float = 1.0  # the pipeline's guidance_scale without guidance, for which 1 is written here

    def guidance_scale(self, ours: float) -> float:
        """What the pipeline is told for a guidance of ours."""
        return ours - 1.0 + self.guidance_off


def in_diffusers(model: Model) -> InDiffusers | None:
    """What the backbone of `model.backbone` says of itself; None if it says nothing."""
    describe = getattr(plugins.load("backbones", model.backbone), "in_diffusers", None)
    return None if describe is None else describe(model)


def sampler_name(model: Model, eta: float) -> str:
    """What our sampler's step is called on this model: without noise, that of a flow is Euler's."""
    names = in_diffusers(model)
    if names is None or not names.is_flow:
        return "DDIM"
    return "Euler" if eta == 0 else "DDIM's step on the flow"
