"""Writes the prepared data: rows are checked one by one, images and prompts encoded in batches and streamed to disk.

Memory holds a few batches of images and the tables, about 1 kB per pair. The folder is renamed into place when it is
complete; a run that is interrupted starts again.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from attune.data.arrays import ArrayFile
from attune.data.ingest.encoder import ImageEncoder
from attune.data.ingest.ingest import Ingest
from attune.data.ingest.reader import ImageReader
from attune.data.ingest.rules import Rules, check_enough
from attune.data.ingest.scorer import ImageScorer
from attune.data.quarantine import TEXT_CHARS, Quarantine
from attune.data.rows import Row, SourceError
from attune.data.splits import SPLITS
from attune.interfaces import Backbone, Reward

logger = logging.getLogger(__name__)

PROMPTS_PER_BATCH = 64
TEST_PROMPTS = "test_prompts.parquet"


def write_prepared(
    folder: Path,
    rows: Iterable[Row],
    backbone: Backbone,
    scorers: Mapping[str, Reward],
    quarantine: Quarantine,
    rules: Rules,
) -> dict[str, float]:
    """Writes the folder that `PreparedData` reads; returns counts.

    Raises:
        TooManyBadRows: more than `rules.max_bad_share`.
        SourceError: no usable row, fewer prompts or pairs than `rules.wanted`, or a text encoder that gives a prompt
            numbers that are not finite; data prepared before stays.
    """
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with ArrayFile(part / "latents.npy") as latents:
        ingest = _ingest(backbone, scorers, latents, quarantine, rules)
        for row in tqdm(rows, desc="prepare", unit="row"):
            ingest.add(row)
        tables = ingest.to_tables()
    counts, prompts = ingest.counts(tables), tables.prompts
    _check_counts(counts, rules)
    counts["cut_prompts"] = sum(map(backbone.is_cut, prompts.prompt))
    _warn(counts)
    prompts.to_parquet(part / "prompts.parquet", index=False)
    # a file of their own, so that images are not generated again when only training prompts have changed
    prompts[prompts.split == "test"][["prompt"]].to_parquet(part / TEST_PROMPTS, index=False)
    tables.pairs.to_parquet(part / "pairs.parquet", index=False)
    if tables.images is not None:
        tables.images.to_parquet(part / "images.parquet", index=False)
    write_prompts(part, prompts.prompt.tolist(), backbone)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return counts


def _ingest(
    backbone: Backbone, scorers: Mapping[str, Reward], latents: ArrayFile, quarantine: Quarantine, rules: Rules
) -> Ingest:
    device = next(backbone.denoiser.parameters()).device
    encoder, scorer = ImageEncoder(backbone, latents), ImageScorer(scorers, device)
    return Ingest(ImageReader(rules.min_side), encoder, scorer, quarantine, rules)


def _check_counts(counts: Mapping[str, float], rules: Rules) -> None:
    check_enough(counts, rules.wanted)
    for split in SPLITS:
        if not counts[f"prompts/{split}"]:
            logger.warning("no %s prompts", split)


def _warn(counts: Mapping[str, float]) -> None:
    """Says what is kept but teaches less than it seems to."""
    if counts["identical_images"]:
        logger.warning("%d pairs show the same image twice", counts["identical_images"])
    if counts["cut_prompts"]:
        logger.warning("%d prompts are longer than the text encoder reads; their ends are cut", counts["cut_prompts"])


def write_prompts(folder: Path, prompts: Sequence[str], backbone: Backbone) -> None:
    """`prompt.<name>.npy` (P, ...) for each conditioning tensor."""
    starts = range(0, len(prompts), PROMPTS_PER_BATCH)
    with ExitStack() as stack:
        files: dict[str, ArrayFile] = {}
        for start in tqdm(starts, desc="encode prompts", unit="batch"):
            batch = prompts[start : start + PROMPTS_PER_BATCH]
            cond = backbone.encode_prompts(batch)
            for name, value in cond.tensors.items():
                _check_finite(name, value, batch)
                if name not in files:
                    files[name] = stack.enter_context(ArrayFile(folder / f"prompt.{name}.npy"))
                files[name].append(value)


def _check_finite(name: str, rows: Tensor, prompts: Sequence[str]) -> None:
    """Raises SourceError for embeddings that are not finite: no run could learn from the prompt."""
    bad = (~torch.isfinite(rows).flatten(1).all(1)).nonzero()
    if len(bad):
        prompt = prompts[int(bad[0])][:TEXT_CHARS]
        raise SourceError(
            f"{name} of the prompt {prompt!r} is not finite; remove the prompt, or set model.dtype float32"
        )
