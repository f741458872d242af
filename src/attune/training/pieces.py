"""Checkpoints of sharded weights: every process writes its pieces, and they count when all of them are on the disk.

    pieces-<time>/*.safetensors    written and read by torch.distributed.checkpoint (DCP)
    pieces.json                    names that folder, the digest of each of its files, and the progress

pieces.json is replaced last, in one step, and only then is the folder before it removed: at any moment it names
pieces that are whole. DCP puts pieces together that another number of processes has written, or one alone. Its own
format keeps pickles, so its safetensors are used; they have no checksums, which is why the digests are kept.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from attune.distributed import Shard
from attune.files import digest, write_atomically
from attune.fsdp import cut_like

POINTER = "pieces.json"
_KEYS = {"folder", "files", "progress"}


def save(
    folder: Path,
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    progress: Mapping[str, Any],
    shard: Shard,
) -> None:
    """Replaces what was saved in `folder` by weights, optimizer state and progress; all processes call this.

    Raises:
        OSError: in one of the processes something could not be written; raised in all, and what was there before stays.
    """
    name = shard.broadcast_from_main(lambda: f"pieces-{time.time_ns()}")
    target = folder / name
    tensors = {f"parameter.{i}": weight.detach() for i, weight in enumerate(parameters)}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
    tensors |= {f"best.{i}": weight for i, weight in enumerate(progress["best"])}
    fault, files = _written(target, tensors, shard.rank)
    found = shard.all_gather_object((fault, files))
    if fault := next((fault for fault, _ in found if fault), None):
        shutil.rmtree(target, ignore_errors=True)
        raise OSError(fault)
    about = {
        "folder": name,
        "files": {name: sha for _, files in found for name, sha in files.items()},
        "progress": {key: value for key, value in progress.items() if key != "best"},
    }
    if fault := shard.broadcast_from_main(lambda: _pointed(folder / POINTER, about)):
        shutil.rmtree(target, ignore_errors=True)
        raise OSError(fault)
    if shard.is_main_process:
        remove(folder, keep=name)


def remove(folder: Path, keep: str | None = None) -> None:
    """Removes all pieces but those in the folder `keep`; without one pieces.json, too, which goes first."""
    if keep is None:
        (folder / POINTER).unlink(missing_ok=True)
    for pieces in folder.glob("pieces-*/"):
        if pieces.name != keep:
            shutil.rmtree(pieces, ignore_errors=True)


def restore(pointer: Path, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Puts saved weights and optimizer state back, into pieces or whole weights; returns the progress.

    Where several processes train, all of them call this.
    """
    about = json.loads(pointer.read_text())
    folder = str(pointer.parent / about["folder"])
    saved = dcp.HuggingFaceStorageReader(folder).read_metadata().state_dict_metadata
    tensors = {name: _empty(tensor, parameters[int(name.split(".")[1])]) for name, tensor in saved.items()}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of one process: that it is alone
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(folder), no_dist=not dist.is_initialized())
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, number, *key = name.split(".")
        if kind == "optimizer":
            states.setdefault(int(number), {})[key[0]] = tensor
    with torch.no_grad():
        for i, weight in enumerate(parameters):
            weight.copy_(tensors[f"parameter.{i}"])
    optimizer.load_state_dict(optimizer.state_dict() | {"state": states})
    best = [tensors[f"best.{i}"].to("cpu", copy=True) for i in range(len(parameters)) if f"best.{i}" in tensors]
    return {**about["progress"], "best": best}


def cut_whole_state(state: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """A checkpoint of whole weights, as one process saves it, as pieces like `parameters`."""
    optimizer = {
        i: {
            key: cut_like(value, parameters[i]) if value.shape == parameters[i].shape else value
            for key, value in values.items()
        }
        for i, values in state["optimizer"]["state"].items()
    }
    best = [cut_like(*both).to("cpu", copy=True) for both in zip(state["progress"]["best"], parameters, strict=False)]
    return {
        "parameters": [cut_like(*both) for both in zip(state["parameters"], parameters, strict=True)],
        "optimizer": state["optimizer"] | {"state": optimizer},
        "progress": state["progress"] | {"best": best},
    }


def damage(pointer: Path) -> str | None:
    """What is wrong with saved pieces; None if every file has the bytes that were written."""
    try:
        about = json.loads(pointer.read_text())
        if not isinstance(about, dict) or set(about) != _KEYS:
            return f"it holds {str(about)[:80]}, not {sorted(_KEYS)}"
        if not re.fullmatch(r"pieces-\d+", about["folder"]):
            return f"{str(about['folder'])[:80]!r} is no folder of pieces"
        for name, sha in about["files"].items():
            file = pointer.parent / about["folder"] / Path(name).name
            if digest(file) != sha:
                return f"the digest of {about['folder']}/{file.name} is wrong"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"[:200]
    return None


def set_aside(pointer: Path) -> Path:
    """Renames damaged pieces and their pointer; returns the folder in which they are now."""
    aside = pointer.parent / f"damaged-{time.time_ns()}"
    for pieces in pointer.parent.glob("pieces-*/"):
        aside.mkdir(exist_ok=True)
        pieces.rename(aside / pieces.name)
    aside.mkdir(exist_ok=True)
    pointer.rename(aside / POINTER)
    return aside


def _written(target: Path, tensors: dict[str, Tensor], rank: int) -> tuple[str | None, dict[str, str]]:
    """Writes this process's pieces: what went wrong, in this process or another, and the digests of its files."""
    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(target), save_distributed=True))
        files = sorted(target.glob(f"shard-{rank + 1:05d}-*"))
        for file in files:
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        return None, {file.name: digest(file) for file in files}
    except CheckpointException as error:
        return "; ".join(f"process {i}: {str(fault[0]).splitlines()[0]}" for i, fault in error.failures.items()), {}
    except OSError as error:
        return f"process {rank}: {error}", {}


def _pointed(pointer: Path, about: Mapping[str, Any]) -> str | None:
    """Writes pieces.json: what went wrong, or None."""
    try:
        write_atomically(pointer, json.dumps(about).encode())
    except OSError as error:
        return str(error)
    return None


def _empty(saved: Any, weight: Tensor) -> Tensor:
    """Room for a saved tensor: cut as the weight it belongs to is, unless it has a shape of its own."""
    dtype = saved.properties.dtype
    return torch.empty_like(weight, dtype=dtype) if saved.size == weight.shape else torch.empty(saved.size, dtype=dtype)
