"""One trial: a short training with the settings drawn, and what scorers then say of validation prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from filelock import FileLock

from attune import tracking
from attune.config import plugins
from attune.config.profile import Profile
from attune.config.schema import ConfigError, check
from attune.config.search import Config
from attune.search.space import drawn, settings
from attune.search.study import patiently

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from attune.interfaces import Reward

WATCHING = ("median", "hyperband")  # pruners that stop a training


@dataclass(frozen=True)
class Trial:
    """Called with an Optuna trial, trains and scores it; a value, for it is sent to the workers."""

    run: str  # the block of profile.methods
    uses: str  # its method
    profile: Profile
    search: Config
    folder: Path  # for models: of the trials at work, and the best
    tags: dict[str, str] = field(default_factory=dict)
    parent: str | None = None  # tracking run of the sweep
    tracking: str | None = None
    root: Path | None = None
    final: bool = False  # of the last round: a training as the pipeline runs it

    def in_full(self, study: str) -> Trial:
        """The objective of the last round, a study of its own."""
        search = self.search.model_copy(update={"fixed": {}, "pruner": "none"})
        tags = {**self.tags, "study": study, "round": "final"}
        return replace(self, search=search, folder=self.folder.with_name(study), tags=tags, final=True)

    def __call__(self, trial: optuna.Trial) -> list[float]:
        """Mean scores over the validation prompts, one per objective.

        The scores of single prompts are kept as the trial's attribute `scores`.

        Raises:
            optuna.TrialPruned: the pruner has seen enough.
            RuntimeError: the method refuses these settings together, or the training came to nothing.
        """
        values = drawn(trial.params)
        profile = self.with_settings(values)
        model = self.folder / str(trial.number)
        tags = {**self.tags, "trial": str(trial.number)}
        name = f"{self.run} final {trial.number}" if self.final else f"{self.run} {trial.number}"
        told = {"methods": {self.uses: profile.methods[self.run]}}  # all of them: trials are compared with trainings
        try:
            with tracking.trial(
                name, told, tags=tags, parent=self.parent, uri=self.tracking, root=self.root
            ) as tracked:
                scores = self.train_and_score(trial, profile, model, tracked)
                means = scores.mean(axis=0).tolist()
                tracked.summary({"score": means[0], **dict(zip(self.search.objectives, means, strict=True))})
            keep_if_best(model, self.folder / "best", {"trial": trial.number, "score": means[0], "params": values})
        finally:
            shutil.rmtree(model, ignore_errors=True)
        return means

    def with_settings(self, values: dict[str, Any]) -> Profile:
        """The profile with the run's block as this trial trains it."""
        search = self.search
        block = settings(self.profile.methods[self.run], search.fixed, values)
        if not self.final:
            block["validation"] = None
        if search.pruner in WATCHING:
            block["validation"] = {
                "scorer": search.objectives[0],
                "prompts": search.prompts,
                "sampling": self.profile.generate.sampling.model_dump(),
                "every": interval(search, block["batches"]),
                "at_start_and_end": False,
            }
        try:
            check(plugins.config_class("methods", self.uses), block, self.run)
        except ConfigError as error:
            raise RuntimeError(f"{values} do not go together: {error}") from None
        return self.profile.model_copy(update={"methods": {**self.profile.methods, self.run: block}})

    def train_and_score(self, trial: optuna.Trial, profile: Profile, model: Path, tracked: tracking.Run) -> np.ndarray:
        """Trains, with the model in `model`, and returns scores (prompts, objectives)."""
        import numpy as np

        from attune.build import load_policy, load_scorer
        from attune.finetune import align, validation_prompts, validation_scores

        def report(batch: int, score: float) -> None:
            tell(trial, {batch: score})

        align(self.run, self.uses, profile, tracked, model, report=report, previews=0)
        policy = load_policy(profile)
        policy.load(str(model))
        scorer = together([load_scorer(name, profile) for name in self.search.objectives])
        prompts, scores = validation_prompts(self.search.prompts), []
        paired = self.search.pruner == "wilcoxon"
        chunk = quarter(len(prompts)) if paired else len(prompts)
        for start in range(0, len(prompts), chunk):
            part = validation_scores(
                policy, profile.generate.sampling, profile.seed, scorer, prompts[start : start + chunk]
            )
            if not np.isfinite(part).all():
                raise RuntimeError("a scorer gave something that is not a number")
            scores.append(part)
            patiently(trial.set_user_attr, "prompts", start + len(part))
            if paired:
                tell(trial, dict(enumerate(part[:, 0].tolist(), start + 1)))
        found = np.concatenate(scores)
        kept = dict(zip(self.search.objectives, found.T.round(6).tolist(), strict=True))
        patiently(trial.set_user_attr, "scores", kept)
        return found


def tell(trial: optuna.Trial, reports: Mapping[int, float]) -> None:
    """Reports values by step, then ends the trial if the pruner says so."""
    for step, value in reports.items():
        patiently(trial.report, value, step)
    if patiently(trial.should_prune):
        raise optuna.TrialPruned


def together(scorers: Sequence[Reward]) -> Callable[..., Tensor]:
    """Scorers as one, whose scores are (images, scorers): images are painted once for all of them."""
    import torch

    return lambda pixels, prompts: torch.stack([scorer(pixels, prompts).cpu() for scorer in scorers], dim=1)


def interval(search: Config, batches: int) -> int:
    """Batches between the held-out scores of a training of so many."""
    return search.every or quarter(batches)


def quarter(n: int) -> int:
    """A quarter, rounded up."""
    return -(-n // 4)


def keep_if_best(model: Path, best: Path, facts: dict[str, Any]) -> None:
    """Moves a trial's model to `best` if its score is the highest of this host's so far, beside its facts."""
    with FileLock(best.with_suffix(".lock")):
        note = best / "trial.json"
        if note.exists() and json.loads(note.read_text())["score"] >= facts["score"]:
            return
        shutil.rmtree(best, ignore_errors=True)
        model.rename(best)
        note.write_text(json.dumps(facts, indent=2) + "\n")
