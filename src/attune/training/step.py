"""One optimizer step: the gradient of a group of minibatches, clipped, and the move along it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch import Tensor

from attune.averages import MovingAverage, exchange
from attune.config.settings import TrainingConfig
from attune.distributed import Part, Shard
from attune.fsdp import full_tensor, is_sharded
from attune.interfaces import Objective, Trainable
from attune.training.guard import NonFiniteError, nonfinite_input, nonfinite_output, nonfinite_weight

P = ParamSpec("P")
R = TypeVar("R")

# How long a process waits for the others, say while the main process saves. It does not delay the news of a process
# that has died: the launcher reports that.
COLLECTIVE_TIMEOUT = timedelta(hours=2)


class TrainStep:
    """The optimizer of a `Trainable`, and everything that an optimizer step needs.

    Several processes (`trainable.shard`) make a step together: each has its own rows of every minibatch, whose loss is
    weighted so that the mean of their gradients is the gradient of the whole minibatch's loss. A network that is
    sharded exchanges pieces of gradients by itself; one that is not is wrapped for it.

    float16 has no gradients below 6e-8, so where the network computes in it the loss is scaled up before the
    backward pass and gradients down after it (Micikevicius et al. 2017, arXiv:1710.03740, section 3.2). Accelerate's
    autocast is not used: networks are loaded in their precision already, and adapters stay in float32.
    """

    def __init__(self, trainable: Trainable, config: TrainingConfig):
        self.config, self.trainable, self.parameters = config, trainable, trainable.parameters()
        self.shard = trainable.shard
        allow_tf32(config.tf32)
        if config.compile:
            compile_in_place(trainable, None if config.compile is True else config.compile)
        self.accelerator = init_distributed(self.shard, cpu=self.parameters[0].device.type == "cpu")
        self.optimizer = build_optimizer(self.parameters, config)
        self.average: MovingAverage | None = None  # of the trained weights; if there is one, it is the result
        if config.ema_decay is not None:
            self.average = MovingAverage([weight.detach().clone() for weight in self.parameters], config.ema_decay)
        self.averages = [average for average in (trainable.moving_reference, self.average) if average is not None]
        self.sharded = is_sharded(trainable.module)
        if not self.sharded:
            self._wrap()
        self.scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=computes_in_half(trainable))

    @property
    def weights(self) -> list[Tensor]:
        """All weights that a step changes: the trained ones, then what follows them. A checkpoint holds these."""
        return [*self.parameters, *(weight for average in self.averages for weight in average.weights)]

    @property
    def result(self) -> Sequence[Tensor]:
        """The weights that are validated and saved: the trained ones, or their average."""
        return self.parameters if self.average is None else self.average.weights

    def with_result(self, look: Callable[P, R]) -> Callable[P, R]:
        """What calls `look` while `result` is in the place of the trained weights."""
        if self.average is None:
            return look
        average = self.average.weights

        def looked(*args: P.args, **options: P.kwargs) -> R:
            exchange(self.parameters, average)
            try:
                return look(*args, **options)
            finally:
                exchange(self.parameters, average)

        return looked

    def _wrap(self) -> None:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch renames broadcast_buffers
            prepared = self.accelerator.prepare(self.trainable.module, self.optimizer)
        self.trainable.module, self.optimizer = prepared

    def __call__(self, objective: Objective, group: Sequence[Part[Any]], step: int, lr: float) -> dict[str, float]:
        """Makes one step at rate `lr`; returns the group's mean metrics, grad_norm before clipping, and lr.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite.
        """
        metrics, grad_norm = self.gradient(objective, group, step)
        while not math.isfinite(grad_norm):
            if self.scaler.get_scale() <= 1:  # 1 also where nothing is scaled
                where = self.locate_nonfinite(objective, group[-1])
                raise NonFiniteError(f"grad_norm is {grad_norm} at step {step}: {where}")
            self.scaler.update()  # halves the scale; then the same group again, so that no data is lost
            self.optimizer.zero_grad()
            metrics, grad_norm = self.gradient(objective, group, step)
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        for average in self.averages:
            average.update(self.parameters, step)
        return {**metrics, "grad_norm": grad_norm, "lr": lr}

    def gradient(self, objective: Objective, group: Sequence[Part[Any]], step: int) -> tuple[dict[str, float], float]:
        """Leaves the clipped mean gradient over the group's rows on the parameters.

        Returns: the means of the metrics over the group's rows, and the norm before clipping.
        """
        weights, rows = minibatch_weights(group), []
        for i, (minibatch, weight) in enumerate(zip(group, weights, strict=True)):
            # processes exchange gradients once, with the last minibatch; but of sharded weights with each, as gradients
            # that wait to be exchanged are whole
            exchanges = self.sharded or i + 1 == len(group)
            with nullcontext() if exchanges else self.accelerator.no_sync(self.trainable.module):
                loss, metrics = self.loss(objective, minibatch)
                self.accelerator.backward(self.scaler.scale(loss * weight / len(group)))
                global_loss, means = self.means(metrics, minibatch)
                if not math.isfinite(global_loss):
                    where = self.locate_nonfinite(objective, minibatch)
                    raise NonFiniteError(f"loss is {global_loss} at step {step}: {where}")
                rows.append({name: weight * value for name, value in means.items()})
        self.scaler.unscale_(self.optimizer)
        limit = self.config.max_grad_norm or math.inf
        grad_norm = float(full_tensor(torch.nn.utils.clip_grad_norm_(self.parameters, limit)))
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}, grad_norm

    def loss(self, objective: Objective, minibatch: Part[Any]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The loss of this process's rows, weighted for the mean over processes; their plain loss ("") and metrics."""
        n_local, n = self._rows(minibatch)
        with self.local_rows(minibatch) as rows:
            loss, metrics = objective.loss(rows)
        return loss * (n_local * self.shard.world_size / n), {"": loss, **metrics}

    def means(self, metrics: dict[str, float | Tensor], minibatch: Part[Any]) -> tuple[float, dict[str, float]]:
        """The loss and metrics of all processes' rows. A GPU is waited for here, once, and after the backward pass."""
        n_local, n = self._rows(minibatch)
        values = [n_local * value for value in to_floats(list(metrics.values()))]
        global_loss, *means = (total / n for total in self.shard.all_reduce_sum(values))
        return global_loss, dict(zip([name for name in metrics if name], means, strict=True))

    def _rows(self, minibatch: Part[Any]) -> tuple[int, int]:
        """How many rows of a minibatch are this process's, and how many there are; of one process all count as one."""
        n = minibatch.n if self.shard.world_size > 1 else 1
        return self.shard.count(n), n

    @contextmanager
    def local_rows(self, minibatch: Part[Any]) -> Iterator[Any]:
        """This process's rows of a minibatch. Inside, `trainable.shard.padding` says whether they count."""
        self.trainable.shard = replace(self.shard, padding=self.shard.count(minibatch.n) == 0)
        try:
            yield minibatch.rows
        finally:
            self.trainable.shard = self.shard

    def locate_nonfinite(self, objective: Objective, minibatch: Part[Any]) -> str:
        """Where numbers first stop being finite, in each of the processes."""
        module = self.trainable.module
        with self.local_rows(minibatch) as rows:
            looks = (
                lambda: nonfinite_input(rows),
                lambda: nonfinite_weight(module),
                lambda: nonfinite_output(objective, module, rows),
            )
            for look in looks:  # the loss may communicate, so either all processes evaluate it or none
                found = self.shard.all_gather_object(look())
                if any(found):
                    break
        return "; ".join(f"process {i}: {what}" if len(found) > 1 else what for i, what in enumerate(found) if what)


