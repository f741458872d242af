"""The rows that sources yield, as they find them, and how many of them are wanted. Nothing is checked here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from attune.config.sources import SourceConfig

if TYPE_CHECKING:
    import numpy as np

    from attune.data.ingest.reader import DecodedImage

ImageRef: TypeAlias = "bytes | Path | np.ndarray | DecodedImage | BadImage | None"
"""An encoded image, the file of one, pixels as uint8 (H, W, 3), an image that has been read, why there is none, or None
where it is not there."""

ImageGenerator: TypeAlias = "Callable[[Sequence[str], Sequence[int], str], np.ndarray]"
"""(prompts, ordinals, name of the progress bar) -> images of the base model, uint8 (n, H, W, 3)."""


class SourceError(ValueError):
    """The data is not there or not what the source reads; the message names the key, the file or the column."""


@dataclass(frozen=True)
class BadImage:
    """An image that the source could not get, the reason in a word, and what was expected."""

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Prompt:
    """A prompt without a pair; `file` and `row` say where the source has it.

    The split of a row is empty until `splits.with_splits` has put it into one.
    """

    prompt: str | None
    split: str
    file: str = ""
    row: int | str = 0


@dataclass(frozen=True)
class Pair:
    """Two images for a prompt and which of them people chose."""

    prompt: str | None
    image_0: ImageRef
    image_1: ImageRef
    label_0: float | None  # 1 if image 0 was chosen, 0 if image 1, 0.5 for a tie
    label_1: float | None
    split: str
    file: str = ""
    row: int | str = 0
    extra: Mapping[str, float] = field(default_factory=dict)  # further columns of the pairs


@dataclass(frozen=True)
class LabelledImage:
    """One image for a prompt, and whether people liked it."""

    prompt: str | None
    image: ImageRef
    liked: bool | None  # None: nobody has said
    split: str
    file: str = ""
    row: int | str = 0


@dataclass(frozen=True)
class BadRow:
    """A row from which not even a prompt or a pair could be read, and the reason in a word.

    `detail` names the column and says what was expected of it.
    """

    reason: str
    file: str = ""
    row: int | str = 0
    prompt: str | None = None
    detail: str = ""


Row: TypeAlias = Prompt | Pair | LabelledImage | BadRow


class Quota:
    """How many pairs of each split are wanted and how many have been taken; a split without a limit takes all."""

    def __init__(self, limits: Mapping[str, int | None] | None = None):
        self.limits = limits or {}
        self.taken: Counter[str] = Counter()

    @classmethod
    def of(cls, config: SourceConfig) -> Quota:
        """What a source's settings want: `pairs` of training, `held_out_pairs` of validation and of test each."""
        settings = dict(config)
        held_out = settings.get("held_out_pairs")
        return cls({"train": settings.get("pairs"), "validation": held_out, "test": held_out})

    def wants_more(self, split: str) -> bool:
        """Whether more pairs of that split are wanted."""
        limit = self.limits.get(split)
        return limit is None or self.taken[split] < limit

    def take_until_full(self, rows: Iterable[Pair | BadRow], split: str) -> Iterator[Pair | BadRow]:
        """The rows until enough pairs of that split are taken; asks for no row more than that needs."""
        rows = iter(rows)
        while self.wants_more(split) and (row := next(rows, None)) is not None:
            yield row
