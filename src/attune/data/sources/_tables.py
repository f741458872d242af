"""Tables of rows: CSV with a header, and JSONL. A row that cannot be read is one bad row, and the next is read."""

from __future__ import annotations

import csv
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from attune.config.sources import FilesConfig
from attune.data.local import is_utf_16
from attune.data.quarantine import RejectedRow
from attune.data.rows import BadRow, Quota, SourceError
from attune.data.rows import Row as SourceRow
from attune.data.sources._files import are_small, image_in, listed_test_prompts, prompt_texts
from attune.data.sources._json import parse_json
from attune.data.splits import count_rows

MAX_LINE_CHARS = 10_000_000
MAX_CELL_CHARS = 2**17
MAX_RECORD_LINES = 1000  # of a CSV cell with line breaks; one that is longer has lost its closing quote

Row = tuple[int, "Mapping[str, Any] | BadRow"]
"""Number of the first line of a row, from 1, and its cells by column."""


def read_rows(path: Path, is_row: Callable[[Mapping[str, str]], bool]) -> Iterator[Row]:
    """The rows of a .csv with a header or of a .jsonl, whose lines are objects; blank lines are skipped.

    Args:
        path: the file.
        is_row: whether cells look like a row of such a table. It is asked of lines inside quotes: a quote that is
            never closed takes the rows below it for one cell.

    Raises:
        SourceError: the file is empty, not there or not UTF-8.
    """
    check_is_text(path)
    with path.open(encoding="utf-8-sig", newline="", errors="surrogateescape") as file:
        lines = _lines(file)
        if path.suffix.lower() == ".csv":
            yield from _csv_rows(lines, path, is_row)
        else:
            yield from ((n, _json_row(line, path.name, n)) for n, line in lines if line.strip())


def check_table(path: Path, columns: Sequence[str]) -> None:
    """Checks what is to be read as `data.path`: a .csv with these columns or a .jsonl, with a row.

    Raises:
        SourceError: it is not there, is of another type, lacks a column, or has no row.
    """
    if path.suffix.lower() not in (".csv", ".jsonl") or not path.is_file():
        raise SourceError(f"data.path: {path} is not there, or neither a .csv nor a .jsonl file")
    header = columns_of(path)
    missing = [column for column in columns if header is not None and column not in header]
    if missing:
        raise SourceError(f"{path}: column {missing[0]!r} is missing; there are {', '.join(header or ())}")
    if next(read_rows(path, lambda cells: False), None) is None:
        raise SourceError(f"{path} has a header and no row below it")


def cells_of(row: Mapping[str, Any], columns: Sequence[str]) -> list[Any]:
    """The cells of these columns. Raises RejectedRow, `malformed_row`, where one is missing."""
    absent = [column for column in columns if column not in row]
    if absent:
        raise RejectedRow("malformed_row", f"column {absent[0]} is missing; there are {', '.join(map(str, row))}")
    return [row[column] for column in columns]


def bad_row(reason: RejectedRow, row: Mapping[str, Any], file: str, number: int) -> BadRow:
    """The row for the quarantine, with its prompt where that is text."""
    prompt = row.get("prompt")
    return BadRow(str(reason), file, number, prompt if isinstance(prompt, str) else None, reason.detail)


def columns_of(path: Path) -> list[str] | None:
    """The header of a .csv; None of a .jsonl, whose rows have their own columns.

    Raises:
        SourceError: the file is empty, not there or not UTF-8.
    """
    check_is_text(path)
    if path.suffix.lower() != ".csv":
        return None
    with path.open(encoding="utf-8-sig", newline="", errors="surrogateescape") as file:
        return _header(_lines(file), path)


def check_is_text(path: Path) -> None:
    """Raises SourceError for a file that is not there, is empty, or is UTF-16, as spreadsheets save it."""
    if not path.is_file():
        raise SourceError(f"{path} is not there, or no file")
    with path.open("rb") as file:
        start = file.read(4096)
    if not start.strip(b"\xef\xbb\xbf\r\n\t "):
        raise SourceError(f"{path} is empty; expected a row per line, of a .csv below a header")
    if is_utf_16(start):
        raise SourceError(f"{path} is not UTF-8 but perhaps UTF-16; save it as UTF-8")


def _lines(file: TextIO) -> Iterator[tuple[int, str]]:
    """(number, line); of a line that is too long only the beginning, so that it is no row."""
    number = 0
    while line := file.readline(MAX_LINE_CHARS):
        number += 1
        yield number, line
        while len(line) == MAX_LINE_CHARS and not line.endswith("\n"):
            line = file.readline(MAX_LINE_CHARS)


def _json_row(line: str, file: str, number: int) -> Mapping[str, Any] | BadRow:
    try:
        row = parse_json(line)
    except ValueError as error:
        return BadRow("malformed_row", file, number, detail=f"line {number} is not JSON: {error}")
    if not isinstance(row, dict):
        return BadRow("malformed_row", file, number, detail=f"line {number}: expected an object in braces")
    return row


