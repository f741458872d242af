"""Decides which rows are used: the rules of docs/data.md, applied row by row. The others go to the quarantine."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from attune.data.ingest.encoder import ImageRows
from attune.data.ingest.reader import DecodedImage, ImageReader, digest
from attune.data.ingest.scorer import ImageScorer
from attune.data.quarantine import Quarantine, RejectedRow
from attune.data.rows import BadRow, ImageRef, Pair, Prompt, Quota, Row, SourceError
from attune.data.splits import SPLITS, PromptSplits, check_splits, count_rows

CHECK_EVERY = 1000  # rows
INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")  # categories of Unicode: control and format characters, spaces


@dataclass(frozen=True)
class Rules:
    """What a run decides about its rows."""

    quota: Quota = field(default_factory=Quota)
    min_side: int = 1  # pixels
    max_bad_share: float = 0.2
    wanted: Mapping[str, int] = field(
        default_factory=dict
    )  # `prompts/<split>`, `pairs/<split>` -> the fewest there must be


@dataclass(frozen=True, slots=True)
class KeptPair:
    """A good pair and where it was; `latents` are the rows of its two images."""

    prompt: str
    digests: tuple[bytes, bytes]
    latents: tuple[int, int]
    label_0: float
    extra: dict[str, float]
    split: str
    file: str
    row: int | str


class Ingest:
    """Takes the rows of a source one by one and makes the tables of the good ones."""

    def __init__(
        self, reader: ImageReader, encoder: ImageRows, scorer: ImageScorer, quarantine: Quarantine, rules: Rules
    ):
        self._reader, self._encoder, self._scorer = reader, encoder, scorer
        self._quarantine, self._rules = quarantine, rules
        self._splits = PromptSplits()
        self._prompts: dict[tuple[str, str], Prompt | None] = {}  # by prompt and split; None: it came with a pair
        self._pairs: list[KeptPair] = []
        self._comparisons: set[bytes] = set()
        self._rows = self._mixed_sizes = self._identical_images = 0

    def add(self, row: Row) -> None:
        """Takes one row; a pair of a split that has enough is passed over.

        Raises:
            TooManyBadRows: so many that the rest is not worth reading.
        """
        if isinstance(row, Pair) and not self._rules.quota.wants_more(row.split):
            return
        self._rows += 1
        try:
            self._take(row)
        except RejectedRow as reason:
            self._quarantine.add(str(reason), row.file, row.row, row.prompt, reason.detail)
        if self._rows % CHECK_EVERY == 0:
            self._quarantine.check(self._rows, self._rules.max_bad_share)

    def to_tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Prompts, split by split, and pairs; a prompt found in several splits stays in the last of them only.

        The prompts depend on the prompts and splits of the good rows and on their order, not on what their images,
        labels or scores are: images are generated from them, and must not be again when only pairs change.

        Raises:
            TooManyBadRows: in the end.
        """
        self._quarantine.check(self._rows, self._rules.max_bad_share)
        self._encoder.flush()
        self._scorer.flush()
        self._pairs = [pair for pair in self._pairs if not (self._leaks(pair) or self._is_not_finite(pair))]
        prompts = list(self._prompts_without_leaks())
        self._quarantine.check(self._rows, self._rules.max_bad_share)
        prompts.sort(key=lambda prompt_split: SPLITS.index(prompt_split[1]))  # a split can be read as one slice
        return pd.DataFrame(prompts, columns=["prompt", "split"]), self._pair_table()

    def counts(self, prompts: pd.DataFrame, pairs: pd.DataFrame) -> dict[str, float]:
        """Sizes of the splits, ties, pairs of images of different size or of one image, and bad rows by reason."""
        found: dict[str, float] = {"prompts": len(prompts), "pairs": len(pairs)}
        found |= {f"prompts/{split}": int((prompts.split == split).sum()) for split in SPLITS}
        found |= {f"pairs/{split}": int((pairs.split == split).sum()) for split in SPLITS}
        found["tie_share"] = float((pairs.label_0 == 0.5).mean()) if len(pairs) else 0.0
        found["choices/train"] = int(((pairs.split == "train") & (pairs.label_0 != 0.5)).sum())
        found["mixed_sizes"] = self._mixed_sizes
        found["identical_images"] = self._identical_images
        found["quarantined"] = self._quarantine.reasons.total()
        return found | {f"quarantined/{reason}": n for reason, n in sorted(self._quarantine.reasons.items())}

    def _take(self, row: Row) -> None:
        if isinstance(row, BadRow):
            raise RejectedRow(row.reason, row.detail)
        prompt = clean_prompt(row.prompt)
        if isinstance(row, Pair):
            self._take_pair(row, prompt)
        if self._prompts.get((prompt, row.split)) is None:
            self._prompts[prompt, row.split] = row if isinstance(row, Prompt) else None
        self._splits.add(prompt, row.split)

    def _take_pair(self, pair: Pair, prompt: str) -> None:
        label_0 = label(pair)
        first, second = (self._read(ref, prompt) for ref in (pair.image_0, pair.image_1))
        comparison = comparison_digest(prompt, first, second, label_0)
        if comparison in self._comparisons:
            raise RejectedRow("duplicate_pair")
        self._comparisons.add(comparison)
        self._rules.quota.taken[pair.split] += 1
        self._mixed_sizes += first.size != second.size
        self._identical_images += first.content == second.content
        latents = (self._encoder.row(first), self._encoder.row(second))
        for image in (first, second):
            self._scorer.add(image, prompt)
        digests = (first.digest, second.digest)
        self._pairs.append(
            KeptPair(prompt, digests, latents, label_0, dict(pair.extra), pair.split, pair.file, pair.row)
        )

    def _read(self, ref: ImageRef, prompt: str) -> DecodedImage:
        def needs_pixels(identity: bytes) -> bool:
            return identity not in self._encoder or self._scorer.wants(identity, prompt)

        return self._reader.read(ref, needs_pixels)

    def _leaks(self, pair: KeptPair) -> bool:
        """Whether the prompt is in a later split too; such a pair goes to the quarantine."""
        leaks = self._splits.leaks(pair.prompt, pair.split)
        if leaks:
            self._quarantine.add("prompt_in_later_split", pair.file, pair.row, pair.prompt)
        return leaks

    def _is_not_finite(self, pair: KeptPair) -> bool:
        """Whether latents or scores of the images are not finite; such a pair goes to the quarantine."""
        found = [f"the latents of image {i}" for i, row in enumerate(pair.latents) if row in self._encoder.bad_rows]
        for i, image in enumerate(pair.digests):
            scores = self._scorer.scores(image, pair.prompt)
            found += [f"the score by {name} of image {i}" for name, score in scores.items() if not math.isfinite(score)]
        if found:
            self._quarantine.add("not_finite", pair.file, pair.row, pair.prompt, "; ".join(found))
        return bool(found)

    def _prompts_without_leaks(self) -> Iterator[tuple[str, str]]:
        """(prompt, split) of every prompt in its last split; rows of it alone in others go to the quarantine."""
        for (prompt, split), row in self._prompts.items():
            if not self._splits.leaks(prompt, split):
                yield prompt, split
            elif row is not None:
                self._quarantine.add("prompt_in_later_split", row.file, row.row, prompt)

    def _pair_table(self) -> pd.DataFrame:
        empty = {"prompt": "str", "image_0": "int64", "image_1": "int64", "label_0": "float64", "split": "str"}
        if not self._pairs:
            return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in empty.items()})
        return pd.DataFrame.from_records(list(map(self._record, self._pairs)))

    def _record(self, pair: KeptPair) -> dict[str, Any]:
        scores = [self._scorer.scores(identity, pair.prompt) for identity in pair.digests]
        return {
            "prompt": pair.prompt,
            "image_0": pair.latents[0],
            "image_1": pair.latents[1],
            "label_0": pair.label_0,
            **pair.extra,
            **{f"{name}_{i}": score for name in scores[0] for i, score in ((0, scores[0][name]), (1, scores[1][name]))},
            "split": pair.split,
        }


