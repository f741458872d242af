"""Answers as files: a data set that the source `table` reads, and the rows that the report reads."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from attune.data.images import FORMATS
from attune.data.local import read_regular
from attune.data.quarantine import RejectedRow, escape_csv_cell
from attune.evaluation.people import COLUMNS, Answer
from attune.files import write_atomically
from attune.labelling.pairs import LabelError, LabelPair, digest_of
from attune.labelling.results import current

TABLE, FACTS = "pairs.csv", "labels.json"
LABELS = {"a": "1", "tie": "0.5", "b": "0"}  # of image_0, which is side a's


@dataclass(frozen=True)
class Exported:
    """Rows of an export, and the answers that are none."""

    rows: int
    both_bad: int
    repeats: int
    changed: int  # about images that are not there any more
    escaped: int  # rows whose prompt got an apostrophe before it

    def __str__(self) -> str:
        left_out = {
            "that neither image is acceptable": self.both_bad,
            "to pairs shown a second time": self.repeats,
            "about images that have changed since": self.changed,
        }
        said = [f"{n} answers {what} are left out" for what, n in left_out.items() if n]
        if self.escaped:
            said.append(f"{self.escaped} prompts begin like a formula and have an apostrophe before them")
        return "; ".join([f"{self.rows} rows", *said])


def export(folder: Path, session: str, answers: Sequence[Answer], pairs: Sequence[LabelPair]) -> Exported:
    """Writes pairs.csv, copies of its images and labels.json into a folder: a row per answer that prefers or ties.

    An answer that neither image is acceptable is no row: it does not say which one is better, and a tie would call
    both worth learning from. The answer when a pair is shown again only serves the agreement.

    Raises:
        LabelError: the folder has the pairs of something else, or an image has changed while this ran.
    """
    _check_owner(folder, session)
    files = {pair.key: pair for pair in pairs}
    usable = current(answers, pairs)
    first = [answer for answer in usable if not answer.repeat]
    used = [answer for answer in first if answer.answer in LABELS]
    names = {answer.pair: _copies(folder / "images", files[answer.pair]) for answer in used}
    rows = [
        (answer.prompt, *names[answer.pair], LABELS[answer.answer], answer.annotator, answer.answered_at)
        for answer in used
    ]
    done = Exported(
        rows=len(rows),
        both_bad=len(first) - len(used),
        repeats=len(usable) - len(first),
        changed=len(answers) - len(usable),
        escaped=sum(escape_csv_cell(answer.prompt) != answer.prompt for answer in used),
    )
    header = ("prompt", "image_0", "image_1", "label_0", "annotator", "answered_at")
    write_atomically(folder / FACTS, (json.dumps({"session": session, **vars(done)}, indent=2) + "\n").encode())
    write_atomically(folder / TABLE, _csv(header, rows))
    return done


def write_people(file: Path, answers: Iterable[Answer]) -> None:
    """Writes all answers for the report, which looks itself whether their images are still the runs'."""
    rows = (
        (
            *(answer.prompt, answer.ordinal, *answer.digests, answer.annotator),
            *(int(answer.repeat), answer.answer, answer.answered_at),
        )
        for answer in answers
    )
    write_atomically(file, _csv(COLUMNS, rows))


def _check_owner(folder: Path, session: str) -> None:
    """Raises LabelError where a pairs.csv is there that is not of this session."""
    if not (folder / TABLE).exists():
        return
    try:
        owner = json.loads((folder / FACTS).read_text())["session"]
    except (OSError, ValueError, KeyError, TypeError):
        owner = None
    if owner != session:
        raise LabelError(f"--export {folder}: its {TABLE} is not of this session ({session}); name another folder")


def _copies(folder: Path, pair: LabelPair) -> tuple[str, str]:
    """Copies both images, and returns their names as pairs.csv has them."""
    first, second = (_copy(folder, file, digest) for file, digest in zip(pair.files, pair.digests, strict=True))
    return first, second


def _copy(folder: Path, file: Path, digest: str) -> str:
    """Copies an image under its digest and the ending of its format, whatever it was called."""
    try:
        data = read_regular(file)
    except RejectedRow as reason:
        raise LabelError(f"{reason.detail}; start again") from None
    if digest_of(data) != digest:
        raise LabelError(f"{file} has changed since this was started; start again")
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        name = f"{digest}.{(image.format or '').lower()}"
    if not (folder / name).exists():
        write_atomically(folder / name, data)
    return f"{folder.name}/{name}"


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """A CSV in which no cell is a formula to a spreadsheet."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([escape_csv_cell(str(cell)) for cell in row] for row in rows)
    return text.getvalue().encode()
