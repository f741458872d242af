"""Where preference data comes from: one source, one file. A source is a module with a `Config` and a `prepare`.

    prepare(config, seed, paint) -> Prepared

`paint(prompts, ordinals, title)` draws images from the base model, uint8 (n, H, W, 3); sources that bring
images of their own never call it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

Painter = Callable[[Sequence[str], Sequence[int], str], np.ndarray]

PROMPT_COLUMNS = ("prompt", "split")
PAIR_COLUMNS = ("prompt", "image_0", "image_1", "label_0", "split")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Prepared:
    """Prompts by split, and pairs whose `image_0` and `image_1` are rows of `images`."""

    prompts: pd.DataFrame
    pairs: pd.DataFrame
    images: np.ndarray  # uint8 (n, H, W, 3)


def check(prepared: Prepared) -> Prepared:
    """Holds a source to its word.

    Raises:
        ValueError: naming the first column, split or row that is wrong.
    """
    for name, frame, columns in (
        ("prompts", prepared.prompts, PROMPT_COLUMNS),
        ("pairs", prepared.pairs, PAIR_COLUMNS),
    ):
        missing = [column for column in columns if column not in frame.columns]
        if missing:
            raise ValueError(f"{name}: column {missing[0]!r} is missing")
        odd = sorted(set(frame["split"]) - set(SPLITS))
        if odd:
            raise ValueError(f"{name}: unknown split {odd[0]!r}; one of {', '.join(SPLITS)}")
    splits = prepared.prompts.groupby("prompt")["split"].nunique()
    if (splits > 1).any():
        raise ValueError(f"prompt {splits[splits > 1].index[0]!r} is in more than one split")
    labels = prepared.pairs["label_0"]
    if not labels.isin([0.0, 0.5, 1.0]).all():
        row = int((~labels.isin([0.0, 0.5, 1.0])).to_numpy().argmax())
        raise ValueError(f"pairs row {row}: label_0 is {labels[row]}, must be 0, 0.5 or 1")
    return prepared