def check_rows(rows: Iterable[Row], quarantine: Quarantine, rules: Rules) -> None:
    """What can be said of rows without opening an image, before a model is loaded; nothing is kept of them.

    Raises:
        TooManyBadRows: more than `rules.max_bad_share`, whatever their images are.
        SourceError: fewer prompts or pairs than `rules.wanted`, even if all images are good.
    """
    seen, good = 0, list[Row]()
    for row in rows:
        seen += 1
        try:
            if isinstance(row, BadRow):
                raise RejectedRow(row.reason, row.detail)
            clean_prompt(row.prompt)
            if isinstance(row, Pair):
                label(row)
            good.append(row)
        except RejectedRow as reason:
            quarantine.add(str(reason), row.file, row.row, row.prompt, reason.detail)
    quarantine.check(seen, rules.max_bad_share)
    counts = count_rows(good, Quota(rules.quota.limits)) | {"quarantined": quarantine.reasons.total()}
    check_enough(counts | {f"quarantined/{reason}": n for reason, n in quarantine.reasons.items()}, rules.wanted)


def check_enough(counts: Mapping[str, float], wanted: Mapping[str, int]) -> None:
    """Raises SourceError for fewer prompts or pairs than wanted; the message says where the rows are instead."""
    if not counts["prompts/train"] + counts["prompts/validation"] + counts["prompts/test"]:
        raise SourceError(f"the source has no usable row; {_whereabouts(counts)}")
    try:
        check_splits(counts, wanted)
    except SourceError as error:
        raise SourceError(f"{error}; {_whereabouts(counts)}") from None


