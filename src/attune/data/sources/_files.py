"""Files that sources read: in a folder here or, one at a time, from a data set on the Hub; and prompt lists."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from attune.data.rows import BadRow, Pair, Prompt, Row, SourceError
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

    Raises:
        SourceError: there are none, the Hub cannot be asked, or its id comes without the commit it is pinned to.
    """
    here = Path(path)
    if here.is_dir():
        found = _local(sorted(file for file in here.rglob("*") if file.is_file()), here)
    elif here.exists():
        found = _local([here], here.parent)
    elif _is_pattern(path):
        found = _local(_glob(path), Path(here.anchor or "."))
    else:
        found = _on_hub(path)
    matching = [file for file in found if file.name.endswith(tuple(endings))]
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
    return [DataFile(f.relative_to(root).as_posix(), f.stat().st_size, partial(Path, f)) for f in files]


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


def inside(root: Path, name: Any) -> Path | None:
    """The file of that name in a folder; None for what is no name or leads out of it: the name is untrusted."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        return None
    parts = PurePosixPath(name.replace("\\", "/"))
    return None if parts.is_absolute() or ".." in parts.parts else root / parts


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        SourceError: it is not there, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8: {error}") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        SourceError: it is not there, or not JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise SourceError(f"{path} is not JSON: {error}") from None


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, row) of a .csv with a header or a .jsonl, line by line; a line that is no object is a `BadRow`.

    Raises:
        SourceError: the file is no CSV.
    """
    with path.open(encoding="utf-8-sig", newline="", errors="surrogateescape") as file:
        if path.suffix == ".csv":
            reader = csv.DictReader(file)
            try:
                yield from ((reader.line_num, row) for row in reader)
            except csv.Error as error:
                raise SourceError(f"{path}, after line {reader.line_num}: {error}") from None
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                row = _parsed(line)
                yield number, row if isinstance(row, dict) else BadRow("malformed_row", path.name, number)


def prompt_list(path: str, split: Callable[[str], str]) -> Iterator[Prompt | BadRow]:
    """The prompts of a list: .txt, one per line and blank lines skipped; .json or .jsonl, strings or objects
    with `prompt` or `caption`. `split` gives the split of each.

    Raises:
        SourceError: the file is not there or not a list.
    """
    file = Path(path)
    if file.suffix == ".txt":
        rows = [line for line in io.StringIO(read_text(file)) if line.strip()]
    elif file.suffix == ".json":
        rows = read_json(file)
    elif file.suffix == ".jsonl":
        rows = [_parsed(line) for line in io.StringIO(read_text(file)) if line.strip()]
    else:
        raise SourceError(f"{path}: a prompt list is a .txt, .json or .jsonl file")
    if not isinstance(rows, list):
        raise SourceError(f"{path}: must be a list of prompts")
    return (_listed(row, split, file.name, number) for number, row in enumerate(rows))


def listed_test_prompts(test_list: str | None) -> Iterable[Prompt | BadRow]:
    """The prompts of `data.test_list`, all of the test split; none without it.

    Raises:
        SourceError: the file is not there or not a list.
    """
    return prompt_list(test_list, lambda prompt: "test") if test_list else ()


def prompt_texts(rows: Iterable[Row]) -> Iterator[str]:
    """The prompts of rows, those without one left out; a prompt of several rows comes several times."""
    texts = (row.prompt for row in rows if isinstance(row, Prompt | Pair))
    return (text for text in texts if isinstance(text, str) and text.strip())


def are_small(*paths: str | Path | None) -> bool:
    """Whether these tables and lists are read in less than a second. Files that are not there weigh nothing."""
    files = (Path(path) for path in paths if path is not None)
    return sum(file.stat().st_size for file in files if file.is_file()) <= SMALL_BYTES


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _listed(row: Any, split: Callable[[str], str], file: str, number: int) -> Prompt | BadRow:
    text = row.get("prompt", row.get("caption")) if isinstance(row, dict) else row
    if not isinstance(text, str):
        return BadRow("malformed_row", file, number)
    return Prompt(text.strip(), split(text), file, number)
