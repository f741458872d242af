"""The prompts of a folder of images: one file for all of them, in the layouts that people use."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attune.data.local import inside
from attune.data.quarantine import RejectedRow
from attune.data.rows import BadRow, SourceError
from attune.data.sources._cells import as_text, shown
from attune.data.sources._json import read_json_members
from attune.data.sources._tables import columns_of, read_rows

FILES = ("captions.json", "captions.jsonl", "metadata.jsonl", "metadata.csv")  # the last two as `imagefolder` has them
NAMES, PROMPTS = ("name", "file_name", "image"), ("prompt", "caption", "text")
ENDING = re.compile(r"\.(?=\w*[A-Za-z])\w{1,8}$", re.ASCII)  # `.png` and `.jp2`, but neither `.0` nor `.0 final`


@dataclass(frozen=True)
class Caption:
    """A prompt and where its file has it."""

    prompt: str | None
    row: int | str
    bad: BadRow | None = None  # why it is none


@dataclass(frozen=True)
class Captions:
    """The prompts of a captions file by the names of their images, and its rows that cannot be used."""

    file: str
    path: Path
    prompts: Mapping[str, Caption]
    by_stem: Mapping[str, Sequence[str]]  # name without ending -> names
    bad: Sequence[BadRow]

    def find(self, names: Sequence[str]) -> str | None:
        """The name under which a file with these names has its prompt: with its ending, with none, or with another."""
        alike = {found for name in names for found in self.by_stem.get(stem(name), ())}
        for group in ([name for name in alike if not self.prompts[name].bad], alike):
            exact = next((name for name in names if name in group), None)
            if exact is not None or len(group) == 1:
                return exact or next(iter(group))
        return None

    def unused(self, used: Iterable[str]) -> Iterator[BadRow]:
        """A row for every prompt whose image is not there."""
        for name in self.prompts.keys() - set(used):
            caption, detail = self.prompts[name], f"there is no image {name!r}"
            yield caption.bad or BadRow("missing_image", self.file, caption.row, caption.prompt, detail)


def read_captions(folders: Sequence[Path]) -> Captions | None:
    """The prompts of the first of `FILES` in the first folder that has one; None without any.

    Raises:
        SourceError: the file is not what its name says, or a link out of the first folder.
    """
    path = next((folder / name for folder in folders for name in FILES if (folder / name).exists()), None)
    if path is None:
        return None
    try:
        inside(folders[0], path.relative_to(folders[0]).as_posix())
    except RejectedRow as reason:
        raise SourceError(reason.detail) from None
    prompts: dict[str, Caption] = {}
    bad: list[BadRow] = []
    for row, name, text in _entries(path, bad):
        caption = _caption(path.name, row, name, text)
        known = prompts.setdefault(plain_name(name), caption)
        if known is caption or (known.prompt == caption.prompt and not caption.bad):
            continue
        if known.bad and not caption.bad:
            prompts[plain_name(name)], caption = caption, known
        detail = f"another prompt for {name!r}; that of row {prompts[plain_name(name)].row} is used"
        bad.append(caption.bad or BadRow("malformed_row", path.name, row, caption.prompt, detail))
    by_stem = defaultdict(list)
    for name in prompts:
        by_stem[stem(name)].append(name)
    return Captions(path.name, path, prompts, by_stem, bad)


def _caption(file: str, row: int | str, name: str, text: Any) -> Caption:
    try:
        return Caption(as_text(text, "prompt"), row)
    except RejectedRow as reason:
        return Caption(None, row, BadRow(str(reason), file, row, detail=f"{name}: {reason.detail}"))


def plain_name(name: str) -> str:
    """A name in one form, whatever system wrote it: composed letters (NFC), forward slashes, no `./` before it."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).removeprefix("./")


def stem(name: str) -> str:
    """A name without its ending."""
    return ENDING.sub("", name)


def _entries(path: Path, bad: list[BadRow]) -> Iterator[tuple[int | str, str, Any]]:
    """(row, name, prompt) of every entry; those that are none join `bad`."""
    if path.suffix == ".json":
        members = read_json_members(path)
        if members is None:
            raise SourceError(f"{path}: must be a mapping of names to prompts")
        yield from ((name, name, prompt) for name, prompt in members)
        return
    header = columns_of(path)
    if header is not None and not (_first(NAMES, header) and _first(PROMPTS, header)):
        needed = f"one of {', '.join(NAMES)} and one of {', '.join(PROMPTS)}"
        raise SourceError(f"{path}: expected the columns {needed}; there are {', '.join(header)}")
    for number, row in read_rows(path, _is_row):
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        name, prompt = _first(NAMES, row), _first(PROMPTS, row)
        if name is None or prompt is None or not isinstance(row[name], str | int):
            expected = f"expected {' or '.join(NAMES)}, and {' or '.join(PROMPTS)}, found {shown(row)}"
            bad.append(BadRow("malformed_row", path.name, number, detail=expected))
            continue
        yield number, str(row[name]), row[prompt]


def _first(names: Sequence[str], row: Iterable[str]) -> str | None:
    return next((name for name in names if name in row), None)


def _is_row(cells: Mapping[str, str]) -> bool:
    """Whether the cells of a line begin with the name of an image."""
    name = _first(NAMES, cells)
    return name is not None and ENDING.search(cells[name].strip('"')) is not None
