"""Decides which rows are used: the rules of docs/data.md, applied row by row. The others go to the quarantine."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pandas as pd

from attune.data.ingest.reader import DecodedImage, ImageReader, digest
from attune.data.ingest.rules import Rules, clean_prompt, dissenters, is_kept, label, verdict
from attune.data.ingest.scorer import ImageScores
from attune.data.quarantine import Quarantine, RejectedRow
from attune.data.rows import BadRow, ImageRef, LabelledImage, Pair, Prompt, Row
from attune.data.splits import SPLITS, PromptSplits, count_images

CHECK_EVERY = 1000  # rows


EMPTY_PAIRS = {"prompt": "str", "image_0": "int64", "image_1": "int64", "label_0": "float64", "split": "str"}
EMPTY_IMAGES = {"prompt": "str", "image": "int64", "liked": "bool", "split": "str"}
OF_PAIR, OF_IMAGE = ("_0", "_1"), ("",)  # ends of the columns of two images, and of one


@dataclass(frozen=True, slots=True)
class Kept:
    """A good pair or single image and where it was."""

    prompt: str
    digests: tuple[bytes, ...]  # of its images
    latents: tuple[int, ...]  # their rows
    values: dict[str, Any]  # label_0 and what the source adds, or liked
    split: str
    file: str
    row: int | str

    @property
    def ends(self) -> tuple[str, ...]:
        """What the columns of each image end with."""
        return OF_PAIR if len(self.digests) == 2 else OF_IMAGE


class ImageRows(Protocol):
    """What `Ingest` asks of whoever has the latents: a row for every image, known by its digest."""

    @property
    def bad_rows(self) -> Collection[int]:
        """Rows whose latents are not finite."""
        ...

    def __contains__(self, digest: bytes) -> bool: ...

    def row(self, image: DecodedImage) -> int: ...

    def flush(self) -> None: ...


@dataclass(frozen=True)
class Tables:
    """What is prepared; `images` only where the source has single images."""

    prompts: pd.DataFrame
    pairs: pd.DataFrame
    images: pd.DataFrame | None


class Ingest:
    """Takes the rows of a source one by one and makes the tables of the good ones."""

    def __init__(
        self, reader: ImageReader, encoder: ImageRows, scorer: ImageScores, quarantine: Quarantine, rules: Rules
    ):
        self._reader, self._encoder, self._scorer = reader, encoder, scorer
        self._quarantine, self._rules = quarantine, rules
        self._splits = PromptSplits()
        self._prompts: dict[tuple[str, str], Prompt | None] = {}  # by prompt and split; None: it came with a pair
        self._pairs: list[Kept] = []
        self._images: list[Kept] = []
        self._has_images = False  # whether there was a single image, good or bad
        self._labels: set[bytes] = set()  # digests of comparisons and verdicts, each of which counts once
        self._rows = self._mixed_sizes = self._identical_images = 0
        self._dissents: Counter[str] = Counter()  # by scorer: training pairs whose choice it does not share

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

    def to_tables(self) -> Tables:
        """Prompts, split by split, pairs and images; a prompt found in several splits stays in the last of them only.

        The prompts depend on the prompts and splits of the good rows and on their order, not on what their images,
        labels or scores are: images are generated from them, and must not be again when only pairs change.

        Raises:
            TooManyBadRows: in the end.
        """
        self._quarantine.check(self._rows, self._rules.max_bad_share)
        self._encoder.flush()
        self._scorer.flush()
        self._pairs, self._images = map(self._usable, (self._pairs, self._images))
        prompts = list(self._prompts_without_leaks())
        self._quarantine.check(self._rows, self._rules.max_bad_share)
        prompts.sort(key=lambda prompt_split: SPLITS.index(prompt_split[1]))  # a split can be read as one slice
        pairs = self._table(self._pairs, EMPTY_PAIRS)
        images = self._table(self._images, EMPTY_IMAGES) if self._has_images else None
        return Tables(pd.DataFrame(prompts, columns=["prompt", "split"]), pairs, images)

    def counts(self, tables: Tables) -> dict[str, float]:
        """Sizes of the splits, ties, pairs of images of different size or of one image, and bad rows by reason."""
        prompts, pairs = tables.prompts, tables.pairs
        found: dict[str, float] = {"prompts": len(prompts), "pairs": len(pairs)}
        found |= {f"prompts/{split}": int((prompts.split == split).sum()) for split in SPLITS}
        found |= {f"pairs/{split}": int((pairs.split == split).sum()) for split in SPLITS}
        found["tie_share"] = float((pairs.label_0 == 0.5).mean()) if len(pairs) else 0.0
        found["choices/train"] = int(((pairs.split == "train") & (pairs.label_0 != 0.5)).sum())
        if tables.images is not None:
            found["images"] = len(tables.images)
            found |= count_images([(kept.split, kept.values["liked"]) for kept in self._images])
        found["mixed_sizes"] = self._mixed_sizes
        found["identical_images"] = self._identical_images
        if (consensus := self._rules.consensus) is not None:
            found |= {f"consensus/against/{scorer}": self._dissents[scorer] for scorer in consensus.scorers}
        found["quarantined"] = self._quarantine.reasons.total()
        return found | {f"quarantined/{reason}": n for reason, n in sorted(self._quarantine.reasons.items())}

    def _take(self, row: Row) -> None:
        if isinstance(row, BadRow):
            raise RejectedRow(row.reason, row.detail)
        self._has_images |= isinstance(row, LabelledImage)
        prompt = clean_prompt(row.prompt)
        if isinstance(row, Pair):
            self._take_pair(row, prompt)
        elif isinstance(row, LabelledImage):
            self._take_image(row, prompt)
        if self._prompts.get((prompt, row.split)) is None:
            self._prompts[prompt, row.split] = row if isinstance(row, Prompt) else None
        self._splits.add(prompt, row.split)

    def _take_pair(self, pair: Pair, prompt: str) -> None:
        label_0 = label(pair)
        first, second = (self._read(ref, prompt) for ref in (pair.image_0, pair.image_1))
        self._note(comparison_digest(prompt, first, second, label_0), "duplicate_pair")
        self._rules.quota.taken[pair.split] += 1
        self._mixed_sizes += first.size != second.size
        self._identical_images += first.content == second.content
        self._pairs.append(self._keep(pair, prompt, [first, second], {"label_0": label_0, **pair.extra}))

    def _take_image(self, row: LabelledImage, prompt: str) -> None:
        liked, image = verdict(row), self._read(row.image, prompt)
        self._note(digest(repr((prompt, image.digest, liked)).encode()), "duplicate_image")
        self._images.append(self._keep(row, prompt, [image], {"liked": liked}))

    def _note(self, label: bytes, reason: str) -> None:
        """Notes a comparison or a verdict. Raises RejectedRow for one that was there before."""
        if label in self._labels:
            raise RejectedRow(reason)
        self._labels.add(label)

    def _keep(
        self, row: Pair | LabelledImage, prompt: str, images: Sequence[DecodedImage], values: dict[str, Any]
    ) -> Kept:
        latents = tuple(map(self._encoder.row, images))
        for image in images:
            self._scorer.add(image, prompt)
        digests = tuple(image.digest for image in images)
        return Kept(prompt, digests, latents, values, row.split, row.file, row.row)

    def _read(self, ref: ImageRef, prompt: str) -> DecodedImage:
        def needs_pixels(identity: bytes) -> bool:
            return identity not in self._encoder or self._scorer.wants(identity, prompt)

        return self._reader.read(ref, needs_pixels)

    def _usable(self, rows: Sequence[Kept]) -> list[Kept]:
        return [row for row in rows if not (self._leaks(row) or self._is_not_finite(row) or self._is_disputed(row))]

    def _leaks(self, row: Kept) -> bool:
        """Whether the prompt is in a later split too; such a row goes to the quarantine."""
        leaks = self._splits.leaks(row.prompt, row.split)
        if leaks:
            self._quarantine.add("prompt_in_later_split", row.file, row.row, row.prompt)
        return leaks

    def _is_not_finite(self, row: Kept) -> bool:
        """Whether latents or scores of the images are not finite; such a row goes to the quarantine."""
        names = [f"image{end.replace('_', ' ')}" for end in row.ends]
        places = zip(names, row.latents, strict=True)
        found = [f"the latents of {name}" for name, place in places if place in self._encoder.bad_rows]
        for name, image in zip(names, row.digests, strict=True):
            scores = self._scorer.scores(image, row.prompt)
            found += [f"the score by {by} of {name}" for by, score in scores.items() if not math.isfinite(score)]
        if found:
            self._quarantine.add("not_finite", row.file, row.row, row.prompt, "; ".join(found))
        return bool(found)

    def _is_disputed(self, row: Kept) -> bool:
        """Whether too few scorers agree with the choice of a training pair; such a row goes to the quarantine."""
        consensus = self._rules.consensus
        if consensus is None or row.split != "train" or row.ends == OF_IMAGE:
            return False
        first, second = (self._scorer.scores(image, row.prompt) for image in row.digests)
        scores = {name: (first[name], second[name]) for name in consensus.scorers}
        against = dissenters(row.values["label_0"], scores, consensus)
        self._dissents.update(against)
        kept = is_kept(against, consensus)
        if not kept:
            self._quarantine.add("no_consensus", row.file, row.row, row.prompt, f"not of {', '.join(against)}")
        return not kept

    def _prompts_without_leaks(self) -> Iterator[tuple[str, str]]:
        """(prompt, split) of every prompt in its last split; rows of it alone in others go to the quarantine."""
        for (prompt, split), row in self._prompts.items():
            if not self._splits.leaks(prompt, split):
                yield prompt, split
            elif row is not None:
                self._quarantine.add("prompt_in_later_split", row.file, row.row, prompt)

    def _table(self, rows: Sequence[Kept], empty: Mapping[str, str]) -> pd.DataFrame:
        if not rows:
            return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in empty.items()})
        return pd.DataFrame.from_records(list(map(self._record, rows)))

    def _record(self, row: Kept) -> dict[str, Any]:
        scores = [self._scorer.scores(identity, row.prompt) for identity in row.digests]
        return {
            "prompt": row.prompt,
            **{f"image{end}": place for end, place in zip(row.ends, row.latents, strict=True)},
            **row.values,
            **{f"{by}{end}": each[by] for by in scores[0] for end, each in zip(row.ends, scores, strict=True)},
            "split": row.split,
        }


def comparison_digest(prompt: str, first: DecodedImage, second: DecodedImage, label_0: float) -> bytes:
    """The same for two rows with the same prompt, the same images in either order and the same choice."""
    sides = sorted([(first.digest, label_0), (second.digest, 1 - label_0)])
    return digest(repr((prompt, sides)).encode())
