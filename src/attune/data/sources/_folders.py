"""Folders of images in two subfolders, and the prompt of each image: from a captions file, or a .txt beside it.

What is shared by the sources whose data are the two subfolders. Hidden files are passed over; every other file is used
or has a row in the quarantine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from attune.data.local import MAX_TEXT_BYTES, inside, is_hidden, read_regular
from attune.data.quarantine import RejectedRow
from attune.data.rows import BadRow, SourceError
from attune.data.sources._captions import FILES, Captions, plain_name


@dataclass(frozen=True)
class Match:
    """The images of one row; `ambiguous` where it is not clear which they are."""

    name: str
    images: Mapping[str, str | None]  # side -> file below it, None where it has none
    names: Sequence[str]  # under which a captions file may have the prompt, the most exact first
    texts: Sequence[str]  # the .txt with the prompt, below the top folder; the first counts
    ambiguous: BadRow | None = None


def sides_of(root: Path, sides: Sequence[str]) -> dict[str, list[str]]:
    """Side and "" for elsewhere -> the names of the files there, below that folder; hidden ones are not.

    A link to a folder counts as a file: what is behind it is not read, so it must be told.

    Raises:
        SourceError: one of the folders is not there.
    """
    for side in sides:
        if not (root / side).is_dir():
            raise SourceError(f"data.path: {root / side} is not there")
    found = {side: list(_walk(root / side)) for side in sides}
    return found | {"": [name for name in _walk(root) if name.partition("/")[0] not in sides]}


def _walk(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not is_hidden(name) and (path.is_symlink() or not path.is_dir()):
            yield name.as_posix()


def is_text(name: str) -> bool:
    """Whether a file holds a prompt of its own."""
    return name.lower().endswith(".txt")


def images_of(files: Sequence[str]) -> list[str]:
    """The files of a side that are images: neither prompts nor lists of them."""
    return [name for name in files if not is_text(name) and name not in FILES]


def texts_of(files: Mapping[str, Sequence[str]], sides: Sequence[str]) -> dict[str, list[str]]:
    """Name without .txt, below its side -> the .txt of that name, below the top folder, in the order of `sides`."""
    found: dict[str, list[str]] = {}
    for side in sides:
        for name in filter(is_text, files[side]):
            found.setdefault(plain_name(name)[: -len(".txt")], []).append(f"{side}/{name}".removeprefix("/"))
    return found


def with_prompts(
    root: Path, matches: Sequence[Match], captions: Captions | None, read_elsewhere: Set[str] = frozenset()
) -> Iterator[tuple[Match, str | None] | BadRow]:
    """Each match with its prompt; a row for each one without, for each prompt that is not used, and each bad caption.

    A caption wins over a .txt; a .txt with another prompt has a row, unless it is the prompt of another image
    (`read_elsewhere`).
    """
    used: set[str] = set()
    for match in matches:
        name = captions.find(match.names) if captions else None
        used |= {name} if name else set()
        caption = captions.prompts[name] if captions and name else None
        if match.ambiguous:
            yield match.ambiguous
        elif caption and not caption.bad:
            yield match, caption.prompt
            yield from _other_texts(match.texts, caption.prompt, root, read_elsewhere)
        else:
            yield from [caption.bad] if caption and caption.bad else []
            if match.texts or not caption:
                row = _with_text(match, root)
                yield row
                prompt = None if isinstance(row, BadRow) else row[1]
                yield from _other_texts(match.texts[1:], prompt, root, read_elsewhere)
    if captions:
        yield from captions.bad
        yield from captions.unused(used)


def unused_files(
    root: Path, files: Mapping[str, Sequence[str]], used: set[str], lists: str, images: str
) -> Iterator[BadRow]:
    """A row for each .txt and each other file that belongs to no image.

    Args:
        used: files below the top folder that are used, of those that are no images.
        lists: where a file of prompts is read, for the message.
        images: the folders of the images, for the message.
    """
    apart = [
        f"{side}/{name}".removeprefix("/")
        for side, names in files.items()
        for name in names
        if not side or is_text(name) or name in FILES
    ]
    for name in sorted(set(apart) - used):
        is_list = Path(name).name in FILES
        said = f"one file of prompts is read, the first of {', '.join(FILES)} in {lists}"
        yield BadRow("unused_file", "", name, detail=said if is_list else f"belongs to no image of {images}")


def _with_text(match: Match, root: Path) -> tuple[Match, str | None] | BadRow:
    """The match with the prompt of its first .txt."""
    side = next(iter(match.images))
    if not match.texts:
        expected = f"expected a prompt in {' or '.join(FILES)}, or in {side}/{match.name}.txt"
        return BadRow("empty_prompt", side, match.name, detail=expected)
    try:
        return match, _text(root, match.texts[0])
    except RejectedRow as reason:
        return BadRow("empty_prompt", side, match.name, detail=reason.detail)


def _other_texts(texts: Sequence[str], prompt: str | None, root: Path, read_elsewhere: Set[str]) -> Iterator[BadRow]:
    """A row for each .txt that has another prompt than the one that is used, and is not read for another image."""
    for text in [text for text in texts if text not in read_elsewhere]:
        try:
            other = _text(root, text)
        except RejectedRow as reason:
            yield BadRow("unused_file", "", text, detail=reason.detail)
            continue
        if other != (prompt or "").strip():
            yield BadRow("unused_file", "", text, other, "another prompt of the same images is used")


def _text(root: Path, name: str) -> str:
    """The prompt in a .txt. Raises RejectedRow for one that cannot be read."""
    return read_regular(inside(root, name), MAX_TEXT_BYTES).decode("utf-8-sig", errors="surrogateescape").strip()
