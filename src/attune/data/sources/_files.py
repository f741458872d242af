"""Files that sources read: in a folder here or, one at a time, from a data set on the Hub; and prompt lists."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from attune.data.local import inside, is_hidden
from attune.data.quarantine import RejectedRow
from attune.data.rows import BadImage, BadRow, Prompt, Row, SourceError
from attune.data.sources._cells import shown
from attune.data.sources._json import parse_json, read_json_list, read_text
from attune.hub import NOTATION, HubError, fetch_file, list_files, parse

SMALL_BYTES = 2_000_000  # of tables and lists, about 20,000 rows: read in less than a second


@dataclass(frozen=True)
class DataFile:
    """A file of a data set: its name inside, its bytes, and how to get it, which may download it."""

    name: str
    size: int
    fetch: Callable[[], Path]


def data_files(path: str, endings: Sequence[str]) -> list[DataFile]:
    """The files with those endings, by name: of a file, a folder or a pattern here, else of a Hub data set.

    Hidden files of a folder or a pattern, as macOS leaves them beside the others, are passed over.

    Raises:
        SourceError: there are none, the Hub cannot be asked, or its id comes without the commit it is pinned to.
    """
    here = Path(path)
    if here.is_dir():
        files = (file for file in here.rglob("*") if not file.is_dir() and not is_hidden(file.relative_to(here)))
        found = _local(sorted(files), here)
    elif here.exists():
        found = _local([here], here.parent)
    elif _is_pattern(path):
        found = _local([file for file in _glob(path) if not is_hidden(Path(file.name))], Path(here.anchor or "."))
    else:
        found = _on_hub(path)
    matching = [file for file in found if file.name.lower().endswith(tuple(endings))]
    if not matching:
        raise SourceError(f"data.path: {path} holds no {' or '.join(endings)} file")
    return matching


def local_paths(path: str) -> list[Path]:
    """What `data_files` finds here: a file, a folder, or the files of a pattern; [] for a Hub data set."""
    if Path(path).exists():
        return [Path(path)]
    return _glob(path) if _is_pattern(path) else []


def _is_pattern(path: str) -> bool:
    return any(sign in path for sign in "*?[")


def _glob(pattern: str) -> list[Path]:
    path = Path(pattern)
    return sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor) if path.anchor else path)))


def _local(files: Sequence[Path], root: Path) -> list[DataFile]:
    return [DataFile(f.relative_to(root).as_posix(), _size(f), partial(Path, f)) for f in files]


def _size(file: Path) -> int:
    """In bytes; 0 for a link to nothing, which is told when the file is read."""
    return file.stat().st_size if file.exists() else 0


def _on_hub(path: str) -> list[DataFile]:
    try:
        source = parse(path)
        sizes = list_files(source, "dataset") if source.commit else {}
    except (HubError, ValueError) as error:
        raise SourceError(f"data.path: {error}") from error
    if source.commit is None:
        raise SourceError(f"data.path: {path} is neither here nor a data set on the Hub, {NOTATION}")
    repository = replace(source, inner="")
    return [
        DataFile(name, size, partial(fetch_file, repository / name, repo_type="dataset"))
        for name, size in sorted(sizes.items())
    ]


def image_in(root: Path, name: Any) -> Path | BadImage:
    """The image of that name in a folder, there or not; for a name that leads out of it, why there is none."""
    try:
        return inside(root, name)
    except RejectedRow as reason:
        return BadImage(str(reason), reason.detail)


def prompt_list(path: str, split: str = "") -> Iterator[Prompt | BadRow]:
    """The prompts of a list: .txt, one per line and blank lines skipped; .json or .jsonl, strings or objects
    with `prompt` or `caption`.

    Raises:
        SourceError: the file is not there or not a list.
    """
    file = Path(path)
    ending = file.suffix.lower()
    if ending == ".txt":
        rows: list[Any] | None = [line for line in io.StringIO(read_text(file), newline=None) if line.strip()]
    elif ending == ".json":
        rows = read_json_list(file)
    elif ending == ".jsonl":
        rows = [_parsed(line) for line in io.StringIO(read_text(file), newline=None) if line.strip()]
    else:
        raise SourceError(f"{path}: a prompt list is a .txt, .json or .jsonl file")
    if rows is None:
        raise SourceError(f"{path}: must be a list of prompts")
    return (_listed(row, split, file.name, number) for number, row in enumerate(rows))


def listed_test_prompts(test_list: str | None) -> Iterable[Prompt | BadRow]:
    """The prompts of `data.test_list`, all of the test split; none without it.

    Raises:
        SourceError: the file is not there or not a list.
    """
    return prompt_list(test_list, "test") if test_list else ()


def prompt_texts(rows: Iterable[Row]) -> Iterator[str]:
    """The prompts of rows, those without one left out; a prompt of several rows comes several times."""
    texts = (row.prompt for row in rows if not isinstance(row, BadRow))
    return (text for text in texts if isinstance(text, str) and text.strip())


def are_small(*paths: str | Path | None) -> bool:
    """Whether these tables and lists are read in less than a second. Files that are not there weigh nothing."""
    files = (Path(path) for path in paths if path is not None)
    return sum(file.stat().st_size for file in files if file.is_file()) <= SMALL_BYTES


def _parsed(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None


def _listed(row: Any, split: str, file: str, number: int) -> Prompt | BadRow:
    text = row.get("prompt", row.get("caption")) if isinstance(row, dict) else row
    if not isinstance(text, str):
        expected = "expected a prompt, or an object with `prompt` or `caption`"
        return BadRow("malformed_row", file, number, detail=f"{expected}, found {shown(row)}")
    return Prompt(text.strip(), split, file, number)
