"""One optimizer step: the mean gradient of a group of minibatches, clipped; and what it is done with."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn

from attune.config.settings import TrainingConfig
from attune.distributed import Shard
from attune.interfaces import Objective
from attune.training.guard import NonFiniteError, first_bad_module

# The first process may be long at a held-out score or a preview; of one that is gone the launcher knows at once.
PATIENCE = timedelta(hours=2)


class Trained(Protocol):
    """What is trained: `module` is called (and replaced by its distributed wrapper), `parameters()` move.

    `shard` may be missing, where one process trains.
    """

    module: nn.Module
    shard: Shard

    def parameters(self) -> list[Tensor]: ...


class Update:
    """The optimizer of what is trained, and all that belongs to its steps.

    Several processes (`trained.shard`) take a step together: each computes the loss of its rows of every minibatch,
    weighted so that the mean of their gradients is the gradient of the whole minibatch's loss.

    float16 has no gradients below 6e-8, so where the network computes in it the loss is scaled up before the
    backward pass and gradients down after it (Micikevicius et al. 2017, arXiv:1710.03740, section 3.2). Not by
    accelerate's autocast: networks are already loaded in their precision, and adapters stay in float32.
    """

    def __init__(self, trained: Trained, config: TrainingConfig):
        self.config, self.trained, self.parameters = config, trained, trained.parameters()
        self.shard = getattr(trained, "shard", Shard())
        if config.compile:
            compile_in_place(trained)
        self.accelerator = joined(self.shard)
        optimizer = build_optimizer(self.parameters, config)
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch renames broadcast_buffers
            trained.module, self.optimizer = self.accelerator.prepare(trained.module, optimizer)
        self.scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=computes_in_half(trained))

    def __call__(self, objective: Objective, group: Sequence[Any], step: int, lr: float) -> dict[str, float]:
        """Steps at rate `lr`; returns the mean metrics of the group, grad_norm before clipping, and lr.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite.
        """
        rows, norm = self.gradient(objective, group, step)
        while not math.isfinite(norm):
            if self.scaler.get_scale() <= 1:  # 1 also where nothing is scaled
                raise NonFiniteError(f"grad_norm is {norm} at step {step}: {self.whats_wrong(objective, group[-1])}")
            self.scaler.update()  # halves the scale; the same group again, so that no data is lost
            self.optimizer.zero_grad()
            rows, norm = self.gradient(objective, group, step)
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        return {**means, "grad_norm": norm, "lr": lr}

    def gradient(self, objective: Objective, group: Sequence[Any], step: int) -> tuple[list[dict[str, float]], float]:
        """Leaves the clipped mean gradient on the parameters; returns each minibatch's metrics and the true norm."""
        rows = []
        for i, minibatch in enumerate(group):
            last = i + 1 == len(group)  # gradients add up in each process by itself, and are exchanged with the last
            with nullcontext() if last else self.accelerator.no_sync(self.trained.module):
                loss, whole, metrics = self.loss(objective, minibatch)
                if not math.isfinite(whole):
                    raise NonFiniteError(f"loss is {whole} at step {step}: {self.whats_wrong(objective, minibatch)}")
                self.accelerator.backward(self.scaler.scale(loss / len(group)))
                rows.append(metrics)
        self.scaler.unscale_(self.optimizer)
        limit = self.config.max_grad_norm or math.inf
        return rows, float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))

    def loss(self, objective: Objective, minibatch: Any) -> tuple[Tensor, float, dict[str, float]]:
        """The loss of our rows, weighted for the mean over processes; that of the whole minibatch; its metrics."""
        n = len(minibatch) if self.shard.world_size > 1 else 1
        ours = self.shard.count(n)
        with self.rows_of(minibatch) as rows:
            loss, metrics = objective.loss(rows)
        values = [v.item() if isinstance(v, Tensor) else float(v) for v in (loss, *metrics.values())]
        whole, *means = (total / n for total in self.shard.all_reduce_sum([ours * value for value in values]))
        return loss * (ours * self.shard.world_size / n), whole, dict(zip(metrics, means, strict=True))

    @contextmanager
    def rows_of(self, minibatch: Any) -> Iterator[Any]:
        """Our rows of a minibatch; inside, what is trained knows whether they count."""
        if self.shard.world_size == 1:
            yield minibatch
            return
        n = len(minibatch)
        self.trained.shard = replace(self.shard, padding=self.shard.count(n) == 0)
        try:
            yield minibatch[self.shard.rows(n)]
        finally:
            self.trained.shard = self.shard

    def whats_wrong(self, objective: Objective, minibatch: Any) -> str:
        """Where numbers first stop being finite, and in which process."""
        with self.rows_of(minibatch) as rows:
            found = self.shard.all_gather_object(first_bad_module(objective, rows))
        return found[0] if len(found) == 1 else "; ".join(f"process {i}: {what}" for i, what in enumerate(found))


def joined(shard: Shard) -> Accelerator:
    """The processes of a training, met.

    Raises:
        RuntimeError: they are not as many as were started, or are to hold pieces of the weights.
    """
    # no buffer ever changes here; and a rollout, where processes need not keep step, must not wait to send one
    wrapping = DistributedDataParallelKwargs(broadcast_buffers=False)
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[wrapping, patience])
    if accelerator.num_processes != shard.world_size:
        raise RuntimeError(
            f"{shard.world_size} processes were started to train together, but accelerate knows of "
            f"{accelerator.num_processes}: each would train alone; docs/several_gpus.md says how to start them"
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise RuntimeError(
            f"accelerate is configured for {accelerator.distributed_type.value}, where a process holds pieces of the "
            "weights; here each holds all of them (docs/several_gpus.md)"
        )
    return accelerator


def learning_rate(config: TrainingConfig, history: Sequence[Mapping[str, float]], batch: int) -> float:
    """Rate of the next step, which is made in batch number `batch`.

    Warm-up counts optimizer steps: 1/n, 2/n, ..., 1. The linear schedule then falls from the full rate in the
    first batch after warm-up to 1/m of it in the last of those m batches. It counts batches because how many
    steps a rollout will make is not known beforehand; an offline method has one step per batch, so for it this
    is the usual linear decay over steps.
    """
    step, warmup = len(history), config.warmup
    if step < warmup:
        return config.lr * min(1.0, (step + 1) / warmup)
    start = int(history[warmup - 1]["batch"]) + 1 if warmup else 0
    if config.schedule == "constant" or batch <= start:
        return config.lr
    return config.lr * (config.batches - batch) / (config.batches - start)


def build_optimizer(parameters: list[Tensor], config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer that the configuration names, at its full rate."""
    options = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(parameters, **options, relative_step=False, scale_parameter=False, warmup_init=False)
    if config.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, **options)


def compile_in_place(trained: Trained) -> None:
    """torch.compile; names of modules and weights stay what they are, adapters can still be switched.

    A frozen copy that serves as reference is compiled too, lest it differ from the policy by rounding alone.
    """
    for module in filter(None, (trained.module, getattr(trained, "reference_model", None))):
        module.compile()


def computes_in_half(trained: Trained) -> bool:
    """Whether gradients pass through float16."""
    frozen = any(weight.dtype == torch.float16 for weight in trained.module.parameters())
    return frozen or getattr(trained, "autocast", None) == torch.float16
