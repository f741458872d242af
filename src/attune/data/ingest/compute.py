"""What the images of a chunk of rows are: what can be said of them, their latents and their scores, a shard each.

All of it is computed from the images and prompts of the chunk alone, so that any process may do it, and a shard that is
there already, of an earlier run, is taken as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from attune.data.images import resize_center_crop
from attune.data.ingest.encoder import encode
from attune.data.ingest.reader import DecodedImage, content_digest, decode_ref, identify
from attune.data.ingest.rules import clean_prompt, label, verdict
from attune.data.ingest.scorer import ImageScorer
from attune.data.quarantine import RejectedRow
from attune.data.rows import BadImage, ImageRef, LabelledImage, Pair, Row, SourceError
from attune.interfaces import Backbone, Reward
from attune.shards import Content, Shards, in_order, shard_name

Found = DecodedImage | BadImage


@dataclass(frozen=True)
class Work:
    """What is computed of images and prompts, and what identifies it: settings, weights, code, libraries."""

    device: torch.device
    backbone: Callable[[], Backbone]  # loaded when the first shard is missing, and so are the scorers
    scorers: Mapping[str, Callable[[], Reward]]
    ids: Mapping[str, str]  # of `latents`, of `prompts` and of each `scores/<scorer>`
    threads: int = 1


@dataclass(frozen=True)
class ComputedChunk:
    """Rows with what was found in the place of their images, and the shards of these."""

    rows: list[Row]
    latents: str | None  # the shard's name; None: no image can be decoded
    digests: list[bytes]  # of the rows of the latents
    not_finite: list[int]  # of these rows
    scores: dict[str, str]  # scorer -> the shard's name
    scored: list[tuple[bytes, str]]  # digest and prompt of the rows of these shards


def compute(rows: Sequence[Row], work: Work, shards: Shards) -> ComputedChunk:
    """Computes the shards of a chunk that are not there."""
    asked = [row if isinstance(row, Pair | LabelledImage) and _is_usable(row) else None for row in rows]
    refs = [ref for row in asked if row for ref in images_of(row)]
    identities = list(in_order(_identity, refs, work.threads))
    unique: dict[bytes, ImageRef] = {}
    for identity, ref in zip(identities, refs, strict=True):
        if isinstance(identity, bytes):
            unique.setdefault(identity, ref)
    name, good, not_finite, facts = _latents(unique, work, shards)
    found = (facts[identity] if isinstance(identity, bytes) else identity for identity in identities)
    read = [row and with_images(row, [next(found) for _ in images_of(row)]) for row in asked]
    scored = list(dict.fromkeys(_wanted_scores(row for row in read if row)))
    scores = {scorer: _scores(scorer, scored, unique, work, shards) for scorer in work.scorers} if scored else {}
    done = [filled or without_images(row) for row, filled in zip(rows, read, strict=True)]
    return ComputedChunk(done, name, good, not_finite, scores, scored)


def images_of(row: Pair | LabelledImage) -> list[Any]:
    """The images of a row, as it has them."""
    return [row.image_0, row.image_1] if isinstance(row, Pair) else [row.image]


def with_images(row: Pair | LabelledImage, images: Sequence[Any]) -> Pair | LabelledImage:
    """The row with these in the place of its images."""
    if isinstance(row, Pair):
        return replace(row, image_0=images[0], image_1=images[1])
    return replace(row, image=images[0])


def without_images(row: Row) -> Row:
    """The row without its images, which can be large; it has none, or is rejected for another reason."""
    return with_images(row, [None, None]) if isinstance(row, Pair | LabelledImage) else row


def _is_usable(row: Pair | LabelledImage) -> bool:
    """Whether prompt and label are in order; if not, the row is rejected before its images are looked at."""
    try:
        clean_prompt(row.prompt)
        label(row) if isinstance(row, Pair) else verdict(row)
    except RejectedRow:
        return False
    return True


def _identity(ref: ImageRef) -> bytes | BadImage:
    try:
        return identify(ref)[0]
    except RejectedRow as reason:
        return BadImage(str(reason), reason.detail)


def _latents(
    unique: Mapping[bytes, ImageRef], work: Work, shards: Shards
) -> tuple[str | None, list[bytes], list[int], dict[bytes, Found]]:
    """Name of the shard, digests of its rows, those that are not finite, and what each image was found to be."""
    if not unique:
        return None, [], [], {}
    content = shard_name(work.ids["latents"], [digest.hex() for digest in unique])
    name = f"latents/{content}"
    if name not in shards:
        shards.write(name, *_encoded(unique, work))
    found = shards.facts(name)
    facts = {digest: _from_json(digest, fact) for digest, fact in zip(unique, found["images"], strict=True)}
    good = [digest for digest, fact in facts.items() if isinstance(fact, DecodedImage)]
    return (name if good else None), good, found["not_finite"], facts


def _encoded(unique: Mapping[bytes, ImageRef], work: Work) -> Content:
    """Latents of the images that can be decoded, and facts of all."""
    backbone = work.backbone()
    facts: list[list[Any]] = []

    def read(ref: ImageRef) -> tuple[list[Any], np.ndarray | None]:
        try:
            image = decode_ref(ref)
        except RejectedRow as reason:
            if str(reason) == "missing_image":  # it was there a moment ago; what is kept depends on its bytes alone
                raise SourceError(f"{ref!r} could not be read again: {reason.detail}; start once more") from None
            return [str(reason), reason.detail], None
        return [content_digest(image).hex(), *image.size], resize_center_crop(image, backbone.resolution)

    def squares() -> Iterator[np.ndarray]:
        for fact, square in in_order(read, unique.values(), work.threads):
            facts.append(fact)
            if square is not None:
                yield square

    latents, not_finite = encode(backbone, squares())
    return {"latents": latents}, {"images": facts, "not_finite": not_finite}


def _from_json(digest: bytes, fact: Sequence[Any]) -> Found:
    if len(fact) == 2:
        return BadImage(*fact)
    content, width, height = fact
    return DecodedImage(digest, bytes.fromhex(content), (width, height), None)


def _wanted_scores(rows: Iterable[Pair | LabelledImage]) -> Iterator[tuple[bytes, str]]:
    """(digest, prompt) of the images of rows that are good."""
    for row in rows:
        images = images_of(row)
        if all(isinstance(image, DecodedImage) for image in images):
            yield from ((image.digest, clean_prompt(row.prompt)) for image in images)


def _scores(
    scorer: str, wanted: Sequence[tuple[bytes, str]], unique: Mapping[bytes, ImageRef], work: Work, shards: Shards
) -> str:
    """Name of the shard with the scores of these images for these prompts."""
    content = shard_name(work.ids[f"scores/{scorer}"], [(digest.hex(), prompt) for digest, prompt in wanted])
    name = f"scores/{content}"
    if name not in shards:
        batches = ImageScorer({scorer: work.scorers[scorer]()}, work.device)
        refs = [unique[digest] for digest, _ in wanted]
        for (digest, prompt), image in zip(wanted, in_order(_pixels, refs, work.threads), strict=True):
            batches.add(DecodedImage(digest, b"", image.size, image), prompt)
        batches.flush()
        values = [batches.scores(digest, prompt)[scorer] for digest, prompt in wanted]
        shards.write(name, {"scores": torch.tensor(values, dtype=torch.float64)}, {})
    return name


def _pixels(ref: ImageRef) -> Image.Image:
    return decode_ref(ref)
