"""One trial: a short training with the drawn settings, then scores of images of validation prompts."""

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
from attune.config.schema import ConfigError, check
from attune.config.search import Config
from attune.config.settings import MethodConfig
from attune.search.plan import SweepPlan
from attune.search.space import rounded_params, with_values
from attune.search.study import retry_on_outage

if TYPE_CHECKING:
    import numpy as np

    from attune.diffusion.policy import Policy
    from attune.interfaces import Reward, Score

PRUNE_TRAINING = ("median", "hyperband")  # pruners that stop a training, and so need its validation scores


@dataclass(frozen=True)
class Trial:
    """The objective: called with an Optuna trial, it trains and scores. It is sent to the workers."""

    plan: SweepPlan
    folder: Path  # of the models of running trials, and of the best
    tags: dict[str, str] = field(default_factory=dict)
    parent: str | None = None  # tracking run of the sweep
    root: Path | None = None
    full_length: bool = False  # trained as the pipeline does, without `fixed` and pruner

    def at_full_length(self, study: str) -> Trial:
        """The objective of the full-length rerun, which is a study of its own."""
        search = self.plan.search.model_copy(update={"fixed": {}, "pruner": "none"})
        tags = {**self.tags, "study": study, "round": "full"}
        plan, folder = replace(self.plan, search=search), self.folder.with_name(study)
        return replace(self, plan=plan, folder=folder, tags=tags, full_length=True)

    def __call__(self, trial: optuna.Trial) -> list[float]:
        """Mean scores over the validation prompts, one per objective.

        The scores of single prompts are kept in the trial's user attribute `scores`.

        Raises:
            optuna.TrialPruned: the pruner stops the trial.
            RuntimeError: the method does not accept these settings together, or a score is not finite.
        """
        plan, values = self.plan, rounded_params(trial.params)
        config = self.config(values)
        model = self.folder / str(trial.number)
        tags = {**self.tags, "trial": str(trial.number)}
        name = f"{plan.run} {'full ' if self.full_length else ''}{trial.number}"
        params = {"methods": {plan.method: config.model_dump()}}  # all of them, as the row of a training has
        try:
            with tracking.trial(
                name, params, tags=tags, parent=self.parent, uri=plan.tracking, root=self.root
            ) as tracked:
                scores = self.train_and_score(trial, config, model, tracked)
                means = scores.mean(axis=0).tolist()
                tracked.summary({"score": means[0], **dict(zip(plan.search.objectives, means, strict=True))})
            keep_if_best(model, self.folder / "best", {"trial": trial.number, "score": means[0], "params": values})
        finally:
            shutil.rmtree(model, ignore_errors=True)
        return means

    def config(self, values: Mapping[str, Any]) -> MethodConfig:
        """The run's settings with `fixed` and the drawn values, and the validation that the pruner needs."""
        search = self.plan.search
        settings = with_values(self.plan.config.model_dump(), {**search.fixed, **values})
        if not self.full_length:
            settings["validation"] = None
        if search.pruner in PRUNE_TRAINING:
            settings["validation"] = {
                "scorer": search.objectives[0],
                "prompts": search.prompts,
                "sampling": self.plan.sampling.model_dump(),
                "every": validation_interval(search, settings["batches"]),
                "at_start_and_end": False,
            }
        try:
            return check(type(self.plan.config), settings, self.plan.run)
        except ConfigError as error:
            raise RuntimeError(f"{values} do not go together: {error}") from None

    def train_and_score(
        self, trial: optuna.Trial, config: MethodConfig, model: Path, tracked: tracking.Run
    ) -> np.ndarray:
        """Trains, saves the model in the folder `model`, and returns scores (prompts, objectives)."""
        import numpy as np

        from attune.finetune import validation_prompts, validation_scores

        plan, search = self.plan, self.plan.search
        train(plan, config, tracked, model, lambda batch, score: report_or_prune(trial, {batch: score}))
        policy, scorer = load_trained(plan, model)
        prompts, scores = validation_prompts(plan.prepared, search.prompts), []
        paired = search.pruner == "wilcoxon"
        chunk = quarter(len(prompts)) if paired else len(prompts)
        for start in range(0, len(prompts), chunk):
            part = validation_scores(policy, plan.sampling, plan.seed, scorer, prompts[start : start + chunk])
            if not np.isfinite(part).all():
                raise RuntimeError("a scorer gave something that is not a number")
            scores.append(part)
            retry_on_outage(trial.set_user_attr, "prompts", start + len(part))
            if paired:
                report_or_prune(trial, dict(enumerate(part[:, 0].tolist(), start + 1)))
        found = np.concatenate(scores)
        by_objective = dict(zip(search.objectives, found.T.round(6).tolist(), strict=True))
        retry_on_outage(trial.set_user_attr, "scores", by_objective)
        return found


def count_prompts(plan: SweepPlan) -> int | None:
    """Validation prompts that trials are scored on; None where none are prepared, which a trial then says."""
    from attune.finetune import validation_prompts

    try:
        return len(validation_prompts(plan.prepared, plan.search.prompts))
    except FileNotFoundError:
        return None


def train(
    plan: SweepPlan, config: MethodConfig, run: tracking.Run, folder: Path, on_score: Callable[[int, float], None]
) -> None:
    """Trains with these settings and saves the model; `on_score` gets (batch, score) of each validation."""
    from attune.finetune import finetune

    method = plan.training.trained_method.model_copy(update={"settings": config.model_dump(mode="json")})
    training = plan.training.model_copy(update={"method": method, "scorers": plan.scorers})
    finetune(training, run, folder, on_score=on_score, samples=0)


def load_trained(plan: SweepPlan, folder: Path) -> tuple[Policy, Score]:
    """The trained policy, and the objectives as one scorer."""
    from attune.build import load_policy, load_scorer

    policy = load_policy(plan.training.model)
    policy.load(str(folder), may_be_zero=True)
    return policy, stack_scorers([load_scorer(plan.objectives[name]) for name in plan.search.objectives])


def report_or_prune(trial: optuna.Trial, reports: Mapping[int, float]) -> None:
    """Reports values by step, then raises TrialPruned if the pruner stops the trial."""
    for step, value in reports.items():
        retry_on_outage(trial.report, value, step)
    if retry_on_outage(trial.should_prune):
        raise optuna.TrialPruned


def stack_scorers(scorers: Sequence[Reward]) -> Score:
    """Scorers as one with scores (images, scorers), so that images are sampled once for all of them."""
    import torch

    return lambda pixels, prompts: torch.stack([scorer(pixels, prompts).cpu() for scorer in scorers], dim=1)


def validation_interval(search: Config, batches: int) -> int:
    """Batches between the validation scores of a training with so many batches."""
    return search.every or quarter(batches)


def quarter(n: int) -> int:
    """A quarter, rounded up."""
    return -(-n // 4)


def keep_if_best(model: Path, best: Path, facts: dict[str, Any]) -> None:
    """Moves a trial's model to `best`, with its facts, if its score is the highest of this host so far."""
    with FileLock(best.with_suffix(".lock")):
        note = best / "trial.json"
        if note.exists() and json.loads(note.read_text())["score"] >= facts["score"]:
            return
        shutil.rmtree(best, ignore_errors=True)
        model.rename(best)
        note.write_text(json.dumps(facts, indent=2) + "\n")
