"""The one training loop: every method and the preference model go through these lines.

Resuming is exact by construction. All randomness of batch b comes from generators seeded by (seed, b), so a
checkpoint holds weights, optimizer state and b, and no generator state. Online methods are checkpointed between
rollouts, never inside one, and no checkpoint is written while minibatches of an incomplete group are pending.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from attune.averages import exchange
from attune.diffusion.noise import Draws, keyed_generator
from attune.distributed import Part, Shard
from attune.interfaces import Log, Objective
from attune.stop import SIGNALS, Stopped, stop_requests
from attune.training.checkpoint import Checkpoint
from attune.training.early_stopping import EarlyStopping, OnScore, restore_best
from attune.training.guard import assert_finite
from attune.training.progress import Progress
from attune.training.step import Trainable, TrainStep, learning_rate

LOG = logging.getLogger("attune.training")
T = TypeVar("T")
Batches = Callable[[int, Shard], Part[Any]]
"""A process's rows of batch number b. Called in another thread, while the batch before is trained on."""


SHOWN = ("loss", "margin", "accuracy")
"""The metrics shown beside the progress bar."""


@dataclass(frozen=True)
class Callbacks:
    """What the training loop calls, in the main process unless said otherwise. Nothing here changes the weights."""

    desc: str = "train"  # in front of the progress bar
    log: Log = lambda metrics, step: None  # the metrics of every optimizer step
    on_score: OnScore = lambda batch, step, score: None  # may raise, to end the training
    sample_images: Callable[[int], None] | None = None  # given the optimizer step; called in all processes
    sample_every: int = 1  # batches

    def of_another_process(self) -> Callbacks:
        """What is left of them where another process is the main one."""
        return Callbacks(sample_images=self.sample_images, sample_every=self.sample_every)