def _whereabouts(counts: Mapping[str, float]) -> str:
    """What became of the rows: pairs of each split, ties and bad rows by reason."""
    found = [f"{counts[f'pairs/{split}']} {split} pairs" for split in SPLITS]
    found[0] += f", {counts['pairs/train'] - counts['choices/train']} of them ties"
    reasons = [f"{n} {name.partition('/')[2]}" for name, n in counts.items() if name.startswith("quarantined/")]
    return f"there are {', '.join(found)}, and in the quarantine {', '.join(reasons) or 'no row'}"


def label(pair: Pair) -> float:
    """label_0 of a pair.

    Raises:
        RejectedRow: it has none, or none that makes sense.
    """
    label_0, label_1 = pair.label_0, pair.label_1
    if label_0 is None or label_1 is None or math.isnan(label_0 + label_1):
        missing = "label_1" if label_0 is not None and math.isfinite(label_0) else "label_0"
        raise RejectedRow("no_label", f"{missing}: expected 1, 0 or 0.5 for a tie")
    if abs(label_0 + label_1 - 1) > 1e-6:
        raise RejectedRow("label_sum", f"label_0 {label_0:g} and label_1 {label_1:g}: expected a sum of 1")
    if label_0 not in (0, 0.5, 1):
        raise RejectedRow("label_value", f"label_0 {label_0:g}: expected 1, 0 or 0.5 for a tie")
    return float(label_0)


def clean_prompt(prompt: str | None) -> str:
    """The prompt without the space around it.

    Raises:
        RejectedRow: there is none, none of its characters can be seen, or it is no text.
    """
    if prompt is not None and not isinstance(prompt, str):
        raise RejectedRow("malformed_row", f"prompt: expected text, found a {type(prompt).__name__}")
    try:
        (prompt or "").encode()
    except UnicodeEncodeError as error:
        raise RejectedRow("malformed_row", f"prompt: expected text in UTF-8; {error.reason}") from None
    if prompt is None or all(unicodedata.category(letter) in INVISIBLE for letter in prompt):
        raise RejectedRow("empty_prompt", "prompt: expected text")
    return prompt.strip()


def comparison_digest(prompt: str, first: DecodedImage, second: DecodedImage, label_0: float) -> bytes:
    """The same for two rows with the same prompt, the same images in either order and the same choice."""
    sides = sorted([(first.digest, label_0), (second.digest, 1 - label_0)])
    return digest(repr((prompt, sides)).encode())
