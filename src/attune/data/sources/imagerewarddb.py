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
from attune.data.rows import BadRow, ImageGenerator, ImageRef, Pair, Prompt, Quota, Row, SourceError
from attune.data.sources._files import inside, listed_test_prompts, prompt_texts
from attune.data.sources._labels import as_float, ranked_pairs
from attune.data.splits import count_rows

HAS_PAIRS = True
FREE_PROMPTS = True

COLUMNS = ["prompt_id", "prompt", "image_path", "rank"]


class Config(PairFilesConfig):
    path: str = Field("data/raw/imagerewarddb", description="folder with metadata-*.parquet and images/")


def read(config: Config, seed: int, generate_images: ImageGenerator, quota: Quota) -> Iterator[Row]:
    """All pairs of each prompt's ranked images, test first.

    Raises:
        SourceError: a metadata file is not there or lacks a column.
    """
    root = Path(config.path)
    tables = {split: _table(root / f"metadata-{split}.parquet") for split in ("test", "validation", "train")}
    pairs = (quota.take_until_full(_pairs(groups, split, root), split) for split, groups in tables.items())
    return chain(listed_test_prompts(config.test_list), _test_prompts(tables["test"]), *pairs)


def needs_files(config: Config) -> list[Path]:
    """The folder whole."""
    return [Path(path) for path in (config.path, config.test_list) if path is not None]


def split_sizes(config: Config) -> dict[str, int]:
    """The test prompts; the tables of the other splits are large, and their pairs may be bad."""
    test = _table(Path(config.path) / "metadata-test.parquet")
    counts = count_rows(chain(listed_test_prompts(config.test_list), _test_prompts(test)), Quota())
    return {"prompts/test": counts["prompts/test"]}


def listed_prompts(config: Config) -> Iterator[str] | None:
    """The prompts of `test_list`; those of the data set are known only when it is read."""
    return prompt_texts(listed_test_prompts(config.test_list)) if config.test_list else None


def _test_prompts(groups: Sequence[list[dict[str, Any]]]) -> Iterator[Prompt]:
    return (Prompt(rows[0]["prompt"], "test", "metadata-test.parquet", rows[0]["row"]) for rows in groups)


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


def _pairs(groups: Sequence[list[dict[str, Any]]], split: str, root: Path) -> Iterator[Pair | BadRow]:
    file = f"metadata-{split}.parquet"
    archive = cache(_archive)  # open while its prompts are read, closed with the last of them
    for rows in groups:
        ranked = [row for row in rows if as_float(row["rank"]) is not None]
        yield from (BadRow("no_label", file, row["row"], row["prompt"]) for row in rows if row not in ranked)
        images = [_image(root, row["image_path"], archive) for row in ranked]
        for i, j, label_0 in ranked_pairs([row["rank"] for row in ranked]):
            where = f"{ranked[i]['row']}-{ranked[j]['row']}"
            yield Pair(ranked[i]["prompt"], images[i], images[j], label_0, 1 - label_0, split, file, where)


def _image(root: Path, name: Any, archive: Any) -> ImageRef:
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
        return b""  # undecodable, so the row goes to the quarantine with that reason


def _archive(path: Path) -> zipfile.ZipFile | None:
    with suppress(zipfile.BadZipFile, FileNotFoundError):
        return zipfile.ZipFile(path)
    return None