def minibatch_weights(group: Sequence[Part[Any]]) -> list[float]:
    """How often each minibatch counts in the group's mean, so that every row counts alike; the weights' mean is 1.

    They differ where an online method's last minibatch of a rollout is shorter than the others.
    """
    sizes = [minibatch.n for minibatch in group]
    return [n * len(group) / sum(sizes) for n in sizes]


def to_floats(values: Sequence[float | Tensor]) -> list[float]:
    """Numbers and scalar tensors as numbers, with one transfer for all tensors."""
    tensors = [value.detach() for value in values if isinstance(value, Tensor)]
    moved = iter(torch.stack([t.to(tensors[0].device).reshape(()) for t in tensors]).tolist() if tensors else [])
    return [next(moved) if isinstance(value, Tensor) else float(value) for value in values]


def init_distributed(shard: Shard, cpu: bool | None = None) -> Accelerator:
    """Joins the processes of a training, on the CPU if `cpu`; None: where there is no GPU.

    Everything that changes numbers is passed here, because accelerate takes what is not passed from environment
    variables, which `accelerate launch` sets from the user's defaults: ACCELERATE_MIXED_PRECISION,
    ACCELERATE_DYNAMO_BACKEND, and ACCELERATE_GRADIENT_ACCUMULATION_STEPS, which would win over the argument
    `gradient_accumulation_steps` but not over the plugin.

    Raises:
        RuntimeError: they are not as many as were started, or accelerate is configured to shard the weights.
    """
    # no buffer ever changes here; and in a rollout, where processes need not keep step, none must wait to send one
    wrapping = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
        cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()) if cpu is None else cpu,
        kwargs_handlers=[wrapping, InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)],
    )
    if accelerator.num_processes != shard.world_size:
        raise RuntimeError(
            f"{shard.world_size} processes were started to train together, but accelerate knows of "
            f"{accelerator.num_processes}: each would train alone; docs/several_gpus.md says how to start them"
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise RuntimeError(
            f"accelerate is configured for {accelerator.distributed_type.value}; here `lora: null` decides whether "
            "weights are sharded, and accelerate only starts the processes (docs/several_gpus.md)"
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
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(parameters, **options, relative_step=False, scale_parameter=False, warmup_init=False)
    if config.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **options)
    # one kernel for all weights in the place of hundreds; on a CPU the usual way keeps the published bits
    fused = True if all(parameter.is_cuda for parameter in parameters) else None
    return torch.optim.AdamW(parameters, **options, fused=fused)


def allow_tf32(allowed: bool) -> None:
    """Lets a GPU multiply float32 matrices in TF32, 10 bits of mantissa, in this process; convolutions already do."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high" if allowed else "highest")


def compile_in_place(trainable: Trainable, mode: str | None = None) -> None:
    """torch.compile, which leaves the names of modules and weights as they are; adapters can still be switched.

    A frozen copy that serves as reference is compiled too. Otherwise it would differ from the policy by rounding.

    Args:
        mode: of torch.compile; "reduce-overhead" records CUDA graphs.
    """
    for module in filter(None, (trainable.module, trainable.reference_model)):
        module.compile(mode=mode)


def computes_in_half(trainable: Trainable) -> bool:
    """Whether gradients pass through float16."""
    frozen = any(weight.dtype == torch.float16 for weight in trainable.module.parameters())
    return frozen or trainable.autocast == torch.float16
