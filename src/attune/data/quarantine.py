"""Rows that cannot be used: written to a CSV with the reason, and counted."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from types import TracebackType

COLUMNS = ("source", "file", "row", "prompt", "reason", "detail")
TEXT_CHARS = 500  # of a prompt or a detail: enough to find the row
# what is left out because the data have it already or do not need it: no sign that they are bad
REDUNDANT = (
    "duplicate_pair",
    "duplicate_image",
    "low_confidence",
    "no_consensus",
    "prompt_in_later_split",
    "unused_file",
    "no_other_image",
)


class RejectedRow(ValueError):
    """A row that cannot be used; the message is the reason, in a word.

    `detail` names the column and says what was expected of it.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.detail = detail


class TooManyBadRows(ValueError):
    """More rows are bad than the stage accepts; the message has the most frequent reasons."""


class Quarantine:
    """Writes the quarantine: a context manager; every row is on disk as soon as it is added."""

    def __init__(self, path: Path, source: str):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8", errors="backslashreplace", newline="", buffering=1)
        self._rows = csv.writer(self._file, lineterminator="\n")
        self._rows.writerow(COLUMNS)
        self.path, self.source = path, source
        self.reasons: Counter[str] = Counter()
        self._first = ""  # bad row, as the message has it

    def add(self, reason: str, file: str, row: int | str, prompt: object, detail: str = "") -> None:
        """Writes one row and counts its reason."""
        self.reasons[reason] += 1
        if reason not in REDUNDANT and not self._first:
            self._first = f"{file} row {row}: {reason}. {detail}"[:TEXT_CHARS]
        text = "" if prompt is None else str(prompt)
        file, row, text, detail = (escape_csv_cell(str(cell)[:TEXT_CHARS]) for cell in (file, row, text, detail))
        self._rows.writerow([self.source, file, row, text, reason, detail])

    @property
    def bad(self) -> Counter[str]:
        """The reasons that count as bad, with their numbers of rows: all but the redundant ones."""
        return Counter({reason: n for reason, n in self.reasons.items() if reason not in REDUNDANT})

    def check(self, seen: int, max_share: float) -> None:
        """Checks the share of bad rows among all rows seen; redundant ones are not bad.

        Raises:
            TooManyBadRows: it is larger.
        """
        bad = self.bad.total()
        if bad > max_share * seen:
            top = ", ".join(f"{reason} {count}" for reason, count in self.bad.most_common(3))
            raise TooManyBadRows(
                f"{bad} of {seen} rows are bad, more than data.max_bad_share {max_share}: {top}; see {self.path}. "
                f"The first is {self._first!r}"
            )

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def escape_csv_cell(text: str) -> str:
    """A cell that no spreadsheet runs as a formula: text that could begin one gets an apostrophe (CWE-1236)."""
    text = text.replace("\0", "")
    return f"'{text}" if text.lstrip()[:1] in set("=+-@") or text[:1] in set("\t\r\n") else text
