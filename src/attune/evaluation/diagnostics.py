"""Signs of reward hacking of every method, measured from the files that generate and evaluate left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from attune.evaluation.diversity import cmmd, diversity, image_indices
from attune.evaluation.images import read_images
from attune.evaluation.summary import Diagnostics


def diagnostics(
    tables: Mapping[str, pd.DataFrame], generated: Path, features: Path, base: str = "base"
) -> dict[str, Diagnostics]:
    """Image indices of every method; diversity and drift from the base of those that have features.

    Args:
        tables: method -> score table, a row per image in the order of its features.
        generated: folder of the methods' folders of images.
        features: folder of `<method>.npy`, (N, D), or (N, 0) where no scorer offered any.
        base: the method that drift is measured from.

    Raises:
        ValueError: features of another number of images, or of another size than the base's.
        KeyError: a method has features and the base has none.
    """
    found = {name: np.load(path) for name in tables if (path := features / f"{name}.npy").exists()}
    vectors = {name: rows for name, rows in found.items() if rows.shape[1]}
    return {
        name: Diagnostics(
            indices=mean_indices(generated / name, table["file"]),
            diversity=diversity(vectors[name], table["prompt"].tolist()) if name in vectors else None,
            drift={"cmmd": cmmd(vectors[name], vectors[base])} if name in vectors and name != base else None,
        )
        for name, table in tables.items()
    }


def mean_indices(folder: Path, files: Sequence[str]) -> dict[str, float]:
    """Mean image indices of a folder, read image by image: thousands of large ones do not fit in memory."""
    rows = [image_indices(read_images(folder, [file]) / 255.0) for file in files]
    return pd.DataFrame(rows).mean().to_dict()