def train(
    objective: Objective,
    trainable: Trainable,
    batches: Batches,
    *,
    seed: int,
    checkpoint: Checkpoint | None = None,
    early_stopping: EarlyStopping | None = None,
    callbacks: Callbacks = Callbacks(),
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Trains for `objective.config.batches` batches, or fewer where `early_stopping` says so.

    Where several processes train together (`trainable.shard`), each calls this with the same arguments and returns
    the same; each computes its part of validation scores and sample images, and only the main one logs.

    Returns:
        One row of metrics per optimizer step, and the validation scores.

    Raises:
        NonFiniteError: a loss, gradient or score is NaN or infinite; the last checkpoint is intact.
        LostProcessError: another process is gone; the last checkpoint is intact.
        Stopped: SIGTERM or Ctrl-C; a checkpoint has been saved after the batch during which it came.
    """
    config, train_step = objective.config, TrainStep(trainable, objective.config)
    shard = train_step.shard
    callbacks, early_stopping = shown_the_result(train_step, callbacks, early_stopping)
    # without a checkpoint there is nothing to save, and a signal ends the process at once
    stopping = nullcontext(lambda: 0) if checkpoint is None else stop_requests()
    with shard.process_group_guard(), stopping as stop_request, ThreadPoolExecutor(1) as reader:
        progress = resume(train_step, checkpoint, callbacks)
        ahead = read_ahead(reader, lambda b: batches(b, shard), range(progress.batch, config.batches))
        pending_microbatches: list[Part[Any]] = []
        if callbacks.sample_images is not None and progress.batch == 0:
            callbacks.sample_images(0)
        bar = progress_bar(callbacks.desc, progress.batch, config.batches, shard)
        for b in bar:
            if early_stopping is not None:
                early_stopping.evaluate(progress, train_step.result, shard, callbacks.on_score)
            if early_stopping is not None and early_stopping.should_stop(progress.scores):
                break
            batch, last = next(ahead), b + 1 == config.batches
            minibatches = objective.minibatches(batch.rows, Draws.of_batch(seed, b, batch.n, shard))
            for group in groups(minibatches, config.accumulation, pending_microbatches, last):
                progress.step += 1
                metrics = train_step(objective, group, progress.step, learning_rate(config, progress.history, b))
                progress.history.append({"step": progress.step, "batch": b, **metrics})
                callbacks.log(metrics, progress.step)
                bar.set_postfix({k: f"{metrics[k]:.4g}" for k in SHOWN if k in metrics}, refresh=False)
            progress.batch = b + 1
            if checkpoint is not None and not pending_microbatches:
                save_or_stop(checkpoint, train_step, progress, agreed(stop_request(), shard), last)
            if callbacks.sample_images is not None and progress.batch % callbacks.sample_every == 0:
                callbacks.sample_images(progress.step)
        if early_stopping is not None:
            early_stopping.evaluate(progress, train_step.result, shard, callbacks.on_score, end=True)
        if checkpoint is not None:  # a signal may have come during what follows the last batch
            save_or_stop(checkpoint, train_step, progress, agreed(stop_request(), shard), last=False)
        leave_the_result(train_step, progress)
    return progress.history, progress.scores


def shown_the_result(
    train_step: TrainStep, callbacks: Callbacks, early_stopping: EarlyStopping | None
) -> tuple[Callbacks, EarlyStopping | None]:
    """What this process calls, whose sample images and scores are of the weights that will be the result."""
    callbacks = callbacks if train_step.shard.is_main_process else callbacks.of_another_process()
    if callbacks.sample_images is not None:
        callbacks = replace(callbacks, sample_images=train_step.with_result(callbacks.sample_images))
    if early_stopping is not None:
        early_stopping = replace(early_stopping, score=train_step.with_result(early_stopping.score))
    return callbacks, early_stopping


def leave_the_result(train_step: TrainStep, progress: Progress) -> None:
    """Puts the result into the trained weights: those of the best score if they were kept, else as they are at the end.

    Raises:
        NonFiniteError: it is not finite.
    """
    if train_step.average is not None:
        exchange(train_step.parameters, train_step.average.weights)
    restore_best(progress, train_step.parameters)
    assert_finite(train_step.parameters)


def save_or_stop(checkpoint: Checkpoint, train_step: TrainStep, progress: Progress, signum: int, last: bool) -> None:
    """Saves a checkpoint if it is time; if a signal has asked to stop, saves at once and stops.

    Raises:
        Stopped: a signal has asked for it.
    """
    progress.scaler = train_step.scaler.state_dict()
    checkpoint.maybe_save(
        train_step.weights, train_step.optimizer, vars(progress), last or signum != 0, train_step.shard
    )
    if signum:
        name = signal.Signals(signum).name
        LOG.warning("%s: saved after batch %d in %s, from where it goes on", name, progress.batch, checkpoint.folder)
        raise Stopped(signum)


def agreed(signum: int, shard: Shard) -> int:
    """The signal that any of the processes has received, so that all of them stop after the same batch."""
    received = shard.all_reduce_sum([float(signum == number) for number in SIGNALS])
    return next((int(number) for number, count in zip(SIGNALS, received, strict=True) if count), 0)


def progress_bar(desc: str, done: int, batches: int, shard: Shard) -> Any:
    """The batches that are left, with a bar in the main process. TQDM_DISABLE silences that one."""
    silent = {} if shard.is_main_process else {"disable": True}
    return tqdm(range(done, batches), desc, batches, initial=done, unit="batch", **silent)


def read_ahead(reader: Executor, read: Callable[[int], T], numbers: Iterable[int]) -> Iterator[T]:
    """`read` of each number in order; while one is in use, the next is read by `reader`, and no further one.

    An error of `read` is raised where its number's turn has come, with the traceback of where it arose.
    """
    waiting = (reader.submit(read, number) for number in numbers)
    following = next(waiting, None)
    while following is not None:
        present, following = following.result(), next(waiting, None)
        yield present


def groups(minibatches: Iterable[T], size: int, pending: list[T], last: bool) -> Iterator[list[T]]:
    """Groups of `size` minibatches for one optimizer step each; groups run across batches.

    Args:
        minibatches: of this batch; each is asked for after the step of the group before, because a rollout may
            depend on it.
        pending: minibatches left over from earlier batches, which come first; what is left over now stays in it.
        last: this is the last batch, whose incomplete group makes a step as well.
    """
    for minibatch in minibatches:
        pending.append(minibatch)
        if len(pending) == size:
            yield list(pending)
            pending.clear()
    if last and pending:
        yield list(pending)
        pending.clear()


def resume(train_step: TrainStep, checkpoint: Checkpoint | None, callbacks: Callbacks) -> Progress:
    """Where the checkpoint left off, weights and optimizer put back; the beginning if there is none.

    What was recorded until then is logged again: the run that logged it first may be one that is gone.

    Raises:
        RuntimeError: the processes have found different checkpoints.
    """
    if checkpoint is None:
        return Progress()
    shard = train_step.shard
    shard.broadcast_from_main(checkpoint.set_aside_if_damaged)
    if len(set(shard.all_gather_object(checkpoint.saved))) > 1:
        raise RuntimeError(f"some processes see a checkpoint and others do not: all must see {checkpoint.folder}")
    progress = Progress(**checkpoint.restore(train_step.weights, train_step.optimizer, default={}))
    if progress.scaler:
        train_step.scaler.load_state_dict(progress.scaler)
    if len(found := set(shard.all_gather_object(progress.batch))) > 1:
        raise RuntimeError(
            f"processes would go on from different batches, {sorted(found)}: all must see the same {checkpoint.folder}"
        )
    for row in progress.history:
        callbacks.log({name: value for name, value in row.items() if name not in ("step", "batch")}, int(row["step"]))
    for past in progress.scores:
        callbacks.on_score(int(past["batch"]), int(past["step"]), past["score"])
    return progress


def epoch_batches(n: int, batch_size: int, seed: int, read: Callable[[Tensor], Any]) -> Batches:
    """The batches of n rows of data, of which each process reads its own rows."""

    def batch(b: int, shard: Shard) -> Part[Any]:
        return Part(read(epoch_rows(n, batch_size, b, seed)[shard.rows(batch_size)]), batch_size)

    return batch


def epoch_rows(n: int, batch_size: int, batch: int, seed: int) -> Tensor:
    """Rows (batch_size,) of batch number `batch`: n rows are shuffled anew each epoch, and batches run across epochs.

    Raises:
        ValueError: there are no rows.
    """
    if n == 0:
        raise ValueError("nothing to learn from: data/<profile>/prepared holds 0 rows (pairs, or prompts) to train on")
    rows: list[int] = []
    position = batch * batch_size
    while len(rows) < batch_size:
        epoch, offset = divmod(position + len(rows), n)
        rows += epoch_order(n, epoch, seed)[offset : offset + batch_size - len(rows)].tolist()
    return torch.tensor(rows)


@lru_cache(maxsize=2)  # a batch may begin in one epoch and end in the next
def epoch_order(n: int, epoch: int, seed: int) -> Tensor:
    """The order (n,) of the rows in an epoch. Drawn once, not for every batch: at n = 1e6 a draw takes 28 ms."""
    return torch.randperm(n, generator=keyed_generator(seed, -1 - epoch))
