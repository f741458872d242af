"""One run of a method, from prepared data to a saved model: what the stage align and every trial of a search do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from attune.build import build_method, load_learner, load_scorer
from attune.config.plugins import plugin_config
from attune.config.profile import Profile
from attune.config.settings import MethodConfig, Sampling, Validation
from attune.data.labels import with_ai_feedback
from attune.data.prepared import PreparedData
from attune.diffusion.generate import paint
from attune.diffusion.policy import Policy
from attune.evaluation.protocol import scorer_identity
from attune.files import values_sha
from attune.interfaces import Objective, Reward
from attune.paths import PREFERENCE, PREPARED
from attune.training.checkpoint import resumable
from attune.training.early_stopping import EarlyStopping
from attune.training.loop import Batches, Callbacks, epoch_rows, train

if TYPE_CHECKING:
    from attune.tracking import Run

PREVIEW_PROMPTS = 6
PREVIEWS = 5  # image grids per training


def align(
    name: str,
    uses: str,
    profile: Profile,
    run: Run,
    folder: Path,
    *,
    checkpoints: Path | None = None,
    report: Callable[[int, float], None] = lambda batch, score: None,
    previews: int = PREVIEWS,
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Trains the policy and saves it in `folder`; returns a row of metrics per step, and facts for the report.

    Of several processes that train it together, the first saves it.

    Args:
        name: the block of `profile.methods` with the run's settings.
        uses: the method, a file of attune/methods.
        run: where curves, scores and previews go.
        checkpoints: the repository's root, for a run that is to be resumable; None for one that is not.
        report: told every held-out score as it is taken, with the batches done; may raise to end the training.
        previews: image grids to be painted on the way; 0 for none.
    """
    policy = load_learner(name, profile, uses)
    method = build_method(name, profile, policy, PREFERENCE, uses)
    config: MethodConfig = method.config
    seed = seed_of(profile.seed, config.start)
    n, batches = training_batches(method, policy.device, seed)
    run.dataset(PREPARED / "pairs.parquet", "preference pairs", n)
    settings = {uses: dict(profile.methods[name]), "rewards": rewards_seen(config, profile)}
    needs = [PREPARED, *([PREFERENCE] if hasattr(method, "judge") else [])]
    if config.start is not None and Path(config.start).exists():  # one from the hub is named with its commit
        needs.append(Path(config.start))
    values = [profile.seed, profile.model.model_dump(), settings]
    main = policy.shard.is_main_process
    keeping = resumable(checkpoints, f"align@{name}", values, needs, main) if checkpoints else nullcontext()
    with keeping as checkpoint:
        history, scores = train(
            method,
            policy,
            batches,
            seed=seed,
            checkpoint=checkpoint,
            early_stopping=early_stopping(config.validation, policy, profile) if config.validation else None,
            callbacks=Callbacks(
                desc=f"align {name}",
                log=run.log,
                on_score=partial(log_score, run, config.validation, report),
                sample_images=preview(policy, profile, run) if previews else None,
                sample_every=max(1, config.batches // max(1, previews)),
            ),
        )
        if policy.shard.is_main_process:
            policy.save(folder)
    return history, {
        "trained_on": list(getattr(method, "trained_on", ())),
        "start": config.start,
        **({"validation": {"scorer": config.validation.scorer, "scores": scores}} if config.validation else {}),
    }


def training_batches(method: Objective, device: torch.device, seed: int) -> tuple[int, Batches]:
    """How many rows a method learns from, pairs or prompts, and batch number b of them."""
    data = PreparedData.read(PREPARED, "train", device, keep_ties=True)
    data = data.with_pairs(with_ai_feedback(data.pairs, getattr(method.config, "ai_feedback", None)))
    pairs = method.consumes == "pairs"
    n, draw = (len(data.pairs), data.pair_batch) if pairs else (len(data.prompts), data.prompt_batch)
    return n, lambda b, generator: draw(epoch_rows(n, method.config.batch_size, b, seed))


def seed_of(seed: int, start: str | None) -> int:
    """The seed of a training: what goes on must not see the batches and the noise again that it started with."""
    return seed if start is None else int(values_sha([seed, start]), 16)


def rewards_seen(config: MethodConfig, profile: Profile) -> list[tuple[str, str, str]]:
    """Weights and settings of the scorers asked while a method trains: its checkpoints are of these alone."""
    names = [*getattr(config, "rewards", ()), *([config.validation.scorer] if config.validation else [])]
    blocks = {name: plugin_config("rewards", name, profile.scorers[name], f"scorers.{name}") for name in names}
    return [scorer_identity(name, block) for name, block in blocks.items()]


def early_stopping(validation: Validation, policy: Policy, profile: Profile) -> EarlyStopping:
    """When a training is validated and ends; its score is the mean over validation prompts."""
    scorer, prompts = load_scorer(validation.scorer, profile), validation_prompts(validation.prompts)

    def score() -> float:
        return float(validation_scores(policy, validation.sampling, profile.seed, scorer, prompts).mean())

    return EarlyStopping(score, validation.every, validation.at_start_and_end, validation.patience)


def log_score(
    run: Run, validation: Validation, report: Callable[[int, float], None], batch: int, step: int, score: float
) -> None:
    """Logs a validation score and reports it."""
    run.log({f"validation/{validation.scorer}": score}, step)
    report(batch, score)


def validation_scores(
    policy: Policy, sampling: Sampling, seed: int, scorer: Reward, prompts: Sequence[str]
) -> np.ndarray:
    """Scores (n,) of one image per prompt, with the noise that every policy gets for it."""
    images = paint(policy, prompts, [0] * len(prompts), sampling, seed, None)
    scores = []
    for start in range(0, len(prompts), sampling.batch_size):
        rows = slice(start, start + sampling.batch_size)
        pixels = torch.from_numpy(images[rows]).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            scores.append(scorer(pixels, prompts[rows]).double().cpu().numpy())
    return np.concatenate(scores)


def validation_prompts(n: int) -> list[str]:
    """The first n prompts that are neither trained on nor reported on; fewer, where there are fewer."""
    table = pd.read_parquet(PREPARED / "prompts.parquet")
    return table.prompt[table.split == "validation"].head(n).tolist()


def preview(policy: Policy, profile: Profile, run: Run) -> Callable[[int], None] | None:
    """A callback that paints the same few validation prompts and logs them as one grid, with a step slider.

    None if there are no validation prompts.
    """
    from attune.evaluation.report.figures import image_grid  # matplotlib, for the tracking UI alone

    prompts = validation_prompts(PREVIEW_PROMPTS)
    if not prompts:
        return None

    def images() -> np.ndarray:
        return paint(policy, prompts, [0] * len(prompts), profile.generate.sampling, profile.seed, None)

    @cache  # not before it is shown: of several processes only one ever shows anything
    def before() -> np.ndarray:
        with policy.reference():
            return images()

    def show(step: int) -> None:
        run.image("samples", image_grid({"reference": before(), "policy": images()}, prompts), step)

    return show
