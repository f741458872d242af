"""How often the step-aware preference model picks the better image of validation pairs, by timestep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from attune.data.store import PreparedData
from attune.evaluation.statistics import bootstrap_mean_ci, prompt_means
from attune.spm.model import from_clip
from attune.spm.objective import SPMObjective

TIMESTEPS = (0, 251, 501, 701, 951)  # the paper's evaluation points


@torch.no_grad()
def accuracy_by_t(objective: SPMObjective, prepared: Path, seed: int) -> dict[str, dict[str, list[Any]]]:
    """How often each model picks the better image of validation pairs, from one-step predictions.

    The better image is the one of higher noise-free utility where the source knows it, else the one people chose.
    `untimed` is the CLIP that training started from, which has no timestep. {} without validation pairs.
    """
    data = PreparedData.read(prepared, "validation", objective.base.device)
    if data.pairs.empty:
        return {}
    untimed, _ = from_clip(objective.config.clip, objective.tokenizer)
    models = {"spm": objective.model.eval(), "untimed": untimed.eval().to(objective.base.device)}
    known = "utility_0" in data.pairs
    truth = data.pairs.utility_0 - data.pairs.utility_1 if known else data.pairs.label_0 - 0.5
    shape = (len(truth), *data.latents.shape[1:])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(objective.base.device)
    size = objective.config.batch_size
    parts = [range(start, min(start + size, len(truth))) for start in range(0, len(truth), size)]
    texts: dict[tuple[str, int], Tensor] = {}  # by model and first row, the same at every t
    curves: dict[str, dict[str, list[Any]]] = {
        name: {"t": list(TIMESTEPS), "accuracy": [], "ci95": []} for name in models
    }
    for t in tqdm(TIMESTEPS, desc="accuracy by t", unit="t"):
        gaps: dict[str, list[float]] = {name: [] for name in models}
        for rows in parts:
            seen = objective.prepare_batch(
                data.pair_batch(rows), torch.full((len(rows),), t), noise[rows.start : rows.stop]
            )
            for name, model in models.items():
                if (name, rows.start) not in texts:
                    texts[name, rows.start] = model.text_features(seen.input_ids)
                scores_0, scores_1 = model.candidate_scores(seen.pixel_values, texts[name, rows.start], seen.t)
                gaps[name] += (scores_0 - scores_1).tolist()
        for name, gap in gaps.items():
            mean, interval = accuracy(np.array(gap), truth.to_numpy(), data.pairs.prompt.tolist(), seed)
            curves[name]["accuracy"].append(mean)
            curves[name]["ci95"].append(list(interval))
    return curves


def accuracy(
    gaps: np.ndarray, truth: np.ndarray, prompts: Sequence[str], seed: int
) -> tuple[float, tuple[float, float]]:
    """How often score differences (n,) of pairs have the sign of the true ones, as mean over prompts; its interval.

    Prompts are resampled and not pairs, because the pairs of a prompt share images. Equal scores are wrong.
    """
    right, _ = prompt_means(gaps * truth > 0, prompts)
    return float(right.mean()), bootstrap_mean_ci(right, seed=seed)