def _header(lines: Iterator[tuple[int, str]], path: Path) -> list[str]:
    first = next((line for _, line in lines if line.strip()), "")
    header = _cells(first)
    if isinstance(header, str):
        raise SourceError(f"{path}: its header is no row of cells: {header}")
    if any(len(name) > MAX_CELL_CHARS for name in header):
        raise SourceError(f"{path}: a name in its header has more than {MAX_CELL_CHARS} characters; expected a header")
    twice = [name for name, n in Counter(header).items() if name and n > 1]
    if twice:
        raise SourceError(f"{path}: column {twice[0]!r} is there twice; remove one of the two")
    for sign, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and sign in header[0]:
            raise SourceError(f"{path}: the cells of its header are separated by {name}; expected commas")
    return header


def _csv_rows(
    lines: Iterator[tuple[int, str]], path: Path, is_row: Callable[[Mapping[str, str]], bool]
) -> Iterator[Row]:
    header, ahead = _header(lines, path), deque[tuple[int, str]]()
    while True:
        ahead.extend(islice(lines, max(0, MAX_RECORD_LINES - len(ahead))))
        if not ahead:
            return
        number, line = ahead[0]
        taken, cells = _record(ahead, header, is_row) if '"' in line else (1, _cells(line))
        for _ in range(taken):
            ahead.popleft()
        if cells:
            yield number, _csv_row(cells, header, path.name, number)


def _csv_row(cells: list[str] | str, header: list[str], file: str, number: int) -> Mapping[str, Any] | BadRow:
    if isinstance(cells, str):
        return BadRow("malformed_row", file, number, detail=f"line {number}: {cells}")
    while len(cells) > len(header) and not cells[-1]:  # commas at the end, as spreadsheets leave them
        cells = cells[:-1]
    if len(cells) > len(header):
        expected = f"expected {len(header)} cells, found {len(cells)}: a comma inside a cell needs quotes around it"
        return BadRow("malformed_row", file, number, detail=f"line {number}: {expected}")
    for column, cell in zip(header, cells, strict=False):
        if len(cell) > MAX_CELL_CHARS:
            size = f"{len(cell)} characters; {MAX_CELL_CHARS} are read at most"
            return BadRow("malformed_row", file, number, detail=f"line {number}, column {column}: {size}")
    return dict(zip(header, [*cells, *[None] * (len(header) - len(cells))], strict=True))


def _record(
    ahead: Sequence[tuple[int, str]], header: list[str], is_row: Callable[[Mapping[str, str]], bool]
) -> tuple[int, list[str] | str]:
    """How many lines the record at the start of them has, and its cells, or what is wrong with its quotes.

    A record that takes several lines must be closed by a quote, and none of its lines but the last may be a row in
    itself; else a quote in its first line was never closed, and the lines below it are rows of their own.
    """
    reader = csv.reader((line for _, line in ahead), strict=True)
    try:
        with _cells_of_any_length():
            cells = next(reader)
    except csv.Error as error:
        if reader.line_num > 1 or "unexpected end of data" in str(error):
            return 1, "a quote is opened here, and never closed"
        return 1, _cells(ahead[0][1])
    taken = reader.line_num
    inside = (_cells(line, quotes=False) for _, line in islice(ahead, taken - 1))
    rows = (
        dict(zip(header, found, strict=True))
        for found in inside
        if len(found) == len(header) and not isinstance(found, str)
    )
    if taken > 1 and (len(cells) > len(header) or any(map(is_row, rows))):
        return 1, "a quote is opened here, and the next one is rows below"
    return taken, cells


def _cells(line: str, quotes: bool = True) -> list[str] | str:
    """The cells of a line by itself, or what is wrong with it."""
    try:
        with _cells_of_any_length():
            return next(csv.reader([line], quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE), [])
    except csv.Error as error:
        return str(error)


@contextmanager
def _cells_of_any_length() -> Iterator[None]:
    """Without csv's own limit, which is the whole process's, and at which a record ends in the middle of a cell."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def table_files(
    path: str, test_list: str | None, columns: Sequence[str], is_row: Callable[[Mapping[str, str]], bool]
) -> list[Path]:
    """The table, the prompt list and every image named in these columns that is here.

    A cell may be a list of names. Of a large table the folders of the images, for speed.
    """
    file = Path(path)
    rows = (row for _, row in read_rows(file, is_row) if isinstance(row, Mapping))
    cells = (row.get(column) for row in rows for column in columns)
    each = (name for cell in cells for name in (cell if isinstance(cell, list) else [cell]))
    try:
        names = {name for name in each if isinstance(name, str)}
    except SourceError:  # said when the rows are read
        names = set()
    if not are_small(file):
        names = {name.partition("/")[0] for name in names}
    images = (image for name in sorted(names) if isinstance(image := image_in(file.parent, name), Path))
    listed = [] if test_list is None else [Path(test_list)]
    return [file, *listed, *(image for image in images if image.is_file() or image.is_dir())]


def sizes_of_small(config: FilesConfig, rows: Callable[[], Iterable[SourceRow]]) -> dict[str, int] | None:
    """Sizes of the splits, of a table that is read in less than a second."""
    return count_rows(rows(), Quota.of(config)) if are_small(config.path, config.test_list) else None


def prompts_of_small(config: FilesConfig, rows: Callable[[], Iterable[SourceRow]]) -> Iterator[str] | None:
    """All prompts of a table that is read in less than a second, else those of `test_list`."""
    if are_small(config.path, config.test_list):
        return prompt_texts(rows())
    return prompt_texts(listed_test_prompts(config.test_list)) if config.test_list else None
