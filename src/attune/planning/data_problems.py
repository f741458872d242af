"""Whether the data can be what the runs learn from and are judged by, as far as that is known before any work."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

from attune.config import plugins
from attune.config.profile import PREFERENCE
from attune.config.resolve import Settings
from attune.data.rows import SourceError
from attune.data.splits import VERDICTS, check_splits
from attune.planning.make import rows_of, wanted_rows
from attune.world.grammar import is_of_the_world

# what is counted -> what it is counted of
KINDS_OF_ROWS = {
    "prompts": "prompts",
    "pairs": "pairs",
    "choices": "pairs",
    "liked": "images",
    "disliked": "images",
}


def data(s: Settings) -> Iterator[str]:
    """Methods that learn from pairs or images need a source of these; sizes that are known must be enough."""
    where, source = f"params/{s.profile}.yaml", plugins.load("sources", s.source)
    for name, run in s.runs.items():
        rows = rows_of(run.method, s.source) if run.method else "prompts"
        if not has(source, rows):
            yield f"runs.{name}: {run.method} learns from {rows}, and data.source {s.source} {_instead(source, rows)}"
    if s.preference is not None and "pairs" not in source.GIVES and any(r.after == PREFERENCE for r in s.runs.values()):
        yield f"{where}:preference: is trained on pairs, and data.source {s.source} has none; use a source of pairs"
    yield from (f"{where}:{problem}" for problem in _too_few(s))


def has(source: ModuleType, rows: str) -> bool:
    """Whether a source has what a method learns from; groups are of the images that pairs have, or of single ones."""
    wanted = {"pairs", "images"} if rows == "groups" else {rows.removeprefix("liked ")}
    return not wanted.isdisjoint(source.GIVES)


def _instead(source: ModuleType, rows: str) -> str:
    """What a source has instead of the rows that a method learns from, and what to do."""
    if rows != "pairs" or "images" not in source.GIVES:
        return "has none; use one that has"
    methods = plugins.available("methods")
    able = [name for name in methods if plugins.load("methods", name).Method.consumes in VERDICTS]
    return f"has single images; use {' or '.join(able)}, or a source of pairs"


def _too_few(s: Settings) -> Iterator[str]:
    """Splits that are too small, as far as their sizes are known before any work; not those it cannot have."""
    source = plugins.load("sources", s.source)
    try:
        sizes = source.split_sizes(s.data) or {}
    except SourceError as error:
        yield str(error)
        return
    wanted = wanted_rows(s).items()
    for split, n in [(name, n) for name, n in wanted if KINDS_OF_ROWS[name.partition("/")[0]] in source.GIVES]:
        try:
            check_splits(sizes, {split: n})
        except SourceError as error:
            yield str(error)


def prompts(s: Settings) -> Iterator[str]:
    """The oracle can score prompts of the embedded world alone."""
    source = plugins.load("sources", s.source)
    oracles = [name for name, scorer in s.scorers.items() if scorer.plugin == "oracle"]
    if not oracles or not source.FREE_PROMPTS:
        return
    try:
        listed, sizes = list(source.listed_prompts(s.data) or ()), source.split_sizes(s.data) or {}
    except SourceError:  # said with the data
        return
    foreign = next((prompt for prompt in listed if not is_of_the_world(prompt)), None)
    if foreign is None and len(set(listed)) >= sum(n for name, n in sizes.items() if name.startswith("prompts/")) > 0:
        return
    said = f"the prompts of data.source {s.source}" if foreign is None else f"the prompt {foreign!r}"
    yield (
        f"params/{s.profile}.yaml:scorers.{oracles[0]}: the oracle knows prompts of the embedded world alone and "
        f"cannot score {said}; remove scorers.{oracles[0]}"
    )


def notes(s: Settings) -> Iterator[str]:
    """What stops nothing and is to be known: the advice of methods about the images that are known before any work."""
    try:
        sizes = plugins.load("sources", s.source).split_sizes(s.data) or {}
    except SourceError:  # said with the problems
        return
    for name, run in s.runs.items():
        advice = getattr(plugins.load("methods", run.method), "advice", None) if run.method else None
        if advice and "liked/train" in sizes:
            said = advice(s.methods[name], sizes["liked/train"], sizes["disliked/train"])
            if said:
                yield f"params/{s.profile}.yaml:methods.{name}: {said}"
