"""Which split a prompt belongs to, how many prompts and pairs each split has, and whether that is enough."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

from attune.data.rows import BadRow, Pair, Quota, Row, SourceError

SPLITS = ("train", "validation", "test")  # a prompt found in several belongs to the last of them

# count -> what asks for it, and what to change where there are too few
REMEDIES = {
    "prompts/train": (
        "the runs that train",
        "name more in data.path, or lower data.validation_share and data.test_share",
    ),
    "prompts/validation": (
        "search.<run>.prompts and methods.<run>.validation.prompts",
        "raise data.validation_share (source prompts: set data.validation_list; world: raise "
        "data.validation_prompts), or lower those",
    ),
    "prompts/test": (
        "generate.prompts",
        "set data.test_list, raise data.test_share (source world: data.test_prompts), or lower generate.prompts",
    ),
    "pairs/train": (
        "the runs that learn from pairs",
        "choose a data.source that has pairs, or lower data.validation_share and data.test_share",
    ),
    "choices/train": (
        "the runs that learn from a chosen and a rejected image",
        "a tie has neither, so bring pairs with a choice, or set ai_feedback of the run",
    ),
    "pairs/validation": ("the preference model's accuracy", "raise data.validation_share"),
    "pairs/test": ("the test split", "raise data.test_share"),
}


def normalize_prompt(prompt: str) -> str:
    """What two spellings of a prompt have in common: neither case nor spacing makes a prompt unseen."""
    return " ".join(prompt.casefold().split())


def hashed_split(prompt: str | None, validation_share: float, test_share: float) -> str:
    """The split of a prompt by its own hash: the same in every run, whatever rows come before or after it."""
    identity = hashlib.sha256(normalize_prompt(prompt or "").encode(errors="replace")).digest()
    position = int.from_bytes(identity[:8]) / 2**64
    if position < test_share:
        return "test"
    return "validation" if position < test_share + validation_share else "train"


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

    `choices/train` counts the training pairs that are no ties.

    No image is opened: cheap for rows that name their images by file.
    """
    splits, prompts, pairs = PromptSplits(), set(), []
    for row in rows:
        if isinstance(row, BadRow) or not isinstance(row.prompt, str) or not row.prompt.strip():
            continue
        prompt = row.prompt.strip()
        if isinstance(row, Pair):
            if not quota.wants_more(row.split):
                continue
            quota.taken[row.split] += 1
            pairs.append((prompt, row.split, row.label_0))
        splits.add(prompt, row.split)
        prompts.add((prompt, row.split))
    found = Counter(f"prompts/{split}" for prompt, split in prompts if not splits.leaks(prompt, split))
    kept = [(split, label_0) for prompt, split, label_0 in pairs if not splits.leaks(prompt, split)]
    found.update(f"pairs/{split}" for split, _ in kept)
    found.update(f"choices/{split}" for split, label_0 in kept if label_0 != 0.5)
    names = [f"{kind}/{split}" for kind in ("prompts", "pairs") for split in SPLITS]
    return {name: found[name] for name in [*names, "choices/train"]}


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
            have = f"{counts[name]} {split} {'pairs that are no ties' if kind == 'choices' else kind}"
            short.append(f"data: {have}, but {needed} are needed by {asked_by}: {remedy}")
    if short:
        raise SourceError("; ".join(short))
