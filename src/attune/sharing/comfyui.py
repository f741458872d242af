"""A transformer's LoRA for ComfyUI, which reads diffusers' names as they are: what the file's header says.

Of Stable Diffusion 3, FLUX and Z-Image, ComfyUI takes `transformer.<module>.lora_A.weight` and `.lora_B.weight` for the
change B A of that module's weight, times alpha / rank where there is a tensor `transformer.<module>.alpha`. None is
written, as alpha is the rank: diffusers' reader of these models refuses a file with a name in which there is no "lora".
Source: ComfyUI, comfy/lora.py (model_lora_keys_unet) at 17358c8, comfy/weight_adapter/lora.py at 6f98b15.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attune.backbones._diffusers import InDiffusers


def header(ranks: Mapping[str, int], names: InDiffusers, resolution: int, made: Mapping[str, Any]) -> dict[str, str]:
    """What the file says of itself: keys of Stability's model specification. Source: sd-scripts, sai_model_spec.py.

    Args:
        ranks: of the modules; the largest is told.
        made: run.json.
    """
    rank = str(max(ranks.values()))
    return {
        "lora_rank": rank,
        "lora_alpha": rank,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{names.tag}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": made["run"],
        "modelspec.description": f"{made['method']} on {made['base']['path']}, trained with attune",
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.tags": f"{made['method']}, preference",
    }
