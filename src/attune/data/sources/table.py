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
from attune.data.sources import SPLITS, Bad, Painter, Pair, Prompt, Quota, SourceError, as_float, hashed_split
from attune.data.sources._files import inside, prompt_list, read_rows

COLUMNS = ("prompt", "image_0", "image_1", "label_0")


class Config(PairFilesConfig):
    path: str = Field("data/raw/pairs.csv", description="a .csv or .jsonl file")


def read(config: Config, seed: int, paint: Painter, quota: Quota) -> Iterator[Prompt | Pair | Bad]:
    """A pair per row.

    Raises:
        SourceError: the file is not there, is of another type, or its first row lacks a column.
    """
    path = Path(config.path)
    if path.suffix not in (".csv", ".jsonl") or not path.is_file():
        raise SourceError(f"data.path: {path} is not there, or neither a .csv nor a .jsonl file")
    _, first = next(read_rows(path), (0, {}))
    missing = [column for column in COLUMNS if not isinstance(first, Bad) and column not in first]
    if missing:
        raise SourceError(f"{path}: column {missing[0]!r} is missing; there are {', '.join(map(str, first))}")
    listed = prompt_list(config.test_list, lambda prompt: "test") if config.test_list else ()
    pairs = (row if isinstance(row, Bad) else _pair(row, number, path, config) for number, row in read_rows(path))
    return chain(listed, pairs)


def _pair(row: Mapping[str, Any], number: int, path: Path, config: Config) -> Pair | Bad:
    prompt, split = row.get("prompt"), row.get("split")
    if not isinstance(prompt, str) or split not in (*SPLITS, None, ""):
        return Bad("malformed_row", path.name, number, prompt if isinstance(prompt, str) else None)
    label_0 = as_float(row.get("label_0"))
    label_1 = as_float(row["label_1"]) if "label_1" in row else None if label_0 is None else 1 - label_0
    images = (inside(path.parent, row.get(name)) for name in ("image_0", "image_1"))
    split = split or hashed_split(prompt, config.validation_share, config.test_share)
    return Pair(prompt, *images, label_0, label_1, split, path.name, number)
