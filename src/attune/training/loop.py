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
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from attune.config.settings import TrainingConfig
from attune.distributed import Shard
from attune.interfaces import Log, Objective
from attune.training.checkpoint import Checkpoint
from attune.training.guard import NonFiniteError
from attune.training.step import Trained, Update, learning_rate

Batches = Callable[[int, torch.Generator], Any]
"""Batch number b, given its generator: offline data picks rows by b, online data picks prompts."""


@dataclass
class Progress:
    """How far training is; the part of a checkpoint that is not weights in training."""

    batch: int = 0
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    scaler: dict[str, Any] = field(default_factory=dict)  # empty unless the loss is scaled
    scores: list[dict[str, float]] = field(default_factory=list)  # held-out: batch (done), step, score
    best: list[Tensor] = field(default_factory=list)  # weights at the best score; empty unless they may be wanted


@dataclass(frozen=True)
class Watch:
    """A held-out score taken every so many batches, which may end the training early.

    With `patience`, training ends when that many scores in a row have brought no new best, and the weights of
    the best are what it leaves, were they the ones it started with.
    """

    score: Callable[[], float]
    every: int  # batches
    ends: bool = True  # before training and after the last batch, too
    patience: int | None = None  # scores; None: train to the end and keep the last weights
    told: Callable[[int, int, float], None] = lambda batch, step, score: None  # may raise, to end it otherwise

    def look(self, progress: Progress, parameters: list[Tensor], shard: Shard, end: bool = False) -> None:
        """Takes the score if one is due and not yet taken; the first process does, and all of them know."""
        end = end or progress.batch == 0
        taken = progress.scores and progress.scores[-1]["batch"] == progress.batch
        if taken or not (self.ends if end else progress.batch % self.every == 0):
            return
        score = shard.broadcast_from_main(self.score)
        if not math.isfinite(score):
            raise NonFiniteError(f"the held-out score is {score} after batch {progress.batch}")
        if self.patience is not None and all(score > past["score"] for past in progress.scores):
            progress.best = [weight.detach().to("cpu", copy=True) for weight in parameters]
        progress.scores.append({"batch": progress.batch, "step": progress.step, "score": score})
        shard.broadcast_from_main(lambda: self.told(progress.batch, progress.step, score))

    def is_over(self, progress: Progress) -> bool:
        """Whether patience is at its end."""
        if self.patience is None or not progress.scores:
            return False
        best = max(range(len(progress.scores)), key=lambda i: progress.scores[i]["score"])
        return len(progress.scores) - 1 - best >= self.patience


@dataclass(frozen=True)
class View:
    """Who looks on: nothing here changes what is trained."""

    title: str = "train"
    log: Log = lambda metrics, step: None
    preview: Callable[[int], None] | None = None  # told the optimizer step
    preview_every: int = 1  # batches


def train(
    objective: Objective,
    trained: Trained,
    batches: Batches,
    config: TrainingConfig,
    *,
    seed: int,
    checkpoint: Checkpoint | None = None,
    watch: Watch | None = None,
    view: View = View(),
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Runs `config.batches` batches, or fewer where `watch` ends them.

    Where several processes train together (`trained.shard`), each calls this with the same arguments and returns
    the same; `view` and the scores of `watch` are the first one's business.

    Returns:
        One row of metrics per optimizer step, and the held-out scores.

    Raises:
        NonFiniteError: a loss or gradient is NaN or infinite; the last checkpoint is intact.
        LostProcessError: another process is gone; the same.
    """
    update = Update(trained, config)
    with update.shard.process_group_guard():
        progress = resume(update, checkpoint)
        run(objective, update, batches, progress, seed=seed, checkpoint=checkpoint, watch=watch, view=view)
        return finish(progress, update, watch)


def run(
    objective: Objective,
    update: Update,
    batches: Batches,
    progress: Progress,
    *,
    seed: int,
    checkpoint: Checkpoint | None,
    watch: Watch | None,
    view: View,
) -> None:
    """The batches that are left; `progress` is where it began, and becomes where it ended."""
    config, first = update.config, update.shard.is_main_process
    left = range(progress.batch, config.batches)
    silent = {} if first else {"disable": True}  # the first one's bar is for the user to silence, by TQDM_DISABLE
    bar = tqdm(left, view.title, config.batches, initial=progress.batch, unit="batch", **silent)
    waiting: list[Any] = []  # of a group that is not complete yet: groups run across batches
    for b in bar:
        if watch is not None:
            watch.look(progress, update.parameters, update.shard)
            if watch.is_over(progress):
                break
        generator, last = batch_generator(seed, b), b + 1 == config.batches
        minibatches = chain(waiting, objective.minibatches(batches(b, generator), generator))
        waiting = []
        for group in _groups(minibatches, config.accumulation):
            if len(group) < config.accumulation and not last:
                waiting = group
                continue
            progress.step += 1
            row = update(objective, group, progress.step, learning_rate(config, progress.history, b))
            progress.history.append({"step": progress.step, "batch": b, **row})
            if first:
                view.log(row, progress.step)
            bar.set_postfix({k: f"{row[k]:.4g}" for k in ("loss", "margin", "accuracy") if k in row}, refresh=False)
        progress.batch = b + 1
        if checkpoint is not None and not waiting:
            progress.scaler = update.scaler.state_dict()
            checkpoint.maybe_save(update.parameters, update.optimizer, vars(progress), last=last)
        if first and view.preview is not None and progress.batch % view.preview_every == 0:
            view.preview(progress.step)


def finish(
    progress: Progress, update: Update, watch: Watch | None
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The last held-out score, and the best weights instead of the last where patience asks for them."""
    if watch is not None:
        watch.look(progress, update.parameters, update.shard, end=True)
    with torch.no_grad():
        for weight, best in zip(update.parameters, progress.best, strict=False):  # best is of all of them, or empty
            weight.copy_(best)
    return progress.history, progress.scores


def resume(update: Update, checkpoint: Checkpoint | None) -> Progress:
    """Where the checkpoint left off, weights and optimizer put back; the beginning if there is none.

    Raises:
        RuntimeError: not all processes have found the same.
    """
    if checkpoint is None:
        return Progress()
    progress = Progress(**checkpoint.restore(update.parameters, update.optimizer, default={}))
    if progress.scaler:
        update.scaler.load_state_dict(progress.scaler)
    if len(found := set(update.shard.all_gather_object(progress.batch))) > 1:
        raise RuntimeError(
            f"processes would go on from different batches, {sorted(found)}: all must see the same {checkpoint.folder}"
        )
    return progress


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
