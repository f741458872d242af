"""Scores of a folder of images by every scorer, one row per image."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from attune.distributed import ALONE, Shard
from attune.evaluation.images import image_bytes, image_reader
from attune.evaluation.protocol import Protocol, write_scores
from attune.files import write_atomically
from attune.shards import Content, Shards, compute_missing, in_order, own_threads, shard_name
from attune.versions import versions

if TYPE_CHECKING:
    from attune.interfaces import Reward

MADE_WITH = "made_with.json"  # beside images: versions and device
FEATURES = "features"  # their name in a shard, which no scorer can have beside `features.part`
BATCH_SIZE = 32  # images; 1024 px ones take 0.4 GB as float32
KEPT_BYTES = 2**31  # of decoded images, which wait for the next scorer: 2,700 of 512 px
Read = Callable[[Sequence[str]], np.ndarray]
"""Images of files as uint8 (B, H, W, 3)."""


class UnexpectedMean(ValueError):
    """A mean score that only wrong weights, a wrong activation or wrong preprocessing can give."""


def evaluation_protocol(folder: Path, scorers: Iterable[tuple[str, str, str]]) -> Protocol:
    """How the images of a folder were made (its protocol.json), and who scores them.

    Args:
        scorers: (name, weights, settings) of each, see `protocol.scorer_identity`.
    """
    made = json.loads((folder / "protocol.json").read_text())
    return Protocol.from_dict(made | {"scorers": list(scorers)})


def evaluate_folder(
    folder: Path,
    scorers: Mapping[str, Callable[[], Reward]],
    protocol: Protocol,
    reports: Path,
    ids: Mapping[str, str],
    shards: Shards,
    shard: Shard = ALONE,
) -> pd.DataFrame | None:
    """Scores a folder of images and writes scores/<name>.parquet and features/<name>.npy into `reports`.

    Args:
        folder: images with their index.parquet; its name is the method's.
        scorers: name -> what loads it.
        protocol: of these scorers, see `evaluation_protocol`.
        ids: name -> what identifies the scorer: settings, weights, code, libraries.
        shards: where scores are kept; those of nothing that is here any more are removed.

    Returns:
        The score table that was written; None in all processes but the main one.

    Raises:
        UnexpectedMean: a scorer's mean lies outside the interval it announces.
        ValueError: scores are missing or not finite.
    """
    frame, features, used = score_images(folder, scorers, ids, shards, shard)
    if not shard.is_main_process:
        return None
    generated = json.loads((folder / MADE_WITH).read_text())
    made_with = {f"generate.{name}": found for name, found in generated.items()}
    made_with |= {f"evaluate.{name}": found for name, found in versions_and_device().items()}
    write_scores(reports / "scores" / f"{folder.name}.parquet", frame, protocol, made_with)
    buffer = io.BytesIO()
    np.save(buffer, features)
    write_atomically(reports / "features" / f"{folder.name}.npy", buffer.getvalue())
    for path in set(shards.folder.glob("*.safetensors")) - {shards.path(name) for name in used}:
        path.unlink()
    return frame


def versions_and_device() -> dict[str, str]:
    """What computes here: the libraries, and the GPU if there is one."""
    without_cuda = "mps" if torch.backends.mps.is_available() else "cpu"
    return {**versions(), "device": torch.cuda.get_device_name() if torch.cuda.is_available() else without_cuda}


def score_images(
    folder: Path,
    scorers: Mapping[str, Callable[[], Reward]],
    ids: Mapping[str, str],
    shards: Shards,
    shard: Shard = ALONE,
) -> tuple[pd.DataFrame, np.ndarray, list[str]]:
    """Scores the images of a folder, by all processes, batch by batch; a batch's scores by a scorer are a shard.

    Scorers are loaded one after the other, and one that has been asked everything before is not loaded. Images are
    decoded for the first of them and kept for the others, as far as `KEPT_BYTES` go.

    Args:
        folder: images with their index.parquet (columns prompt, ordinal, file).
        scorers: name -> what loads it.

    Returns:
        The index with a column `name` per scorer and `name.part` per part of it; features (N, D) of the first scorer
        that offers them, from which diversity and drift are measured, or (N, 0) if none does; and the shards' names.

    Raises:
        UnexpectedMean: a scorer's mean lies outside the interval it announces.
    """
    frame, features, used = pd.read_parquet(folder / "index.parquet"), None, list[str]()
    threads = own_threads(shard.world_size)
    batches, read = list(read_batches(folder, frame, threads)), image_reader(folder, threads, KEPT_BYTES)
    for name, load in scorers.items():
        load = cache(load)  # once, and not for the next scorer's pass
        names = [shard_name(ids[name], features is None, rows.prompt.tolist(), digests) for rows, digests in batches]
        score = partial(score_batch, name, load, read, with_features=features is None)
        tasks = {each: partial(score, rows) for each, (rows, _) in zip(names, batches, strict=True)}
        compute_missing(tasks, shards, shard, f"{folder.name}: {name}")
        found = [shards.read(each) for each in names]  # equal batches, of images that are alike, are one shard
        used += names
        columns = {key: torch.cat([tensors[key] for tensors, _ in found]).numpy() for key in found[0][0]}
        features = columns.pop(FEATURES, features)
        check_mean(name, columns[name].mean(), found[0][1]["expected_range"])
        frame = frame.assign(**columns)
    return frame, np.empty((len(frame), 0), np.float32) if features is None else features, used


def read_batches(folder: Path, frame: pd.DataFrame, threads: int) -> Iterator[tuple[pd.DataFrame, list[str]]]:
    """Batches of rows, with what identifies their images."""

    def identity(file: str) -> str:
        return hashlib.blake2b(image_bytes(folder / file), digest_size=16).hexdigest()

    digests = list(in_order(identity, frame["file"], threads))
    for start in range(0, len(frame), BATCH_SIZE):
        yield frame.iloc[start : start + BATCH_SIZE], digests[start : start + BATCH_SIZE]


def score_batch(
    name: str, load: Callable[[], Reward], read: Read, rows: pd.DataFrame, *, with_features: bool
) -> Content:
    """Columns `name` and `name.part` of a batch, features if wanted and offered; and the interval of the mean."""
    from attune.interfaces import ExplainedReward, FeatureExtractor

    scorer, prompts, pixels = load(), rows["prompt"].tolist(), as_pixels(read(rows["file"].tolist()))
    with torch.no_grad():
        columns = {name: scorer(pixels, prompts).cpu().double()}
    if isinstance(scorer, ExplainedReward):
        parts = scorer.parts(pixels, prompts)
        columns |= {f"{name}.{part}": torch.from_numpy(np.asarray(values)) for part, values in parts.items()}
    if with_features and isinstance(scorer, FeatureExtractor):
        columns[FEATURES] = scorer.features(pixels).cpu()
    expected = scorer.expected_range
    return columns, {"expected_range": None if expected is None else list(expected)}


def as_pixels(images: np.ndarray) -> Tensor:
    """Images as scorers take them: float32 (B, 3, H, W) in [0, 1], of uint8 (B, H, W, 3)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def check_mean(name: str, mean: float, expected: tuple[float, float] | None) -> None:
    """Raises UnexpectedMean where a mean lies outside the expected interval; None expects nothing."""
    if expected is not None and not expected[0] <= mean <= expected[1]:
        raise UnexpectedMean(
            f"scorer {name}: mean {mean:.3f} lies outside {expected[0]:g} to {expected[1]:g}. Check, in this order: "
            f"that the weights are the ones you mean, that hidden_act is theirs, that preprocess is as published, and "
            f"that the images are images. If all is right, scorers.{name}.expected_range sets another interval."
        )
