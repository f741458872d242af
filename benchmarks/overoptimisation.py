"""What happens when AlignProp is run too long: the trained reward, held-out scorers and diversity, every 40 batches.

    PYTHONPATH=src python benchmarks/overoptimisation.py --batches 320

The profile's settings of `alignprop` with another number of batches, on its prepared data (`dvc repro prepare` first),
with the test prompts of the report. Also tells where `validation: {scorer: ..., patience: 2}` would have stopped.
Writes reports/overoptimisation.md, .json and .png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from plans import plans_of, prompts_of_report
from torch import Tensor

from attune.build import build_method, load_learner, load_scorer
from attune.config.plan import GeneratePlan, RunPlan, plan_file
from attune.config.profile import DATA, Run
from attune.config.resolve import Settings, load
from attune.diffusion.generate import generate_images
from attune.diffusion.policy import Policy
from attune.evaluation.diversity import pairwise_distance, vendi
from attune.evaluation.statistics import bootstrap_mean_ci
from attune.finetune import training_batches
from attune.interfaces import Reward
from attune.paths import Paths
from attune.training.early_stopping import EarlyStopping
from attune.training.loop import Callbacks, train

ROOT = Path(__file__).resolve().parents[1]
METHOD, TRAINED, VALIDATION, PATIENCE = "alignprop", "pickscore", ("hpsv2", "aesthetic", "oracle"), 2


def measure(policy: Policy, plan: GeneratePlan, prompts: list[str], scorers: Mapping[str, Reward]) -> dict[str, Any]:
    """Mean score by each scorer with its 95 % CI, and diversity, of one image per prompt."""
    images = generate_images(policy, prompts, [0] * len(prompts), plan.generate.sampling, plan.seed, None)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    row: dict[str, Any] = {}
    with torch.no_grad():
        for name, scorer in scorers.items():
            scores = torch.cat([scorer(*rows).cpu() for rows in batched(pixels, prompts)]).double().numpy()
            row[name] = float(scores.mean())
            row[f"{name}_ci95"] = [float(x) for x in bootstrap_mean_ci(scores)]
        features = torch.cat([scorers["aesthetic"].features(rows).cpu() for rows, _ in batched(pixels, prompts)])
    return row | {"pairwise_distance": pairwise_distance(features.numpy()), "vendi": vendi(features.numpy())}


def batched(pixels: Tensor, prompts: list[str], size: int = 32) -> list[tuple[Tensor, list[str]]]:
    starts = range(0, len(prompts), size)
    return [(pixels[start : start + size], prompts[start : start + size]) for start in starts]


def with_batches(settings: Settings, batches: int) -> Settings:
    """The settings with a run of AlignProp that has so many batches and is not validated."""
    config = settings.methods[METHOD].model_copy(update={"batches": batches, "validation": None})
    runs = {**settings.runs, METHOD: Run(method=METHOD, after=DATA)}
    return replace(settings, runs=runs, methods={**settings.methods, METHOD: config})


def run(batches: int, every: int) -> list[dict[str, Any]]:
    """Trains and measures; a row per measurement."""
    settings = with_batches(load(), batches)
    plans, paths = plans_of(settings), Paths(settings.profile)
    torch.set_num_threads(settings.threads)
    plan: RunPlan = plans[plan_file("align", METHOD)]
    policy = load_learner(plan.method.config, plan.model, plan.seed)
    method = build_method(plan.method, policy, paths.preference, plan.scorers)
    generating, known = plans[plan_file("generate", METHOD)], plans[plan_file("evaluate", METHOD)].scorers
    scorers = {name: load_scorer(known[name]) for name in (TRAINED, *VALIDATION)}
    prompts = prompts_of_report(generating)
    rows: list[dict[str, Any]] = []

    def score() -> float:
        rows.append(measure(policy, generating, prompts, scorers))
        return rows[-1]["oracle"]

    _, batch = training_batches(method, paths.prepared, policy.device, plan.seed)
    _, scores = train(
        method,
        policy,
        batch,
        seed=plan.seed,
        early_stopping=EarlyStopping(score, every),
        callbacks=Callbacks(METHOD),
    )
    return [{"batches": taken["batch"], **row} for taken, row in zip(scores, rows, strict=True)]


def stopping_point(rows: list[dict[str, Any]], scorer: str) -> tuple[int, int]:
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
    x, stop = [row["batches"] for row in rows], stopping_point(rows, "oracle")[1]
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


def document(rows: list[dict[str, Any]]) -> str:
    """The table and what early stopping would have done, in Markdown."""
    names = (TRAINED, *VALIDATION, "vendi")
    lines = ["| batches | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        cells = " | ".join(f"{row[name]:.3f}" for name in names)
        lines.append(f"| {row['batches']} | {cells} |")
    stops = [
        f"- {name}: stops after {at} batches and keeps those of {best}"
        for name in VALIDATION
        for at, best in [stopping_point(rows, name)]
    ]
    head = "# AlignProp, run too long\n\n![curves](overoptimisation.png)\n\n" + __doc__.split("\n\n", 2)[2]
    return f"{head}\n" + "\n".join(lines) + f"\n\nWith patience {PATIENCE}:\n\n" + "\n".join(stops) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=320)
    parser.add_argument("--every", type=int, default=40, help="batches from one measurement to the next")
    options = parser.parse_args()
    rows = run(options.batches, options.every)
    reports = ROOT / "reports"
    (reports / "overoptimisation.json").write_text(json.dumps(rows, indent=2) + "\n")
    (reports / "overoptimisation.md").write_text(document(rows))
    plot(rows, reports / "overoptimisation.png")


if __name__ == "__main__":
    main()
