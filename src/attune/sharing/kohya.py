"""Adapters as kohya's sd-scripts write them, which ComfyUI and A1111 read: names of tensors, and the file's header.

Stable Diffusion 1 and 2 keep diffusers' names of modules, SDXL has those of Stability's own code (`sgm`), as sd-scripts
trains the two on different implementations. A LoRA of a convolution has a down factor of its kernel's size and an up
factor of 1 x 1. Source: sd-scripts, networks/lora.py, library/sdxl_model_util.py and library/sai_model_spec.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PREFIX = "lora_unet_"
RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {  # modules outside the blocks
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.((?:resnets|attentions)\.\d+)\.(.+)")


def is_xl(unet: Mapping[str, Any]) -> bool:
    """Whether a denoiser's configuration is SDXL's, which is told its picture's size."""
    return unet.get("addition_embed_type") == "text_time"


def to_kohya(tensors: Mapping[str, Tensor], unet: Mapping[str, Any]) -> dict[str, Tensor]:
    """A LoRA under kohya's names, with an alpha for each module.

    The alpha is the largest rank in all modules; where the rank r is lower, B is multiplied by r / alpha. An alpha of
    its own for each module would mean the same, but diffusers (0.42.1) loses those of attention where they differ.

    Args:
        tensors: `unet.<module>.lora_A.weight` (r, ...) and `.lora_B.weight`, scaled so that alpha = r.
        unet: the denoiser's configuration in diffusers.

    Raises:
        ValueError: a name is not understood.
    """
    found: dict[str, Tensor] = {}
    alpha = max((len(value) for name, value in tensors.items() if name.endswith(".lora_A.weight")), default=0)
    for key, value in tensors.items():
        module, _, side = key.removeprefix("unet.").partition(".lora_")
        stem = PREFIX + (sgm_name(module, unet) if is_xl(unet) else module).replace(".", "_")
        if side == "A.weight":
            found[f"{stem}.lora_down.weight"] = value.contiguous()
            found[f"{stem}.alpha"] = torch.tensor(float(alpha))
        elif side == "B.weight":
            rank = value.shape[1]
            found[f"{stem}.lora_up.weight"] = (value if rank == alpha else value * (rank / alpha)).contiguous()
        else:
            raise ValueError(f"{key} is no factor of a LoRA")
    return found


def sgm_name(module: str, unet: Mapping[str, Any]) -> str:
    """A module of diffusers' SDXL by its name in sgm: `down_blocks.1.attentions.0.norm` is `input_blocks.4.1.norm`.

    Blocks are numbered through: one of diffusers has `layers_per_block` layers and a sampler; on the way up, a layer
    more.

    Raises:
        ValueError: there is no such module in SDXL.
    """
    if module in OUTSIDE:
        return OUTSIDE[module]
    per_block = unet["layers_per_block"]
    block, middle = _BLOCK.fullmatch(module), _MIDDLE.fullmatch(module)
    if not isinstance(per_block, int) or (block is None and (middle is None or middle[1] not in MIDDLE)):
        raise ValueError(f"{module} has no name in kohya's layout of SDXL")
    if block is None:
        assert middle is not None
        return f"middle_block.{MIDDLE[middle[1]]}.{_inside(middle[1], middle[2])}"
    way, number, kind, layer, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
    first = number * (per_block + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + per_block + 1}.0.op"
    if kind == "upsamplers":
        place = 2 if "CrossAttn" in unet["up_block_types"][number] else 1
        return f"output_blocks.{first + per_block}.{place}.{rest}"
    start = f"input_blocks.{first + layer + 1}" if way == "down" else f"output_blocks.{first + layer}"
    return f"{start}.{int(kind == 'attentions')}.{_inside(kind, rest)}"


def _inside(kind: str, name: str) -> str:
    """The name of a layer within a block, of which residual ones have others in sgm."""
    return RESNET.get(name, name) if kind.startswith("resnets") else name


def header(
    ranks: Mapping[str, int], unet: Mapping[str, Any], prediction_type: str, resolution: int, made: Mapping[str, Any]
) -> dict[str, str]:
    """What the header of kohya's file says: its own keys (`ss_`) and those of Stability's model specification.

    Args:
        ranks: of the modules; the largest is the alpha of all.
        prediction_type: epsilon or v_prediction.
        resolution: pixels.
        made: run.json.
    """
    xl, two, v = is_xl(unet), unet.get("cross_attention_dim") == 1024, prediction_type == "v_prediction"
    version = "sdxl_base_v1-0" if xl else f"sd_v2{'_v' if v else ''}" if two else "sd_v1"
    kind = "xl-v1-base" if xl else f"v2-{'768-v' if v else '512'}" if two else "v1"
    rank = str(max(ranks.values()))
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_base_model_version": version,
        "ss_v2": str(two and not xl),
        "ss_sd_model_name": made["base"]["path"],
        "ss_output_name": made["run"],
        "ss_seed": str(made["seed"]),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-{kind}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models" if xl else "diffusers",
        "modelspec.title": made["run"],
        "modelspec.description": f"{made['method']} on {made['base']['path']}, trained with attune",
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": "v" if v else "epsilon",
        "modelspec.tags": f"{made['method']}, preference",
    }
