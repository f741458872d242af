"""LoRA layers that compute in the dtype of their base, as the authors' scripts do under autocast.

peft's own convert their input to the adapter's float32: a copy of every input, kept for the backward pass, and
products at a fraction of a GPU's speed, whose digits are lost when they are added to a result in half precision.
Autocast of the whole network would compute its norms in float32, which needs more memory yet.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from peft.tuners.lora.layer import Conv2d, Linear
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


class _InInputDtype:
    """Of a half-precision input both factors are applied in its dtype; what float32 gives is as ever."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        computes = torch.autocast(x.device.type, x.dtype, cache_enabled=False) if x.dtype in HALF else nullcontext()
        with computes:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]  # peft's

    def _cast_input_dtype(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x if x.dtype in HALF else super()._cast_input_dtype(x, dtype)  # type: ignore[misc]


class HalfLinear(_InInputDtype, Linear):  # type: ignore[misc]  # peft overloads for an input of None
    """Of a Linear."""


class HalfConv2d(_InInputDtype, Conv2d):  # type: ignore[misc]
    """Of a Conv2d."""


LAYERS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: HalfLinear, nn.Conv2d: HalfConv2d}
"""What peft puts around a layer, by the layer's type."""
