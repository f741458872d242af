"""Data source `ranked`: several images of a prompt, ranked or scored, in a CSV with a header or a JSONL.

    prompt, image, rank          a row per image; rank 1 is the best, equal ranks are a tie
    prompt, image, score         or scores, the higher the better
    prompt, images, ranks        or, in a JSONL, a line per prompt with lists; ranks or scores
    split                        if there: train, validation (val, dev) or test

n images of a prompt make n (n - 1) / 2 pairs. Rows of one prompt and split are one ranking, wherever in the file they
are; a line with lists is a ranking by itself. Image paths are relative to the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from attune.config.sources import TEST_PROMPTS, VALIDATION_PROMPTS, PairFilesConfig
from attune.data.quarantine import RejectedRow
from attune.data.rows import BadRow, ImageGenerator, Pair, Quota, Row, SourceError
from attune.data.sources._cells import as_float, as_split, as_text
from attune.data.sources._files import image_in, listed_test_prompts
from attune.data.sources._layouts import has_columns
from attune.data.sources._ranks import MAX_IMAGES, ranked_pairs, too_many_images
from attune.data.sources._tables import (
    bad_row,
    cells_of,
    check_table,
    columns_of,
    prompts_of_small,
    read_rows,
    sizes_of_small,
    table_files,
)
from attune.data.splits import HeldOut, with_splits

GIVES = ("prompts", "pairs")
FREE_PROMPTS = True

ORDERS = {"rank": 1, "score": -1}  # column, `ranks` and `scores` of lists -> what makes a rank of its numbers


class Config(PairFilesConfig):
    path: str = Field("data/raw/ranked.csv", description="a .csv or .jsonl file")
    pairs_per_prompt: int | None = Field(None, ge=1, description="pairs of one ranking at most; null = all")
    validation_prompts: int | None = VALIDATION_PROMPTS
    test_prompts: int | None = TEST_PROMPTS


def recognises(path: Path) -> bool:
    """A table of images with ranks or scores, a row for each image or for each prompt."""
    one = any(has_columns(path, ("prompt", "image", order)) for order in ORDERS)
    return one or any(has_columns(path, ("prompt", "images", f"{order}s")) for order in ORDERS)


def read(config: Config, seed: int, generate_images: ImageGenerator, quota: Quota) -> Iterator[Row]:
    """All pairs of each ranking.

    Raises:
        SourceError: the file is not there, is of another type, or its header lacks a column.
    """
    return _rows(config)


def needs_files(config: Config) -> list[Path]:
    """The table and every image that it names and that is here; of a large table their folders, for speed."""
    return table_files(config.path, config.test_list, ("image", "images"), _is_row)


def split_sizes(config: Config) -> dict[str, int] | None:
    """All of them, of a table that is read in less than a second."""
    return sizes_of_small(config, partial(_rows, config))


def listed_prompts(config: Config) -> Iterator[str] | None:
    """All prompts of such a table, else those of `test_list`."""
    return prompts_of_small(config, partial(_rows, config))


def _rows(config: Config) -> Iterator[Row]:
    path = Path(config.path)
    check_table(path, ("prompt", "image"))
    header = columns_of(path)
    orders = [order for order in ORDERS if header is None or order in header]
    if header is not None and len(orders) != 1:
        found = " and ".join(orders) or "neither"
        raise SourceError(f"{path}: expected a column rank or a column score, found {found}; keep one of the two")
    rows = partial(_pairs, path, config.pairs_per_prompt)
    return with_splits(listed_test_prompts(config.test_list), rows, HeldOut.of(config))


@dataclass(frozen=True)
class Ranked:
    """An image of a ranking, the smaller its rank the better."""

    row: int
    name: Any
    rank: float


@dataclass(frozen=True)
class Ranking:
    """The images of a prompt that are compared with each other."""

    prompt: str | None
    split: str
    images: Sequence[Ranked]


def _pairs(path: Path, limit: int | None) -> Iterator[Row]:
    rankings: dict[tuple[str | None, str], list[Ranked]] = {}
    for number, row in read_rows(path, _is_row):
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            found = _ranking(row, number)
        except RejectedRow as reason:
            yield bad_row(reason, row, path.name, number)
            continue
        if "images" in row:
            yield from _pairs_of(found, path, limit)
        else:
            rankings.setdefault((found.prompt, found.split), []).extend(found.images)
    for (prompt, split), images in rankings.items():
        yield from _pairs_of(Ranking(prompt, split, images), path, limit)


def _is_row(cells: Mapping[str, str]) -> bool:
    """Whether the cells of a line could be an image by themselves."""
    return any(as_float(cells.get(order)) is not None for order in ORDERS)


def _ranking(row: Mapping[str, Any], number: int) -> Ranking:
    """The ranked images of a row.

    Raises:
        RejectedRow: `malformed_row`, or `no_label` for a number that is missing.
    """
    several = "images" in row
    cell, names = cells_of(row, ("prompt", "images" if several else "image"))
    prompt, split = as_text(cell, "prompt"), as_split(row.get("split")) or ""
    orders = {order + "s" * several: sign for order, sign in ORDERS.items()}
    given = [column for column in orders if row.get(column) not in (None, "")]
    if len(given) != 1:
        reason = "malformed_row" if given else "no_label"
        raise RejectedRow(reason, f"expected one of {' and '.join(orders)}, found {' and '.join(given) or 'neither'}")
    numbers = row[given[0]] if several else [row[given[0]]]
    names = names if several else [names]
    if not isinstance(names, list) or not isinstance(numbers, list) or not len(names) == len(numbers) > 0:
        raise RejectedRow("malformed_row", f"expected a list of images and as many {given[0]}")
    ranks = [as_float(number) for number in numbers]
    if None in ranks:
        raise RejectedRow("no_label", f"{given[0]}: expected a number")
    sign = orders[given[0]]
    ranked = [Ranked(number, name, sign * rank) for name, rank in zip(names, ranks, strict=True) if rank is not None]
    return Ranking(prompt, split, ranked)


def _pairs_of(ranking: Ranking, path: Path, limit: int | None) -> Iterator[Row]:
    first = ranking.images[0].row
    if len(ranking.images) > MAX_IMAGES:
        yield BadRow("malformed_row", path.name, first, ranking.prompt, too_many_images(len(ranking.images)))
        return
    images: dict[tuple[str, float], Ranked] = {}
    for image in ranking.images:
        if images.setdefault((str(image.name), image.rank), image) is not image:
            yield BadRow("duplicate_image", path.name, image.row, ranking.prompt, "ranked alike before")
    yield from _compared(list(images.values()), ranking, path, limit)


def _compared(images: Sequence[Ranked], ranking: Ranking, path: Path, limit: int | None) -> Iterator[Row]:
    """The pairs of images, each of which is there once with a rank."""
    pairs = [(images[i], images[j], label) for i, j, label in ranked_pairs([image.rank for image in images])]
    pairs = [pair for pair in pairs if pair[0].name != pair[1].name]  # the same image at two ranks
    if not pairs:
        yield BadRow("no_other_image", path.name, images[0].row, ranking.prompt, "expected several images with ranks")
    for one, other, label_0 in _some(pairs, limit):
        first, second = (image_in(path.parent, image.name) for image in (one, other))
        where = f"{one.row}-{other.row}"
        yield Pair(ranking.prompt, first, second, label_0, 1 - label_0, ranking.split, path.name, where)


def _some(pairs: list[tuple[Ranked, Ranked, float]], limit: int | None) -> list[tuple[Ranked, Ranked, float]]:
    """As many pairs as wanted, chosen by the names of their images, in the order they had."""
    if limit is None or len(pairs) <= limit:
        return pairs

    def place(i: int) -> bytes:
        return hashlib.sha256(f"{pairs[i][0].name}\0{pairs[i][1].name}".encode(errors="replace")).digest()

    return [pairs[i] for i in sorted(sorted(range(len(pairs)), key=place)[:limit])]
