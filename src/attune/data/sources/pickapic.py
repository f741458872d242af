"""Data source `pickapic`: Pick-a-Pic v1 and v2, and whatever has its columns, shard by shard.

Source: Kirstain et al. 2023, arXiv:2305.01569. People asked for an image, saw two, and chose one or neither.
Shards are read in two layouts:

    *.parquet   columns caption, jpg_0, jpg_1, label_0 and, where there, label_1, has_label, are_different
    *.tar       webdataset: `<key>.<column>` and `<key>.<column>.<type>` are one row's files; original_prompt is
                another name of caption (sayakpaul/pickapic_v2_webdataset)

A shard's split is in its file's or folder's name, as `train-00001-of-00645.parquet` or `validation_unique/0.tar`.
If train, validation and test are all there, these are the splits, validation and test read first; if not, prompts
are hashed into splits. Hub shards are downloaded when their turn comes and not at all once enough pairs are found.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow
from pydantic import Field

from attune.config.schema import Float
from attune.config.settings import Location
from attune.config.sources import PairFilesConfig
from attune.data.quarantine import RejectedRow
from attune.data.rows import BadRow, ImageGenerator, Pair, Quota, Row, SourceError
from attune.data.sources._cells import as_flag, as_float, as_image, as_text, shown
from attune.data.sources._files import DataFile, data_files, listed_test_prompts, local_paths, prompt_texts
from attune.data.sources._parquet import parquet_rows, read_columns
from attune.data.sources._tar import tar_samples
from attune.data.splits import hashed_split

logger = logging.getLogger(__name__)

ENDINGS = (".parquet", ".tar")
GIVES = ("prompts", "pairs")
FREE_PROMPTS = True

NEEDED = ("caption", "jpg_0", "jpg_1", "label_0")
OPTIONAL = ("label_1", "has_label", "are_different")
IMAGES = ("jpg_0", "jpg_1")
TEXTS = ("caption", "label_0", *OPTIONAL)
# the unique splits have one pair per prompt, so they are preferred to the full ones they are part of
OWN_SPLITS = {"train": ("train",), "validation": ("validation_unique", "validation"), "test": ("test_unique", "test")}
GB = 1_000_000_000
HUB_SHARDS = 3  # that are downloaded to see whether a data set has the columns


class Config(PairFilesConfig):
    path: Location = Field(description="a folder, file or pattern of shards here, or a Hub data set, owner/name@commit")
    max_gb: Float | None = Field(None, gt=0, description="of shards to read or download, 10^9 bytes; null = no limit")


def recognises(path: Path) -> bool:
    """A shard, or a folder of shards."""
    return path.suffix in ENDINGS or (path.is_dir() and any(file.suffix in ENDINGS for file in path.iterdir()))


def read(config: Config, seed: int, generate_images: ImageGenerator, quota: Quota) -> Iterator[Row]:
    """The pairs of the shards, read one after the other.

    Raises:
        SourceError: there are no shards, or none of them has the columns.
    """
    files = data_files(config.path, ENDINGS)
    shards = by_split(files)
    first = shards[0][1]
    if config.max_gb is not None and first.size > config.max_gb * GB:
        raise SourceError(f"data.max_gb: {config.max_gb} is less than {first.name} alone, {first.size / GB:.3g} GB")
    _check_columns([shard for _, shard in (shards if local_paths(config.path) else shards[:HUB_SHARDS])])
    return chain(listed_test_prompts(config.test_list), _without_split(files, shards), _pairs(shards, config, quota))


def needs_files(config: Config) -> list[Path]:
    """The shards that are here; none of a Hub data set, which its commit pins."""
    listed = [] if config.test_list is None else [Path(config.test_list)]
    return [*local_paths(config.path), *listed]


def split_sizes(config: Config) -> None:
    """Unknown: the prompts are in the shards, and their splits can depend on them."""
    return None


def listed_prompts(config: Config) -> Iterator[str] | None:
    """The prompts of `test_list`; those of the data set are known only when it is read."""
    return prompt_texts(listed_test_prompts(config.test_list)) if config.test_list else None


def by_split(shards: Sequence[DataFile]) -> list[tuple[str | None, DataFile]]:
    """(split, shard), test first, then validation, then train; (None, shard) if the names do not give all three."""
    named: dict[str, list[DataFile]] = {}
    for shard in shards:
        named.setdefault(own_split(shard.name), []).append(shard)
    chosen = {split: next((named[n] for n in names if n in named), []) for split, names in OWN_SPLITS.items()}
    if not all(chosen.values()):
        return [(None, shard) for shard in shards]
    return [(split, shard) for split in ("test", "validation", "train") for shard in chosen[split]]


def _without_split(files: Sequence[DataFile], shards: Sequence[tuple[str | None, DataFile]]) -> Iterator[BadRow]:
    """A row for each shard that is not read because its name gives no split, where those of the others do."""
    read_names = {shard.name for _, shard in shards}
    for file in files:
        if file.name not in read_names and not own_split(file.name):
            detail = "its name gives no split, as those of the other shards do; begin it with train, validation or test"
            yield BadRow("unused_file", file.name, detail=detail)


def own_split(name: str) -> str:
    """The data set's name for a shard's split; "" if its path does not say."""
    *folders, file = name.split("/")
    for text in (file, *reversed(folders)):
        if found := re.match(r"(train|(?:validation|test)(?:_unique)?)(?!_?[a-z])", text):
            return found[1]
    return ""


def _check_columns(shards: Sequence[DataFile]) -> None:
    """Raises SourceError if none of the shards has the columns. A tar's are known only when it is read."""
    wrong: SourceError | None = None
    for shard in shards:
        if not shard.name.lower().endswith(".parquet"):
            return
        try:
            read_columns(shard.fetch(), shard.name, NEEDED)
        except SourceError as error:
            wrong = wrong or error
        else:
            return
    if wrong is not None:
        raise wrong


