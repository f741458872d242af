"""Webdataset tars: `<key>.<column>` and `<key>.<column>.<type>` are one row's files, wherever in the tar they are."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from attune.data.local import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, is_hidden
from attune.data.quarantine import RejectedRow
from attune.data.rows import BadRow

Sample = tuple[str, Mapping[str, bytes]]
"""The key of a row, and column -> the bytes of its file."""


def tar_samples(path: Path, name: str, images: Sequence[str], texts: Sequence[str]) -> Iterator[Sample | BadRow]:
    """The samples of a tar that is not compressed, in the order of their first files.

    A tar that breaks off is one bad row at the end; the samples before that are read.

    Args:
        path: the tar.
        name: what bad rows call it.
        images: columns that hold images.
        texts: columns that hold text. Other files of a sample are not read.
    """
    limits = dict.fromkeys(images, MAX_IMAGE_BYTES) | dict.fromkeys(texts, MAX_TEXT_BYTES)
    try:
        with tarfile.open(path, "r:") as tar:
            samples, error = _index(tar)
            if error and samples:
                samples.popitem()  # its other files are lost with the rest of the tar
            for key, members in samples.items():
                yield _sample(tar, key, members, name, limits)
    except (tarfile.TarError, OSError, ValueError) as broken:
        error = broken
    if error:
        yield BadRow("unreadable_file", name, detail=f"{error}; expected a whole tar that is not compressed")


def _index(tar: tarfile.TarFile) -> tuple[dict[str, list[tuple[str, tarfile.TarInfo]]], Exception | None]:
    """Key -> (column, member) of its files, and what stopped the reading; only headers are read."""
    samples: dict[str, list[tuple[str, tarfile.TarInfo]]] = {}
    try:
        for member in tar:
            if not member.isdir() and not is_hidden(Path(member.name.removeprefix("./"))):
                key, column = key_and_column(member.name)
                samples.setdefault(key, []).append((column, member))
    except (tarfile.TarError, OSError, ValueError) as error:
        return samples, error
    return samples, None


def key_and_column(name: str) -> tuple[str, str]:
    """`a/000.jpg_0.jpg` -> ("a/000", "jpg_0"): the key ends at the first dot of the file's own name."""
    folder, _, file = name.rpartition("/")
    key, _, rest = file.partition(".")
    column = rest.partition(".")[0]
    return f"{folder}/{key}" if folder else key, "caption" if column == "original_prompt" else column


def _sample(
    tar: tarfile.TarFile,
    key: str,
    members: Sequence[tuple[str, tarfile.TarInfo]],
    name: str,
    limits: Mapping[str, int],
) -> Sample | BadRow:
    columns: dict[str, bytes] = {}
    for column, member in members:
        if column not in limits:
            continue
        try:
            content = _content(tar, member, column, limits[column])
        except RejectedRow as reason:
            return BadRow(str(reason), name, key, detail=reason.detail)
        if columns.setdefault(column, content) != content:
            return BadRow("malformed_row", name, key, detail=f"column {column}: several files that differ")
    return key, columns


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, column: str, limit: int) -> bytes:
    """The bytes of a member, whose size is known before: a sparse one of terabytes takes a few bytes of the tar."""
    if not member.isreg():
        raise RejectedRow("malformed_row", f"column {column}: {member.name} is a link or a device; expected a file")
    if member.size > limit:
        raise RejectedRow("too_large", f"column {column}: {member.size} bytes; {limit} are read at most")
    file = tar.extractfile(member)
    return b"" if file is None else file.read()
