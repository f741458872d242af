"""Data source `table`: a CSV with a header or a JSONL, a row per pair.

    prompt, image_0, image_1, label_0      image paths relative to the file; label_0 is 1, 0, or 0.5 for a tie
    label_1, split                         if there: label_1 is checked against label_0; train, validation (val, dev)
                                           or test

Prompts of rows without a split are put into one by their hash, those that runs ask for first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from attune.config.sources import TEST_PROMPTS, VALIDATION_PROMPTS, PairFilesConfig
from attune.data.quarantine import RejectedRow
from attune.data.rows import BadRow, ImageGenerator, Pair, Quota, Row
from attune.data.sources._cells import as_float, as_split, as_text
from attune.data.sources._files import image_in, listed_test_prompts
from attune.data.sources._layouts import has_columns
from attune.data.sources._tables import (
    bad_row,
    cells_of,
    check_table,
    prompts_of_small,
    read_rows,
    sizes_of_small,
    table_files,
)
from attune.data.splits import HeldOut, with_splits

GIVES = ("prompts", "pairs")
FREE_PROMPTS = True

COLUMNS = ("prompt", "image_0", "image_1", "label_0")


class Config(PairFilesConfig):
    path: str = Field("data/raw/pairs.csv", description="a .csv or .jsonl file")
    validation_prompts: int | None = VALIDATION_PROMPTS
    test_prompts: int | None = TEST_PROMPTS


def recognises(path: Path) -> bool:
    """A table of pairs."""
    return has_columns(path, COLUMNS)


def read(config: Config, seed: int, generate_images: ImageGenerator, quota: Quota) -> Iterator[Row]:
    """A pair per row.

    Raises:
        SourceError: the file is not there, is of another type, or its first row lacks a column.
    """
    return _rows(config)


def needs_files(config: Config) -> list[Path]:
    """The table and every image that it names and that is here; of a large table their folders, for speed."""
    return table_files(config.path, config.test_list, ("image_0", "image_1"), _is_row)


def split_sizes(config: Config) -> dict[str, int] | None:
    """All of them, of a table that is read in less than a second."""
    return sizes_of_small(config, partial(_rows, config))


def listed_prompts(config: Config) -> Iterator[str] | None:
    """All prompts of such a table, else those of `test_list`."""
    return prompts_of_small(config, partial(_rows, config))


def _rows(config: Config) -> Iterator[Row]:
    path = Path(config.path)
    check_table(path, COLUMNS)

    def pairs() -> Iterator[Row]:
        return (row if isinstance(row, BadRow) else _pair(row, n, path) for n, row in read_rows(path, _is_row))

    return with_splits(listed_test_prompts(config.test_list), pairs, HeldOut.of(config))


def _is_row(cells: Mapping[str, str]) -> bool:
    """Whether the cells of a line could be a pair by themselves."""
    return as_float(cells.get("label_0")) is not None


def _pair(row: Mapping[str, Any], number: int, path: Path) -> Pair | BadRow:
    try:
        cell, *names, label = cells_of(row, COLUMNS)
        prompt, split = as_text(cell, "prompt"), as_split(row.get("split")) or ""
    except RejectedRow as reason:
        return bad_row(reason, row, path.name, number)
    label_0 = as_float(label)
    label_1 = as_float(row["label_1"]) if "label_1" in row else None if label_0 is None else 1 - label_0
    image_0, image_1 = (image_in(path.parent, name) for name in names)
    return Pair(prompt, image_0, image_1, label_0, label_1, split, path.name, number)
