"""LoRA adapters on a network: put on, taken off, saved and loaded. `lora_files` reads those of others."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from attune.diffusion.lora_files import ADAPTER_FILE, checked_ranks, part_of, read_lora
from attune.diffusion.lora_layers import LAYERS
from attune.weights import check_finite, save_tensors

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
    from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from peft.tuners.lora.layer import Linear

    Denoiser = UNet2DConditionModel | SD3Transformer2DModel | FluxTransformer2DModel | ZImageTransformer2DModel
    """The networks that are trained: modules of diffusers that save themselves and take adapters."""


ENDS = (
    *("conv_in", "conv_out", "pos_embed.proj", "x_embedder", "proj_out"),
    *("all_x_embedder.2-1", "all_final_layer.2-1.linear"),  # of Z-Image
)
"""A denoiser's layers next to the latents, whose few channels have no low rank."""


def target_modules(denoiser: nn.Module, targets: str | Sequence[str], attention: Sequence[str]) -> list[str]:
    """Names of the modules that an adapter is put on.

    Args:
        targets: "attention", modules whose names end as `attention` says; "all", every Linear and Conv2d but ENDS;
            or endings of module names.
        attention: endings of the attention projections' names, which the backbone knows.

    Raises:
        ValueError: an ending fits no module.
    """
    layers = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if targets == "all":
        return [name for name in layers if name not in ENDS]
    endings = attention if targets == "attention" else targets
    for ending in endings:
        if not any(f".{name}".endswith(f".{ending}") for name in layers):
            raise ValueError(f"lora.targets: no Linear or Conv2d of the denoiser is called {ending!r}")
    return [name for name in layers if any(f".{name}".endswith(f".{ending}") for ending in endings)]


def add_lora(denoiser: Denoiser, ranks: Mapping[str, int], in_float32: bool = False) -> None:
    """Puts a trainable LoRA on exactly these modules (name -> rank): A Gaussian, B zero, alpha = rank, float32.

    Args:
        in_float32: its products are computed in float32 too, however the network computes.
    """
    rank = max(ranks.values())
    other_ranks = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=other_ranks,
        alpha_pattern=dict(other_ranks),
        init_lora_weights="gaussian",
        target_modules="|".join(map(re.escape, ranks)),
    )
    if not in_float32:
        config._register_custom_module(LAYERS)
    denoiser.add_adapter(config)
    for weight in denoiser.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def lora_layers(denoiser: nn.Module) -> list[BaseTunerLayer]:
    """The modules that hold the network's adapter."""
    return [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]


def set_lora(layers: Sequence[BaseTunerLayer], enabled: bool) -> None:
    """Switches an adapter by a flag on each of its layers.

    peft's setter freezes the weights as well, and diffusers' looks for the layers each time: 5 ms on a tiny UNet.
    """
    for layer in layers:
        layer._disable_adapters = not enabled


def can_merge(denoiser: nn.Module, layers: Sequence[BaseTunerLayer]) -> bool:
    """Whether there is an adapter that is on, and `merged_lora` would lose nothing of it.

    Weights in half precision have 8 or 11 bits: most of what an adapter adds early in training is below the last of
    them and would be rounded away. Quantised weights cannot be added to. What is compiled expects its weights in place.
    """
    if getattr(denoiser, "_compiled_call_impl", None) is not None:
        return False
    return bool(layers) and all(
        not layer._disable_adapters and _base_weight(layer).dtype == torch.float32 for layer in layers
    )


@contextmanager
def merged_lora(layers: Sequence[BaseTunerLayer]) -> Iterator[None]:
    """Inside, the base weights W are W + B A, the adapter is off, and there is no gradient.

    The sums are other tensors in the weights' place, and the old ones are put back afterwards: the base is the same bit
    for bit. Inside, memory holds the weights that the adapter touches twice.
    """
    weights = [_base_weight(layer) for layer in layers]
    kept = [weight.data for weight in weights]
    try:
        with torch.no_grad():
            for layer, weight in zip(layers, weights, strict=True):
                weight.data = weight.data + cast("Linear", layer).get_delta_weight(layer.active_adapters[0])
            set_lora(layers, enabled=False)
            yield
    finally:
        for weight, data in zip(weights, kept, strict=True):
            weight.data = data.to(weight.device)  # `model.offload` may have moved the network meanwhile
        set_lora(layers, enabled=True)


def _base_weight(layer: BaseTunerLayer) -> nn.Parameter:
    return cast("nn.Parameter", layer.get_base_layer().weight)


def lora_ranks(denoiser: nn.Module) -> dict[str, int]:
    """Module name -> rank of its LoRA; empty without an adapter."""
    down = [(name, weight) for name, weight in denoiser.named_parameters() if ".lora_A." in name]
    return {name.partition(".lora_A.")[0]: len(weight) for name, weight in down}


def unload_lora(denoiser: Denoiser) -> Denoiser:
    """The same network, without its adapter if it had one."""
    if lora_ranks(denoiser):
        denoiser.unload_lora()
    return denoiser


def load_lora(denoiser: Denoiser, file: Path, may_be_zero: bool = False, in_float32: bool = False) -> None:
    """Replaces the network's adapter, if it has one, by that of a file. Raises ValueError as `read_lora`."""
    weights = read_lora(file, denoiser, may_be_zero)
    ranks = checked_ranks(weights, denoiser, file)
    add_lora(unload_lora(denoiser), ranks, in_float32)
    set_peft_model_state_dict(denoiser, weights)


def save_lora(denoiser: nn.Module, folder: Path, header: Mapping[str, str]) -> None:
    """Writes the network's adapter as diffusers reads it (`load_lora_weights`), under peft's names.

    diffusers' own converter would rename attention only, and its reader, which tells the format by the first name
    in the file, would then leave the attention out. Its `lora_adapter_metadata` is left out: with alpha = rank it
    tells nothing that the tensors do not, and diffusers gives every key of it to peft.

    Args:
        header: texts for the file's header, besides rank and alpha.

    Raises:
        ValueError: a weight is not finite; nothing is written.
    """
    named, part = get_peft_model_state_dict(denoiser), part_of(denoiser)
    weights = {f"{part}.{name}": value.contiguous() for name, value in named.items()}
    check_finite(weights, f"{folder} was not saved")
    ranks = set(lora_ranks(denoiser).values())
    rank = str(*ranks) if len(ranks) == 1 else "dynamic"  # as kohya's `resize_lora` says that it differs
    save_tensors(weights, folder / ADAPTER_FILE, {**header, "lora_rank": rank, "lora_alpha": rank})
