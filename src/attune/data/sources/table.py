"""Data source `table`: a CSV with a header or a JSONL, a row per pair.

    prompt, image_0, image_1, label_0      image paths relative to the file; label_0 is 1, 0, or 0.5 for a tie
    label_1, split                         if there: label_1 is checked against label_0; train, validation or test

Prompts of rows without a split are hashed into splits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import Field

from attune.config.settings import PairFilesConfig
from attune.data.rows import BadRow, ImageGenerator, Pair, Quota, Row, SourceError
from attune.data.sources._files import are_small, inside, listed_test_prompts, prompt_texts, read_rows
from attune.data.sources._labels import as_float
from attune.data.splits import SPLITS, count_rows, hashed_split

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
    """The table and every image that it names; of a large table the folders of the images, for speed."""
    path = Path(config.path)
    rows = (row for _, row in read_rows(path) if isinstance(row, Mapping)) if path.is_file() else ()
    names = {name for row in rows for name in (row.get("image_0"), row.get("image_1")) if isinstance(name, str)}
    if not are_small(path):
        names = {name.partition("/")[0] for name in names}
    images = (inside(path.parent, name) for name in sorted(names))
    listed = [] if config.test_list is None else [Path(config.test_list)]
    return [path, *listed, *(image for image in images if image is not None)]


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
    if path.suffix not in (".csv", ".jsonl") or not path.is_file():
        raise SourceError(f"data.path: {path} is not there, or neither a .csv nor a .jsonl file")
    _, first = next(read_rows(path), (0, {}))
    missing = [column for column in COLUMNS if not isinstance(first, BadRow) and column not in first]
    if missing:
        raise SourceError(f"{path}: column {missing[0]!r} is missing; there are {', '.join(map(str, first))}")
    pairs = (row if isinstance(row, BadRow) else _pair(row, number, path, config) for number, row in read_rows(path))
    return chain(listed_test_prompts(config.test_list), pairs)


def _pair(row: Mapping[str, Any], number: int, path: Path, config: Config) -> Pair | BadRow:
    prompt, split = row.get("prompt"), row.get("split")
    if not isinstance(prompt, str) or split not in (*SPLITS, None, ""):
        return BadRow("malformed_row", path.name, number, prompt if isinstance(prompt, str) else None)
    label_0 = as_float(row.get("label_0"))
    label_1 = as_float(row["label_1"]) if "label_1" in row else None if label_0 is None else 1 - label_0
    image_0, image_1 = (inside(path.parent, row.get(name)) for name in ("image_0", "image_1"))
    split = split or hashed_split(prompt, config.validation_share, config.test_share)
    return Pair(prompt, image_0, image_1, label_0, label_1, split, path.name, number)
