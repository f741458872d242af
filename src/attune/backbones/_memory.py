"""Which of a base model's networks are in memory, and how many pixels they are given at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

N = TypeVar("N", bound=nn.Module)

MAX_PIXELS = 2**21  # decoded or encoded at a time: 8 images of 512 px or 2 of 1024 px; one of 512 px takes about 0.5 GB


class Turns:
    """Networks that take turns on a GPU too small for all of them (`model.offload`); else they stay where they are."""

    def __init__(self, device: torch.device, offload: bool):
        self.device, self.offload = device, offload and device.type != "cpu"
        self.start = torch.device("cpu") if self.offload else device
        """Where networks are loaded to."""
        self._here: nn.Module | None = None

    def __call__(self, network: N) -> N:
        """The network, on the device; what was there before makes room for it."""
        if self.offload and network is not self._here:
            if self._here is not None:
                self._here.to("cpu")
            self._here = network.to(self.device)
        return network


def release(owner: object, *names: str) -> None:
    """Lets go of cached properties, each of which is made anew when it is next asked for."""
    for name in names:
        vars(owner).pop(name, None)


def in_parts(f: Callable[[Tensor], Tensor], rows: Tensor, pixels_per_row: int) -> Tensor:
    """f(rows), of as many rows at a time as `MAX_PIXELS` allows.

    With a graph all at once: what a part keeps for the backward pass would not be given back between parts.
    """
    if torch.is_grad_enabled() and rows.requires_grad:
        return f(rows)
    most = max(1, MAX_PIXELS // pixels_per_row)
    return f(rows) if len(rows) <= most else torch.cat([f(part) for part in rows.split(most)])
