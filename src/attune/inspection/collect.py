"""Reads a source as `prepare` does, by the same rules, and keeps tables of what it found instead of encodings.

Images are decoded one pair at a time. What stays in memory is a row per pair and per image, about 1 kB, and the few
pairs that are shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from attune.data.ingest.ingest import CHECK_EVERY, Ingest
from attune.data.ingest.reader import DecodedImage, ImageReader
from attune.data.ingest.rules import Rules
from attune.data.ingest.scorer import ImageScorer
from attune.data.quarantine import Quarantine, TooManyBadRows
from attune.data.rows import ImageRef, LabelledImage, Pair, Prompt, Row
from attune.inspection.sheets import Sheets, ShownPair

NUMBER = "number"  # column of the pairs: which row of the source it was
MAGIC = {b"\xff\xd8": "JPEG", b"\x89PNG": "PNG", b"RIFF": "WebP", b"BM": "BMP", b"GIF8": "GIF"}
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True)
class Collected:
    """What was found in the rows that were read."""

    prompts: pd.DataFrame  # prompt, split
    pairs: pd.DataFrame  # prompt, split, label_0, image_0, image_1 (rows of images), scores, file, row, content_0, _1
    singles: pd.DataFrame | None  # prompt, split, liked, image (row of images), of a source of single images
    images: pd.DataFrame  # width, height, content, kind; a row per distinct image, those of rows that leak too
    counts: Mapping[str, float]  # as `prepare` counts them
    rows: int  # that were read and judged
    passed_over: int  # pairs of a split that had enough
    is_whole: bool  # False: the source has more rows than were asked for
    too_bad: str | None  # what `prepare` would say where too many rows are bad
    shown: Mapping[str, list[ShownPair]]  # title of a sheet -> its pairs


class ImageIndex:
    """Stands where `prepare` has its encoder: gives every image a row and notes its size, and encodes nothing."""

    def __init__(self) -> None:
        self._rows: dict[bytes, int] = {}
        self._seen: list[tuple[int, int, bytes]] = []  # width, height, digest of the pixels
        self.bad_rows: frozenset[int] = frozenset()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._rows

    def row(self, image: DecodedImage) -> int:
        """The image's row."""
        if image.digest not in self._rows:
            self._rows[image.digest] = len(self._rows)
            self._seen.append((*image.size, image.content))
        return self._rows[image.digest]

    def flush(self) -> None:
        """Nothing waits to be written."""

    def table(self, kinds: Mapping[bytes, str]) -> pd.DataFrame:
        """Width, height, content and, by digest, type of file of every image, in the order of the rows."""
        table = pd.DataFrame(self._seen, columns=["width", "height", "content"])
        return table.assign(kind=[kinds[digest] for digest in self._rows])


class Limit:
    """The rows up to so many that show images; rows of a prompt alone cost next to nothing and do not count."""

    def __init__(self, rows: Iterable[Row], most: int | None):
        self._rows, self._most = rows, most
        self.reached = False  # and there were more

    def __iter__(self) -> Iterator[Row]:
        taken = 0
        for row in self._rows:
            if taken == self._most and not isinstance(row, Prompt):
                self.reached = True
                return
            taken += not isinstance(row, Prompt)
            yield row


def collect(
    rows: Iterable[Row], rules: Rules, scorer: ImageScorer, quarantine: Quarantine, sheets: Sheets, most: int | None
) -> Collected:
    """Judges the rows one by one, as `prepare` does, though it goes on where that would stop.

    Args:
        rules: those of `prepare`; their `wanted` is for whoever reads the counts.
        sheets: is offered every pair that is kept.
        most: so many rows with images are read; None: all.
    """
    reader, index = ImageReader(rules.min_side), ImageIndex()
    ingest = Ingest(reader, index, scorer, quarantine, replace(rules, max_bad_share=1.0))
    limited, places, kinds = Limit(rows, most), dict[int, tuple[str, str]](), dict[bytes, str]()
    judged, passed_over, too_bad = 0, 0, None
    for number, row in enumerate(tqdm(limited, desc="inspect", unit="row")):
        taken, bad = rules.quota.taken.total(), quarantine.reasons.total()
        if isinstance(row, Pair) and not rules.quota.wants_more(row.split):
            passed_over += 1
            continue
        ingest.add(_numbered(row, number))
        judged += 1
        if judged % CHECK_EVERY == 0:
            too_bad = too_bad or _too_bad(quarantine, judged, rules)
        if isinstance(row, Pair) and rules.quota.taken.total() > taken:  # the pair was kept
            first, second = (reader.read(ref, _never) for ref in (row.image_0, row.image_1))
            places[number] = (row.file, str(row.row))
            for image, ref in ((first, row.image_0), (second, row.image_1)):
                if image.digest not in kinds:
                    kinds[image.digest] = kind_of(ref)
            sheets.offer(number, row, (first, second), scorer)
        if isinstance(row, LabelledImage) and quarantine.reasons.total() == bad:  # the image was kept
            kinds.setdefault(reader.read(row.image, _never).digest, kind_of(row.image))
            sheets.offer_image(number, row)
    tables = ingest.to_tables()
    counts = ingest.counts(tables)
    images = index.table(kinds)
    pairs = with_places(tables.pairs, places, images)
    return Collected(
        prompts=tables.prompts,
        pairs=pairs,
        singles=tables.images,
        images=images,
        counts=counts,
        rows=judged,
        passed_over=passed_over,
        is_whole=not limited.reached,
        too_bad=too_bad or _too_bad(quarantine, judged, rules),
        shown=sheets.finished(None if tables.images is not None else set(pairs[NUMBER]), scorer),
    )


def _numbered(row: Row, number: int) -> Row:
    """The row with its number among the further columns that a pair may have, by which its place is found again."""
    return replace(row, extra={**row.extra, NUMBER: number}) if isinstance(row, Pair) else row


def _never(digest: bytes) -> bool:
    return False


def _too_bad(quarantine: Quarantine, judged: int, rules: Rules) -> str | None:
    try:
        quarantine.check(judged, rules.max_bad_share)
    except TooManyBadRows as error:
        return str(error)
    return None


def with_places(pairs: pd.DataFrame, places: Mapping[int, tuple[str, str]], images: pd.DataFrame) -> pd.DataFrame:
    """The pairs with the file and the row they come from, and the digests of their images' pixels."""
    if NUMBER not in pairs:  # there are none
        return pairs.assign(**{name: pd.Series(dtype="object") for name in (NUMBER, "file", "row")})
    found = [places[int(number)] for number in pairs[NUMBER]]
    content = images.content.to_numpy()
    return pairs.assign(
        file=[file for file, _ in found],
        row=[row for _, row in found],
        content_0=content[pairs.image_0.to_numpy()],
        content_1=content[pairs.image_1.to_numpy()],
    )


def kind_of(ref: ImageRef) -> str:
    """The type of a good image's file by how it begins, whatever its name ends in."""
    if isinstance(ref, np.ndarray):
        return "made by the source"
    if isinstance(ref, Path):
        with ref.open("rb") as file:
            beginning = file.read(4)
    else:
        beginning = ref[:4] if isinstance(ref, bytes) else b""
    if beginning in TIFF:
        return "TIFF"
    return next((kind for magic, kind in MAGIC.items() if beginning.startswith(magic)), "other")
