"""Do the scorers agree? Rank correlation of the differences that they see between a run and the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from attune.evaluation.statistics import prompt_means


def concord(
    tables: Mapping[str, pd.DataFrame], runs: Sequence[str], base: str, scorers: Sequence[str]
) -> dict[tuple[str, str], float]:
    """Spearman's correlation over prompts of the paired differences by each two scorers, averaged over the runs.

    Within a run, so that two scorers do not agree merely because both see that one run is better than another.
    nan where a scorer sees no difference anywhere.
    """
    differences = {run: _differences(tables[run], tables[base], scorers) for run in runs}
    found = {}
    for i, first in enumerate(scorers):
        for j, second in enumerate(scorers[:i]):
            each = [_spearman(rows[:, i], rows[:, j]) for rows in differences.values()]
            known = [rho for rho in each if np.isfinite(rho)]
            found[first, second] = float(np.mean(known)) if known else float("nan")
    return found


def _differences(run: pd.DataFrame, base: pd.DataFrame, scorers: Sequence[str]) -> np.ndarray:
    """(n, k) by prompt and scorer."""
    after, before = (prompt_means(table[list(scorers)].to_numpy(float), table["prompt"])[0] for table in (run, base))
    return after - before


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(stats.spearmanr(x, y).statistic)
