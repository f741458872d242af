"""Data source `thumbs`: single images that people liked or disliked, as a folder or as a table.

    <path>/liked/<name>.png      <path>/disliked/<name>.jpg     any names, types and endings
    <path>/captions.json         and the other files of prompts that `folder` reads, here, or in liked/ and disliked/
    <path>/liked/<name>.txt      or <path>/<name>.txt: the prompt of an image, where there are no captions

    <path>.csv or .jsonl         a row per image: prompt, image (path relative to the file), liked (1, true, yes, up,
                                 or 0, false, no, down), and split, if there

Images may share a prompt. Prompts are put into splits by their hash, those that runs ask for first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from attune.config.sources import TEST_PROMPTS, VALIDATION_PROMPTS, FilesConfig
from attune.data.quarantine import RejectedRow
from attune.data.rows import BadRow, ImageGenerator, LabelledImage, Quota, Row, SourceError
from attune.data.sources._captions import Captions, plain_name, read_captions, stem
from attune.data.sources._cells import as_split, as_text, as_verdict
from attune.data.sources._files import are_small, image_in, listed_test_prompts, prompt_texts
from attune.data.sources._folders import Match, images_of, sides_of, texts_of, unused_files, with_prompts
from attune.data.sources._layouts import has_columns
from attune.data.sources._tables import bad_row, cells_of, check_table, read_rows, table_files
from attune.data.splits import HeldOut, count_rows, with_splits

GIVES = ("prompts", "images")
FREE_PROMPTS = True

SIDES = ("liked", "disliked")
COLUMNS = ("prompt", "image", "liked")
TABLES = (".csv", ".jsonl")


class Config(FilesConfig):
    path: str = Field("data/raw/thumbs", description="a folder with liked/ and disliked/, or a .csv or .jsonl file")
    validation_prompts: int | None = VALIDATION_PROMPTS
    test_prompts: int | None = TEST_PROMPTS


def recognises(path: Path) -> bool:
    """A folder with liked/ and disliked/, or a table of images with verdicts."""
    return all((path / side).is_dir() for side in SIDES) or has_columns(path, COLUMNS)


def read(config: Config, seed: int, generate_images: ImageGenerator, quota: Quota) -> Iterator[Row]:
    """A row for each image.

    Raises:
        SourceError: neither folder nor table is there, or captions or columns are not what is read.
    """
    return _rows(config)


def needs_files(config: Config) -> list[Path]:
    """The folder whole, or the table and every image that it names and that is here."""
    if _is_table(config):
        return table_files(config.path, config.test_list, ("image",), _is_row)
    return [Path(path) for path in (config.path, config.test_list) if path is not None]


def split_sizes(config: Config) -> dict[str, int] | None:
    """All of them, of a folder, or of a table that is read in less than a second."""
    if _is_table(config) and not are_small(config.path, config.test_list):
        return None
    return count_rows(_rows(config), Quota())


def listed_prompts(config: Config) -> Iterator[str] | None:
    """All prompts of a folder or a small table, else those of `test_list`."""
    if not _is_table(config) or are_small(config.path, config.test_list):
        return prompt_texts(_rows(config))
    return prompt_texts(listed_test_prompts(config.test_list)) if config.test_list else None


def _is_table(config: Config) -> bool:
    return Path(config.path).suffix.lower() in TABLES and not Path(config.path).is_dir()


def _rows(config: Config) -> Iterator[Row]:
    path = Path(config.path)
    if _is_table(config):
        check_table(path, COLUMNS)
        rows = partial(_table_rows, path)
    elif path.is_dir():
        files = sides_of(path, SIDES)
        rows = partial(_folder_rows, path, files, _captions(path), config.test_list)
    else:
        raise SourceError(f"data.path: {path} is not there, or neither a folder nor a .csv or .jsonl file")
    return with_splits(listed_test_prompts(config.test_list), rows, HeldOut.of(config))


def _table_rows(path: Path) -> Iterator[Row]:
    return (row if isinstance(row, BadRow) else _image(row, n, path) for n, row in read_rows(path, _is_row))


def _is_row(cells: Mapping[str, str]) -> bool:
    """Whether the cells of a line could be an image by themselves."""
    try:
        return as_verdict(cells.get("liked")) is not None
    except RejectedRow:
        return False


def _image(row: Mapping[str, Any], number: int, path: Path) -> LabelledImage | BadRow:
    try:
        prompt, name, liked = cells_of(row, COLUMNS)
        split, text = as_split(row.get("split")) or "", as_text(prompt, "prompt")
        return LabelledImage(text, image_in(path.parent, name), as_verdict(liked), split, path.name, number)
    except RejectedRow as reason:
        return bad_row(reason, row, path.name, number)


def _captions(root: Path) -> dict[str, Captions | None]:
    """Side -> its captions file; "" -> that of the folder itself, and then there is no other."""
    own = read_captions([root])
    return {"": own} if own else {side: read_captions([root / side]) for side in SIDES}


def _folder_rows(
    root: Path, files: Mapping[str, Sequence[str]], captions: Mapping[str, Captions | None], test_list: str | None
) -> Iterator[Row]:
    """A row for each image, then one for each prompt and each file that belongs to none."""
    matches = [match for side in SIDES for match in _matches(side, files)]
    bare = [side for side, prompts in captions.items() if prompts is None]
    read = {match.texts[0] for match in matches if match.texts and not match.images.keys().isdisjoint(bare)}
    for side, prompts in captions.items():
        mine = [match for match in matches if side in ("", *match.images)]
        for found in with_prompts(root, mine, prompts, read):
            yield found if isinstance(found, BadRow) else _in_folder(*found, root)
    used = {text for match in matches for text in match.texts} | {Path(test_list or "").name}
    used |= {prompts.path.relative_to(root).as_posix() for prompts in captions.values() if prompts}
    yield from unused_files(root, files, used, "the folder itself, else in each of its two", "liked/ and disliked/")


def _matches(side: str, files: Mapping[str, Sequence[str]]) -> Iterator[Match]:
    """Every image of a side by itself."""
    beside, above = texts_of(files, (side,)), texts_of(files, ("",))
    for name in images_of(files[side]):
        plain = plain_name(name)
        own = [plain, stem(plain)]
        texts = dict.fromkeys(text for found in (beside, above) for each in own for text in found.get(each, ()))
        yield Match(name, {side: name}, [*(f"{side}/{each}" for each in own), *own], list(texts))


def _in_folder(match: Match, prompt: str | None, root: Path) -> LabelledImage:
    ((side, name),) = match.images.items()
    return LabelledImage(prompt, image_in(root, f"{side}/{name}"), side == "liked", "", side, match.name)
