"""The list of the files that hold latents and embeddings: their order, rows, sizes and hashes.

The hashes are made while the files are written. Whoever wants to know whether prepared data are the same reads this
list and not the data, which may be hundreds of GB.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import safe_open

from attune.data.mapped import MappedFile, MappedRows
from attune.files import MANIFEST, write_atomically
from attune.shards import tensors_sha

HASHED_BELOW = 2**30  # bytes in all, which take a second; beyond it sizes are compared, and DVC has hashes of its own


@dataclass(frozen=True)
class Entry:
    """A file of rows."""

    file: str  # relative to the folder
    rows: int
    bytes: int
    sha256: str  # of the tensors


def entry(folder: Path, file: str) -> Entry:
    """Of a file in a folder, from its header."""
    path = folder / file
    with safe_open(path, "pt") as opened:
        facts = json.loads(opened.metadata()["facts"])
        rows = {opened.get_slice(name).get_shape()[0] for name in opened.keys()}  # noqa: SIM118
    (count,) = rows
    return Entry(file, count, path.stat().st_size, facts["sha256"])


def write(folder: Path, files: Mapping[str, Iterable[str]]) -> None:
    """Writes the list; `files`: kind -> files, in the order of their rows."""
    lists = {kind: [asdict(entry(folder, file)) for file in some] for kind, some in files.items()}
    write_atomically(folder / MANIFEST, (json.dumps(lists, indent=0) + "\n").encode())


def read(folder: Path) -> dict[str, list[Entry]]:
    """Kind -> entries.

    Raises:
        FileNotFoundError: the prepare stage has not run.
        ValueError: the list is damaged.
    """
    try:
        lists = json.loads((folder / MANIFEST).read_text())
        return {kind: [Entry(**values) for values in some] for kind, some in lists.items()}
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} holds no prepared data; run the prepare stage first") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged; run the prepare stage again: {error}") from error


def rows_of(folder: Path, entries: Sequence[Entry], name: str) -> MappedRows:
    """The rows of a tensor of that name over the files."""
    return MappedRows([MappedFile(folder / each.file, name, each.rows) for each in entries])


def names_in(folder: Path, entries: Sequence[Entry]) -> list[str]:
    """The names of the tensors in the files."""
    with safe_open(folder / entries[0].file, "pt") as opened:
        return sorted(opened.keys())


def check(folder: Path) -> None:
    """Compares the files with the list: their sizes, and where they are small in all, their content.

    Raises:
        ValueError: a file is missing, or not what was written.
    """
    entries = [each for some in read(folder).values() for each in some]
    hashed = sum(each.bytes for each in entries) < HASHED_BELOW
    for each in entries:
        path = folder / each.file
        size = path.stat().st_size if path.exists() else None
        if size != each.bytes or (hashed and content_sha(path) != each.sha256):
            raise ValueError(f"{path} is damaged or lost; run the prepare stage again")


def content_sha(path: Path) -> str:
    """SHA-256 of the tensors of a file, in the order of their names."""
    with safe_open(path, "pt") as opened:
        return tensors_sha({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
