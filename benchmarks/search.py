"""What a search is worth: default settings, a TPE search's and a full-length grid's, on the test prompts.

    PYTHONPATH=src python benchmarks/search.py dpo spo

Of the profile in params.yaml, after `dvc repro prepare` (for spo: `dvc repro train_preference`). For each run: a TPE
search of 12 short trials (`short`); the same with its finalists trained in full, as `search.<run>` has it (`tpe`); a
grid of 4 x 3 full trainings over the same ranges (`grid`). Then the default and the best settings of each search are
trained in full, and their images of the test prompts are scored. The searches see validation prompts and their own
scorer alone; no search sees the oracle. Writes reports/search.md and .json; goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from optuna.trial import TrialState
from plans import plans_of, prompts_of_report, with_method_settings

from attune import tracking
from attune.build import load_policy, load_scorer
from attune.config.plan import EvaluatePlan, GeneratePlan, RunPlan, SearchPlan, plan_file
from attune.config.resolve import Settings, load, read_yaml
from attune.config.schema import check
from attune.config.search import Config
from attune.evaluation.statistics import Comparison, compare_paired
from attune.finetune import finetune, validation_scores
from attune.paths import BEST_SETTINGS
from attune.search.space import current_settings, with_values
from attune.search.sweep import sweep
from attune.search.trial import stack_scorers
from attune.stages.sweep import sweep_plan

WORK = Path(".checkpoints/benchmark-search")
JUDGES = ("oracle", "hpsv2")
TRIALS, WORKERS, GRID = 12, 2, (4, 3)
PAIRS = (("tpe", "default"), ("tpe", "grid"), ("grid", "default"), ("short", "default"), ("short", "grid"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="blocks of the profile's search")
    parser.add_argument("--out", type=Path, default=Path("reports"))
    given = parser.parse_args()
    settings = load()
    found = {run: compared(run, settings) for run in given.runs}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "search.json").write_text(json.dumps(found, indent=2) + "\n")
    (given.out / "search.md").write_text(document(found, settings.profile))


def compared(run: str, settings: Settings) -> dict[str, Any]:
    """The searches of a run, a training with each one's best settings, and how their images compare."""
    folder, space = WORK / settings.profile / run, settings.search[run].space
    result: dict[str, Any] = {"searches": {}, "settings": {"default": {}}, "scores": {}, "comparisons": {}}
    for name, search in searches(settings.search[run]).items():
        plan = plans_of(replace(settings, search={run: search}))[plan_file("sweep", run)]
        result["searches"][name] = timed(plan, folder / name)
        result["settings"][name] = read_yaml(folder / name / BEST_SETTINGS)["params"]
    for seconds in ("wall_seconds", "cpu_seconds"):
        result["searches"]["tpe"][seconds] += result["searches"]["short"][seconds]
    plans = plans_of(settings)
    training, generating, evaluating = (plans[plan_file(stage, run)] for stage in ("align", "generate", "evaluate"))
    scores = {
        name: test_scores(
            with_values(training.method.settings, values), training, generating, evaluating, folder / name
        )
        for name, values in result["settings"].items()
    }
    result["settings"]["default"] = current_settings(space, settings.methods[run])
    result["scores"] = {name: dict(zip(JUDGES, s.mean(axis=0).tolist(), strict=True)) for name, s in scores.items()}
    for i, judge in enumerate(JUDGES):
        result["comparisons"][judge] = {
            f"{a} - {b}": vars(compare_paired(scores[a][:, i], scores[b][:, i])) for a, b in PAIRS
        }  # fmt: skip
    return result


def searches(search: Config) -> dict[str, Config]:
    """The searches that are compared, from the profile's block; `tpe` is the same study as `short`, which goes on."""
    block = search.model_dump()
    tpe = block | {"sampler": "tpe", "trials": TRIALS, "workers": WORKERS}
    full = {"sampler": "grid", "pruner": "none", "trials": None, "fixed": {}, "finalists": 0, "workers": WORKERS}
    found = {"short": tpe | {"finalists": 0}, "tpe": tpe, "grid": block | {"space": grid(search)} | full}
    return {name: check(Config, values, f"search ({name})") for name, values in found.items()}


