"""What an annotator is asked and has answered, as the page is told it; answers and their undoing, saved."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attune.data.images import decode
from attune.data.local import read_regular
from attune.data.quarantine import RejectedRow
from attune.labelling import store
from attune.labelling.order import Key, Question, questions
from attune.labelling.pairs import LabelError, LabelPair, digest_of
from attune.labelling.results import current, result_lines

MAX_NAME = 60  # characters of an annotator's name


class NotNow(ValueError):
    """An answer to a question that is not to be answered now: the page is behind, or another server asked it."""


class NoImage(ValueError):
    """An image cannot be shown; the message does not name its file, which would tell whose it is."""


@dataclass(frozen=True)
class Session:
    """What is asked, and where the answers go."""

    names: tuple[str, str]  # of the two sides, for the results
    pairs: Sequence[LabelPair]
    database: Path
    secret: str
    seed: int
    repeats: float
    annotator: str  # "": the page asks
    export_command: str

    def asked_of(self, annotator: str) -> list[Question]:
        """All questions for an annotator, in order."""
        return questions(self.pairs, annotator, seed=self.seed, repeats=self.repeats, secret=self.secret)


def annotator_name(text: str) -> str:
    """A name in one form. Raises LabelError for one that is empty, too long or cannot be seen."""
    name = " ".join(text.split())
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise LabelError(f"a name has 1 to {MAX_NAME} visible characters")
    return name


def state(session: Session, annotator: str) -> dict[str, Any]:
    """What the page shows an annotator now."""
    with store.opened(session.database) as connection:
        return _state(session, annotator, store.standing(connection))


def save_answer(session: Session, annotator: str, question: str, choice: str) -> dict[str, Any]:
    """Saves an answer; returns what is asked next.

    Args:
        session: the session.
        annotator: who answers.
        question: the id of what the page shows.
        choice: `left`, `right`, `tie` or `bad`.

    Raises:
        NotNow: something else is to be answered.
    """
    with store.opened(session.database) as connection:
        asked = _open(session, annotator, store.standing(connection))
        if not asked or asked[0].id != question:
            raise NotNow
        store.add(connection, annotator, asked[0], _side_of(choice, asked[0].swapped))
        return _state(session, annotator, store.standing(connection))


def undo(session: Session, annotator: str, question: str | None) -> dict[str, Any]:
    """Takes an annotator's last answer back; returns what is asked then. Raises NotNow as `save_answer` does."""
    with store.opened(session.database) as connection:
        standing = store.standing(connection)
        asked = _open(session, annotator, standing)
        if (asked[0].id if asked else None) != question:
            raise NotNow
        keys = {each.key for each in session.asked_of(annotator)}
        mine = [each for each in standing if each.answer.annotator == annotator and each.answer.key in keys]
        if mine:
            store.take_back(connection, mine[-1])
        return _state(session, annotator, store.standing(connection))


def image_png(session: Session, annotator: str, question: str, side: str) -> bytes:
    """The image on one side of a question as a PNG of nothing but its pixels.

    Raises:
        NoImage: there is none, or it is no longer what it was when the session started.
    """
    found = next((each for each in session.asked_of(annotator) if each.id == question), None)
    if found is None:
        raise NoImage("there is no such question")
    which = int((side == "right") != found.swapped)
    try:
        data = read_regular(found.pair.files[which])
        if digest_of(data) != found.pair.digests[which]:
            raise NoImage("the image has changed since the server started: start it again")
        image = decode(data)
    except RejectedRow:
        raise NoImage("the image cannot be read any more: start the server again") from None
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # it goes to this machine: small files gain nothing
    return buffer.getvalue()


def _open(session: Session, annotator: str, standing: Sequence[store.Stored]) -> list[Question]:
    """The questions that an annotator has not answered, in order."""
    answered: set[Key] = {each.answer.key for each in standing if each.answer.annotator == annotator}
    return [question for question in session.asked_of(annotator) if question.key not in answered]


def _side_of(choice: str, swapped: bool) -> str:
    """What a choice on the page says of the sides."""
    return {"left": "b" if swapped else "a", "right": "a" if swapped else "b"}.get(choice, choice)


def _state(session: Session, annotator: str, standing: Sequence[store.Stored]) -> dict[str, Any]:
    """All that the page knows. Results name the sides, so they come last."""
    total, asked = len(session.asked_of(annotator)), _open(session, annotator, standing)
    found: dict[str, Any] = {
        "annotator": annotator,
        "answered": total - len(asked),
        "total": total,
        "question": {"id": asked[0].id, "prompt": asked[0].pair.prompt} if asked else None,
        "next": asked[1].id if len(asked) > 1 else None,
    }
    if not asked:
        answers = current((each.answer for each in standing), session.pairs)
        mine = [answer for answer in answers if answer.annotator == annotator]
        found["results"] = list(result_lines(mine, *session.names))
        if len(mine) < len(answers):
            found["results"] += ["Of all annotators:", *result_lines(answers, *session.names)]
        found["export"] = session.export_command
    return found
