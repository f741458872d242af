"""Cuts the rows of a source into chunks, which processes share; a chunk's latents and scores make a shard each.

Where a chunk ends depends on the prompts around its end and not on row numbers (content-defined chunking), so rows
that are added, removed or put in between change the chunk they fall into and leave the others, and their shards, as
they are.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from attune.data.rows import Pair, Prompt, Quota, Row

FEWEST, MOST, USUAL = (
    64,
    512,
    64,
)  # rows: the limits of a chunk, and how many more than FEWEST it has mostly
MOST_PROMPTS = 65_536  # rows of a prompt alone, which cost next to nothing
MERGE_EVERY = 16  # chunks per process from one meeting of all to the next


@dataclass(frozen=True)
class Chunk:
    """Rows that follow each other, and the process that is to compute their shards."""

    rows: list[Row]
    owner: int  # rank
    merge: bool  # whether `quota` must be brought up to date before the next chunk is asked for


def chunks(rows: Iterable[Row], quota: Quota, processes: int) -> Iterator[Chunk]:
    """The rows in chunks, but for pairs of a split that has enough; a chunk goes to the process with the fewest rows.

    A source asks `quota` before every row that it reads. It is not up to date while chunks wait to be merged, so a
    chunk ends, and all are merged, as soon as its split has enough if all its pairs are good: no row more is read than
    one by one.
    """
    work, waiting = Counter[int](), Counter[str]()  # rows by process; pairs by split that are not merged yet
    chunk, counted, made = list[Row](), 0, 0
    for row in rows:
        if isinstance(row, Pair) and not quota.wants_more(row.split):
            continue
        chunk.append(row)
        counted += not isinstance(row, Prompt)
        enough = isinstance(row, Pair) and _may_have_enough(row.split, quota, waiting)
        if not (enough or _ends(row, counted) or len(chunk) == MOST_PROMPTS):
            continue
        made += 1
        merge = enough or processes == 1 or made % (MERGE_EVERY * processes) == 0
        yield Chunk(chunk, _least(work, processes, counted), merge)
        chunk, counted = [], 0
        if merge:
            waiting.clear()
    yield Chunk(chunk, _least(work, processes, counted), merge=True)


def _may_have_enough(split: str, quota: Quota, waiting: Counter[str]) -> bool:
    """Counts a pair as taken. Whether its split has enough then, if all that wait are good."""
    waiting[split] += 1
    limit = quota.limits.get(split)
    return limit is not None and quota.taken[split] + waiting[split] >= limit


def _ends(row: Row, counted: int) -> bool:
    """Whether a chunk with so many rows, but for prompts alone, ends after this one."""
    if isinstance(row, Prompt) or counted < FEWEST:
        return False
    text = row.prompt if isinstance(row.prompt, str) else ""
    return counted >= MOST or zlib.crc32(text.encode(errors="surrogatepass")) % USUAL == 0


def _least(work: Counter[int], processes: int, rows: int) -> int:
    owner = min(range(processes), key=lambda rank: work[rank])
    work[owner] += rows
    return owner
