"""The one training loop: every method and the preference model go through these lines.

Resuming is exact by construction. All randomness of batch b comes from a generator seeded by (seed, b), so a
checkpoint holds weights, optimizer state and b, and no generator state; online methods are checkpointed
between rollouts, never inside one, and no checkpoint is written while a group of accumulated minibatches waits
for the next batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from attune.config import TrainingConfig
from attune.interfaces import Log, Objective
from attune.training.checkpoint import Checkpoint
from attune.training.guard import NonFiniteError, first_bad_module


class Trained(Protocol):
    """What is trained: `module` is called (and replaced by its distributed wrapper), `parameters()` move."""

    module: nn.Module

    def parameters(self) -> list[Tensor]: ...


Batches = Callable[[int, torch.Generator], Any]
"""Batch number b, given its generator: offline data picks rows by b, online data picks prompts."""


@dataclass
class Progress:
    """How far training is; the part of a checkpoint that is not weights."""

    batch: int = 0
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self.batch, "step": self.step, "history": self.history}


def train(
    objective: Objective,
    trained: Trained,
    batches: Batches,
    config: TrainingConfig,
    *,
    seed: int,
    title: str = "train",
    log: Log = lambda metrics, step: None,
    checkpoint: Checkpoint | None = None,
    preview: Callable[[int], None] | None = None,
    preview_every: int = 0,
) -> list[dict[str, float]]:
    """Runs `config.batches` batches; returns one row of metrics per optimizer step.

    Raises:
        NonFiniteError: a loss or gradient is NaN or infinite; the last checkpoint is intact.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    parameters = trained.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    trained.module, optimizer = accelerator.prepare(trained.module, optimizer)
    progress = Progress()
    if checkpoint is not None:
        progress = Progress(**checkpoint.restore(parameters, optimizer, default=progress.state_dict()))
    bar = tqdm(
        range(progress.batch, config.batches),
        desc=title,
        initial=progress.batch,
        total=config.batches,
        unit="batch",
    )
    waiting: list[Any] = []  # of a group that is not complete yet: groups run across batches
    for b in bar:
        generator, last = batch_generator(seed, b), b + 1 == config.batches
        minibatches = chain(waiting, objective.minibatches(batches(b, generator), generator))
        waiting = []
        for group in _groups(minibatches, config.accumulation):
            if len(group) < config.accumulation and not last:
                waiting = group
                continue
            row = optimizer_step(objective, group, parameters, optimizer, config, accelerator, progress.step)
            progress.step += 1
            progress.history.append({"step": progress.step, "batch": b, **row})
            log(row, progress.step)
            bar.set_postfix({k: f"{row[k]:.4g}" for k in ("loss", "margin", "accuracy") if k in row}, refresh=False)
        progress.batch = b + 1
        if checkpoint is not None and not waiting:
            checkpoint.maybe_save(parameters, optimizer, progress.state_dict(), last=last)
        if preview is not None and preview_every and (b + 1) % preview_every == 0:
            preview(progress.step)
    return progress.history


def optimizer_step(
    objective: Objective,
    group: list[Any],
    parameters: list[Tensor],
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    accelerator: Accelerator,
    step: int,
) -> dict[str, float]:
    """Accumulates the mean gradient of a group of minibatches, clips it and steps."""
    rows = []
    for minibatch in group:
        loss, metrics = objective.loss(minibatch)
        if not torch.isfinite(loss):
            raise NonFiniteError(f"loss is {loss.item()} at step {step + 1}: {first_bad_module(objective, minibatch)}")
        accelerator.backward(loss / len(group))
        rows.append({k: v.item() if isinstance(v, Tensor) else float(v) for k, v in metrics.items()})
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf))
    if not math.isfinite(norm):
        raise NonFiniteError(f"grad_norm is {norm} at step {step + 1}: {first_bad_module(objective, group[-1])}")
    lr = config.lr * min(1.0, (step + 1) / config.warmup) if config.warmup else config.lr
    for param_group in optimizer.param_groups:
        param_group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    return {**means, "grad_norm": norm, "lr": lr}


def batch_generator(seed: int, batch: int) -> torch.Generator:
    """The generator every random choice of a batch comes from."""
    digest = hashlib.sha256(f"{seed}/{batch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def epoch_rows(n: int, batch_size: int, batch: int, seed: int) -> Tensor:
    """Rows of batch number `batch` when n rows are shuffled anew each epoch, batches running across epochs."""
    rows, position = [], batch * batch_size
    while len(rows) < batch_size:
        epoch, offset = divmod(position + len(rows), n)
        order = torch.randperm(n, generator=batch_generator(seed, -1 - epoch))
        rows += order[offset : offset + batch_size - len(rows)].tolist()
    return torch.tensor(rows)


def _groups(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while group := list(islice(items, size)):
        yield group
