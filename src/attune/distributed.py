"""Which rows are this process's, where several train one model, and what the processes tell each other.

All of them know the same batches and minibatches, draw the same random numbers and make the same steps; each
computes with its own rows alone. With one process every row is its own, and nothing here does anything.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
Draw = Callable[[tuple[int, ...]], Tensor]


class LostProcessError(RuntimeError):
    """Another process of the same training is gone."""


@dataclass(frozen=True)
class Shard:
    """This process's part of the work: number `rank` of `world_size`."""

    rank: int = 0
    world_size: int = 1
    padding: bool = False  # no row of this minibatch is ours: we compute with one of another, which counts 0

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that writes, logs and paints."""
        return self.rank == 0

    def count(self, n: int) -> int:
        """How many of n rows are ours; 0 for some, where there are fewer rows than processes."""
        return n * (self.rank + 1) // self.world_size - n * self.rank // self.world_size

    def rows(self, n: int) -> slice:
        """Our rows of n, which lie together; the first row, where none is ours: it keeps us in step."""
        start, count = n * self.rank // self.world_size, self.count(n)
        return slice(start, start + count) if count else slice(0, 1)

    def local_noise(self, draw: Draw, n: int) -> Draw:
        """Noise of our rows of n prompts, or of k n candidate-major rows, drawn for all: as one process would.

        What it returns takes the shape of our rows, and so many of them that k is a whole number.
        """
        rows = self.rows(n)

        def ours(shape: tuple[int, ...]) -> Tensor:
            k = shape[0] // (rows.stop - rows.start)
            return draw((k * n, *shape[1:])).unflatten(0, (k, n))[:, rows].flatten(0, 1)

        return draw if self.world_size == 1 else ours

    def gather(self, rows: Tensor) -> Tensor:
        """The rows (first dimension) of all processes in their order, without gradient; none of an padding one."""
        if self.world_size == 1:
            return rows
        here = rows.detach()[: 0 if self.padding else None]
        sizes = self.all_gather_object(len(here))
        padded = here.new_zeros((max(sizes), *here.shape[1:]), device=_comm_device())
        padded[: len(here)] = here
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(rows.device)

    def all_gather_object(self, value: T) -> list[T]:
        """The small value of each process, in their order."""
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

    def broadcast_from_main(self, ask: Callable[[], T]) -> T:
        """What the first process answers, who alone is asked; if that raises, it raises in all of them."""
        if self.world_size == 1:
            return ask()
        said: list[Any] = [None, None]
        if self.is_main_process:
            try:
                said[0] = ask()
            except Exception as error:
                dist.broadcast_object_list([None, f"{type(error).__name__}: {error}"])
                raise
        dist.broadcast_object_list(said)
        if said[1] is not None:
            raise RuntimeError(f"the first process has ended the training: {said[1]}")
        return said[0]

    @contextmanager
    def process_group_guard(self) -> Iterator[None]:
        """Around all that needs the other processes: says plainly when one of them is gone.

        Where one ends, the launcher tells the others to stop (SIGTERM), unless they have noticed before.

        Raises:
            LostProcessError: one is gone, whatever the libraries call that.
            SystemExit: we were told to stop.
        """
        if self.world_size == 1:
            yield
            return
        before = signal.signal(signal.SIGTERM, self._told_to_stop)
        try:
            yield
        except RuntimeError as error:
            if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            before = signal.SIG_IGN  # the launcher stops us next, and must not before this has been told
            what = str(error).strip().splitlines()[0]
            raise LostProcessError(f"{self._lost('another is gone')} ({what})") from None
        finally:
            signal.signal(signal.SIGTERM, before)

    def _told_to_stop(self, *_: Any) -> None:
        sys.exit(self._lost("told to stop, which happens when another has ended"))

    def _lost(self, why: str) -> str:
        us = f"process {self.rank} of the {self.world_size} that train together"
        return f"{us} cannot go on: {why}. Started again, the training goes on from its last checkpoint."


def _comm_device() -> torch.device:
    """Where tensors must lie to be sent."""
    here = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if here else torch.device("cpu")
