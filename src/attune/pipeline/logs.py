"""What a stage has written to its log so far: whole lines, and the progress bar that it is at."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attune.text import printable

BAR = re.compile(
    r"(?P<what>[^|]*?)(?:: *)?(?P<percent>\d+)%\|[^|]*\| *(?P<count>\S+) \[[^\]]*\]"  # of tqdm, with a total
    r"|(?P<what_else>[^|]*?): *(?P<number>\d+\S*) \[\d+:\d+[^\]]*\]"  # and without
)
LONGEST_BAR = 500  # characters; in a line of a million the search for one would take half an hour
COMMAND = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # to a terminal: a colour, a line up


@dataclass(frozen=True)
class Bar:
    """A progress bar: what it counts, how far it is, and in percent where the total is known."""

    what: str
    count: str
    percent: int | None


@dataclass
class Log:
    """A log that another process writes, read a part at a time."""

    file: Path
    bar: Bar | None = None  # the latest
    _position: int = 0
    _rest: str = ""  # of a line that has no end yet
    _decoder: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def new_lines(self) -> list[str]:
        """The lines that were written since the last call; of a progress bar none."""
        try:
            with self.file.open("rb") as file:
                file.seek(self._position)
                found = file.read()
        except FileNotFoundError:  # removed while the stage runs, which goes on
            return []
        self._position += len(found)
        *whole, self._rest = (self._rest + self._decoder.decode(found)).split("\n")
        for text in (*whole, self._rest):
            self.bar = last_bar(text) or self.bar
        self._rest = self._rest[self._rest.rfind("\r") + 1 :]
        return [line for text in whole for line in plain(text)]


def last_bar(text: str) -> Bar | None:
    """The last progress bar of a line, in which each is written over the one before."""
    matches = [match for part in _parts(text) if (match := _bar(part))]
    if not matches:
        return None
    last = matches[-1]
    what, count = last["what"] or last["what_else"] or "", last["count"] or last["number"]
    return Bar(printable(what.strip()), printable(count), int(last["percent"]) if last["percent"] else None)


def plain(text: str) -> Iterator[str]:
    """The parts of a line that are no progress bar and not empty, without control characters."""
    for part in _parts(text):
        bar = _bar(part)
        said = printable(part[bar.end() if bar else 0 :].replace("\t", "    ")).rstrip()
        if said.strip():
            yield said


def _parts(text: str) -> list[str]:
    return COMMAND.sub("", text).split("\r")


def _bar(part: str) -> re.Match[str] | None:
    return BAR.match(part, 0, LONGEST_BAR)


def last_lines(file: Path, count: int) -> list[str]:
    """The last lines of a log, without progress bars."""
    text = file.read_bytes().decode(errors="replace") if file.exists() else ""
    return [line for each in text.split("\n") for line in plain(each)][-count:]
