"""Signs of reward hacking of every run against the base, measured from the files that generate and evaluate left.

Two kinds of numbers. Those that every image or prompt has (burnt pixels, high frequencies, variety among the images of
one prompt) are paired by prompt, and their intervals are those of the scores. Those of a whole set of images (variety
over all of them, distance from the base's) have no value per prompt: their intervals are a grouped jackknife.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from attune.evaluation.diversity import cmmd, high_frequency, pairwise_distance, per_prompt, saturation, vendi
from attune.evaluation.hacking import Sign
from attune.evaluation.images import read_images
from attune.evaluation.statistics import bootstrap_mean_ci, prompt_means

GROUPS = 20  # of the jackknife; fewer where there are fewer prompts
OF_A_PROMPT = {"pairwise_distance_per_prompt": pairwise_distance, "vendi_per_prompt": vendi}
OF_AN_IMAGE = {"saturation": saturation, "high_frequency": high_frequency}
Of = Callable[[np.ndarray, np.ndarray], tuple[float, float]]
"""A statistic of a run's and of the base's features of the same images, (N, D) each: its value for both."""
Images = tuple[np.ndarray, Sequence[str]]
"""Features (N, D) and the N prompts of the images."""


def measure_signs(
    tables: Mapping[str, pd.DataFrame], generated: Path, features: Path, base: str = "base", seed: int = 0
) -> dict[str, dict[str, Sign]]:
    """Run -> sign -> its change; the base has none.

    Args:
        tables: run -> score table, a row per image in the order of its features, all with the same images.
        generated: folder of the runs' folders of images.
        features: folder of `<run>.npy`, (N, D), or (N, 0) where no scorer offered any.
        base: the run that the others are compared with.
        seed: of the bootstrap.

    Raises:
        ValueError: features of another number of images than the table, or of another size than the base's.
    """
    values = {name: _by_prompt(table, generated / name) for name, table in tables.items()}
    vectors = {name: rows for name in tables if (rows := _features(features / f"{name}.npy", tables[name])) is not None}
    for name, rows in vectors.items():
        values[name] |= {sign: per_prompt(of, rows, tables[name]["prompt"]) for sign, of in OF_A_PROMPT.items()}
    found = {}
    for name in (name for name in tables if name != base):
        both = [sign for sign in values[name] if sign in values[base]]
        paired = {sign: _paired(values[name][sign], values[base][sign], seed) for sign in both}
        whole = {}
        if name in vectors and base in vectors:
            whole = of_sets((vectors[name], tables[name]["prompt"]), (vectors[base], tables[base]["prompt"]))
        signs = whole | paired
        found[name] = {sign: change for sign, change in signs.items() if np.isfinite([change.base, change.value]).all()}
    return found


def of_sets(run: Images, base: Images) -> dict[str, Sign]:
    """Variety over all images and the distance between the two sets, from the features of the same images."""
    if run[0].shape != base[0].shape:
        raise ValueError(f"features of shape {run[0].shape} cannot be compared with the base's {base[0].shape}")
    statistics: dict[str, Of] = {
        "pairwise_distance": lambda a, b: (pairwise_distance(a), pairwise_distance(b)),
        "vendi": lambda a, b: (vendi(a), vendi(b)),
        "cmmd": lambda a, b: (cmmd(a, b), 0.0),
    }
    return {name: _of_set(of, run, base, is_biased=name == "cmmd") for name, of in statistics.items()}


def _of_set(of: Of, run: Images, base: Images, *, is_biased: bool) -> Sign:
    """A statistic of two sets with the interval of its change.

    The grouped jackknife (Efron and Tibshirani 1993, ch. 11): the statistic without one group of prompts after the
    other. Resampling with replacement, as a bootstrap does, would put copies into the set, and variety counts those.

    Args:
        is_biased: of a distance, which is above 0 for two sets of one kind too: the interval is around the jackknife's
            estimate without that bias (in 60 trials with two such sets of 240 images one interval excluded 0).
    """
    value, at_base = of(run[0], base[0])
    owners = [np.unique(np.asarray(prompts, dtype=object), return_inverse=True)[1] for _, prompts in (run, base)]
    groups = min(GROUPS, int(owners[0].max()) + 1)
    if groups < 3:
        return Sign(at_base, value, (float("nan"), float("nan")))
    kept = [
        [rows[owner % groups != g] for (rows, _), owner in zip((run, base), owners, strict=True)] for g in range(groups)
    ]
    without = np.array([np.subtract(*of(*both)) for both in kept])
    change = value - at_base
    half = float(stats.t.ppf(0.975, groups - 1) * np.sqrt((groups - 1) * without.var()))
    centre = groups * change - (groups - 1) * float(without.mean()) if is_biased else change
    return Sign(at_base, value, (centre - half, centre + half))


def _paired(run: np.ndarray, base: np.ndarray, seed: int) -> Sign:
    """A value of every prompt, (n,) of both; prompts without one are left out."""
    there = np.isfinite(run) & np.isfinite(base)
    if not there.any():
        return Sign(float("nan"), float("nan"), (float("nan"), float("nan")))
    run, base = run[there], base[there]
    return Sign(float(base.mean()), float(run.mean()), bootstrap_mean_ci(run - base, seed=seed))


def _by_prompt(table: pd.DataFrame, folder: Path) -> dict[str, np.ndarray]:
    """Sign -> (n,) of the sorted prompts. Images are read one by one: thousands of large ones do not fit in memory."""
    found: list[list[float]] = []
    for file in table["file"]:
        image = read_images(folder, [file]) / 255.0
        found.append([float(of(image)[0]) for of in OF_AN_IMAGE.values()])
    means = prompt_means(np.array(found), table["prompt"])[0]
    return dict(zip(OF_AN_IMAGE, means.T, strict=True))


def _features(path: Path, table: pd.DataFrame) -> np.ndarray | None:
    """The features of a run's images; None where they were not measured."""
    if not path.exists():
        return None
    rows = np.load(path)
    if len(rows) != len(table):
        raise ValueError(f"{path} holds {len(rows)} feature vectors for {len(table)} images")
    return rows if rows.shape[1] else None
