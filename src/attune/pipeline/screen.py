"""What `attune repro` shows: lines, and on a terminal below them what runs, how far it is and how much is left."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from attune.pipeline.logs import Bar
from attune.pipeline.progress import FAILED, Progress, duration

BAR_WIDTH = 24  # characters
FRAMES = 4  # a second
GREY, GREEN = "bright_black", "green"  # which every terminal has


class Screen:
    """Standard output. Of what is not a terminal only lines are asked."""

    def __init__(self, console: Console, live: Live | None) -> None:
        self._console, self._live = console, live

    def say(self, line: str) -> None:
        """Writes a line; on a terminal above what runs."""
        if self._live is None:
            self._console.file.write(line + "\n")
            self._console.file.flush()
        else:
            self._console.print(Text(line), soft_wrap=True)

    def show(self, progress: Progress, bars: Mapping[str, Bar | None]) -> None:
        """Shows how far all of it is."""
        if self._live is not None:
            self._live.update(picture(progress, bars))


@contextmanager
def screen() -> Iterator[Screen]:
    """Standard output for the with-body; what was shown of the running stages is removed at its end.

    A character that it cannot hold is written as its number. Of FORCE_COLOR, which services for CI set, a file or a
    pipe does not become a terminal.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    if not sys.stdout.isatty() or not console.is_terminal or console.is_dumb_terminal:
        yield Screen(console, None)
        return
    live = Live(
        console=console, transient=True, refresh_per_second=FRAMES, redirect_stdout=False, redirect_stderr=False
    )
    with live:
        yield Screen(console, live)


def picture(progress: Progress, bars: Mapping[str, Bar | None]) -> RenderableType:
    """A line for all of it, and one for each stage that runs."""
    table = Table.grid(padding=(0, 2))
    for stage, elapsed in progress.running.items():
        bar = bars.get(stage)
        percent = None if bar is None else bar.percent
        drawn: RenderableType = Text()
        if percent is not None:
            drawn = ProgressBar(
                completed=percent, width=BAR_WIDTH, style=GREY, complete_style=GREEN, finished_style=GREEN
            )
        counted = "" if bar is None else f"{bar.what} {bar.count}"
        number = "" if percent is None else f"{percent:3d} %"
        table.add_row(Text(f"  {stage}"), drawn, Text(number), Text(duration(elapsed)), Text(counted, no_wrap=True))
    return Group(Text(headline(progress), style="bold"), table)


def headline(progress: Progress) -> str:
    """How many stages have ended, which one that makes the running ones, and how long the rest will take."""
    ended, running, count = len(progress.ended), len(progress.began), len(progress.graph.order)
    last = f"{' and' if running == 2 else ' to'} {ended + running}" if running > 1 else ""
    stages = f"stage{'s' if last else ''} {ended + 1}{last}"
    now = f"{stages} of {count}" if running else f"{ended} of {count} stages have ended"
    failed = f"; failed: {', '.join(progress.that(FAILED))}" if progress.that(FAILED) else ""
    left = "" if failed else progress.left()
    return now + (f"; {left}" if left else "") + failed
