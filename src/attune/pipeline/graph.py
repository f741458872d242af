"""DVC's graph of stages as a value: what can run now, what of it first, and how long all of it will take."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Graph:
    """The stages in the order in which DVC runs them one by one, and the stages that each needs."""

    order: tuple[str, ...]
    needs: Mapping[str, frozenset[str]]

    def ready(self, done: Collection[str], begun: Collection[str]) -> list[str]:
        """The stages that have not begun and need none but those that are done."""
        return [stage for stage in self.order if stage not in begun and self.needs[stage] <= set(done)]

    def users(self, stage: str) -> list[str]:
        """The stages that need this one."""
        return [other for other in self.order if stage in self.needs[other]]


def estimates(stages: Iterable[str], known: Mapping[str, float]) -> dict[str, float]:
    """Stage -> seconds: its own, or the mean of its kind (`generate@<run>`); nothing of a stage with neither."""
    kinds: dict[str, list[float]] = {}
    for stage, seconds in known.items():
        kinds.setdefault(stage.partition("@")[0], []).append(seconds)
    means = {kind: sum(some) / len(some) for kind, some in kinds.items()}
    found = {stage: known.get(stage, means.get(stage.partition("@")[0])) for stage in stages}
    return {stage: seconds for stage, seconds in found.items() if seconds is not None}


def longest_paths(graph: Graph, seconds: Mapping[str, float]) -> dict[str, float]:
    """Stage -> seconds from its begin to the end of all that needs it, were nothing to wait for.

    A stage of which nothing is known counts as one of average length.
    """
    average = sum(seconds.values()) / len(seconds) if seconds else 1.0
    lengths: dict[str, float] = {}
    for stage in reversed(graph.order):
        after = max((lengths[user] for user in graph.users(stage)), default=0.0)
        lengths[stage] = seconds.get(stage, average) + after
    return lengths


def first_of(ready: Iterable[str], lengths: Mapping[str, float]) -> str | None:
    """The stage with the longest path before it, the earlier one of two that are equal; None of none."""
    return max(ready, key=lambda stage: lengths[stage], default=None)


def time_left(
    graph: Graph, seconds: Mapping[str, float], done: Collection[str], running: Mapping[str, float], jobs: int
) -> float:
    """Seconds until all is done, so many stages at a time.

    Args:
        seconds: stage -> how long it takes; a stage that is not there counts as none.
        running: stage -> seconds since it began.
    """
    lengths, now, over, begun = longest_paths(graph, seconds), 0.0, set(done), set(done) | set(running)
    ends = [
        (max(seconds.get(stage, 0.0) - elapsed, 0.0), stage) for stage, elapsed in running.items() if stage not in done
    ]
    heapq.heapify(ends)
    while True:
        while len(ends) < jobs and (stage := first_of(graph.ready(over, begun), lengths)):
            begun.add(stage)
            heapq.heappush(ends, (now + seconds.get(stage, 0.0), stage))
        if not ends:
            return now
        now, ended = heapq.heappop(ends)
        over.add(ended)


def widest(graph: Graph) -> int:
    """The most stages that run at a time, if each takes as long as any other and there is no limit."""
    done: set[str] = set()
    most = 1
    while ready := graph.ready(done, done):
        most = max(most, len(ready))
        done |= set(ready)
    return most
