"""Work cut into shards, which several processes share and an interrupted stage goes on from.

A shard is one safetensors file. It is written whole or not at all, under a name that is made from all it is computed
from, and is not computed again where it is there already. So a stage that was killed repeats one shard per process at
most, and what it makes is the same whatever was interrupted and however many processes there were.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from attune.distributed import EndedElsewhereError, LostProcessError, Shard
from attune.files import replaced_file, write_atomically

LOG = logging.getLogger("attune.shards")
TIMEOUT = timedelta(hours=12)  # a process that is done waits for the slowest; one that dies ends the others at once
AHEAD = 4  # items per thread that are worked on before they are asked for

Content = tuple[Mapping[str, Tensor], Mapping[str, Any]]
"""Of a shard: its tensors, and facts that can be written as JSON."""

A = TypeVar("A")
B = TypeVar("B")


class Shards:
    """A folder of shards. What an earlier run of the stage left elsewhere counts as there: it is linked when needed."""

    def __init__(self, folder: Path, earlier: Mapping[str, Path] | None = None):
        """`earlier`: path relative to the folder -> where that file is now."""
        self.folder, self._earlier = folder, dict(earlier or {})
        self._whole = set[str]()  # names of those that were compared with their hashes

    def path(self, name: str) -> Path:
        """The file of a shard; a name may lead to a folder below, `latents/1f00`."""
        return self.folder / f"{name}.safetensors"

    def __contains__(self, name: str) -> bool:
        path = self.path(name)
        found = self._earlier.pop(f"{name}.safetensors", None)
        if found is not None and not path.exists():
            link(found, path)
        if not path.exists():
            return False
        if name not in self._whole and (fault := damage(path)) is not None:
            LOG.warning("%s is damaged (%s): it is computed again", path, fault)
            path.unlink()
            return False
        self._whole.add(name)
        return True

    def write(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Writes a shard; the facts get the hash of the tensors."""
        rows = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        text = json.dumps({**facts, "sha256": tensors_sha(rows)})
        write_atomically(self.path(name), save(rows, {"facts": text}))

    def read(self, name: str) -> tuple[dict[str, Tensor], Any]:
        """Tensors, mapped and not read, and facts of a shard that is there."""
        with safe_open(self.path(name), "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118

    def facts(self, name: str) -> Any:
        """The facts alone."""
        with safe_open(self.path(name), "pt") as file:
            return json.loads(file.metadata()["facts"])


def damage(path: Path) -> str | None:
    """What is wrong with a shard; None if its tensors are what was written."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            told = json.loads(file.metadata()["facts"])["sha256"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        return str(error)
    return None if tensors_sha(tensors) == told else "its hash is another"


def tensors_sha(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors on the CPU, in the order of their names."""
    whole = hashlib.sha256()
    for _, value in sorted(tensors.items()):
        whole.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()


def shard_name(*content: Any) -> str:
    """The name of a shard that is computed from these values and nothing else: 32 hex digits."""
    text = json.dumps(content, separators=(",", ":"), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def compute_missing(tasks: Mapping[str, Callable[[], Content]], shards: Shards, shard: Shard, desc: str) -> None:
    """Computes the shards that are not there, each process its share of them; ends when all are there.

    Args:
        tasks: name -> what computes that shard; the same in all processes.
        desc: in front of the progress bar.
    """
    missing = shard.broadcast_from_main(lambda: [name for name in tasks if name not in shards])
    ours = missing[shard.rank :: shard.world_size]
    silent = {} if shard.is_main_process else {"disable": True}  # TQDM_DISABLE silences that of the main process
    with tqdm(total=len(tasks), initial=len(tasks) - len(missing), desc=desc, unit="batch", **silent) as bar:
        for name in ours:
            shards.write(name, *tasks[name]())
            bar.update(min(shard.world_size, int(bar.total - bar.n)))
    shard.all_gather_object(None)


def in_order(work: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """What `work` returns for each item, in their order, computed ahead by threads.

    Threads are enough for images: Pillow decodes, resizes and compresses without Python's lock, and so does hashing.
    """
    if threads < 2:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[B]] = deque()
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > AHEAD * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def own_threads(world_size: int) -> int:
    """How many threads a process may use for images beside its networks: its share of the cores."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, world_size)) if hasattr(os, "sched_getaffinity") else 1


def link(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`, or a copy of it on another file system. What was there is replaced."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with replaced_file(target) as beside:
            shutil.copyfile(source, beside)


@contextmanager
def process_group(shard: Shard) -> Iterator[None]:
    """Joins the processes of a stage that trains nothing; they exchange small objects only, so that gloo will do."""
    if shard.world_size == 1:
        yield
        return
    dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        with shard.process_group_guard():
            yield
    except (EndedElsewhereError, LostProcessError) as error:
        sys.exit(str(error))  # without a traceback, which would bury the message of the process that knows more
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()
