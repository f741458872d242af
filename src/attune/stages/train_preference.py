"""Stage train_preference: the step-aware preference model, from a PickScore-style CLIP."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from attune.config.profile import Profile
from attune.paths import PREFERENCE, PREPARED, REPORTS, project_root
from attune.stages.common import is_first, launch, stage
from attune.stages.history import write_history

if TYPE_CHECKING:  # at run time these wait until params.yaml has been checked
    from attune.spm.objective import SPMObjective
    from attune.tracking import Run

TIMESTEPS = (0, 251, 501, 701, 951)  # the paper's evaluation points


def main() -> None:
    launch("attune.stages.train_preference")
    with stage("train_preference", "model", "preference") as (profile, run):
        history, accuracy = train_preference(profile, run)
        if not is_first():
            return
        write_history(REPORTS / "train" / "preference", history, {"accuracy_by_t": accuracy})
        for model, curve in accuracy.items():
            run.summary({f"accuracy/{model}_t{t}": a for t, a in zip(curve["t"], curve["accuracy"], strict=True)})
        run.artifact(REPORTS / "train" / "preference.json")


def train_preference(profile: Profile, run: Run) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Trains and saves the model; returns its curve and its held-out accuracy by timestep.

    Of several processes that train it together, the first saves it, and it alone asks how accurate it is.
    """
    from attune.build import load_policy, shard
    from attune.data.labels import with_ai_feedback
    from attune.data.prepared import PreparedData
    from attune.spm.model import save
    from attune.spm.objective import Config, SPMObjective, starting_model
    from attune.training.checkpoint import resumable
    from attune.training.loop import Callbacks, epoch_rows, train

    config = Config.model_validate(profile.preference)
    policy = load_policy(profile)
    data = PreparedData.read(PREPARED, "train", policy.device, keep_ties=True)
    data = replace(data, pairs=with_ai_feedback(data.pairs, config.ai_feedback))
    run.dataset(PREPARED / "pairs.parquet", "preference pairs", len(data.pairs))
    model, tokenizer = starting_model(config)
    objective = SPMObjective(config, model.to(policy.device), tokenizer, policy)
    objective.shard = shard()
    values = [profile.seed, profile.model.model_dump(), config.model_dump()]
    with resumable(
        project_root(), "train_preference", values, [PREPARED], objective.shard.is_main_process
    ) as checkpoint:
        history, _ = train(
            objective,
            objective,
            lambda b, generator: data.pair_batch(epoch_rows(len(data.pairs), config.batch_size, b, profile.seed)),
            seed=profile.seed,
            checkpoint=checkpoint,
            callbacks=Callbacks("train preference", run.log),
        )
        if objective.shard.is_main_process:
            save(model, tokenizer, PREFERENCE)
    return history, accuracy_by_t(objective, profile.seed) if objective.shard.is_main_process else {}


def accuracy_by_t(objective: SPMObjective, seed: int) -> dict[str, dict[str, list[float]]]:
    """How often each model picks the truly better image of held-out pairs, seen through one-step predictions.

    The truth is the noise-free utility where the source knows it, else people's labels. The untimed model is
    the CLIP the training started from: the same weights asked without knowing t. Without validation pairs
    there is nothing to tell: {}.
    """
    import torch
    from tqdm import tqdm

    from attune.data.prepared import PreparedData
    from attune.evaluation.statistics import bootstrap_mean_ci
    from attune.spm.model import from_clip

    data = PreparedData.read(PREPARED, "validation", objective.base.device)
    if data.pairs.empty:
        return {}
    untimed, _ = from_clip(objective.config.clip, objective.config.revision, objective.tokenizer)
    models = {"spm": objective.model.eval(), "untimed": untimed.eval().to(objective.base.device)}
    known = "utility_0" in data.pairs
    truth = data.pairs.utility_0 - data.pairs.utility_1 if known else data.pairs.label_0 - 0.5
    shape = (len(truth), *data.latents.shape[1:])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(objective.base.device)
    size = objective.config.batch_size
    parts = [range(start, min(start + size, len(truth))) for start in range(0, len(truth), size)]
    curves = {name: {"t": list(TIMESTEPS), "accuracy": [], "ci95": []} for name in models}
    for t in tqdm(TIMESTEPS, desc="accuracy by t", unit="t"):
        gaps: dict[str, list[float]] = {name: [] for name in models}
        for rows in parts:
            seen = objective.seen(data.pair_batch(rows), torch.full((len(rows),), t), noise[rows.start : rows.stop])
            for name, model in models.items():
                with torch.no_grad():
                    scores_0, scores_1 = model(seen.pixel_values, seen.input_ids, seen.t)
                gaps[name] += (scores_0 - scores_1).tolist()
        for name, gap in gaps.items():
            right = (gap * truth.to_numpy() > 0).astype(float)
            curves[name]["accuracy"].append(float(right.mean()))
            curves[name]["ci95"].append([float(x) for x in bootstrap_mean_ci(right, seed=seed)])
    return curves


if __name__ == "__main__":
    main()
