"""Which of a base model's networks are in memory, and how many pixels they are given at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

N = TypeVar("N", bound=nn.Module)

MAX_PIXELS = 2**21  # decoded or encoded at a time: 8 images of 512 px or 2 of 1024 px; one of 512 px takes about 0.5 GB


class ModelOffload:
    """Networks that wait on the CPU and are on the GPU one at a time (`model.offload`); else they stay where they are.

    Source: diffusers' `enable_model_cpu_offload`, which is for its pipelines.
    """

    def __init__(self, device: torch.device, offload: bool):
        self.device, self.offload = device, offload and device.type != "cpu"
        self.load_to = torch.device("cpu") if self.offload else device
        """Where networks are loaded to."""
        self._onloaded: nn.Module | None = None

    def onload(self, network: N) -> N:
        """The network, on the device; the one that was there before goes back to the CPU."""
        if self.offload and network is not self._onloaded:
            if self._onloaded is not None:
                self._onloaded.to("cpu")
            self._onloaded = network.to(self.device)
        return network


def in_parts(f: Callable[[Tensor], Tensor], rows: Tensor, pixels_per_row: int) -> Tensor:
    """f(rows), of as many rows at a time as `MAX_PIXELS` allows.

    With a graph all at once: what a part keeps for the backward pass would not be given back between parts.
    """
    if torch.is_grad_enabled() and rows.requires_grad:
        return f(rows)
    most = max(1, MAX_PIXELS // pixels_per_row)
    return f(rows) if len(rows) <= most else torch.cat([f(part) for part in rows.split(most)])
