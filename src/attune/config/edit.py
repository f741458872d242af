"""Changing single values of a YAML file; comments, order and every other line stay as they are."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from functools import reduce
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from attune.config.resolve import merged, read_yaml
from attune.config.schema import ConfigError
from attune.files import write_atomically

LONG = 4096  # characters of a line


def update_params_file(changes: Mapping[str, Any], path: Path | str) -> None:
    """Sets values by dotted key, in one step: a reader sees the old file or the new one.

    Line endings, a byte order mark and a missing last line end are kept. A key that is not written yet is added to its
    block, and a block likewise.

    Raises:
        ConfigError: the value is shared with another block by an anchor, and both would change; or what should hold
            it is no block.
    """
    path = Path(path)
    wanted, written = read_yaml(path), StringIO()
    text, encoding = _decoded(path)
    yaml = like(text)
    values = yaml.load(text)
    for dotted, value in changes.items():
        *blocks, last = dotted.split(".")
        wanted = merged(wanted, reduce(lambda inner, key: {key: inner}, [last, *reversed(blocks)], value))
        place = values
        for block in blocks:
            place = place.setdefault(block, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{path}: {dotted}: {block} is no block, so nothing can be written into it")
        place[last] = value
    yaml.dump(values, written)
    if YAML(typ="safe").load(written.getvalue()) != wanted:
        raise ConfigError(
            f"{path}: {', '.join(changes)}: another block shares these by an anchor; write them out there"
        )
    _write_like(path, written.getvalue(), text, encoding)


def replace_blocks(blocks: Mapping[str, Any], path: Path | str, to: Path | str | None = None) -> None:
    """Writes top-level blocks anew, or takes them out (None) with the comment above; every other line stays.

    A block that is not there yet is put at the end.

    Args:
        path: the YAML file that is read.
        to: where the result is written; None: the same file.

    Raises:
        ConfigError: the layout of the file hides where a block ends; nothing is written.
    """
    text, encoding = _decoded(Path(path))
    lines = text.replace("\r\n", "\n").splitlines(keepends=True)
    for key, value in blocks.items():
        start, end = _place(lines, key)
        if value is None:
            while start and lines[start - 1].startswith("#"):
                start -= 1
            end += end < len(lines) and not lines[end].strip()
        lines[start:end] = [] if value is None else [_dumped({key: value})]
    changed, wanted = "".join(lines), read_yaml(path)
    wanted = {key: value for key, value in (wanted | dict(blocks)).items() if blocks.get(key, value) is not None}
    if not _says(changed, wanted):
        raise ConfigError(f"{path}: {', '.join(blocks)}: write each of these as a block of its own, from the margin on")
    _write_like(Path(to or path), changed, text, encoding)


def _says(text: str, wanted: Mapping[str, Any]) -> bool:
    """Whether a text is YAML of these values."""
    yaml = YAML(typ="safe")
    try:
        return yaml.load(text) == yaml.load(_dumped(wanted))
    except YAMLError:
        return False


def _place(lines: list[str], key: str) -> tuple[int, int]:
    """First and last line (excluded) of a top-level block, without the blank lines and comments below it."""
    start = next((i for i, line in enumerate(lines) if line.startswith(f"{key}:")), len(lines))
    end = start + 1
    for i in range(start + 1, len(lines)):
        if lines[i].startswith((" ", "\t", "- ")):
            end = i + 1
        elif lines[i].strip() and not lines[i].startswith("#"):
            break
    return start, end


def _dumped(values: Mapping[str, Any]) -> str:
    written = StringIO()
    round_trip().dump(dict(values), written)
    return written.getvalue()


def _write_like(path: Path, changed: str, text: str, encoding: str) -> None:
    """Writes a changed text with the line ends, the last line and the encoding of the text that it was."""
    changed = changed.replace("\r\n", "\n")
    if not text.endswith("\n"):
        changed = changed.removesuffix("\n")
    newline = "\r\n" if "\r\n" in text else "\n"
    write_atomically(path, changed.replace("\n", newline).encode(encoding))


def _decoded(path: Path) -> tuple[str, str]:
    """A file's text without its byte order mark, and the encoding that writes it with the mark it has."""
    data = path.read_bytes()
    marks = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
    encoding = next((name for mark, name in marks if data.startswith(mark)), "utf-8")
    return data.decode(encoding), encoding


def write_yaml(values: Mapping[str, Any], path: Path) -> None:
    """Plain values as a YAML file."""
    round_trip().dump(dict(values), path)


def like(text: str) -> YAML:
    """The YAML that writes a text as it is laid out: with lines of any length, or broken at 80 as DVC breaks them."""
    for width in (80, LONG):
        yaml, written = round_trip(width), StringIO()
        yaml.dump(yaml.load(text), written)
        if written.getvalue().removesuffix("\n") == text.replace("\r\n", "\n").removesuffix("\n"):
            return yaml
    return round_trip()


def round_trip(width: int = LONG) -> YAML:
    """ruamel's YAML that keeps quotes; nothing behind a key is null, as DVC writes it."""
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = width, True
    return yaml
