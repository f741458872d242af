"""Stage train_preference: the step-aware preference model, from a PickScore-style CLIP, where a run needs one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from attune.config.plan import PreferencePlan
from attune.config.schema import check
from attune.config.settings import PreferenceConfig
from attune.files import write_atomically
from attune.paths import Paths
from attune.stages.common import checkpoint_of, is_main_process, launch, planned, stage
from attune.stop import stoppable

if TYPE_CHECKING:  # at run time these wait until the plan has been read
    from attune.tracking import Run
    from attune.training.checkpoint import Checkpoint


def main() -> None:
    plan = planned(PreferencePlan, "preference")
    paths = Paths(plan.profile)
    if plan.settings is not None:
        launch("attune.stages.train_preference")
    settings = {"model": plan.model.model_dump(), "preference": plan.settings, "seed": plan.seed}
    from attune.stages.history import write_history

    if plan.settings is None:
        with stage("train_preference", plan, settings):
            write_atomically(paths.preference / "README", b"No run needs the step-aware preference model.\n")
            write_history(paths.training("preference"), [], {"accuracy_by_t": {}})
        return
    kept = checkpoint_of(f"train_preference-{plan.profile}", plan, [paths.prepared])
    with kept as checkpoint, stage("train_preference", plan, settings, checkpoint) as run:
        history, accuracy = train_preference(plan, run, checkpoint)
        if not is_main_process():
            return
        write_history(paths.training("preference"), history, {"accuracy_by_t": accuracy})
        for model, curve in accuracy.items():
            run.summary({f"accuracy/{model}_t{t}": a for t, a in zip(curve["t"], curve["accuracy"], strict=True)})
        run.artifact(paths.training("preference").with_suffix(".json"))


def train_preference(
    plan: PreferencePlan, run: Run, checkpoint: Checkpoint
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Trains and saves the model; returns its curve and its validation accuracy by timestep.

    Where several processes train together, the main process saves it, and it alone measures its accuracy.
    """
    from attune.build import load_policy, shard
    from attune.data import manifest
    from attune.data.labels import with_ai_feedback
    from attune.data.store import PreparedData
    from attune.spm.accuracy import accuracy_by_t
    from attune.spm.model import save
    from attune.spm.objective import SPMObjective, starting_model
    from attune.training.loop import Callbacks, epoch_batches, train

    paths, config = Paths(plan.profile), check(PreferenceConfig, plan.settings, "preference")
    policy = load_policy(plan.model)
    if is_main_process():
        manifest.check(paths.prepared)
    data = PreparedData.read(paths.prepared, "train", policy.device, keep_ties=True)
    data = replace(data, pairs=with_ai_feedback(data.pairs, config.ai_feedback))
    run.dataset(paths.prepared / "pairs.parquet", "training pairs", len(data.pairs))
    model, tokenizer = starting_model(config)
    objective = SPMObjective(config, model.to(policy.device), tokenizer, policy)
    objective.shard = shard()
    history, _ = train(
        objective,
        objective,
        epoch_batches(len(data.pairs), config.batch_size, plan.seed, data.pair_batch),
        seed=plan.seed,
        checkpoint=checkpoint,
        callbacks=Callbacks(desc="train preference", log=run.log),
    )
    if not objective.shard.is_main_process:
        return history, {}
    save(model, tokenizer, paths.preference)
    return history, accuracy_by_t(objective, paths.prepared, plan.seed)


if __name__ == "__main__":
    with stoppable("train_preference"):
        main()
