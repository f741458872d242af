"""Does a gain survive another seed? Runs the whole pipeline once per seed and tables the headline scorer.

    PYTHONPATH=src python benchmarks/seeds.py --seeds 0 1 2 --jobs 2

Each seed gets a copy of the repository, so data, preference model, training and evaluation noise all differ; the
test combinations stay unseen in every one. Writes reports/seeds.md and reports/seeds.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from copies import ROOT, repro_in_copy


def run_seed(seed: int, work: Path) -> dict:
    """Runs the pipeline with one seed; returns its summary and the seconds it took."""
    started = time.monotonic()
    reports = repro_in_copy(work / f"seed{seed}", {"seed": seed})
    summary = json.loads((reports / "summary.json").read_text())
    accuracy = json.loads((reports / "train" / "preference.json").read_text())["accuracy_by_t"]
    return {
        "seed": seed,
        "seconds": round(time.monotonic() - started),
        "summary": summary,
        "accuracy_by_t": accuracy,
    }


def table(results: list[dict], scorer: str = "oracle") -> str:
    """Markdown: a row per seed and method."""
    rows = [
        "| seed | method | mean | difference to base, 95 % CI | win rate | p |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        for name, entry in result["summary"]["methods"].items():
            mean = entry["scores"][scorer]["mean"]
            if scorer not in entry["vs_base"]:
                rows.append(f"| {result['seed']} | {name} | {mean:.3f} | | | |")
                continue
            versus = entry["vs_base"][scorer]
            low, high = versus["difference_ci95"]
            rows.append(
                f"| {result['seed']} | {name} | {mean:.3f} | {versus['difference']:+.3f} [{low:+.3f}, {high:+.3f}] "
                f"| {versus['win_rate']:.2f} | {versus['p_value']:.1e} |"
            )
    return "\n".join(rows)


def accuracy_table(results: list[dict]) -> str:
    """Markdown: accuracy of the step-aware and of the untimed preference model by timestep and seed."""
    curves = [result["accuracy_by_t"] for result in results]
    rows = [
        "| t | " + " | ".join(f"seed {result['seed']}" for result in results) + " | mean |",
        "|---" * (len(results) + 2) + "|",
    ]
    for i, t in enumerate(curves[0]["spm"]["t"]):
        cells = [[curve[model]["accuracy"][i] for model in ("spm", "untimed")] for curve in curves]
        cells.append([sum(column) / len(curves) for column in zip(*cells, strict=True)])
        rows.append(f"| {t} | " + " | ".join(f"{timed:.3f} / {untimed:.3f}" for timed, untimed in cells) + " |")
    return "\n".join(rows)


HEAD = """# Seeds

The whole pipeline once per seed (`benchmarks/seeds.py`); oracle, test prompts of unseen combinations.

{table}

Preference model: how often it picks the truly better of two held-out images, seen as one-step predictions at t;
step-aware / untimed (the PickScore-style CLIP it started from).

{accuracy}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, one core each")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "attune-seeds")
    options = parser.parse_args()
    shutil.rmtree(options.work, ignore_errors=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda seed: run_seed(seed, options.work), options.seeds))
    (ROOT / "reports").mkdir(exist_ok=True)
    (ROOT / "reports" / "seeds.json").write_text(json.dumps(results, indent=2) + "\n")
    text = HEAD.format(table=table(results), accuracy=accuracy_table(results))
    (ROOT / "reports" / "seeds.md").write_text(text)


if __name__ == "__main__":
    main()
