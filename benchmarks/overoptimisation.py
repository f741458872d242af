"""What happens when AlignProp is run too long: the trained reward, held-out scorers and diversity, every 40 batches.

    python benchmarks/overoptimisation.py --batches 320

Profile `tiny` of params.yaml with another number of batches, on data/prepared (`dvc repro prepare` first), looked at
with the test prompts of the report. Says too where `held_out: {scorer: ..., patience: 2}` would have stopped. Writes
reports/overoptimisation.md, .json and .png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from attune.config.check import load
from matplotlib.figure import Figure
from torch import Tensor

from attune.build import build_method, load_learner, load_scorer
from attune.config.profile import Profile
from attune.diffusion.generate import generate_images
from attune.diffusion.policy import Policy
from attune.evaluation.diversity import diversity
from attune.evaluation.statistics import bootstrap_mean_ci
from attune.finetune import seed_of, training_batches
from attune.interfaces import Reward
from attune.paths import PREFERENCE, PREPARED
from attune.training.early_stopping import EarlyStopping
from attune.training.loop import Callbacks, train

ROOT = Path(__file__).resolve().parents[1]
TRAINED, VALIDATION, PATIENCE = "pickscore", ("hpsv2", "aesthetic", "oracle"), 2


def looked_at(policy: Policy, profile: Profile, prompts: list[str], scorers: dict[str, Reward]) -> dict[str, Any]:
    """Mean score by each scorer with its 95 % CI, and diversity, of one image per prompt."""
    images = generate_images(policy, prompts, [0] * len(prompts), profile.generate.sampling, profile.seed, None)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    row: dict[str, Any] = {}
    with torch.no_grad():
        for name, scorer in scorers.items():
            scores = torch.cat([scorer(*rows) for rows in batched(pixels, prompts)]).double().numpy()
            row[name] = float(scores.mean())
            row[f"{name}_ci95"] = [float(x) for x in bootstrap_mean_ci(scores)]
        seen = torch.cat([scorers["aesthetic"].features(rows) for rows, _ in batched(pixels, prompts)]).numpy()
    return row | {key: float(value) for key, value in diversity(seen, prompts).items() if np.isfinite(value)}


def batched(pixels: Tensor, prompts: list[str], size: int = 32) -> list[tuple[Tensor, list[str]]]:
    starts = range(0, len(prompts), size)
    return [(pixels[start : start + size], prompts[start : start + size]) for start in starts]


def run(batches: int, every: int) -> list[dict[str, Any]]:
    """Trains and looks; a row per look."""
    _, profile = load(ROOT / "params.yaml")
    block = {**profile.methods["alignprop"], "batches": batches}
    profile = profile.model_copy(update={"methods": {**profile.methods, "alignprop": block}})
    torch.set_num_threads(profile.threads)
    policy = load_learner("alignprop", profile, "alignprop")
    method = build_method("alignprop", profile, policy, PREFERENCE, "alignprop")
    scorers = {name: load_scorer(name, profile) for name in (TRAINED, *VALIDATION)}
    table = pd.read_parquet(PREPARED / "prompts.parquet")
    prompts = table.prompt[table.split == "test"].head(profile.generate.prompts).tolist()
    rows: list[dict[str, Any]] = []

    def score() -> float:
        rows.append(looked_at(policy, profile, prompts, scorers))
        return rows[-1]["oracle"]

    _, seen = training_batches(method, policy.device, seed_of(profile.seed, None))
    _, scores = train(
        method,
        policy,
        seen,
        seed=profile.seed,
        early_stopping=EarlyStopping(score, every),
        callbacks=Callbacks("alignprop"),
    )
    return [{"batches": taken["batch"], **row} for taken, row in zip(scores, rows, strict=True)]


def stopped(rows: list[dict[str, Any]], scorer: str) -> tuple[int, int]:
    """After how many batches patience with that scorer ends training, and of which batch the weights are kept."""
    best = 0
    for i, row in enumerate(rows):
        best = i if row[scorer] > rows[best][scorer] else best
        if i - best >= PATIENCE:
            return row["batches"], rows[best]["batches"]
    return rows[-1]["batches"], rows[best]["batches"]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Three panels over batches: the trained reward, the truth, and diversity."""
    panels = [
        (TRAINED, "PickScore (trained on)", "#d55e00"),
        ("oracle", "oracle (the truth)", "#0072b2"),
        ("vendi", "Vendi score (diversity)", "#009e73"),
    ]
    figure = Figure(figsize=(10.2, 3.3), layout="constrained")
    x, stop = [row["batches"] for row in rows], stopped(rows, "oracle")[1]
    for axes, (key, label, colour) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.plot(x, [row[key] for row in rows], "o-", color=colour, lw=2, ms=4)
        if f"{key}_ci95" in rows[0]:
            low, high = zip(*(row[f"{key}_ci95"] for row in rows), strict=True)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        axes.axvline(stop, color="#667085", lw=1, ls=(0, (4, 3)))
        axes.set(title=label, xlabel="batches")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e7ec")
    figure.axes[1].annotate("best", (stop, figure.axes[1].get_ylim()[0]), (4, 4), textcoords="offset points")
    figure.savefig(path, dpi=130)


def written(rows: list[dict[str, Any]]) -> str:
    """The table and what early stopping would have done, in Markdown."""
    names = (TRAINED, *VALIDATION, "vendi")
    lines = ["| batches | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        cells = " | ".join(f"{row[name]:.3f}" for name in names)
        lines.append(f"| {row['batches']} | {cells} |")
    stops = [
        f"- {name}: stops after {at} batches and keeps those of {best}"
        for name in VALIDATION
        for at, best in [stopped(rows, name)]
    ]
    head = "# AlignProp, run too long\n\n![curves](overoptimisation.png)\n\n" + __doc__.split("\n\n", 2)[2]
    return f"{head}\n" + "\n".join(lines) + f"\n\nWith patience {PATIENCE}:\n\n" + "\n".join(stops) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=320)
    parser.add_argument("--every", type=int, default=40, help="batches from one look to the next")
    options = parser.parse_args()
    rows = run(options.batches, options.every)
    reports = ROOT / "reports"
    (reports / "overoptimisation.json").write_text(json.dumps(rows, indent=2) + "\n")
    (reports / "overoptimisation.md").write_text(written(rows))
    plot(rows, reports / "overoptimisation.png")


if __name__ == "__main__":
    main()
