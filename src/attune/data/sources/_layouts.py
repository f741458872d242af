"""How a source knows its data: by the columns of a table, or the first lines of a list."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attune.data.rows import SourceError
from attune.data.sources._json import parse_json
from attune.data.sources._tables import columns_of

LOOKED_AT = 65_536  # bytes of a file


def has_columns(path: Path, columns: Sequence[str]) -> bool:
    """Whether a .csv has all of these columns, or the first row of a .jsonl."""
    if path.suffix.lower() not in (".csv", ".jsonl") or not path.is_file():
        return False
    try:
        found = columns_of(path)
        if found is None:
            row = parse_json(_beginning(path).strip().partition("\n")[0])
            found = list(row) if isinstance(row, dict) else []
    except (SourceError, ValueError):
        return False
    return set(columns) <= set(found)


def begins_with(path: Path, words: Sequence[str]) -> bool:
    """Whether one of these words is near the beginning of a file."""
    return path.is_file() and any(word in _beginning(path) for word in words)


def _beginning(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(LOOKED_AT).decode("utf-8-sig", errors="replace")
