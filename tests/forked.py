"""Several processes that are forks of this one and talk by gloo: real collectives in a fraction of a second."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

from attune.distributed import Shard

SECONDS = 60


def together(n: int, folder: Path, work: Callable[[Shard], Any]) -> list[Any]:
    """What `work` returns in each of n processes, in the order of their ranks.

    Args:
        folder: a new one, in which the processes find each other.
        work: called with the process's `Shard`; needs no pickling, as a fork has all that its parent has.
    """
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=_work, args=(rank, n, folder, work, answers)) for rank in range(n)]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < n:
            rank, content = answers.get(timeout=SECONDS)
            value = pickle.loads(content)
            assert not isinstance(value, BaseException), f"process {rank}: {value!r}"
            found[rank] = value
    except queue.Empty:
        raise AssertionError(f"of {n} processes only {sorted(found)} have answered") from None
    finally:
        for process in processes:
            process.join(timeout=1 if len(found) < n else SECONDS)
            process.kill()
    return [found[rank] for rank in range(n)]


def _work(rank: int, n: int, folder: Path, work: Callable[[Shard], Any], answers: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # what the parent has joined as a single process
    store = dist.FileStore(str(folder / "meeting"), n)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n, timeout=timedelta(seconds=SECONDS))
    try:
        value = work(Shard(rank, n))
    except BaseException as error:
        value = RuntimeError(f"{type(error).__name__}: {error}")
    answers.put((rank, pickle.dumps(value)))  # bytes: a tensor would be lent by a process that is about to end
    answers.close()
    answers.join_thread()
    dist.destroy_process_group()
    os._exit(0)
