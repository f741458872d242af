"""Data source `table`: a CSV with a header or a JSONL, a row per pair.

    prompt, image_0, image_1, label_0      image paths relative to the file; label_0 is 1, 0, or 0.5 for a tie
    label_1, split                         if there: label_1 is checked against label_0; train, validation (val, dev)
                                           or test

Prompts of rows without a split are hashed into splits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import Field

from attune.config.settings import PairFilesConfig
from attune.data.quarantine import RejectedRow
from attune.data.rows import BadRow, ImageGenerator, Pair, Quota, Row, SourceError
from attune.data.sources._cells import as_float, as_split, as_text
from attune.data.sources._files import are_small, image_in, listed_test_prompts, prompt_texts
from attune.data.sources._tables import columns_of, read_rows
from attune.data.splits import count_rows, hashed_split

HAS_PAIRS = True
FREE_PROMPTS = True

COLUMNS = ("prompt", "image_0", "image_1", "label_0")


class Config(PairFilesConfig):
    path: str = Field("data/raw/pairs.csv", description="a .csv or .jsonl file")


def read(config: Config, seed: int, generate_images: ImageGenerator, quota: Quota) -> Iterator[Row]:
    """A pair per row.

    Raises:
        SourceError: the file is not there, is of another type, or its first row lacks a column.
    """
    return _rows(config)


def needs_files(config: Config) -> list[Path]:
    """The table and every image that it names and that is here; of a large table their folders, for speed."""
    path = Path(config.path)
    names = _image_names(path)
    if not are_small(path):
        names = {name.partition("/")[0] for name in names}
    images = (image for name in sorted(names) if isinstance(image := image_in(path.parent, name), Path))
    listed = [] if config.test_list is None else [Path(config.test_list)]
    return [path, *listed, *(image for image in images if image.is_file() or image.is_dir())]


def _image_names(path: Path) -> set[str]:
    try:
        rows = (row for _, row in read_rows(path, _is_row) if isinstance(row, Mapping))
        cells = (row.get(column) for row in rows for column in ("image_0", "image_1"))
        return {name for name in cells if isinstance(name, str)}
    except SourceError:  # said by `split_sizes` and `read`
        return set()


def split_sizes(config: Config) -> dict[str, int] | None:
    """All of them, of a table that is read in less than a second."""
    if not are_small(config.path, config.test_list):
        return None
    return count_rows(_rows(config), Quota.of(config))


def listed_prompts(config: Config) -> Iterator[str] | None:
    """All prompts of a table that is read in less than a second, else those of `test_list`."""
    if are_small(config.path, config.test_list):
        return prompt_texts(_rows(config))
    return prompt_texts(listed_test_prompts(config.test_list)) if config.test_list else None


def _rows(config: Config) -> Iterator[Row]:
    path = Path(config.path)
    if path.suffix.lower() not in (".csv", ".jsonl") or not path.is_file():
        raise SourceError(f"data.path: {path} is not there, or neither a .csv nor a .jsonl file")
    header = columns_of(path)
    missing = [column for column in COLUMNS if header is not None and column not in header]
    if missing:
        raise SourceError(f"{path}: column {missing[0]!r} is missing; there are {', '.join(header or ())}")
    if next(read_rows(path, _is_row), None) is None:
        raise SourceError(f"{path} has a header and no row below it")
    pairs = (
        row if isinstance(row, BadRow) else _pair(row, number, path, config) for number, row in read_rows(path, _is_row)
    )
    return chain(listed_test_prompts(config.test_list), pairs)


def _is_row(cells: Mapping[str, str]) -> bool:
    """Whether the cells of a line could be a pair by themselves."""
    return as_float(cells.get("label_0")) is not None


def _pair(row: Mapping[str, Any], number: int, path: Path, config: Config) -> Pair | BadRow:
    try:
        absent = [column for column in COLUMNS if column not in row]
        if absent:
            raise RejectedRow("malformed_row", f"column {absent[0]} is missing; there are {', '.join(map(str, row))}")
        prompt, split = as_text(row["prompt"], "prompt"), as_split(row.get("split"))
    except RejectedRow as reason:
        prompt = row.get("prompt")
        return BadRow(str(reason), path.name, number, prompt if isinstance(prompt, str) else None, reason.detail)
    label_0 = as_float(row["label_0"])
    label_1 = as_float(row["label_1"]) if "label_1" in row else None if label_0 is None else 1 - label_0
    image_0, image_1 = (image_in(path.parent, row[name]) for name in ("image_0", "image_1"))
    split = split or hashed_split(prompt, config.validation_share, config.test_share)
    return Pair(prompt, image_0, image_1, label_0, label_1, split, path.name, number)
