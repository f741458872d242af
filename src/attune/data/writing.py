"""What a source yields, checked row by row, encoded in batches and streamed to disk as the prepared data.

At any time a few batches of images are in memory, besides the tables, about 1 kB per pair. The folder appears
whole or not at all; a run that is interrupted starts again.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from attune.data.arrays import ArrayFile
from attune.data.pictures import Pictures
from attune.data.quarantine import Quarantine
from attune.data.rows import Kept, Rules
from attune.data.sources import SPLITS, Bad, Pair, Prompt, SourceError
from attune.interfaces import Backbone, Reward

logger = logging.getLogger(__name__)

PROMPTS_AT_ONCE = 64


def write_prepared(
    folder: Path,
    rows: Iterable[Prompt | Pair | Bad],
    backbone: Backbone,
    scorers: Mapping[str, Reward],
    quarantine: Quarantine,
    rules: Rules,
) -> dict[str, float]:
    """Writes the folder that `PreparedData` reads; returns counts.

    Raises:
        TooManyBadRows: more than `rules.max_bad_share`.
        SourceError: no row is left.
    """
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with ArrayFile(part / "latents.npy") as latents:
        pictures = Pictures(backbone, scorers, latents, rules.min_side)
        kept = Kept(pictures, quarantine, rules)
        for row in tqdm(rows, desc="prepare", unit="row"):
            kept.add(row)
        pictures.finish()
    prompts, pairs = kept.tables()
    if prompts.empty:
        raise SourceError("the source has no usable row")
    for split in sorted(set(SPLITS) - set(prompts.split)):
        logger.warning("no %s prompts: a stage that needs some will stop", split)
    prompts.to_parquet(part / "prompts.parquet", index=False)
    pairs.to_parquet(part / "pairs.parquet", index=False)
    write_prompts(part, prompts.prompt.tolist(), backbone)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return kept.counts(prompts, pairs)


def write_prompts(folder: Path, prompts: Sequence[str], backbone: Backbone) -> None:
    """`prompt.<name>.npy` (P, ...) for each conditioning tensor."""
    starts = range(0, len(prompts), PROMPTS_AT_ONCE)
    with ExitStack() as stack:
        files: dict[str, ArrayFile] = {}
        for start in tqdm(starts, desc="encode prompts", unit="batch"):
            cond = backbone.encode_prompts(prompts[start : start + PROMPTS_AT_ONCE])
            for name, value in cond.tensors.items():
                if name not in files:
                    files[name] = stack.enter_context(ArrayFile(folder / f"prompt.{name}.npy"))
                files[name].append(value)