def _pairs(shards: Sequence[tuple[str | None, DataFile]], config: Config, quota: Quota) -> Iterator[Pair | BadRow]:
    spent = 0
    for split, shard in shards:
        if not quota.wants_more(split or "train"):
            continue
        spent += shard.size
        if config.max_gb is not None and spent > config.max_gb * GB:
            logger.warning("data.max_gb: %s reached before %s", config.max_gb, shard.name)
            return
        rows = (row if isinstance(row, BadRow) else _pair(*row, split, shard.name, config) for row in _rows(shard))
        yield from quota.take_until_full(rows, split or "train")


def _pair(key: int | str, row: Mapping[str, Any], split: str | None, file: str, config: Config) -> Pair | BadRow:
    try:
        prompt, label_0 = as_text(row["caption"], "caption"), as_float(row["label_0"])
        label_1 = as_float(row["label_1"]) if "label_1" in row else None if label_0 is None else 1 - label_0
        if as_flag(row.get("has_label"), "has_label") is False:
            label_0 = label_1 = None
        elif as_flag(row.get("are_different"), "are_different") is False and label_0 is not None:
            label_0 = label_1 = 0.5
        image_0, image_1 = (as_image(row[column], column) for column in IMAGES)
    except RejectedRow as reason:
        prompt = row["caption"] if isinstance(row["caption"], str) else None
        return BadRow(str(reason), file, key, prompt, reason.detail)
    split = split or hashed_split(prompt, config.validation_share, config.test_share)
    return Pair(prompt, image_0, image_1, label_0, label_1, split, file, key)


def _rows(shard: DataFile) -> Iterator[tuple[int | str, Mapping[str, Any]] | BadRow]:
    """(row, its columns); a shard that breaks off is one bad row, for what came before it is good."""
    try:
        path = shard.fetch()
        if not path.is_file():
            raise SourceError(f"{shard.name} is not there, or no file")
        if shard.name.lower().endswith(".parquet"):
            names = read_columns(path, shard.name, NEEDED)
            yield from parquet_rows(path, shard.name, [name for name in (*NEEDED, *OPTIONAL) if name in names])
        else:
            samples = tar_samples(path, shard.name, IMAGES, TEXTS)
            yield from (row if isinstance(row, BadRow) else _sample(*row, shard.name) for row in samples)
    except (SourceError, OSError, pyarrow.ArrowException) as error:
        yield BadRow("unreadable_file", shard.name, detail=str(error))


def _sample(key: str, columns: Mapping[str, bytes], file: str) -> tuple[str, Mapping[str, Any]] | BadRow:
    missing = [column for column in ("caption", "label_0") if column not in columns]
    if missing:
        return BadRow("malformed_row", file, key, detail=f"column {missing[0]}: {key}.{missing[0]}.txt is not there")
    if as_float(columns["label_0"]) is None and columns["label_0"].strip().lower() not in (b"", b"none", b"nan"):
        expected = f"expected 1, 0, 0.5 or nan, found {shown(columns['label_0'])}"
        return BadRow("malformed_row", file, key, detail=f"column label_0: {expected}")
    return key, {**dict.fromkeys(IMAGES), **columns}
