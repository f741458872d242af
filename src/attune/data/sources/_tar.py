"""Webdataset tars: `<key>.<column>` and `<key>.<column>.<type>` are one row's files, wherever in the tar they are."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from attune.data.local import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, is_hidden
from attune.data.quarantine import RejectedRow
from attune.data.rows import BadRow

MAX_HEADERS = 16  # of one file: they hold its long names and further attributes, and are read one inside the other
MAX_PADDING = 2**24  # bytes of zeros after the end of a tar; tape drives fill up their records, of 10 kB mostly
LENGTHENING = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
ERRORS = (tarfile.TarError, OSError, ValueError, OverflowError)

Sample = tuple[str, Mapping[str, bytes]]
"""The key of a row, and column -> the bytes of its file."""


def tar_samples(path: Path, name: str, images: Sequence[str], texts: Sequence[str]) -> Iterator[Sample | BadRow]:
    """The samples of a tar that is not compressed, in the order of their first files.

    A tar that breaks off or is damaged is one bad row at the end; the samples before that are read.

    Args:
        path: the tar.
        name: what bad rows call it.
        images: columns that hold images.
        texts: columns that hold text. Other files of a sample are not read.
    """
    limits = dict.fromkeys(images, MAX_IMAGE_BYTES) | dict.fromkeys(texts, MAX_TEXT_BYTES)
    error: Exception | None = None
    try:
        with path.open("rb") as file:
            start = _after_zeros(file, 0)
            if start is None:
                return
            _check_headers(file, start)
            file.seek(start)
            with tarfile.TarFile(fileobj=file) as tar:
                samples, error = _index(tar, file)
                for key, members in samples.items():
                    yield _sample(tar, key, members, name, limits)
    except ERRORS as broken:
        error = broken
    if error:
        yield BadRow("unreadable_file", name, detail=f"{error}; expected a whole tar that is not compressed")


def _index(
    tar: tarfile.TarFile, file: BinaryIO
) -> tuple[dict[str, list[tuple[str, tarfile.TarInfo]]], Exception | None]:
    """Key -> (column, member) of its files, and what stopped the reading; only headers are read."""
    samples: dict[str, list[tuple[str, tarfile.TarInfo]]] = {}
    key, end = "", 0
    try:
        while (start := _after_zeros(file, end)) is not None:
            key = key if start == end else ""  # a tar ended here, and with it the sample
            _check_headers(file, start)
            file.seek(start)
            member = tarfile.TarInfo.fromtarfile(tar)
            if member.size < 0 or tar.offset <= start:
                raise tarfile.ReadError(f"byte {start}: the file {member.name} is {member.size} bytes long")
            end = tar.offset
            if not member.isdir() and not is_hidden(Path(member.name.removeprefix("./"))):
                key, column = key_and_column(member.name)
                samples.setdefault(key, []).append((column, member))
    except ERRORS as error:
        samples.pop(key, None)  # its other files are lost with the rest of the tar
        return samples, error
    return samples, None


def _after_zeros(file: BinaryIO, start: int) -> int | None:
    """The byte where the next member begins; None at the end. Tars one after the other (`cat a.tar b.tar`) are one.

    Raises:
        tarfile.TarError: the tar breaks off.
    """
    size = os.fstat(file.fileno()).st_size
    if start > size or size == 0:
        raise tarfile.ReadError("unexpected end of data")
    file.seek(start)
    while not any(block := file.read(tarfile.BLOCKSIZE)):
        if not block:
            return None
        if file.tell() - start > MAX_PADDING:
            raise tarfile.ReadError(f"byte {start}: more than {MAX_PADDING} bytes of zeros")
    return file.tell() - len(block)


def _check_headers(file: BinaryIO, first: int) -> None:
    """Looks at headers before `tarfile` does, which takes a damaged one for the end, and believes any length.

    Raises:
        tarfile.TarError: one is damaged or claims what cannot be, or there are too many.
    """
    at = first
    for _ in range(MAX_HEADERS):
        file.seek(at)
        header = _header(file.read(tarfile.BLOCKSIZE), at)
        if header.type not in LENGTHENING:
            return
        if header.size > MAX_TEXT_BYTES:
            raise tarfile.ReadError(f"byte {at}: a header of {header.size} bytes; {MAX_TEXT_BYTES} are read at most")
        at += tarfile.BLOCKSIZE * (1 - -header.size // tarfile.BLOCKSIZE)
    raise tarfile.ReadError(f"byte {first}: more than {MAX_HEADERS} headers for one file")


def _header(block: bytes, at: int) -> tarfile.TarInfo:
    try:
        header = tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.TarError as error:
        raise tarfile.ReadError(f"byte {at}: {error}") from None
    if header.size < 0:
        raise tarfile.ReadError(f"byte {at}: {header.name} is {header.size} bytes long")
    return header


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