def grid(search: Config) -> dict[str, Any]:
    """Four values of the first key, three of the second, evenly over the logarithm of the same ranges."""
    points = {}
    for (key, dimension), n in zip(search.space.items(), GRID, strict=True):
        points[key] = {"choices": [float(f"{v:.3g}") for v in np.geomspace(dimension.low, dimension.high, n)]}
    return points


def timed(plan: SearchPlan, report: Path) -> dict[str, Any]:
    """Runs a search to its end; what it took, over all sessions that were not killed."""
    file, begun, cpu = report / "seconds.json", time.time(), children_seconds()
    spent = json.loads(file.read_text()) if file.exists() else {"wall_seconds": 0.0, "cpu_seconds": 0.0}
    try:
        study = sweep(replace(sweep_plan(plan, report), tracking=None))
    finally:
        report.mkdir(parents=True, exist_ok=True)
        if not file.exists() or children_seconds() - cpu > 1:  # a search that was over has started no process
            spent = {
                "wall_seconds": round(spent["wall_seconds"] + time.time() - begun, 1),
                "cpu_seconds": round(spent["cpu_seconds"] + children_seconds() - cpu, 1),
            }
            file.write_text(json.dumps(spent) + "\n")
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    finals = report / "finals.csv"
    in_full = len(pd.read_csv(finals)) if finals.exists() else 0
    return {"trials": len(states), "pruned": states.count(TrialState.PRUNED), "finals": in_full, **spent}


def children_seconds() -> float:
    """CPU seconds of the processes that this one has started and seen end."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_scores(
    values: Mapping[str, Any], training: RunPlan, generating: GeneratePlan, evaluating: EvaluatePlan, place: Path
) -> np.ndarray:
    """Scores (prompts, judges) of the images of test prompts after a full training with these settings.

    Args:
        place: path without ending of what is kept for the next session: model, settings and scores.
    """
    file, model, note = (place.with_name(place.name + end) for end in (".npy", ".model", ".settings.json"))
    if file.exists() and json.loads(note.read_text()) == json.loads(json.dumps(values)):
        return np.load(file)
    finetune(with_method_settings(training, values), tracking.Run(), model, samples=0)
    policy = load_policy(training.model)
    policy.load(str(model))
    scorer = stack_scorers([load_scorer(evaluating.scorers[judge]) for judge in JUDGES])
    prompts = prompts_of_report(generating)
    scores = validation_scores(policy, generating.generate.sampling, generating.seed, scorer, prompts)
    note.write_text(json.dumps(values))
    np.save(file, scores)
    return scores


def document(found: dict[str, Any], profile: str) -> str:
    """The tables, for people."""
    lines = [f"# What a search is worth (profile `{profile}`)", ""]
    lines += [
        "Made by `benchmarks/search.py`. The searches saw validation prompts and their own scorer. Scores are means",
        "over the test prompts, differences have 95 % bootstrap intervals over prompts; CPU s: all workers.",
        "",
    ]
    for run, result in found.items():
        lines += [f"## {run}", "", "| search | trials | pruned | finals | wall s | CPU s |"]
        lines.append("|---|---|---|---|---|---|")
        for name, s in result["searches"].items():
            counts = f"{s['trials']} | {s['pruned']} | {s['finals']}"
            lines.append(f"| {name} | {counts} | {s['wall_seconds']:.0f} | {s['cpu_seconds']:.0f} |")
        lines += ["", f"| settings | values | {' | '.join(JUDGES)} |", "|---|---|---|---|"]
        for name, values in result["settings"].items():
            said = ", ".join(f"{key} {value:g}" for key, value in values.items())
            means = " | ".join(f"{result['scores'][name][judge]:.4f}" for judge in JUDGES)
            lines.append(f"| {name} | {said} | {means} |")
        lines += ["", f"| difference | {' | '.join(JUDGES)} |", "|---|---|---|"]
        for pair in next(iter(result["comparisons"].values())):
            said = " | ".join(difference(Comparison(**result["comparisons"][judge][pair])) for judge in JUDGES)
            lines.append(f"| {pair} | {said} |")
        lines.append("")
    return "\n".join(lines)


def difference(found: Comparison) -> str:
    low, high = found.difference_ci95
    return f"{found.difference:+.4f} [{low:+.4f}, {high:+.4f}]"


if __name__ == "__main__":
    main()
