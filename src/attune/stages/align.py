"""Stage align@<run>: the model of a run: trained with its method, or a note of what it is where nothing is trained."""

from __future__ import annotations

from typing import Any

from attune.config.plan import RunPlan
from attune.paths import Paths, project_root
from attune.stages.common import is_main_process, launch, planned, remember_run, stage


def main() -> None:
    plan = planned(RunPlan, "align")
    if plan.method is not None:
        launch("attune.stages.align")
    paths = Paths(plan.profile)
    settings = {"model": plan.model.model_dump(), "seed": plan.seed}
    tags = {"method": plan.run, "uses": plan.method.name if plan.method else "none"}
    if plan.method is not None:
        settings["methods"] = {plan.run: dict(plan.method.settings)}
    with stage(f"align@{plan.run}", plan, settings, **tags) as run:
        from attune.stages.history import write_history
        from attune.stages.run_json import write_run_json

        if plan.method is None:
            history: list[dict[str, float]] = []
            facts: dict[str, Any] = {}
        else:
            from attune.finetune import finetune

            history, facts = finetune(plan, run, paths.model(plan.run), checkpoints=project_root())
        if not is_main_process():
            return
        write_run_json(plan, paths.model(plan.run))
        write_history(paths.training(plan.run), history, facts)
        if plan.method is not None:
            remember_run(plan.run, run.run_id)
            run.artifact(paths.model(plan.run))


if __name__ == "__main__":
    main()
