"""Parquet files row by row, in bounded memory: a few kilobytes of one can stand for terabytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from attune.data.local import MAX_IMAGE_BYTES
from attune.data.rows import BadRow, SourceError

MAX_ROW_BYTES = 2 * MAX_IMAGE_BYTES
BATCH_BYTES, BATCH_ROWS = 2**27, 1024  # what a batch may come to if every cell is as large as its column allows
# A group of rows is a bomb if a column is larger than both, unpacked: images are packed already, text about 5 times
BOMB_BYTES, BOMB_RATIO = 2**28, 50
VALUE_BYTES = 8  # of a value in a list, at most
ERRORS = (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError)

Row = tuple[int, Mapping[str, Any]]


def read_columns(path: Path, name: str, needed: Sequence[str]) -> list[str]:
    """The columns of a parquet file.

    Raises:
        SourceError: it is no parquet file, or lacks a column.
    """
    if not path.is_file():
        raise SourceError(f"{name} is not there, or no file")
    try:
        names = pyarrow.parquet.read_schema(path).names
    except ERRORS as error:
        raise SourceError(f"{name} is not a parquet file: {error}") from None
    missing = [column for column in needed if column not in names]
    if missing:
        raise SourceError(f"{name}: column {missing[0]!r} is missing; there are {', '.join(names)}")
    twice = [column for column in needed if names.count(column) > 1]
    if twice:
        raise SourceError(f"{name}: column {twice[0]!r} is there twice; remove one of the two")
    return names


def parquet_rows(path: Path, name: str, columns: Sequence[str]) -> Iterator[Row | BadRow]:
    """(number from 0, cells by column) of each row; a group of rows that cannot be read is one bad row.

    Raises:
        OSError, pyarrow.ArrowException: the file is no parquet file.
    """
    start = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            yield from _group_rows(file, group, start, name, columns)
            start += rows


def _group_rows(
    file: pyarrow.parquet.ParquetFile, group: int, start: int, name: str, columns: Sequence[str]
) -> Iterator[Row | BadRow]:
    chunks = list(_chunks(file, group, columns))
    rows = f"rows {start} to {start + file.metadata.row_group(group).num_rows - 1}"
    for chunk, unpacked in chunks:
        if unpacked > max(BOMB_BYTES, BOMB_RATIO * chunk.total_compressed_size):
            sizes = f"{chunk.total_compressed_size} bytes that stand for {unpacked}"
            yield BadRow("too_large", name, start, detail=f"{rows}, column {chunk.path_in_schema}: {sizes}")
            return
    largest = sum(unpacked for _, unpacked in chunks)  # one cell can be as large as its column
    at_once = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, largest)))
    number = start
    try:
        for batch in file.iter_batches(at_once, row_groups=[group], columns=list(columns)):
            for row in range(batch.num_rows):
                yield _row(batch.slice(row, 1), number, name)
                number += 1
    except ERRORS as error:
        yield BadRow("unreadable_file", name, number, detail=f"{rows} from {number} on: {error}")


def _chunks(file: pyarrow.parquet.ParquetFile, group: int, columns: Sequence[str]) -> Iterator[tuple[Any, int]]:
    """What the file says of each column's data, and its bytes unpacked; of a column of structs there are several.

    Equal values of a list are written once with their number, so the values are counted.
    """
    metadata = file.metadata.row_group(group)
    for i in range(metadata.num_columns):
        chunk = metadata.column(i)
        if chunk.path_in_schema.partition(".")[0] in columns:
            in_lists = chunk.num_values * VALUE_BYTES if file.schema.column(i).max_repetition_level else 0
            yield chunk, max(chunk.total_uncompressed_size, in_lists)


def _row(batch: pyarrow.RecordBatch, number: int, name: str) -> Row | BadRow:
    if batch.nbytes > MAX_ROW_BYTES:
        return BadRow("too_large", name, number, detail=f"{batch.nbytes} bytes; {MAX_ROW_BYTES} are read at most")
    try:
        return number, batch.to_pylist()[0]
    except ERRORS as error:  # of a type that Python has no value for, or beyond the values that it has
        column = next((c for c in batch.schema.names if not _is_readable(batch.column(c))), "")
        what = "expected text in UTF-8" if isinstance(error, UnicodeDecodeError) else error
        return BadRow("malformed_row", name, number, detail=f"column {column}: {what}")


def _is_readable(column: pyarrow.Array) -> bool:
    try:
        column.to_pylist()
    except ERRORS:
        return False
    return True
