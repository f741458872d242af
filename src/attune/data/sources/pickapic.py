"""Data source `pickapic`: Pick-a-Pic v1 and v2, and whatever has its columns, shard by shard.

Source: Kirstain et al. 2023, arXiv:2305.01569. People asked for an image, saw two, and chose one or neither.
Shards are read in two layouts:

    *.parquet   columns caption, jpg_0, jpg_1, label_0 and, where there, label_1, has_label, are_different
    *.tar       webdataset: `<key>.<column>` and `<key>.<column>.<type>` are one row's files, next to each other;
                original_prompt is another name of caption (sayakpaul/pickapic_v2_webdataset)

A shard's split is in its file's or folder's name, as `train-00001-of-00645.parquet` or `validation_unique/0.tar`.
If train, validation and test are all there, these are the splits, validation and test read first; if not, prompts
are hashed into splits. Hub shards are downloaded when their turn comes and not at all once enough pairs are found.
"""

from __future__ import annotations

import logging
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from pydantic import Field

from attune.config.schema import Float
from attune.config.settings import Location, PairFilesConfig
from attune.data.rows import BadRow, ImageGenerator, Pair, Quota, Row, SourceError
from attune.data.sources._files import DataFile, data_files, listed_test_prompts, local_paths, prompt_texts
from attune.data.sources._labels import as_float
from attune.data.splits import hashed_split

logger = logging.getLogger(__name__)

HAS_PAIRS = True
FREE_PROMPTS = True

NEEDED = ("caption", "jpg_0", "jpg_1", "label_0")
OPTIONAL = ("label_1", "has_label", "are_different")
# the unique splits have one pair per prompt, so they are preferred to the full ones they are part of
OWN_SPLITS = {"train": ("train",), "validation": ("validation_unique", "validation"), "test": ("test_unique", "test")}
ROWS_AT_ONCE = 64
GB = 1_000_000_000


class Config(PairFilesConfig):
    path: Location = Field(description="a folder, file or pattern of shards here, or a Hub data set, owner/name@commit")
    max_gb: Float | None = Field(None, gt=0, description="of shards to read or download, 10^9 bytes; null = no limit")


def read(config: Config, seed: int, generate_images: ImageGenerator, quota: Quota) -> Iterator[Row]:
    """The pairs of the shards, read one after the other.

    Raises:
        SourceError: there are no shards, or a parquet shard lacks a column.
    """
    shards = by_split(data_files(config.path, (".parquet", ".tar")))
    first = shards[0][1]
    if config.max_gb is not None and first.size > config.max_gb * GB:
        raise SourceError(f"data.max_gb: {config.max_gb} is less than {first.name} alone, {first.size / GB:.3g} GB")
    if first.name.endswith(".parquet"):
        with suppress(pyarrow.ArrowInvalid):  # unreadable shards are counted later
            _columns(pyarrow.parquet.read_schema(first.fetch()).names, first.name)
    return chain(listed_test_prompts(config.test_list), _pairs(shards, config, quota))


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


def own_split(name: str) -> str:
    """The data set's name for a shard's split; "" if its path does not say."""
    *folders, file = name.split("/")
    for text in (file, *reversed(folders)):
        if found := re.match(r"(train|(?:validation|test)(?:_unique)?)(?!_?[a-z])", text):
            return found[1]
    return ""


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


def _pair(key: int | str, row: Mapping[str, Any], split: str | None, file: str, config: Config) -> Pair:
    prompt, label_0 = row["caption"], as_float(row["label_0"])
    label_1 = as_float(row["label_1"]) if "label_1" in row else None if label_0 is None else 1 - label_0
    if row.get("has_label") is False:
        label_0 = label_1 = None
    elif row.get("are_different") is False and label_0 is not None:
        label_0 = label_1 = 0.5
    split = split or hashed_split(prompt, config.validation_share, config.test_share)
    return Pair(prompt, _bytes(row["jpg_0"]), _bytes(row["jpg_1"]), label_0, label_1, split, file, key)


def _bytes(value: Any) -> bytes | None:
    """Bytes as the original has them, or in the mapping that the `datasets` library makes of an image."""
    return value.get("bytes") if isinstance(value, Mapping) else value


def _rows(shard: DataFile) -> Iterator[tuple[int | str, Mapping[str, Any]] | BadRow]:
    """(row, its columns); a shard that breaks off is one bad row, for what came before it is good."""
    path = shard.fetch()
    rows = _parquet(path, shard.name) if shard.name.endswith(".parquet") else _tar(path, shard.name)
    try:
        yield from rows
    except (pyarrow.ArrowInvalid, tarfile.TarError, OSError):
        yield BadRow("unreadable_file", shard.name)


def _parquet(path: Path, name: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with pyarrow.parquet.ParquetFile(path) as file:
        columns = _columns(file.schema_arrow.names, name)
        batches = file.iter_batches(ROWS_AT_ONCE, columns=columns)
        yield from enumerate(chain.from_iterable(batch.to_pylist() for batch in batches))


def _columns(names: Sequence[str], file: str) -> list[str]:
    """The columns to read of those there are."""
    missing = [column for column in NEEDED if column not in names]
    if missing:
        raise SourceError(f"{file}: column {missing[0]!r} is missing; there are {', '.join(names)}")
    return [column for column in (*NEEDED, *OPTIONAL) if column in names]


def _tar(path: Path, name: str) -> Iterator[tuple[str, Mapping[str, Any]] | BadRow]:
    with tarfile.open(path, "r|") as tar:  # read once from front to back
        named = ((*_key_and_column(member.name), member) for member in tar if member.isreg())
        for key, members in groupby(named, lambda item: item[0]):
            yield _sample(key, {column: _content(tar, member) for _, column, member in members}, name)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()  # None: of what is no regular file


def _key_and_column(name: str) -> tuple[str, str]:
    """`a/000.jpg_0.jpg` -> ("a/000", "jpg_0"): the key ends at the first dot of the file's own name."""
    folder, _, file = name.rpartition("/")
    key, _, rest = file.partition(".")
    column = rest.partition(".")[0]
    return f"{folder}/{key}" if folder else key, "caption" if column == "original_prompt" else column


def _sample(key: str, columns: Mapping[str, bytes], file: str) -> tuple[str, Mapping[str, Any]] | BadRow:
    if "caption" not in columns or "label_0" not in columns:
        return BadRow("malformed_row", file, key)
    row: dict[str, Any] = {name: columns.get(name) for name in ("jpg_0", "jpg_1")}
    try:
        row["caption"] = columns["caption"].decode()
        row |= {name: _value(columns[name].decode()) for name in ("label_0", *OPTIONAL) if name in columns}
    except ValueError:  # not UTF-8, or not a number
        return BadRow("malformed_row", file, key)
    return key, row


def _value(text: str) -> float | bool | None:
    """What is written of a label or flag: 1, 0.5, nan, True, None."""
    words = {"true": True, "false": False, "none": None, "": None}
    return words[text.strip().lower()] if text.strip().lower() in words else float(text)
