"""How far a training is: what a checkpoint holds besides weights and the optimizer's state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Progress:
    """Batches and steps done, and what was recorded of them. Its fields are the checkpoint's `progress`."""

    batch: int = 0  # batches done
    step: int = 0  # optimizer steps done
    history: list[dict[str, float]] = field(default_factory=list)  # one row of metrics per optimizer step
    scaler: dict[str, Any] = field(default_factory=dict)  # state of the loss scaler; empty unless the loss is scaled
    scores: list[dict[str, float]] = field(default_factory=list)  # validation scores: batch (batches done), step, score
    best: list[Tensor] = field(default_factory=list)  # weights at the best score; empty without patience
