"""Files of weights and their configurations: told from what others have put in their place, read, and written.

A pickle can run any program when it is read. So weights are safetensors, or pickles of which only tensors and plain
containers are read (`weights_only`, and torch >= 2.10 for CVE-2026-24747). Weights that are not finite are refused.

Plans are made with this module, so torch is imported in the functions that need it.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attune.files import replaced_file
from attune.hub import Source

if TYPE_CHECKING:
    from torch import Tensor

INSTEAD = (  # how a file begins, in lower case, that is not what its name says
    ((b"version https://git-lfs", b"version https://hawser"), "is a pointer of git-lfs: `git lfs pull` fetches it"),
    ((b"/annex/objects/",), "is a pointer of git-annex: `git annex get` fetches it"),
    ((b"<!doctype", b"<html", b"<head", b"<?xml", b"<error"), "is a web page: download the file itself"),
)

# ---------------------------------------------------------------- what is there


def check_there(file: str | Path) -> None:
    """Raises ValueError if a file is empty, a pointer or a web page, as broken downloads leave them."""
    with Path(file).open("rb") as opened:
        start = opened.read(512).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginnings, is_what in INSTEAD:
        if start.startswith(beginnings):
            raise ValueError(f"{file} {is_what}")
    if not start:
        raise ValueError(f"{file} is empty: download it again")


def check_weights_files(files: Iterable[Path]) -> None:
    """Raises ValueError naming the first file that is no file of weights, or is not whole."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        check_there(file)
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt"):
                    pass  # the header is read, and the file's length compared with it
            except SafetensorError as error:
                raise ValueError(damage(file, error)) from error


def damage(file: str | Path, error: Exception) -> str:
    """The message for a file of weights that cannot be read; what is in it, if that is text."""
    with Path(file).open("rb") as opened:
        start = opened.read(80)
    text = start.decode(errors="replace")
    if text.lstrip().startswith(("{", "[")) and text.replace("\n", " ").isprintable():
        return f"{file} is JSON and no file of weights, perhaps a server's answer: {text!r}"
    return f"{file} is damaged, or no file of weights ({str(error).strip().partition(chr(10))[0]}): download it again"


def refusal(source: str | Path | Source) -> str:
    """The message for a pickle that would run something."""
    return f"{source} was not loaded: it holds more than tensors, and reading that could run any program"


# ---------------------------------------------------------------- reading


def read_tensors(file: str | Path) -> dict:
    """The content of a `.safetensors` file or of a pickle holding nothing but tensors and plain containers.

    Pickles are mapped, not copied, where their format allows it: clone what outlives a change of the file.

    Raises:
        ValueError: the pickle holds anything else (nothing in it is executed); the file is something else, or cannot
            be read; or a tensor is not finite.
    """
    from safetensors.torch import load_file

    file = Path(file)
    check_weights_files([file])
    tensors = load_file(file) if file.suffix == ".safetensors" else _read_pickle(file)
    if not isinstance(tensors, dict):
        raise ValueError(f"{file} holds a {type(tensors).__name__}, not named tensors")
    check_finite(tensors, file)
    return tensors


def _read_pickle(file: Path) -> Any:
    import torch

    with file.open("rb") as opened:
        is_pickle = opened.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    try:  # only zip-format files can be mapped; older ones are tar-like
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(refusal(file) if is_pickle else damage(file, error)) from error
    except Exception as error:  # a file that is cut or overwritten fails in many ways
        raise ValueError(damage(file, error)) from error


def check_finite(tensors: Any, source: str | Path | Source) -> None:
    """Raises ValueError naming the first tensor, in nested mappings or lists too, that holds a NaN or an infinity."""
    if (name := nonfinite_name(tensors)) is not None:
        raise ValueError(f"{source}: {name} holds values that are not finite (NaN or infinity)")


def nonfinite_name(tensors: Any) -> str | None:
    """The first tensor, in nested mappings or lists too, that holds a NaN or an infinity.

    Its least and greatest value show it, for NaN is both; `isfinite` of all takes ten times as long on a CPU.
    """
    for name, tensor in _named_tensors(tensors):
        if tensor.is_floating_point() and tensor.numel():
            values = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # float8 has few operations of its own
            if not all(math.isfinite(value) for value in values.aminmax()):
                return name
    return None


def _named_tensors(values: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    import torch

    if isinstance(values, torch.Tensor):
        yield name, values
    elif isinstance(values, Mapping | list | tuple):
        for key, value in values.items() if isinstance(values, Mapping) else enumerate(values):
            yield from _named_tensors(value, f"{name}.{key}" if name else str(key))


def read_json(file: str | Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming the file if it is none."""
    check_there(file)
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}, not a JSON object")
    return values


def count_parameters(folder: Path, patterns: Iterable[str] = ("*.safetensors",)) -> int:
    """Numbers in the safetensors files of a folder whose names fit any of the patterns, from their headers alone."""
    from safetensors import safe_open

    total = 0
    for file in {file for pattern in patterns for file in folder.glob(pattern) if file.suffix == ".safetensors"}:
        check_weights_files([file])
        with safe_open(file, "pt") as opened:
            total += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    return total


def tensor_names(folder: Path) -> list[str]:
    """Names in all safetensors files of a folder, from their headers alone."""
    from safetensors import safe_open

    names: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        check_weights_files([file])
        with safe_open(file, "pt") as opened:
            names += opened.keys()
    return names


# ---------------------------------------------------------------- writing


def save_tensors(tensors: Mapping[str, Tensor], file: Path, header: Mapping[str, str] | None = None) -> None:
    """Writes a `.safetensors` file, whole or not at all: the same tensors and header give the same bytes.

    Args:
        header: texts for the file's header, beside `format: pt`, which diffusers and transformers ask for.
    """
    from safetensors.torch import save_file

    with replaced_file(file) as beside:
        save_file(dict(tensors), beside, metadata={"format": "pt", **(header or {})})
        _sort_header(beside)


def read_header(file: Path) -> dict[str, str]:
    """The texts in the header of a `.safetensors` file. Raises ValueError if it is none."""
    from safetensors import safe_open

    check_weights_files([file])
    with safe_open(file, "pt") as opened:
        return dict(sorted((opened.metadata() or {}).items()))


def _sort_header(file: Path) -> None:
    """Puts the texts of a header in order: safetensors writes them in another order in every process."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise ValueError(f"{file}: the header of {size} bytes has no room for {len(text)}")
        opened.seek(8)
        opened.write(text.ljust(size))
