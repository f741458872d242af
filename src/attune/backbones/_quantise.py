"""A frozen denoiser whose linear layers are held in 8 or 4 bits, for adapters on small GPUs.

Source: Dettmers et al. 2022, arXiv:2208.07339 (int8), and 2023, arXiv:2305.14314 (nf4); both by bitsandbytes.
Convolutions and norms stay as they are: in SD 1.5 about two fifths of the weights, in SDXL one seventh.
"""

from __future__ import annotations

import logging
from typing import Any, TypeVar

import torch
from torch import nn

N = TypeVar("N", bound=nn.Module)
BLOCK = 64  # weights of a row that share a scale in nf4; the layers of SD 1.5 and SDXL are multiples of it
INT8_LOGGER = "bitsandbytes.autograd._functions"  # of what multiplies in int8


def quantise(network: N, kind: str, device: torch.device) -> N:
    """The network with other linear layers, on a device.

    Args:
        network: frozen, and on the CPU: weights become 8 or 4 bits when they are moved, to the CPU too.
        kind: "int8" or "nf4".
    """
    logging.getLogger(INT8_LOGGER).addFilter(_is_not_of_casts)
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and layer.in_features % BLOCK == 0:
                setattr(parent, name, _layer(layer, kind))
    return network.to(device)


def _is_not_of_casts(record: logging.LogRecord) -> bool:
    """False for the warning, at every call of every layer in int8, that its inputs are cast to float16.

    Thousands of lines would hide all others. The cast is how LLM.int8() works; a base model whose values float16 cannot
    hold refuses int8 before anything is read.
    """
    return "inputs will be cast" not in record.getMessage()


def _layer(linear: nn.Linear, kind: str) -> nn.Module:
    """The layer that takes a Linear's place, with its weight not quantised yet.

    It is made without memory, as bitsandbytes would draw random weights for it, in float32 and on the CPU.
    """
    import bitsandbytes

    made: Any
    sizes, options = (linear.in_features, linear.out_features), {"bias": linear.bias is not None, "device": "meta"}
    if kind == "nf4":
        made = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=linear.weight.dtype, quant_type="nf4", **options)
        made.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    else:
        made = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False, **options)
        made.weight = bitsandbytes.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = linear.bias
    return made.eval()
