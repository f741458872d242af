"""Answers in a SQLite database: every answer is on disk before it is confirmed, and nothing is ever deleted.

Taking an answer back adds a row that names it.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from attune.evaluation.people import Answer
from attune.labelling.order import Question
from attune.labelling.pairs import LabelError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS session (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS answers (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    answered_at TEXT NOT NULL,
    annotator TEXT NOT NULL,
    undoes INTEGER UNIQUE REFERENCES answers (id),
    prompt TEXT, ordinal INTEGER, digest_a TEXT, digest_b TEXT, repeat INTEGER, swapped INTEGER,
    answer TEXT CHECK (answer IN ('a', 'b', 'tie', 'bad')),
    CHECK ((undoes IS NULL) = (answer IS NOT NULL))
);
"""
_STANDING = """
SELECT id, prompt, ordinal, digest_a, digest_b, annotator, repeat, answer, answered_at FROM answers
WHERE undoes IS NULL AND id NOT IN (SELECT undoes FROM answers WHERE undoes IS NOT NULL) ORDER BY id
"""


@dataclass(frozen=True)
class Stored:
    """An answer that stands, and its row."""

    id: int
    answer: Answer


@contextmanager
def opened(file: Path) -> Iterator[sqlite3.Connection]:
    """A connection whose with-body is one transaction, on disk when it ends; it waits for others that write.

    Raises:
        LabelError: the file is no database.
    """
    try:
        with closing(sqlite3.connect(file, timeout=30, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")
    except sqlite3.DatabaseError as error:
        raise LabelError(f"{file}: the answers cannot be read or written: {error}") from None


def create(file: Path, sides: Sequence[str]) -> str:
    """Makes the database unless it is there; returns the session's secret.

    Raises:
        LabelError: it is of a session between other sides.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with opened(file) as connection:
        for statement in _SCHEMA.split(";"):
            connection.execute(statement)
        wanted = {"sides": " | ".join(sides), "secret": secrets.token_hex(16)}
        connection.executemany("INSERT OR IGNORE INTO session VALUES (?, ?)", wanted.items())
        known = dict(connection.execute("SELECT name, value FROM session"))
    if known["sides"] != wanted["sides"]:
        raise LabelError(f"{file} has answers about {known['sides']}, not {wanted['sides']}; move the file away")
    return known["secret"]


def standing(connection: sqlite3.Connection) -> list[Stored]:
    """All answers that were not taken back, in the order in which they were given."""
    return [
        Stored(row[0], Answer(row[1], row[2], (row[3], row[4]), row[5], bool(row[6]), row[7], row[8]))
        for row in connection.execute(_STANDING)
    ]


def read(file: Path) -> list[Answer]:
    """All answers of a session that were not taken back."""
    with opened(file) as connection:
        return [each.answer for each in standing(connection)]


def add(connection: sqlite3.Connection, annotator: str, question: Question, answer: str) -> None:
    """Adds an answer; `answer` is a key of `people.VALUES`."""
    pair = question.pair
    columns = "answered_at, annotator, prompt, ordinal, digest_a, digest_b, repeat, swapped, answer"
    values = (_now(), annotator, pair.prompt, pair.ordinal, *pair.digests, question.repeat, question.swapped, answer)
    connection.execute(f"INSERT INTO answers ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)


def take_back(connection: sqlite3.Connection, stored: Stored) -> None:
    """Adds that an answer does not stand."""
    values = (_now(), stored.answer.annotator, stored.id)
    connection.execute("INSERT INTO answers (answered_at, annotator, undoes) VALUES (?, ?, ?)", values)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
