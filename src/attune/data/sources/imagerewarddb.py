"""Data source `imagerewarddb`: ImageRewardDB, as downloaded or unpacked.

Source: Xu et al. 2023, arXiv:2304.05977; zai-org/ImageRewardDB on the Hub.

    metadata-{train,validation,test}.parquet   a row per image: prompt_id, prompt, image_path, rank (1 = best)
    images/train/train_1.zip                   holds images/train/train_1/<name>.webp; or that folder, unpacked

n images of a prompt make n (n - 1) / 2 pairs; equal ranks are ties. The splits are the data set's own.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow
from pydantic import Field

from attune.config.sources import PairFilesConfig
from attune.data.local import MAX_IMAGE_BYTES
from attune.data.quarantine import RejectedRow
from attune.data.rows import BadImage, BadRow, ImageGenerator, ImageRef, Pair, Prompt, Quota, Row, SourceError
from attune.data.sources._cells import as_float, as_text, shown
from attune.data.sources._files import image_in, listed_test_prompts, prompt_texts
from attune.data.sources._parquet import parquet_rows, read_columns
from attune.data.sources._ranks import MAX_IMAGES, ranked_pairs, too_many_images
from attune.data.splits import count_rows

GIVES = ("prompts", "pairs")
FREE_PROMPTS = True

COLUMNS = ["prompt_id", "prompt", "image_path", "rank"]


Archive: TypeAlias = "zipfile.ZipFile | BadImage | None"


class Config(PairFilesConfig):
    path: str = Field("data/raw/imagerewarddb", description="folder with metadata-*.parquet and images/")


def recognises(path: Path) -> bool:
    """A folder with its tables, as downloaded."""
    return path.is_dir() and any(path.rglob("metadata-*.parquet"))


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


def _test_prompts(groups: Sequence[Group]) -> Iterator[Prompt]:
    return (
        Prompt(group.images[0].prompt, "test", "metadata-test.parquet", group.images[0].row)
        for group in groups
        if group.images
    )


@dataclass(frozen=True)
class Ranked:
    """A row of the metadata: an image of a prompt and its rank, None without one."""

    row: int
    prompt: str | None
    name: Any
    rank: float | None


@dataclass
class Group:
    """The images of one prompt, and its rows that cannot be read."""

    images: list[Ranked] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)


def _table(path: Path) -> list[Group]:
    """The rows of each prompt."""
    read_columns(path, str(path), COLUMNS)
    groups: dict[str, Group] = {}
    try:
        for row in parquet_rows(path, path.name, COLUMNS):
            if isinstance(row, BadRow):
                groups.setdefault("", Group()).bad.append(row)
            else:
                _sort_in(groups, *row, path.name)
    except (OSError, pyarrow.ArrowException) as error:
        raise SourceError(f"{path} is not a parquet file: {error}") from None
    return list(groups.values())


def _sort_in(groups: dict[str, Group], number: int, cells: Mapping[str, Any], file: str) -> None:
    group = groups.setdefault(repr(cells["prompt_id"]), Group())
    try:
        prompt = as_text(cells["prompt"], "prompt")
        _check_id(cells["prompt_id"], prompt, group)
    except RejectedRow as reason:
        group.bad.append(BadRow(str(reason), file, number, detail=reason.detail))
        return
    rank = as_float(cells["rank"])
    if rank is None:
        group.bad.append(BadRow("no_label", file, number, prompt, "column rank: expected a number"))
    group.images.append(Ranked(number, prompt, cells["image_path"], rank))


def _check_id(prompt_id: Any, prompt: str | None, group: Group) -> None:
    """Raises RejectedRow for a row that has no id, or the id of another prompt: its images belong to no others."""
    if prompt_id is None or prompt_id == "" or prompt_id != prompt_id:  # NaN is unlike itself
        raise RejectedRow("malformed_row", "column prompt_id: expected an id, found nothing")
    if prompt is None:
        raise RejectedRow("empty_prompt", "column prompt: expected a prompt, found nothing")
    if group.images and group.images[0].prompt != prompt:
        other = f"row {group.images[0].row} has another prompt under this id, {shown(group.images[0].prompt)}"
        raise RejectedRow("malformed_row", f"column prompt_id: {other}")


def _pairs(groups: Sequence[Group], split: str, root: Path) -> Iterator[Pair | BadRow]:
    file = f"metadata-{split}.parquet"
    archive = cache(_archive)  # open while its prompts are read, closed with the last of them
    for group in groups:
        yield from group.bad
        ranked = [(image, image.rank) for image in group.images if image.rank is not None]
        if len(ranked) == 1:
            alone = ranked[0][0]
            yield BadRow("no_other_image", file, alone.row, alone.prompt, "expected several images with ranks")
        if len(ranked) > MAX_IMAGES:
            detail = too_many_images(len(ranked))
            yield BadRow("malformed_row", file, ranked[0][0].row, ranked[0][0].prompt, detail)
            continue
        images = [_image(root, image.name, archive) for image, _ in ranked]
        for i, j, label_0 in ranked_pairs([rank for _, rank in ranked]):
            first, second = ranked[i][0], ranked[j][0]
            where = f"{first.row}-{second.row}"
            yield Pair(first.prompt, images[i], images[j], label_0, 1 - label_0, split, file, where)


def _image(root: Path, name: Any, archive: Callable[[Path], Archive]) -> ImageRef:
    """The unpacked file, or the bytes of the member of that name in the zip that its folder comes from."""
    path = image_in(root, name)
    if isinstance(path, BadImage) or path.exists():
        return path
    if not path.parent.name:  # in the folder `.`, which no zip is called after
        return path
    packed = archive(path.parent.with_suffix(".zip"))
    if not isinstance(packed, zipfile.ZipFile):
        return packed or path
    members = [path.name, f"{path.parent.name}/{path.name}", name]
    member = next((member for member in members if member in packed.NameToInfo), None)
    return path if member is None else _member(packed, member)


def _member(packed: zipfile.ZipFile, name: str) -> bytes | BadImage:
    where, size = f"{name} in {packed.filename}", packed.getinfo(name).file_size
    if size > MAX_IMAGE_BYTES:
        return BadImage("too_large", f"{where}: {size} bytes; {MAX_IMAGE_BYTES} are read at most")
    try:
        with packed.open(name) as file:
            return file.read(MAX_IMAGE_BYTES)
    except Exception as error:  # encrypted, packed in a way that Python does not know, or damaged in any way
        return BadImage("undecodable", f"{where}: {error}")


def _archive(path: Path) -> Archive:
    """The zip, None if there is none, or why it cannot be read."""
    if not path.exists():
        return None
    if not path.is_file():
        return BadImage("missing_image", f"{path} is no file; expected a zip")
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        return BadImage("missing_image", f"{path}: {error}; expected a whole zip")
