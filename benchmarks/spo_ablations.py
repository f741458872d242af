"""SPO's own ablations in the embedded world: the candidate a rollout continues from, and the preference model.

    PYTHONPATH=src python benchmarks/spo_ablations.py --seeds 0 1 2

Liang et al. 2024 (arXiv:2406.04314) find, for SD 1.5: continuing from a random candidate beats continuing from the best
or the worst; a preference model that knows the timestep beats one that does not, and plain PickScore does worse than no
training. Each row here is one whole pipeline run with that one setting changed; all see the same prompts and noise.
Runs are tracked in this repository's MLflow store. Writes reports/spo_ablations.md and .json; goes on where it was
stopped, if the code is still the same (`--work` is where the copies are).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import pandas as pd
from copies import ROOT, active_profile, repro_in_copy

from attune.evaluation.statistics import bootstrap_mean_ci, wilcoxon_p
from attune.paths import Paths

BASE, SPO = {"after": "data"}, {"method": "spo", "after": "preference"}
# name of the copy -> changed values of the profile
COPIES = {"timed": {}, "untimed": {"preference.step_aware": False}, "plain": {"preference.batches": 0}}
# row -> (copy, run in it)
ROWS = {
    "SPO": ("timed", "spo"),
    "continues from the best": ("timed", "spo_chosen"),
    "continues from the worst": ("timed", "spo_rejected"),
    "preference model without t": ("untimed", "spo"),
    "plain PickScore": ("plain", "spo"),
}
SCORERS = ("oracle", "pickscore", "hpsv2")


def run_seed(seed: int, work: Path) -> list[dict]:
    """The rows of one seed; the copies share a cache, so data and base are made once."""
    spo = active_profile()[1]["methods"].get("spo", {})
    for copy, changes in COPIES.items():
        runs, values = {"base": BASE, "spo": SPO}, {"seed": seed, **changes}
        if copy == "timed":
            for continuation in ("chosen", "rejected"):
                runs[f"spo_{continuation}"] = SPO
                values[f"methods.spo_{continuation}"] = {**spo, "continuation": continuation}
        repro_in_copy(work / f"{copy}{seed}", values, runs, cache=work / "cache", tracked=True)
    return [{"seed": seed, "variant": row, **compared(seed, row, work)} for row in ROWS]


def compared(seed: int, row: str, work: Path) -> dict:
    """Means, and paired differences to base and to SPO as the paper has it, over the same prompts."""

    def scores(name: str) -> pd.DataFrame:
        copy, run = ("timed", "base") if name == "base" else ROWS[name]
        frame = pd.read_parquet(work / f"{copy}{seed}" / Paths(active_profile()[0]).scores(run))
        return frame.groupby("prompt")[list(SCORERS)].mean()

    mine, found = scores(row), {}
    for scorer in SCORERS:
        found[scorer] = {"mean": float(mine[scorer].mean())}
        for other in ("base", "SPO"):
            difference = (mine[scorer] - scores(other)[scorer]).to_numpy()
            found[scorer][f"vs_{other.lower()}"] = {
                "difference": float(difference.mean()),
                "ci95": [float(x) for x in bootstrap_mean_ci(difference, seed=seed)],
                "p": wilcoxon_p(difference) if difference.any() else 1.0,
            }
    return found


def table(results: list[dict], scorer: str) -> str:
    """Markdown: a row per seed and variant."""
    rows = ["| seed | variant | mean | against base, 95 % CI | against SPO, 95 % CI |", "|---|---|---|---|---|"]
    for result in results:
        found = result[scorer]
        cells = [
            f"{found[other]['difference']:+.3f} [{found[other]['ci95'][0]:+.3f}, {found[other]['ci95'][1]:+.3f}]"
            for other in ("vs_base", "vs_spo")
        ]
        rows.append(f"| {result['seed']} | {result['variant']} | {found['mean']:.3f} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "attune-spo-ablations")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in options.seeds:
        results += run_seed(seed, options.work)
        (ROOT / "reports" / "spo_ablations.json").write_text(json.dumps(results, indent=2) + "\n")
        parts = [f"## {scorer}\n\n{table(results, scorer)}\n" for scorer in SCORERS]
        text = "# SPO's ablations\n\n" + __doc__.split("\n\n", 2)[2] + "\n" + "\n".join(parts)
        (ROOT / "reports" / "spo_ablations.md").write_text(text)


if __name__ == "__main__":
    main()
