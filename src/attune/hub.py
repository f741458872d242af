"""Weights from files nobody has to trust: found, checked, read without running anything, and fitted exactly.

A pickle can run any program when it is read. So files are safetensors, or pickles of which only tensors and plain
containers are read (`weights_only`, and torch >= 2.10 for CVE-2026-24747); there is no way around that.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn

HUB = "hf://"
M = TypeVar("M", bound=nn.Module)


def find_file(path: str, revision: str | None = None, sha256: str | None = None) -> Path:
    """A local file, or `hf://owner/repository/file` fetched from the Hub (cached).

    Args:
        revision: Hub commit; ignored for a local file.
        sha256: what the file must hash to, 64 hex digits; None accepts any file.

    Raises:
        FileNotFoundError: no such local file.
        ValueError: the Hub address has fewer than three parts, or the file is not the one asked for.
    """
    file = _fetched(path, revision)
    if sha256 is not None:
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != sha256:
            raise ValueError(f"{path} has sha256 {found}, not {sha256}; it was not loaded")
    return file


def _fetched(path: str, revision: str | None) -> Path:
    if not path.startswith(HUB):
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file {path}; one on the Hub is written {HUB}owner/repository/file")
        return Path(path)
    parts = path.removeprefix(HUB).split("/", 2)
    if len(parts) < 3:
        raise ValueError(f"{path} should read {HUB}owner/repository/file")
    return Path(hf_hub_download("/".join(parts[:2]), parts[2], revision=revision))


def read_tensors(file: str | Path) -> dict:
    """The content of a `.safetensors` file or of a pickle holding nothing but tensors and plain containers.

    Pickles are mapped, not copied, where their format allows it: clone what outlives a change of the file.

    Raises:
        ValueError: the pickle holds anything else, or is none; nothing in it is executed.
    """
    if Path(file).suffix == ".safetensors":
        return load_file(file)
    try:
        # only zip-format files can be mapped; older ones are tar-like
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(refusal(file)) from error


def refusal(source: str | Path) -> str:
    """What to tell whoever offers a pickle that wants to run something."""
    return f"{source} was not loaded: it holds more than tensors, and reading that could run any program"


def read_json(file: str | Path) -> dict:
    """A JSON object."""
    return json.loads(Path(file).read_text(encoding="utf-8"))


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Copies tensors into the module. Raises ValueError naming missing and unexpected ones."""
    _refuse_misfit(*module.load_state_dict(tensors, strict=False), source)


def build_with(build: Callable[[], M], tensors: Mapping[str, Tensor], source: str | Path) -> M:
    """The module `build` makes, holding these very tensors: one copy in memory, and no time for random ones.

    Args:
        build: makes the module; called where tensors have shapes but no memory.
        tensors: all its parameters and saved buffers, of the right dtype.
        source: what to blame.

    Raises:
        ValueError: naming missing and unexpected tensors.
    """
    with torch.device("meta"):
        module = build()
    _refuse_misfit(*module.load_state_dict(tensors, strict=False, assign=True), source)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta and name != "position_ids":
                raise NotImplementedError(f"buffer {name} of {type(part).__name__} is not in {source}")
            if buffer.is_meta:  # 0, 1, 2, ...: transformers does not save them
                setattr(part, name, torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return module


def misfit(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """What is wrong with a set of tensors, in one line however many they are."""
    return f"missing {_some(missing)}, unexpected {_some(unexpected)}"


def _some(names: Iterable[str], most: int = 6) -> str:
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{names[:most]}{more}"


def _refuse_misfit(missing: list[str], unexpected: list[str], source: str | Path) -> None:
    if missing or unexpected:
        raise ValueError(f"{source} does not fit: {misfit(missing, unexpected)}")
