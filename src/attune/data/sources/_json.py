"""JSON from elsewhere: a hostile value costs its own row, not the file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from attune.data.local import is_utf_16, read_regular, read_regular_start
from attune.data.quarantine import RejectedRow
from attune.data.rows import SourceError

MAX_FILE_BYTES = 2**31  # of a list or an index, which is read whole
MAX_DIGITS = 308  # of an integer: more are beyond a float
TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)  # strings, so that their brackets do not count
STREAM_TOKEN = re.compile(TOKEN.pattern + '|"', re.DOTALL)
CHUNK_CHARS, MAX_ELEMENT_CHARS = 2**20, 2**24


class TooDeep(ValueError):
    """JSON nested so deeply that it cannot be read."""


def parse_json(text: str) -> Any:
    """The value of a JSON text. Integers too large for a float are NaN.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text, parse_int=_integer)
    except RecursionError:
        raise TooDeep("nested too deeply") from None


def read_json_list(path: Path) -> list[Any] | None:
    """The elements of the list in a JSON file, None in place of one that cannot be read; None if it is no list.

    Raises:
        SourceError: the file is not there, or not JSON.
    """
    text = read_text(path)
    if not text.lstrip().startswith("["):
        _check_json(text, path)
        return None
    try:
        return _parse_file(text, path)
    except TooDeep:
        return [_or_none(element) for element in _members(text)]


def stream_json_list(path: Path) -> Iterator[Any]:
    """The elements of the list in a JSON file, however large, one by one; None in place of one that cannot be read.

    A file that ends without closing the list has None as its last element, for nobody knows what was to follow.

    Raises:
        SourceError: the file is not there, is no list, or has an element of more than MAX_ELEMENT_CHARS.
    """
    try:
        start = read_regular_start(path)
    except RejectedRow as error:
        raise SourceError(error.detail) from None
    if is_utf_16(start):
        raise SourceError(f"{path} is not UTF-8 but perhaps UTF-16; save it as UTF-8")
    if not start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        raise SourceError(f"{path}: must be a list of objects")
    return (_or_none(text) for text in _streamed(path))


def _streamed(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        text = file.read(CHUNK_CHARS).lstrip()[1:]
        while True:
            start = 0
            while (end := _element_end(text, start)) is not None:
                if text[start:end].strip() or text[end] == ",":
                    yield text[start:end]
                if text[end] == "]":
                    return
                start = end + 1
            text, more = text[start:], file.read(CHUNK_CHARS)
            if not more:
                yield ""  # in place of what is cut
                return
            if len(text) > MAX_ELEMENT_CHARS:
                raise SourceError(f"{path} is not JSON: {MAX_ELEMENT_CHARS} characters without the end of an element")
            text += more


def _element_end(text: str, start: int) -> int | None:
    """Where the comma or bracket after an element is; None if the text ends before it."""
    depth = 0
    for token in STREAM_TOKEN.finditer(text, start):
        sign = token[0]
        if sign == '"':  # of a string that is cut
            return None
        if depth == 0 and sign in ",]":
            return token.start()
        depth += (sign in "[{") - (sign in "]}")
    return None


def read_json_members(path: Path) -> list[tuple[str, Any]] | None:
    """(key, value) of the object in a JSON file in order, repeated keys too; None if it is no object.

    A value that cannot be read is None.

    Raises:
        SourceError: the file is not there, or not JSON.
    """
    text = read_text(path)
    _check_json(text, path)
    if not text.lstrip().startswith("{"):
        return None
    found = []
    for member in _members(text):
        key = re.match(r'\s*("[^"\\]*(?:\\.[^"\\]*)*")\s*:', member, re.DOTALL)
        if key is None:
            raise SourceError(f"{path} is not JSON: expected a name in quotes, found {member.strip()[:40]!r}")
        found.append((str(json.loads(key[1], strict=False)), _or_none(member[key.end() :])))
    return found


def read_text(path: Path) -> str:
    """A text file. Bytes that are not UTF-8 become surrogates, so that only the rows that hold them are bad.

    Raises:
        SourceError: it is not there, or UTF-16.
    """
    try:
        data = read_regular(path, MAX_FILE_BYTES)
    except RejectedRow as error:
        raise SourceError(error.detail) from None
    if is_utf_16(data[:4096]):
        raise SourceError(f"{path} is not UTF-8 but perhaps UTF-16; save it as UTF-8")
    return data.decode("utf-8-sig", errors="surrogateescape")


def _parse_file(text: str, path: Path) -> Any:
    try:
        return parse_json(text)
    except TooDeep:
        raise
    except ValueError as error:
        raise SourceError(f"{path} is not JSON: {error}") from None


def _check_json(text: str, path: Path) -> None:
    """Raises SourceError for what is not JSON; what is nested too deeply may be."""
    with suppress(TooDeep):
        _parse_file(text, path)


def _integer(digits: str) -> float:
    return int(digits) if len(digits) <= MAX_DIGITS else math.nan


def _or_none(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None


def _members(text: str) -> Iterator[str]:
    """The texts of the elements of a list, or of `"key": value` of an object, without reading what is inside them.

    What is left over after the end, or where there is no end, is one more.
    """
    depth = start = 0
    for token in TOKEN.finditer(text):
        sign = token[0]
        depth += (sign in "[{") - (sign in "]}")
        if sign in "[{" and depth == 1:
            start = token.end()
        elif (sign == "," and depth == 1) or (sign in "]}" and depth == 0):
            if text[start : token.start()].strip():
                yield text[start : token.start()]
            start = token.end()
            if depth == 0:
                break
    if text[start:].strip():
        yield text[start:]
