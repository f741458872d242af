"""What a search is worth: default settings, a TPE search's and a full-length grid's, on the test prompts.

    PYTHONPATH=src python benchmarks/search.py dpo spo

Of the profile in params.yaml, after `dvc repro prepare` (and train_preference, for spo). For each run: a TPE search of
12 short trials (`short`), and with its finalists in full, as `search.<run>` has it (`tpe`); a grid of 4 x 3 full
trainings over the same ranges; then the default and each one's best are trained in full and paint the test prompts. The
searches see validation prompts and their own scorer alone; the judge is the oracle, which none asks. Writes
reports/search.md and .json; goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from attune.config.check import load, method_of, read_params
from optuna.trial import TrialState

from attune import tracking
from attune.build import load_policy, load_scorer
from attune.config.profile import Params, Profile
from attune.config.search import Config
from attune.evaluation.statistics import Comparison, compare_paired
from attune.finetune import align, validation_scores
from attune.search.space import with_values
from attune.search.sweep import sweep
from attune.search.trial import stack_scorers
from attune.stages.generate import held_out_index
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
    params, profile = load()
    params = params.model_copy(update={"tracking": None})
    found = {run: measured(run, params, profile) for run in given.runs}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "search.json").write_text(json.dumps(found, indent=2) + "\n")
    (given.out / "search.md").write_text(document(found, params.profile))


def measured(run: str, params: Params, profile: Profile) -> dict[str, Any]:
    """The searches of a run, a training of each one's best, and how their images compare."""
    folder = WORK / params.profile / run
    block = dict(profile.search[run])
    tpe = block | {"sampler": "tpe", "trials": TRIALS, "workers": WORKERS}
    searches = {
        "short": tpe | {"finalists": 0},
        "tpe": tpe,  # the same study, which goes on
        "grid": block | {"space": grid(block), "sampler": "grid", "pruner": "none", "trials": None}
        | {"fixed": {}, "finalists": 0, "workers": WORKERS},
    }  # fmt: skip
    result: dict[str, Any] = {"searches": {}, "settings": {"default": {}}, "scores": {}, "comparisons": {}}
    for name, search in searches.items():
        changed = profile.model_copy(update={"search": {run: search}})
        result["searches"][name] = timed(run, params, changed, folder / name)
        result["settings"][name] = read_params(folder / name / "best_params.yaml")["params"]
    for seconds in ("wall_seconds", "cpu_seconds"):
        result["searches"]["tpe"][seconds] += result["searches"]["short"][seconds]
    scores = {name: judged(run, params, profile, folder, name, values) for name, values in result["settings"].items()}
    result["settings"]["default"] = {key: profile.methods[run][key] for key in block["space"]}
    result["scores"] = {name: dict(zip(JUDGES, s.mean(axis=0).tolist(), strict=True)) for name, s in scores.items()}
    for i, judge in enumerate(JUDGES):
        result["comparisons"][judge] = {
            f"{a} - {b}": vars(compare_paired(scores[a][:, i], scores[b][:, i])) for a, b in PAIRS
        }  # fmt: skip
    return result


def grid(block: dict[str, Any]) -> dict[str, Any]:
    """Four values of the first key, three of the second, evenly over the logarithm of the same ranges."""
    space = Config.model_validate(block).space
    points = {}
    for (key, dimension), n in zip(space.items(), GRID, strict=True):
        points[key] = {"choices": [float(f"{v:.3g}") for v in np.geomspace(dimension.low, dimension.high, n)]}
    return points


def timed(run: str, params: Params, profile: Profile, report: Path) -> dict[str, Any]:
    """Runs a search to its end; what it took, over all sessions that were not killed."""
    file, begun, cpu = report / "seconds.json", time.time(), children_seconds()
    spent = json.loads(file.read_text()) if file.exists() else {"wall_seconds": 0.0, "cpu_seconds": 0.0}
    try:
        study = sweep(sweep_plan(run, params, profile, report))
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


def judged(run: str, params: Params, profile: Profile, folder: Path, name: str, values: dict[str, Any]) -> np.ndarray:
    """Scores (prompts, judges) of a full-length training's images of the test prompts; kept for the next session."""
    file, model = folder / f"{name}.npy", folder / f"{name}.model"
    note = folder / f"{name}.settings.json"
    block = with_values(profile.methods[run], values)
    if file.exists() and json.loads(note.read_text()) == json.loads(json.dumps(block)):
        return np.load(file)
    changed = profile.model_copy(update={"methods": {**profile.methods, run: block}})
    align(run, method_of(run, params), changed, tracking.Run(), model, previews=0)
    policy = load_policy(changed)
    policy.load(str(model))
    scorer = stack_scorers([load_scorer(judge, changed) for judge in JUDGES])
    index = held_out_index(changed).drop_duplicates("prompt")
    scores = validation_scores(policy, changed.generate.sampling, changed.seed, scorer, index.prompt.tolist())
    note.write_text(json.dumps(block))
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
