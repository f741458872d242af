"""One run of a method, from prepared data to a saved model: what the stage align and every trial of a search do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from attune.build import build_method, load_learner, load_scorer
from attune.config.plan import RunPlan, Session, read
from attune.config.settings import MethodConfig, Sampling, Validation
from attune.data import manifest
from attune.data.labels import with_ai_feedback
from attune.data.rows import SourceError
from attune.data.store import IMAGES, PreparedData
from attune.diffusion.generate import generate_images
from attune.diffusion.policy import Policy
from attune.files import values_sha
from attune.interfaces import Method, Score
from attune.paths import Paths
from attune.training.checkpoint import Checkpoint
from attune.training.early_stopping import EarlyStopping
from attune.training.loop import Batches, Callbacks, epoch_batches, train

if TYPE_CHECKING:
    from attune.tracking import Run

SAMPLES, SAMPLE_PROMPTS = 5, 6  # image grids per training, and rows of each


def finetune(
    plan: RunPlan,
    run: Run,
    folder: Path,
    *,
    checkpoint: Checkpoint | None = None,
    on_score: Callable[[int, float], None] = lambda batch, score: None,
    samples: int = SAMPLES,
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Trains the policy and saves it in `folder`; returns a row of metrics per step, and facts for the report.

    Where several processes train together, the main process saves it.

    Args:
        run: where curves, scores and sample images go.
        checkpoint: of a run that is to be resumable; it stays until the caller has stored what this returns.
        on_score: called with batches done and each validation score; may raise to end the training.
        samples: how many grids of sample images to log on the way.
    """
    paths = Paths(plan.profile)
    start = start_of(plan)
    policy = load_learner(plan.trained_method.config, plan.model, plan.seed, start)
    method = build_method(plan.trained_method, policy, paths.preference, plan.scorers)
    config = method.config
    if config.validation is None:  # a method that decodes has its autoencoder back at once
        policy.backbone.release()
    seed = seed_of(plan.seed, start)
    n, batches = training_batches(method, paths.prepared, policy.device, seed)
    table = paths.prepared / (IMAGES if (paths.prepared / IMAGES).exists() else "pairs.parquet")
    run.dataset(table, f"training {method.consumes}", n)
    callbacks = _callbacks(plan, policy, run, config, on_score, samples)
    history, scores = train(
        method,
        policy,
        batches,
        seed=seed,
        checkpoint=checkpoint,
        early_stopping=early_stopping(config.validation, policy, plan) if config.validation else None,
        callbacks=callbacks,
    )
    policy.save(folder, header_of(plan))
    validated = {"validation": {"scorer": config.validation.scorer, "scores": scores}} if config.validation else {}
    trained_on = read(Session, "session").trained_on.get(plan.run, [])
    return history, {"trained_on": trained_on, "start": start, **validated}


def header_of(plan: RunPlan) -> dict[str, str]:
    """What an adapter's file says of itself. No commit and no date: the same training gives the same bytes."""
    names = {"run": plan.run, "profile": plan.profile, "method": plan.trained_method.name}
    return {"base_model": plan.model.path, **names, "trained_with": "attune"}


def start_of(plan: RunPlan) -> str | None:
    """What the training starts from: the model of the run before it, or a released one; None: the base model."""
    return str(Paths(plan.profile).model(plan.after)) if plan.after else plan.trained_method.config.start


def seed_of(seed: int, start: str | None) -> int:
    """The seed of a training: one that goes on must not see the batches and the noise again that it started with."""
    return seed if start is None else int(values_sha([seed, start]), 16)


def training_batches(method: Method, prepared: Path, device: torch.device, seed: int) -> tuple[int, Batches]:
    """How many rows a method learns from, and batch number b of them. Ends the process if verdicts are missing."""
    if method.policy.shard.is_main_process:
        manifest.check(prepared)
    data = PreparedData.read(prepared, "train", device, keep_ties=True)
    feedback, images = (getattr(method.config, name, None) for name in ("ai_feedback", "images"))
    # scores order the images of a group, whatever people chose
    data = data.with_pairs(with_ai_feedback(data.pairs, feedback), keep_ties=method.consumes == "groups")
    try:
        n, draw = data.rows_for(method.consumes, **({} if images is None else {"images": images}))
    except SourceError as error:
        sys.exit(str(error))
    return n, epoch_batches(n, method.config.batch_size, seed, draw)


def early_stopping(validation: Validation, policy: Policy, plan: RunPlan) -> EarlyStopping:
    """When a training is validated and ends; its score is the mean over validation prompts."""
    scorer = load_scorer(plan.scorers[validation.scorer])
    prompts = validation_prompts(Paths(plan.profile).prepared, validation.prompts)

    def score() -> float:
        return float(validation_scores(policy, validation.sampling, plan.seed, scorer, prompts).mean())

    return EarlyStopping(score, validation.every, validation.at_start_and_end, validation.patience)


def validation_scores(
    policy: Policy, sampling: Sampling, seed: int, scorer: Score, prompts: Sequence[str]
) -> np.ndarray:
    """Scores (n,) of one image per prompt, with the noise that every policy gets for it.

    Of several processes that train together each samples and scores `batch_size` prompts at a time, and all have the
    scores of all.
    """

    def scored(rows: list[int]) -> Tensor:
        own = [prompts[row] for row in rows]
        images = generate_images(policy, own, [0] * len(own), sampling, seed, None)
        scores = []
        for start in range(0, len(own), sampling.batch_size):
            some = slice(start, start + sampling.batch_size)
            pixels = torch.from_numpy(images[some]).permute(0, 3, 1, 2).float() / 255
            with torch.no_grad():
                scores.append(scorer(pixels, own[some]).cpu().double())
        return torch.cat(scores)

    return policy.shard.map_rows(len(prompts), sampling.batch_size, scored).numpy()


def validation_prompts(prepared: Path, n: int) -> list[str]:
    """The first n prompts that are neither trained on nor reported on; fewer, where there are fewer."""
    table = pd.read_parquet(prepared / "prompts.parquet")
    return table.prompt[table.split == "validation"].head(n).tolist()


def inputs_of(plan: RunPlan) -> list[Path]:
    """The outputs of other stages that a training reads."""
    paths, start = Paths(plan.profile), start_of(plan)
    preference = [paths.preference] if plan.needs_preference else []
    return [paths.prepared, *preference, *([Path(start)] if start is not None and Path(start).exists() else [])]


def _callbacks(
    plan: RunPlan,
    policy: Policy,
    run: Run,
    config: MethodConfig,
    on_score: Callable[[int, float], None],
    samples: int,
) -> Callbacks:
    """What is logged while a training runs; nothing here changes what is trained."""
    from attune.tracking.samples import sampler

    scorer = config.validation.scorer if config.validation else None

    def log_score(batch: int, step: int, score: float) -> None:
        run.log({f"validation/{scorer}": score}, step)
        on_score(batch, score)

    prompts = validation_prompts(Paths(plan.profile).prepared, SAMPLE_PROMPTS) if samples else []
    show = sampler(policy, prompts, read(Session, "session").samples, plan.seed, run) if prompts else None

    def show_and_release(step: int) -> None:
        if show is not None:
            show(step)
        if scorer is None:
            policy.backbone.release()

    return Callbacks(
        desc=f"align {plan.run}",
        log=run.log,
        on_score=log_score,
        sample_images=show_and_release if show else None,
        sample_every=max(1, config.batches // max(1, samples)),
    )
