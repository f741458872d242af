"""What the tests of attune/training train: one weight by hand-made gradients, and methods on the tiny model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from attune.config.settings import TrainingConfig
from attune.data.store import PreparedData
from attune.diffusion.noise import Draws
from attune.diffusion.policy import Policy
from attune.distributed import Part, Shard
from attune.fsdp import full_tensor
from attune.interfaces import Objective
from attune.methods import alignprop, ddpo, dpo, sft, spo
from attune.training.checkpoint import Checkpoint
from attune.training.loop import Batches, train
from attune.training.step import init_distributed

OWN = {
    "sft": {},
    "dpo": {"beta": 500.0, "caption_dropout": 0.0},
    "spo": {"beta": 10.0, "clip": 0.1, "candidates": 2, "threshold": 0.0, "steps": 3, "start_step": 1}
    | {"minibatch_size": 2, "guidance_scale": 2.0, "inner_steps": 0},
    "alignprop": {"rewards": {"light": 1.0}, "steps": 3, "guidance_scale": 2.0, "target": None}
    | {"truncation": "fixed", "truncation_range": [0.0], "checkpoint_steps": False},
    "ddpo": {"rewards": {"light": 1.0}, "images_per_prompt": 2, "clip": 0.1, "steps": 2, "guidance_scale": 2.0}
    | {"minibatch_size": 4},
}
METHODS = {"sft": sft, "dpo": dpo, "spo": spo}
BUILT = {**METHODS, "alignprop": alignprop, "ddpo": ddpo}


class Light:
    """A scorer of brightness, which has a gradient."""

    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))


NEEDS = {"spo": [tiny.brightness], "alignprop": [{"light": Light()}], "ddpo": [{"light": Light()}]}


def method(name: str, policy: Policy, **changes: Any) -> Objective:
    """A method with a learning rate that shows after three batches, and `changes`."""
    loop = {"lora": None, "lr": 1e-3, "batches": 3, "batch_size": 2, "warmup": 2}
    config = BUILT[name].Config(**(tiny.PLAIN | loop | OWN[name] | changes))
    return BUILT[name].Method(config, policy, *NEEDS.get(name, []))


def every_weight(policy: Policy, shard: Shard, moved: float = 0.02) -> Policy:
    """The bare policy, all of whose weights are trained and have left the reference; cut, if `shard` says so."""
    policy.shard = shard
    if shard.sharded_weights:
        init_distributed(shard)
    policy.unfreeze()
    tiny.move(policy, moved)
    return policy


def flat(weights: list[Tensor]) -> Tensor:
    """All weights in one row, put together from their pieces."""
    return torch.cat([full_tensor(weight.detach()).flatten().clone() for weight in weights])


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def at_batch(trained: Objective, at: int, act: Callable[[], object]) -> None:
    """Lets something happen in a training from the beginning, when batch number `at` has been read."""
    inner, begun = trained.minibatches, count()

    def minibatches(batch: Any, draws: Draws) -> Iterable[Part[Any]]:
        if next(begun) == at:
            act()
        return inner(batch, draws)

    trained.minibatches = minibatches


def numbers(b: int, shard: Shard) -> Part[int]:
    """The batches of a `Line`, which are just numbers."""
    return Part(b, 1)


Row = float | tuple[float, ...]


class Line:
    """One weight w, starting at 0; the loss of a row x is x w, so the gradient of a minibatch is the mean of its rows.

    A minibatch is a tuple of rows; a number stands for a minibatch of one.
    """

    def __init__(self, *per_batch: list[Row]):
        self.module: nn.Module = nn.Linear(1, 1, bias=False)
        self.module.weight.data.zero_()
        self.shard, self.reference_model, self.autocast = Shard(), None, None
        self.moving_reference = None
        self.per_batch = [[x if isinstance(x, tuple) else (x,) for x in batch] for batch in per_batch]
        self.config = TrainingConfig(lr=0.1, batches=1, batch_size=1)

    @property
    def w(self) -> float:
        return self.module.weight.item()

    def parameters(self) -> list[Tensor]:
        return list(self.module.parameters())

    def minibatches(self, batch: int, draws: Draws) -> list[Part[tuple[float, ...]]]:
        some = self.per_batch[batch % len(self.per_batch)]
        return [Part(rows[self.shard.rows(len(rows))], len(rows)) for rows in some]

    def loss(self, rows: tuple[float, ...]) -> tuple[Tensor, dict[str, Any]]:
        x = sum(rows) / len(rows)
        loss = self.module(torch.tensor([x])).sum()
        return loss, {"loss": loss, "x": x}

    def train(
        self, batches: int, loop: dict[str, Any] | None = None, drawn: Batches = numbers, **config: Any
    ) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
        """History and scores of that many batches, at rate 0.1 without weight decay.

        Args:
            loop: options of `train`.
            drawn: the batches, if they are not just numbers.
            config: fields of the TrainingConfig.
        """
        plain = {"lr": 0.1, "batch_size": 1, "weight_decay": 0.0}
        self.config = TrainingConfig(batches=batches, **(plain | config))
        return train(self, self, drawn, seed=0, **(loop or {}))


class HalfLine(Line):
    """A line through float16, where gradients below 6e-8 are nothing unless the loss is scaled up."""

    def __init__(self, *per_batch: list[Row]):
        super().__init__(*per_batch)
        self.autocast = torch.float16

    def loss(self, rows: tuple[float, ...]) -> tuple[Tensor, dict[str, Any]]:
        through = (self.module.weight * 1.0).half()
        loss = (through.float() * sum(rows) / len(rows)).sum()
        return loss, {"loss": loss}


def halved(policy: Policy) -> Policy:
    """The policy on a float16 base, its adapter left in float32."""
    for weight in policy.denoiser.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.half()
    policy.backbone.dtype = torch.float16
    return policy


class Interrupted(Exception):
    """As if the process had been killed."""


def interrupted(drawn: Batches, at: int) -> Batches:
    """The batches up to number `at`, where the process 'dies'."""

    def batches(b, shard):
        if b == at:
            raise Interrupted
        return drawn(b, shard)

    return batches


def run_until(trained: Objective, data: PreparedData, root: Path, stop: int, key: str = "key") -> None:
    """Trains with a checkpoint after every batch; the process 'dies' before batch `stop`."""
    checkpoint = Checkpoint(root, "align@x", key, every_seconds=0)
    with pytest.raises(Interrupted):
        tiny.run(trained, data, batches=interrupted(tiny.batches(data, trained), stop), checkpoint=checkpoint)
