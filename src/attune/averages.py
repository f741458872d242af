"""Exponential moving averages of weights in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from attune.fsdp import local


@dataclass(frozen=True)
class MovingAverage:
    """Weights r that follow the trained ones theta: after each optimizer step r becomes d r + (1 - d) theta.

    They are float32, as theta is. In half precision an average hardly moves, as (1 - d) (theta - r) is below the last
    bit of r. Every process that trains together computes the same average, of pieces where weights are cut.
    """

    weights: Sequence[Tensor]  # r, changed in place, in the order and the shapes of theta
    decay: float  # d: 0 is theta, 1 the start, which never moves
    warmup: bool = True

    def update(self, trained: Sequence[Tensor], step: int) -> None:
        """Follows `trained` after optimizer step number `step`, counted from 1."""
        with torch.no_grad():
            ours, theirs = ([local(weight) for weight in weights] for weights in (self.weights, trained))
            get_ema_multi_avg_fn(decay_at(self.decay, step) if self.warmup else self.decay)(ours, theirs, None)


def exchange(some: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Lets weights change places with others of their shapes; one of them at a time is held twice."""
    with torch.no_grad():
        for mine, theirs in zip(map(local, some), map(local, others), strict=True):
            kept = mine.clone()
            mine.copy_(theirs)
            theirs.copy_(kept)


def decay_at(decay: float, step: int) -> float:
    """The decay after optimizer step number `step`, counted from 1: less in the beginning, as little is averaged yet.

    min(d, (1 + n) / (10 + n)), that is 2/11, 3/12, ...; but 1 stays 1.
    Source: Linear-DPO, arXiv:2605.21123, utils/train_utils.py ModelEMA; diffusers' EMAModel has the same.
    """
    return decay if decay == 1 else min(decay, (1 + step) / (10 + step))
