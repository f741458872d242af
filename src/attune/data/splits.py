"""Which split a prompt belongs to, how many prompts and pairs each split has, and whether that is enough."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import inf
from typing import Any

from attune.data.rows import BadRow, LabelledImage, Pair, Prompt, Quota, Row, SourceError

SPLITS = ("train", "validation", "test")  # a prompt found in several belongs to the last of them

# count -> what asks for it, and what to change where there are too few
REMEDIES = {
    "prompts/train": (
        "the runs that train",
        "name more in data.path, or lower the prompts that are held out: generate.prompts, data.test_prompts, "
        "data.validation_prompts, data.test_share and data.validation_share",
    ),
    "prompts/validation": (
        "search.<run>.prompts and methods.<run>.validation.prompts",
        "raise data.validation_prompts or data.validation_share (source prompts: set data.validation_list), or "
        "lower those",
    ),
    "prompts/test": (
        "generate.prompts",
        "set data.test_list, raise data.test_share or data.test_prompts, or lower generate.prompts",
    ),
    "pairs/train": (
        "the runs that learn from pairs",
        "choose a data.source that has pairs, or lower data.validation_share and data.test_share",
    ),
    "choices/train": (
        "the runs that learn from a chosen and a rejected image",
        "a tie has neither, so bring pairs with a choice, or set ai_feedback of the run",
    ),
    "liked/train": (
        "the runs that learn from liked images",
        "bring more images that people liked, or lower the prompts that are held out",
    ),
    "disliked/train": (
        "the runs that learn from liked and disliked images (sft learns from liked ones alone)",
        "bring images that people disliked, or lower the prompts that are held out",
    ),
    "pairs/validation": ("the preference model's accuracy", "raise data.validation_share"),
    "pairs/test": ("the test split", "raise data.test_share"),
}

# what a method consumes -> counts of single images that must not be 0
VERDICTS = {"images": ("liked/train", "disliked/train"), "liked images": ("liked/train",)}
KINDS = {"choices": "pairs that are no ties", "liked": "liked images", "disliked": "disliked images"}


def normalize_prompt(prompt: str) -> str:
    """What two spellings of a prompt have in common: neither case nor spacing makes a prompt unseen."""
    return " ".join(prompt.casefold().split())


def hashed_split(prompt: str | None, validation_share: float, test_share: float) -> str:
    """The split of a prompt by its own hash: the same in every run, whatever rows come before or after it."""
    return _split_at(_position(prompt), test_share, test_share + validation_share)


def _position(prompt: str | None) -> float:
    """Where a prompt lies among all there may be, from 0 to 1: its hash."""
    identity = hashlib.sha256(normalize_prompt(prompt or "").encode(errors="replace")).digest()
    return int.from_bytes(identity[:8]) / 2**64


def _split_at(position: float, test_end: float, validation_end: float) -> str:
    if position < test_end:
        return "test"
    return "validation" if position < validation_end else "train"


@dataclass(frozen=True)
class HeldOut:
    """What a source holds out of its own prompts: shares of them, and how many there must be at least."""

    validation_share: float
    test_share: float
    validation_prompts: int = 0
    test_prompts: int = 0
    pairs: int | None = None  # of each of the two splits, at most; None: all

    @classmethod
    def of(cls, config: Any, **shares: float) -> HeldOut:
        """As a source's settings say, with other `validation_share` or `test_share` where these are given."""
        own = {"validation_share": config.validation_share, "test_share": config.test_share} | shares
        wanted = (config.validation_prompts or 0, config.test_prompts or 0)
        return cls(own["validation_share"], own["test_share"], *wanted, getattr(config, "held_out_pairs", None))


def with_splits(listed: Iterable[Row], rows: Callable[[], Iterable[Row]], held_out: HeldOut) -> Iterator[Row]:
    """Rows of prompt lists, then all others; those whose split is empty are put into one by their prompt's hash.

    Prompts lie in the order of their hashes: the first are of the test split, the next of validation, the rest of
    training. A split has as many as its share, or more, where less than the wanted number would be held out. So a
    prompt's split depends on all prompts and on what is wanted, not on their order or a seed. A split that is short of
    wanted prompts by its share or by the limit of its pairs has a row for each wanted prompt by itself, so that it
    has the prompt even if the images are bad or not wanted.

    Args:
        listed: rows with a split of their own, which count first.
        rows: gives the other rows; asked twice if prompts are wanted. Memory is about 100 bytes a prompt.
    """
    before = list(listed)
    ends = _Ends.of(chain(before, rows()), held_out) if held_out.validation_prompts or held_out.test_prompts else None
    return chain(before, _put(rows(), ends or _Ends.by_share(held_out)))


