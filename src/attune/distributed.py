"""Data parallelism: which rows of a minibatch this process computes, and collectives over the processes of a training.

All processes make the same steps; of each batch and minibatch a process reads, draws and computes its own rows alone.
A single process computes all rows, and every collective returns its argument unchanged.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class LostProcessError(RuntimeError):
    """Another process that works on the same is gone."""


class EndedElsewhereError(RuntimeError):
    """Another process has ended the work with an error, which it reports itself."""


@dataclass(frozen=True)
class Part(Generic[T]):
    """This process's rows of a batch or minibatch that all processes of a training share, as `Shard.rows` cuts it."""

    rows: T  # another process's row, which counts 0, where none is ours
    n: int  # rows in all processes


@dataclass(frozen=True)
class Shard:
    """This process's part of the work: process `rank` of `world_size`."""

    rank: int = 0
    world_size: int = 1
    padding: bool = False  # none of the current minibatch's rows is ours: we compute a row of another, which counts 0
    sharded_weights: bool = False  # each process holds a piece of every trained weight (`sharded`), not all of them

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that writes files, logs, and samples images."""
        return self.rank == 0

    def count(self, n: int) -> int:
        """How many of n rows are this process's; 0 for some processes if there are fewer rows than processes."""
        return n * (self.rank + 1) // self.world_size - n * self.rank // self.world_size

    def rows(self, n: int) -> slice:
        """This process's rows of n, which are contiguous.

        A process without rows gets the first row, because it has to take part in the same collectives as the others.
        """
        start, count = n * self.rank // self.world_size, self.count(n)
        return slice(start, start + count) if count else slice(0, 1)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows (first dimension) of all processes in the order of ranks, without gradient and without padding."""
        if self.world_size == 1:
            return rows
        local = rows.detach()[: 0 if self.padding else None]
        sizes = self.all_gather_object(len(local))
        padded = local.new_zeros((max(sizes), *local.shape[1:]), device=_comm_device())
        padded[: len(local)] = local
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(rows.device)

    def gather_n(self, rows: Tensor, n: int) -> Tensor:
        """`gather` of a batch's n rows, of which these are this process's; one without rows has computed one more."""
        return self.gather(rows[: self.count(n)])

    def map_rows(self, n: int, size: int, compute: Callable[[list[int]], Tensor]) -> Tensor:
        """What `compute` makes of n rows, each process of its own; gathered, in their order.

        A process that takes its rows `size` at a time has, as far as the last batch, batches that a single process has
        too; and all have equally many, because in each they may call a network of which each holds a piece.

        Raises:
            RuntimeError: it raised in another process; in that one the exception itself is raised.
        """
        step = size * self.world_size
        rounds = [(start, min(step, n - start)) for start in range(0, n, step)]

        def taken_by(shard: Shard) -> tuple[list[int], int]:
            """A process's rows, and how many of them count: one that is idle in the last round computes one more."""
            rows = [start + i for start, size in rounds for i in range(*shard.rows(size).indices(size))]
            return rows, sum(shard.count(size) for _, size in rounds)

        rows, count = taken_by(self)
        values = self.same_end(partial(compute, rows))[:count]
        if self.world_size == 1:
            return values
        of_all = [taken_by(replace(self, rank=rank)) for rank in range(self.world_size)]
        order = torch.tensor([row for rows, count in of_all for row in rows[:count]])
        return self.gather(values)[order.argsort()]

    def same_end(self, compute: Callable[[], T]) -> T:
        """What `compute` returns in this process, where it has succeeded in all of them.

        A lack of memory is not shared: it may come amid a collective, in which the others wait. The process ends, and
        the launcher ends the others.

        Raises:
            RuntimeError: it raised in another process; in that one the exception itself is raised.
        """
        if self.world_size == 1:
            return compute()
        value, error = None, None
        try:
            value = compute()
        except torch.OutOfMemoryError:
            raise
        except Exception as raised:
            error = raised
        failures = self.all_gather_object(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise EndedElsewhereError(f"process {rank} has ended the work: {failure}")
        return cast(T, value)

    def all_gather_object(self, value: T) -> list[T]:
        """The values of all processes in the order of ranks; for small values, which are pickled."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """Sums over all processes, in float64."""
        if self.world_size == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64, device=_comm_device())
        dist.all_reduce(sums)
        return sums.tolist()

    def broadcast_from_main(self, compute: Callable[[], T]) -> T:
        """What `compute` returns in the main process, where alone it is called.

        Raises:
            RuntimeError: it raised there; in the main process the exception itself is raised.
        """
        if self.world_size == 1:
            return compute()
        result_and_error: list[Any] = [None, None]
        if self.is_main_process:
            try:
                result_and_error[0] = compute()
            except Exception as error:
                dist.broadcast_object_list([None, f"{type(error).__name__}: {error}"])
                raise
        dist.broadcast_object_list(result_and_error)
        result, failure = result_and_error
        if failure is not None:
            raise EndedElsewhereError(f"the first process has ended the work: {failure}")
        return result

    @contextmanager
    def process_group_guard(self) -> Iterator[None]:
        """Wraps code that communicates, so that the loss of another process is reported in plain words.

        When a process ends, the launcher sends SIGTERM to the others, unless a collective has failed in them before.

        Raises:
            LostProcessError: a collective failed because another process is gone.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is next, and must not cut off the message
            reason = str(error).strip().splitlines()[0]
            raise LostProcessError(
                f"process {self.rank} of the {self.world_size} that work together cannot go on: another is gone. "
                f"Started again, the work goes on from what was saved last. ({reason})"
            ) from None


ALONE = Shard()
"""Of a process that works by itself."""


def _comm_device() -> torch.device:
    """The device on which tensors must be to be sent."""
    nccl = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
