"""The candidate for champion of the model registry: the best run of a report, and the evidence for it.

What the registry does with it is in `attune.tracking.promote`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from attune.evaluation.protocol import Protocol, assert_comparable, read_scores
from attune.evaluation.statistics import Comparison, compare_paired, cross_fitted_choice, prompt_means
from attune.evaluation.summary import Summary
from attune.files import digest


class NoCandidate(LookupError):
    """No run of the report is better than the base."""


@dataclass(frozen=True)
class Candidate:
    """A run with the files it would be registered with."""

    run: str
    scorer: str  # the headline scorer, by which it is the best run
    difference: float  # mean difference to the base by that scorer
    protocol: Protocol
    adapter: Path  # folder
    scores: Path  # parquet
    chosen_from: tuple[Path, ...]  # score tables of the runs it is the best of, its own among them

    @property
    def tags(self) -> dict[str, str]:
        """What a registered version says of itself; `adapter` and `protocol` identify it."""
        return {
            "run": self.run,
            "headline": self.scorer,
            "protocol": self.protocol.sha,
            "adapter": digest(self.adapter),
            "difference": f"{self.difference:.6g}",
        }


def find_candidate(reports: Path, models: Path) -> Candidate:
    """The best run of reports/summary.json among those trained here.

    Args:
        reports: folder with summary.json and scores/<run>.parquet.
        models: folder of the trained runs' folders; released models of the report have none and are no candidates.

    Raises:
        NoCandidate: no such run is better than the base.
        FileNotFoundError: there is no report, or no adapter of the best run.
        ValueError: scores and summary are of different protocols, or the run is no adapter.
    """
    path = reports / "summary.json"
    summary = Summary.from_json(path.read_text())
    runs = [name for name in summary.tuned if _is_trained_here(models / name)]
    run = best_run(summary, runs)
    if run is None:
        raise NoCandidate(f"no run of the report is better than {summary.base} by {summary.headline} beyond doubt")
    adapter = find_adapter(models / run)
    scores = reports / "scores" / f"{run}.parquet"
    _, protocol = read_scores(scores)
    if protocol != summary.protocol:
        raise ValueError(f"{scores} and {path} are of different protocols: `dvc repro` first")
    difference = summary.methods[run].vs_base[summary.headline].difference
    chosen_from = tuple(reports / "scores" / f"{name}.parquet" for name in runs)
    return Candidate(run, summary.headline, difference, protocol, adapter, scores, chosen_from)


def _is_trained_here(folder: Path) -> bool:
    """Whether a run's folder holds what a method has trained, by its run.json."""
    note = folder / "run.json"
    return note.exists() and json.loads(note.read_text())["method"] is not None


def best_run(summary: Summary, runs: Iterable[str]) -> str | None:
    """The run farthest above the base by the headline scorer, of those that the report calls better."""
    entries = {name: summary.methods[name].vs_base[summary.headline] for name in runs}
    better = [name for name, entry in entries.items() if entry.evidence == "better"]
    return max(better, key=lambda name: entries[name].difference, default=None)


def find_adapter(folder: Path) -> Path:
    """The folder of a run's LoRA.

    Raises:
        ValueError: all weights were trained, and MLflow's diffusers flavor is of adapters.
        FileNotFoundError: there is nothing.
    """
    from attune.diffusion.lora_files import PARTS  # here, as it imports diffusers

    if any(folder.glob("*.safetensors")):
        return folder
    if any((folder / part).is_dir() for part in PARTS):
        raise ValueError(
            f"{folder.name} is a whole denoiser; only adapters (`lora`) can be registered, share {folder} by DVC"
        )
    raise FileNotFoundError(f"no adapter in {folder}: `dvc repro` or `dvc pull` first")


def compare_with(candidate: Candidate, champion_scores: Path, *, seed: int) -> Comparison:
    """The candidate against the champion, prompt by prompt, by the headline scorer.

    The candidate is the best of several runs on these very prompts. So what is compared with the champion is, for each
    half of the prompts, the run that is best on the other half (`statistics.cross_fitted_choice`); where that is the
    candidate both times, this is the plain comparison.

    Args:
        champion_scores: score table of the champion, under the candidate's protocol.
        seed: of the bootstrap.

    Raises:
        ValueError: naming what differs, where the protocols do.
    """
    theirs, protocol = read_scores(champion_scores)
    assert_comparable({"candidate": candidate.protocol, "champion": protocol})
    runs = np.stack([_per_prompt(read_scores(file)[0], candidate.scorer) for file in candidate.chosen_from])
    return compare_paired(
        cross_fitted_choice(runs, by=runs) if runs.shape[1] > 1 else runs[0],
        _per_prompt(theirs, candidate.scorer),
        seed=seed,
    )


def _per_prompt(frame: pd.DataFrame, scorer: str) -> np.ndarray:
    """Scores (n,) of the prompts, sorted: one protocol means the same prompts."""
    return prompt_means(frame[scorer].to_numpy(dtype=float), frame["prompt"])[0]
