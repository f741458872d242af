"""Scores of a folder of images by every scorer, one row per image."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from attune.evaluation.images import read_images
from attune.evaluation.protocol import Protocol, write_scores
from attune.files import write_atomically
from attune.versions import versions

if TYPE_CHECKING:
    from torch import Tensor

    from attune.interfaces import Reward

MADE_WITH = "made_with.json"  # beside images: versions and device
BATCH_SIZE = 32  # images; 1024 px ones take 0.4 GB as float32


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
    folder: Path, scorers: Mapping[str, Callable[[], Reward]], protocol: Protocol, reports: Path
) -> pd.DataFrame:
    """Scores a folder of images and writes scores/<name>.parquet and features/<name>.npy into `reports`.

    Args:
        folder: images with their index.parquet; its name is the method's.
        scorers: name -> what loads it.
        protocol: of these scorers, see `evaluation_protocol`.

    Returns:
        The score table that was written.

    Raises:
        UnexpectedMean: a scorer's mean lies outside the interval it announces.
        ValueError: scores are missing or not finite.
    """
    frame, features = score_images(folder, scorers)
    generated = json.loads((folder / MADE_WITH).read_text())
    made_with = {f"generate.{name}": found for name, found in generated.items()}
    made_with |= {f"evaluate.{name}": found for name, found in versions_and_device().items()}
    write_scores(reports / "scores" / f"{folder.name}.parquet", frame, protocol, made_with)
    buffer = io.BytesIO()
    np.save(buffer, features)
    write_atomically(reports / "features" / f"{folder.name}.npy", buffer.getvalue())
    return frame


def versions_and_device() -> dict[str, str]:
    """What computes here: the libraries, and the GPU if there is one."""
    import torch

    without_cuda = "mps" if torch.backends.mps.is_available() else "cpu"
    return {**versions(), "device": torch.cuda.get_device_name() if torch.cuda.is_available() else without_cuda}


def score_images(folder: Path, scorers: Mapping[str, Callable[[], Reward]]) -> tuple[pd.DataFrame, np.ndarray]:
    """Scores the images of a folder.

    Scorers are loaded one after the other, and images a batch at a time: memory holds one scorer and one batch.

    Args:
        folder: images with their index.parquet (columns prompt, ordinal, file).
        scorers: name -> what loads it.

    Returns:
        The index with a column `name` per scorer and `name.part` per part of it; and features (N, D) of the first
        scorer that offers them, from which diversity and drift are measured, or (N, 0) if none does.

    Raises:
        UnexpectedMean: a scorer's mean lies outside the interval it announces.
    """
    from attune.interfaces import FeatureExtractor

    frame = pd.read_parquet(folder / "index.parquet")
    features = None
    for name, load in scorers.items():
        scorer = load()
        wanted = features is None and isinstance(scorer, FeatureExtractor)
        columns, found = _score(name, scorer, folder, frame, wanted)
        features = found if wanted else features
        check_mean(name, columns[name].mean(), scorer.expected_range)
        frame = frame.assign(**columns)
    return frame, np.empty((len(frame), 0), np.float32) if features is None else features


def _score(
    name: str, scorer: Reward, folder: Path, frame: pd.DataFrame, with_features: bool
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """One pass of a scorer over the images: its columns `name` and `name.part`, and features (N, D) if wanted."""
    import torch

    from attune.interfaces import ExplainedReward, FeatureExtractor

    parts: dict[str, list[Any]] = {}
    features = []
    for start in tqdm(range(0, len(frame), BATCH_SIZE), desc=f"{folder.name}: {name}", unit="batch"):
        rows = frame.iloc[start : start + BATCH_SIZE]
        pixels, prompts = read_pixels(folder, rows["file"]), rows["prompt"].tolist()
        with torch.no_grad():
            found = {name: scorer(pixels, prompts).cpu().double().numpy()}
        if isinstance(scorer, ExplainedReward):
            found |= {f"{name}.{part}": values for part, values in scorer.parts(pixels, prompts).items()}
        for column, values in found.items():
            parts.setdefault(column, []).append(values)
        if with_features and isinstance(scorer, FeatureExtractor):
            features.append(scorer.features(pixels).numpy())
    columns = {column: np.concatenate(values) for column, values in parts.items()}
    return columns, np.concatenate(features) if with_features else None


def read_pixels(folder: Path, files: Sequence[str]) -> Tensor:
    """Images as scorers take them: float32 (B, 3, H, W) in [0, 1]."""
    import torch

    return torch.from_numpy(read_images(folder, files)).permute(0, 3, 1, 2).float() / 255


def check_mean(name: str, mean: float, expected: tuple[float, float] | None) -> None:
    """Raises UnexpectedMean where a mean lies outside the expected interval; None expects nothing."""
    if expected is not None and not expected[0] <= mean <= expected[1]:
        raise UnexpectedMean(
            f"scorer {name}: mean {mean:.3f} lies outside {expected[0]:g} to {expected[1]:g}. Check, in this order: "
            f"that the weights are the ones you mean, that hidden_act is theirs, that preprocess is as published, and "
            f"that the images are images. If all is right, scorers.{name}.expected_range sets another interval."
        )
