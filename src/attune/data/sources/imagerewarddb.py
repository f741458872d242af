"""Data source `imagerewarddb`: ImageRewardDB, as downloaded or unpacked.

Source: Xu et al. 2023, arXiv:2304.05977; zai-org/ImageRewardDB on the Hub.

    metadata-{train,validation,test}.parquet   a row per image: prompt_id, prompt, image_path, rank (1 = best)
    images/train/train_1.zip                   holds images/train/train_1/<name>.webp; or that folder, unpacked

n images of a prompt make n (n - 1) / 2 pairs; equal ranks are ties. The splits are the data set's own.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from pydantic import Field

from attune.config.settings import PairFilesConfig
from attune.data.sources import Bad, Painter, Pair, Picture, Prompt, Quota, SourceError, as_float, ranked_pairs
from attune.data.sources._files import inside, prompt_list

COLUMNS = ["prompt_id", "prompt", "image_path", "rank"]


class Config(PairFilesConfig):
    path: str = Field("data/raw/imagerewarddb", description="folder with metadata-*.parquet and images/")


def read(config: Config, seed: int, paint: Painter, quota: Quota) -> Iterator[Prompt | Pair | Bad]:
    """All pairs of each prompt's ranked images, test first.

    Raises:
        SourceError: a metadata file is not there or lacks a column.
    """
    root = Path(config.path)
    tables = {split: _table(root / f"metadata-{split}.parquet") for split in ("test", "validation", "train")}
    listed = prompt_list(config.test_list, lambda prompt: "test") if config.test_list else ()
    held_out = (Prompt(rows[0]["prompt"], "test", "metadata-test.parquet", rows[0]["row"]) for rows in tables["test"])
    pairs = (quota.until_full(_pairs(groups, split, root), split) for split, groups in tables.items())
    return chain(listed, held_out, *pairs)


def _table(path: Path) -> list[list[dict[str, Any]]]:
    """The rows of each prompt."""
    if not path.is_file():
        raise SourceError(f"{path} is not there")
    try:
        missing = set(COLUMNS) - set(pyarrow.parquet.read_schema(path).names)
        if missing:
            raise SourceError(f"{path}: column {min(missing)!r} is missing")
        rows = pyarrow.parquet.read_table(path, columns=COLUMNS).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise SourceError(f"{path} is not a parquet file: {error}") from None
    groups: dict[Any, list[dict[str, Any]]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row["prompt_id"], []).append(row | {"row": number})
    return list(groups.values())


def _pairs(groups: Sequence[list[dict[str, Any]]], split: str, root: Path) -> Iterator[Pair | Bad]:
    file = f"metadata-{split}.parquet"
    archive = cache(_archive)  # open while its prompts are read, closed with the last of them
    for rows in groups:
        ranked = [row for row in rows if as_float(row["rank"]) is not None]
        yield from (Bad("no_label", file, row["row"], row["prompt"]) for row in rows if row not in ranked)
        images = [_picture(root, row["image_path"], archive) for row in ranked]
        for i, j, label_0 in ranked_pairs([row["rank"] for row in ranked]):
            where = f"{ranked[i]['row']}-{ranked[j]['row']}"
            yield Pair(ranked[i]["prompt"], images[i], images[j], label_0, 1 - label_0, split, file, where)


def _picture(root: Path, name: Any, archive: Any) -> Picture:
    """The unpacked file, or the bytes of the member of that name in the zip that its folder comes from."""
    path = inside(root, name)
    if path is None or path.is_file():
        return path
    packed = archive(path.parent.with_suffix(".zip"))
    if packed is not None:
        members = [path.name, f"{path.parent.name}/{path.name}", name]
        if member := next((member for member in members if member in packed.NameToInfo), None):
            return _member(packed, member)
    return path


def _member(packed: zipfile.ZipFile, name: str) -> bytes:
    try:
        return packed.read(name)
    except (zipfile.BadZipFile, zlib.error, EOFError):
        return b""  # no image, as will be found


def _archive(path: Path) -> zipfile.ZipFile | None:
    with suppress(zipfile.BadZipFile, FileNotFoundError):
        return zipfile.ZipFile(path)
    return None
