"""Writes the prepared data: images and prompts are encoded in shards, by all processes, and rows are judged one by one.

Memory holds the tables, about 1 kB per pair, and the images of a chunk of rows where the source has no files. The
folder is renamed into place when it is complete.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from attune.data import manifest
from attune.data.ingest.chunks import chunks
from attune.data.ingest.compute import ComputedChunk, Work, compute
from attune.data.ingest.ingest import Ingest
from attune.data.ingest.prompts import encode_prompts
from attune.data.ingest.reader import DecodedImage, ImageReader
from attune.data.ingest.rules import Rules, check_enough
from attune.data.quarantine import Quarantine
from attune.data.rows import Row
from attune.data.splits import SPLITS
from attune.distributed import ALONE, Shard
from attune.shards import Shards, link

logger = logging.getLogger(__name__)

TEST_PROMPTS = "test_prompts.parquet"
NO_LATENTS = "latents/none"


class Known:
    """The rows of latents and the scores of the chunks so far: what `Ingest` asks of an encoder and of a scorer."""

    def __init__(self, shards: Shards):
        self._shards = shards
        self._rows: dict[bytes, int] = {}  # by digest
        self._scores: dict[tuple[bytes, str], dict[str, float]] = {}
        self._count = 0
        self.latents: dict[str, None] = {}  # names of shards, in the order of their rows
        self.scored: dict[str, None] = {}
        self.bad_rows: set[int] = set()

    def add_chunk(self, chunk: ComputedChunk) -> None:
        """Takes what a chunk has computed. An image that is known keeps the row that it has."""
        if chunk.latents is not None and any(digest not in self._rows for digest in chunk.digests):
            for row, digest in enumerate(chunk.digests, self._count):
                self._rows.setdefault(digest, row)
            self.bad_rows.update(self._count + row for row in chunk.not_finite)
            self._count += len(chunk.digests)
            self.latents[chunk.latents] = None
        for scorer, name in chunk.scores.items():
            values = self._shards.read(name)[0]["scores"].tolist()
            for wanted, value in zip(chunk.scored, values, strict=True):
                self._scores.setdefault(wanted, {}).setdefault(scorer, value)
            self.scored[name] = None

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._rows

    def row(self, image: DecodedImage) -> int:
        """The image's row of the latents."""
        return self._rows[image.digest]

    def wants(self, digest: bytes, prompt: str) -> bool:
        """No score is wanted any more."""
        return False

    def add(self, image: DecodedImage, prompt: str) -> None:
        """Its scores are known."""

    def scores(self, digest: bytes, prompt: str) -> Mapping[str, float]:
        """Scorer -> score; empty without scorers."""
        return self._scores.get((digest, prompt), {})

    def flush(self) -> None:
        """Nothing waits to be written."""


def write_prepared(
    folder: Path,
    rows: Iterable[Row],
    work: Work,
    shards: Shards,
    quarantine: Quarantine | None,
    rules: Rules,
    shard: Shard = ALONE,
) -> dict[str, float]:
    """Writes the folder that `PreparedData` reads; returns counts, and {} in all processes but the main one.

    Args:
        rows: the same in all processes, which read them all and compute the shards of their own chunks.
        quarantine: of the main process, which judges the rows; None in the others.

    Raises:
        TooManyBadRows: more than `rules.max_bad_share`.
        SourceError: no usable row, fewer prompts or pairs than `rules.wanted`, or a text encoder that gives a prompt
            numbers that are not finite; data prepared before stays.
    """
    part, known = folder.with_name(f"{folder.name}.part"), Known(shards)
    ingest = None if quarantine is None else Ingest(ImageReader(rules.min_side), known, known, quarantine, rules)
    for merged in _computed(rows, work, shards, rules, shard):
        rules.quota.taken = shard.broadcast_from_main(partial(_judge, merged, ingest, known, rules))
    counts = shard.broadcast_from_main(lambda: _write_tables(part, ingest, rules))
    prompts = pd.read_parquet(part / "prompts.parquet").prompt.tolist()
    encoded = encode_prompts(prompts, work, shards, shard)
    if not shard.is_main_process:
        return {}
    if not known.latents:
        shards.write(NO_LATENTS, {"latents": torch.zeros((0, *work.backbone().latent_shape))}, {})
    counts["cut_prompts"] = sum(shards.facts(name)["cut"] for name in encoded)
    _warn(counts)
    named = {"latents": [*known.latents] or [NO_LATENTS], "prompts": encoded, "scores": [*known.scored]}
    _link(shards, named, part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return counts


def _link(shards: Shards, named: Mapping[str, Sequence[str]], folder: Path) -> None:
    """Puts shards, named by kind, into a folder, and the list of them."""
    files = {kind: [f"{name}.safetensors" for name in names] for kind, names in named.items()}
    for file in (file for some in files.values() for file in some):
        link(shards.folder / file, folder / file)
    manifest.write(folder, files)


def _computed(
    rows: Iterable[Row], work: Work, shards: Shards, rules: Rules, shard: Shard
) -> Iterator[list[ComputedChunk]]:
    """The chunks of all processes, in their order, as often as they are to be merged; [] but in the main process."""
    ours: dict[int, ComputedChunk] = {}
    silent = {} if shard.is_main_process else {"disable": True}
    with tqdm(desc="prepare", unit="row", **silent) as bar:
        for number, chunk in enumerate(chunks(rows, rules.quota, shard.world_size)):
            if chunk.owner == shard.rank:
                ours[number] = compute(chunk.rows, work, shards)
            bar.update(len(chunk.rows))
            if chunk.merge:
                found = {number: done for some in shard.all_gather_object(ours) for number, done in some.items()}
                yield [found[number] for number in sorted(found)] if shard.is_main_process else []
                ours = {}


def _judge(merged: Sequence[ComputedChunk], ingest: Ingest | None, known: Known, rules: Rules) -> Counter[str]:
    """Judges the rows of chunks, in the main process; returns the pairs taken of each split."""
    assert ingest is not None
    for chunk in merged:
        known.add_chunk(chunk)
        for row in chunk.rows:
            ingest.add(row)
    return rules.quota.taken


def _write_tables(part: Path, ingest: Ingest | None, rules: Rules) -> dict[str, float]:
    """Writes the tables into a new folder and returns the counts, in the main process."""
    assert ingest is not None
    tables = ingest.to_tables()
    counts, prompts = ingest.counts(tables), tables.prompts
    check_enough(counts, rules.wanted)
    for split in SPLITS:
        if not counts[f"prompts/{split}"]:
            logger.warning("no %s prompts", split)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    prompts.to_parquet(part / "prompts.parquet", index=False)
    # a file of their own, so that images are not generated again when only training prompts have changed
    prompts[prompts.split == "test"][["prompt"]].to_parquet(part / TEST_PROMPTS, index=False)
    tables.pairs.to_parquet(part / "pairs.parquet", index=False)
    if tables.images is not None:
        tables.images.to_parquet(part / "images.parquet", index=False)
    return counts


def _warn(counts: Mapping[str, float]) -> None:
    """Says what is kept but teaches less than it seems to."""
    if counts["identical_images"]:
        logger.warning("%d pairs show the same image twice", counts["identical_images"])
    if counts["cut_prompts"]:
        logger.warning("%d prompts are longer than the text encoder reads; their ends are cut", counts["cut_prompts"])
