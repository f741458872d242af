"""Stage align@<run>: the model of a run: trained with its method, or a note of what it is where nothing is trained."""

from __future__ import annotations

from typing import Any

from attune.config.plan import PreparePlan, RunPlan, Session, read
from attune.files import write_atomically
from attune.paths import Paths
from attune.stages.common import checkpoint_of, is_main_process, launch, planned, remember_run, stage
from attune.stop import stoppable


def main() -> None:
    plan = planned(RunPlan, "align")
    if plan.method is not None:
        launch("attune.stages.align")
    paths = Paths(plan.profile)
    settings = plan.model_dump(include={"model", "seed", "released", "after"})
    settings["scorers"] = {name: {"scorer": it.name, **it.settings} for name, it in plan.scorers.items()}
    tags = {"method": plan.run, "uses": plan.method.name if plan.method else "none"}
    if plan.method is not None:
        settings["methods"] = {plan.run: dict(plan.method.settings)}
    if plan.method is None:
        with stage(f"align@{plan.run}", plan, settings, None, **tags):
            write(plan, [], {})
        return
    from attune.finetune import finetune, inputs_of

    kept = checkpoint_of(f"align@{plan.profile}-{plan.run}", plan, inputs_of(plan))
    with kept as checkpoint, stage(f"align@{plan.run}", plan, settings, checkpoint, **tags) as run:
        history, facts = finetune(plan, run, paths.model(plan.run), checkpoint=checkpoint)
        if not is_main_process():
            return
        write(plan, history, facts)
        remember_run(plan.run, run.run_id)
        run.artifact(paths.model(plan.run), dvc_keeps_it=True)


def write(plan: RunPlan, history: list[dict[str, float]], facts: dict[str, Any]) -> None:
    """Writes run.json and a card beside the model, and the training's curves and facts."""
    from attune.sharing.card import card
    from attune.stages.history import write_history
    from attune.stages.run_json import write_run_json

    paths = Paths(plan.profile)
    made = write_run_json(plan, paths.model(plan.run))
    if plan.method is not None:
        source = read(PreparePlan, "prepare").source
        text = card(made, {"source": source.name, **source.settings, "license": read(Session, "session").data_license})
        write_atomically(paths.model(plan.run) / "README.md", text.encode())
    write_history(paths.training(plan.run), history, facts)


if __name__ == "__main__":
    with stoppable("align"):
        main()