@dataclass(frozen=True)
class _Ends:
    """Up to which position prompts are in a split, and up to which they have a row of their own."""

    test: float
    validation: float
    named: Mapping[str, float]

    @staticmethod
    def by_share(held_out: HeldOut) -> _Ends:
        return _Ends(held_out.test_share, held_out.test_share + held_out.validation_share, {})

    @staticmethod
    def of(rows: Iterable[Row], held_out: HeldOut) -> _Ends:
        """The ends that leave as many prompts to each split as are wanted, as far as there are that many."""
        free: set[float] = set()
        given: dict[str, set[float]] = {split: set() for split in SPLITS}
        for row in rows:
            if not isinstance(row, BadRow) and row.prompt and row.prompt.strip():
                (given[row.split] if row.split else free).add(_position(row.prompt))
        positions = sorted(free - given["test"] - given["validation"])
        shares = _Ends.by_share(held_out)
        test, both = (bisect_left(positions, end) for end in (shares.test, shares.validation))
        wanted = {"test": held_out.test_prompts, "validation": held_out.validation_prompts}
        missing = {split: max(0, n - len(given[split])) for split, n in wanted.items()}
        n_test, n_validation = max(test, missing["test"]), max(both - test, missing["validation"])
        ends = (_end(positions, n_test, shares.test), _end(positions, n_test + n_validation, shares.validation))
        few = held_out.pairs is not None and held_out.pairs < max(wanted.values())
        short = {"test": few or n_test > test, "validation": few or n_validation > both - test}
        named = {"test": missing["test"], "validation": n_test + missing["validation"]}
        return _Ends(*ends, {split: _end(positions, n) for split, n in named.items() if short[split]})


def _end(positions: Sequence[float], n: int, share_end: float = -1.0) -> float:
    """Where the first n positions end: at the share, if they are what it holds."""
    if n == bisect_left(positions, share_end):
        return share_end
    return positions[n] if n < len(positions) else inf


def _put(rows: Iterable[Row], ends: _Ends) -> Iterator[Row]:
    named: set[float] = set()
    for row in rows:
        if isinstance(row, BadRow) or row.split:
            yield row
            continue
        position = _position(row.prompt)
        split = _split_at(position, ends.test, ends.validation)
        if position < ends.named.get(split, -inf) and position not in named and row.prompt and row.prompt.strip():
            named.add(position)
            yield Prompt(row.prompt, split, row.file, row.row)
        yield replace(row, split=split)


class PromptSplits:
    """The last split in which each prompt has been found, whatever its spelling."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}  # as an index of SPLITS

    def add(self, prompt: str, split: str) -> None:
        """Notes a prompt of a split."""
        identity = normalize_prompt(prompt)
        self._last[identity] = max(self._last.get(identity, 0), SPLITS.index(split))

    def leaks(self, prompt: str, split: str) -> bool:
        """Whether the prompt was found in a later split as well, so that training on it here would be a leak."""
        return SPLITS.index(split) < self._last[normalize_prompt(prompt)]


def count_rows(rows: Iterable[Row], quota: Quota) -> dict[str, int]:
    """`prompts/<split>` and `pairs/<split>` if every row is good, so at most what `prepare` will write.

    `choices/train` counts the training pairs that are no ties. Of single images, where there are any: `images/<split>`,
    and of training `liked/train` and `disliked/train`.

    No image is opened: cheap for rows that name their images by file.
    """
    splits, prompts, pairs, images = PromptSplits(), set(), [], []
    for row in rows:
        if isinstance(row, BadRow) or not isinstance(row.prompt, str) or not row.prompt.strip():
            continue
        prompt = row.prompt.strip()
        if isinstance(row, Pair):
            if not quota.wants_more(row.split):
                continue
            quota.taken[row.split] += 1
            pairs.append((prompt, row.split, row.label_0))
        if isinstance(row, LabelledImage):
            images.append((prompt, row.split, row.liked))
        splits.add(prompt, row.split)
        prompts.add((prompt, row.split))
    found = Counter(f"prompts/{split}" for prompt, split in prompts if not splits.leaks(prompt, split))
    kept = [(split, label_0) for prompt, split, label_0 in pairs if not splits.leaks(prompt, split)]
    found.update(f"pairs/{split}" for split, _ in kept)
    found.update(f"choices/{split}" for split, label_0 in kept if label_0 != 0.5)
    names = [f"{kind}/{split}" for kind in ("prompts", "pairs") for split in SPLITS]
    counts = {name: found[name] for name in [*names, "choices/train"]}
    verdicts = [(split, liked) for prompt, split, liked in images if not splits.leaks(prompt, split)]
    return counts | (count_images(verdicts) if images else {})


def count_images(verdicts: Sequence[tuple[str, bool | None]]) -> dict[str, int]:
    """`images/<split>`, `liked/train` and `disliked/train` of single images, given their splits and verdicts."""
    found = Counter(f"images/{split}" for split, _ in verdicts)
    found.update(f"{'liked' if liked else 'disliked'}/{split}" for split, liked in verdicts if liked is not None)
    return {name: found[name] for name in [*(f"images/{split}" for split in SPLITS), "liked/train", "disliked/train"]}


def check_splits(counts: Mapping[str, float], wanted: Mapping[str, int]) -> None:
    """Holds what there is of each split against what a run wants of it.

    Args:
        counts: `prompts/<split>` and `pairs/<split>` -> how many there are; those not known yet are left out.
        wanted: the same names -> how many are needed.

    Raises:
        SourceError: too few of one; the message says how many there are, what asks for more, and what to set.
    """
    short = []
    for name, needed in wanted.items():
        asked_by, remedy = REMEDIES[name]
        if counts.get(name, needed) < needed:
            kind, _, split = name.partition("/")
            have = f"{counts[name]} {split} {KINDS.get(kind, kind)}"
            held = [f"{counts.get(f'prompts/{other}', 0)} are for {other}" for other in SPLITS[1:]]
            of_all = f" (of all prompts, {' and '.join(held)})" if name == "prompts/train" else ""
            short.append(f"data: {have}{of_all}, but {needed} are needed by {asked_by}: {remedy}")
    if short:
        raise SourceError("; ".join(short))
