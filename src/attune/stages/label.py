"""A page on which people choose between images of two runs or folders, and their answers as a data set: `make label`.

Every answer is saved at once; started again, it goes on where it was (docs/labelling.md).
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from attune.config.resolve import load
from attune.config.schema import ConfigError
from attune.paths import Paths
from attune.stages.plan import say
from attune.stop import stoppable
from attune.text import message

if TYPE_CHECKING:
    import socket

    from attune.labelling.asking import Session


def main() -> None:
    words = arguments()
    try:
        paths = Paths(load().profile)
    except ConfigError as error:
        sys.exit(str(error))

    from attune.labelling.pairs import LabelError

    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    try:
        label(words, paths)
    except LabelError as error:
        sys.exit(f"label: {message(str(error))}")


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--a", required=True, help="a run of the profile with images, or a folder")
    parser.add_argument("--b", help="what to compare it with; without it, images of one prompt in a")
    parser.add_argument("--annotator", default="", help="who answers; without it, the page asks")
    parser.add_argument("--port", type=int, default=8765, help="on 127.0.0.1; 0 for any that is free")
    parser.add_argument("--repeats", type=float, default=0.1, help="share of the pairs to be shown a second time")
    parser.add_argument("--seed", type=int, default=0, help="of the order and of the sides")
    parser.add_argument("--prompts", type=int, help="ask about the first so many prompts only")
    parser.add_argument("--export", type=Path, help="write the answers into this folder as a data set")
    words = parser.parse_args()
    if not 0 <= words.repeats <= 0.5:
        parser.error(f"--repeats {words.repeats}: a share from 0 to 0.5 is wanted")
    if words.prompts is not None and words.prompts < 1:
        parser.error(f"--prompts {words.prompts}: at least 1 is wanted")
    if words.a == words.b:
        parser.error("--a and --b are the same; leave --b out to compare images of one prompt with each other")
    return words


def label(words: argparse.Namespace, paths: Paths) -> None:
    """Finds the pairs, then exports the answers about them, or asks for more.

    Raises:
        LabelError: with what stands in the way.
    """
    from attune.labelling import store
    from attune.labelling.asking import Session, annotator_name
    from attune.labelling.pairs import find_pairs, find_side, session_name
    from attune.labelling.server import listen

    annotator = annotator_name(words.annotator) if words.annotator else ""
    sides = [find_side(name, paths) for name in (words.a, words.b) if name is not None]
    found = find_pairs(sides, words.prompts)
    for note in found.notes:
        say(message(note))
    database = paths.labels(session_name(sides))
    session = Session(
        names=(sides[0].name, sides[1].name) if len(sides) > 1 else ("the first image", "the second image"),
        pairs=found.pairs,
        database=database,
        secret=store.create(database, [str(side.folder.resolve()) for side in sides]),
        seed=words.seed,
        repeats=words.repeats,
        annotator=annotator,
        export_command=export_command(words),
    )
    report = paths.people(words.a, words.b) if len(sides) > 1 and all(side.is_run for side in sides) else None
    if words.export is not None:
        write_out(session, words.export, report)
    else:
        ask(session, listen(words.port), report)


def ask(session: Session, listener: socket.socket, report: Path | None) -> None:
    """Serves the page until it is stopped; the report's file is written when somebody is done, and at the end."""
    from attune.labelling.server import ADDRESS, serve

    say(f"{len(session.pairs)} pairs: http://{ADDRESS}:{listener.getsockname()[1]}  (Ctrl-C ends; answers are saved)")
    sys.stdout.flush()
    try:
        serve(session, listener, lambda: for_the_report(session, report))
    finally:
        for_the_report(session, report)


def write_out(session: Session, folder: Path, report: Path | None) -> None:
    """Writes the answers as a data set, and says what they are."""
    from attune.labelling.export import export
    from attune.labelling.results import current, result_lines
    from attune.labelling.store import read

    answers = read(session.database)
    done = export(folder, session.database.stem, answers, session.pairs)
    for_the_report(session, report)
    say(f"{folder}: {done}")
    say("\n".join(result_lines(current(answers, session.pairs), *session.names)))


def for_the_report(session: Session, report: Path | None) -> None:
    """Writes the answers about two runs where the report reads them, once there are any."""
    from attune.labelling.export import write_people
    from attune.labelling.store import read

    answers = read(session.database)
    if report is not None and answers:
        write_people(report, answers)


def export_command(words: argparse.Namespace) -> str:
    """The command line that exports this session."""
    named = [f"--a {shlex.quote(words.a)}", *([] if words.b is None else [f"--b {shlex.quote(words.b)}"])]
    return " ".join(["attune label", *named, "--export data/raw/labels"])


if __name__ == "__main__":
    with stoppable("label"):
        main()
