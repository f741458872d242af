"""How far the whole pipeline is: what has ended and how, what runs, and how long the rest will take."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from attune.pipeline.graph import Graph, estimates, time_left

SAID = re.compile(r"(?P<running>Running stage) '(?P<a>.+)':$|Stage '(?P<b>.+)' (?P<how>didn't change|is cached)\b")
"""What DVC says when it has decided whether a stage must run."""
RAN, UNCHANGED, CACHED, FAILED, STOPPED = "ran", "unchanged", "from DVC's cache", "failed", "stopped"


@dataclass(frozen=True)
class Ended:
    """How a stage ended, and after how many seconds."""

    how: str
    seconds: float


@dataclass
class Progress:
    """The state of a pipeline while it runs."""

    graph: Graph
    jobs: int
    known: dict[str, float]  # seconds of each stage, the last time; of those that have run now, this time
    ended: dict[str, Ended] = field(default_factory=dict)
    began: dict[str, float] = field(default_factory=dict)  # of those that run, s of `time.monotonic`
    how: dict[str, str] = field(default_factory=dict)  # of those that run, as far as DVC has said

    def start(self, stage: str) -> None:
        self.began[stage] = time.monotonic()

    def hear(self, line: str) -> str | None:
        """Takes in a line that DVC may have said; the stage that it is of."""
        match = SAID.search(line)
        if match is None:
            return None
        stage = match["a"] or match["b"]
        self.how[stage] = RAN if match["running"] else UNCHANGED if match["how"] == "didn't change" else CACHED
        return stage

    def end(self, stage: str, how: str) -> Ended:
        ended = Ended(how, time.monotonic() - self.began.pop(stage))
        if how == RAN:
            self.known[stage] = ended.seconds
        self.ended[stage] = ended
        return ended

    @property
    def done(self) -> set[str]:
        return {stage for stage, ended in self.ended.items() if ended.how not in (FAILED, STOPPED)}

    def that(self, how: str) -> list[str]:
        """The stages that have ended so."""
        return [stage for stage, ended in self.ended.items() if ended.how == how]

    @property
    def not_run(self) -> list[str]:
        return [stage for stage in self.graph.order if stage not in self.ended]

    @property
    def running(self) -> Mapping[str, float]:
        """Stage -> seconds since it began."""
        return {stage: time.monotonic() - began for stage, began in self.began.items()}

    def seconds(self) -> dict[str, float]:
        """Stage -> how long it takes, where that is known or can be guessed."""
        return estimates(self.graph.order, self.known)

    def left(self) -> str:
        """How long the rest will take, in words; nothing where nothing of it is known, or nothing is left."""
        known, todo = self.seconds(), [stage for stage in self.graph.order if stage not in self.done]
        unknown = [stage for stage in todo if stage not in known]
        if len(unknown) == len(todo):
            return ""
        seconds = time_left(self.graph, known, self.done, self.running, self.jobs)
        return f"{'at least' if unknown else 'about'} {duration(seconds)} left"


def duration(seconds: float) -> str:
    """A time to be read."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
