"""Stage report: the comparison, as JSON for tools, Markdown for git and HTML for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attune.config.plan import (
    EvaluatePlan,
    GeneratePlan,
    PreferencePlan,
    PreparePlan,
    ReportPlan,
    RunPlan,
    StagePlan,
    read,
)
from attune.costs import Cost, read_costs
from attune.files import values_sha
from attune.paths import Paths
from attune.stages.common import planned, stage
from attune.stop import stoppable

if TYPE_CHECKING:
    from attune.evaluation.summary import Summary
    from attune.tracking import Run

OF_A_RUN: dict[str, type[StagePlan]] = {"align": RunPlan, "generate": GeneratePlan, "evaluate": EvaluatePlan}


def main() -> None:
    plan = planned(ReportPlan, "report")
    paths = Paths(plan.profile)
    settings = plan.model_dump(include={"seed", "runs", "trained_on", "selected_by"})
    with stage("report", plan, settings) as run:
        from attune.evaluation.report.make import make_report
        from attune.versions import commit

        about = {
            "profile": plan.profile,
            "origin": plan.origin.model_dump(),
            "facts": {name: facts.model_dump() for name, facts in plan.facts.items()},
            "commit": commit(),
            "costs": costs_of(plan),
        }
        summary = make_report(
            plan.runs,
            paths.reports,
            paths.data / "generated",
            trained_on=plan.trained_on,
            selected_by=plan.selected_by,
            seed=plan.seed,
            settings=plan.settings,
            about=about,
        )
        for name, method in summary.methods.items():
            run.summary({f"{name}/{scorer}": location.mean for scorer, location in method.scores.items()})
        run.artifact(paths.reports / "report.html")
        run.artifact(paths.reports / "report.md")
        run.artifact(paths.reports / "figures")
        tell(run.pipeline, summary, paths.reports)


def costs_of(plan: ReportPlan) -> dict[str, Cost]:
    """Stage -> what it cost here, in the order of the pipeline; of work that is not today's plan nothing is known."""
    plans: dict[str, StagePlan] = {
        "prepare": read(PreparePlan, "prepare"),
        "train_preference": read(PreferencePlan, "preference"),
        **{f"{stage}@{run}": read(kind, stage, run) for run in plan.runs for stage, kind in OF_A_RUN.items()},
    }
    works = {stage: values_sha(each.model_dump(mode="json")) for stage, each in plans.items()}  # as `stage` notes them
    found = read_costs(plan.profile, works)
    return {stage: found[stage] for stage in plans if stage in found}


def tell(pipeline: Run, summary: Summary, folder: Path) -> None:
    """Puts the result on the tracking run of the whole pipeline: numbers, a description and the report itself."""
    from PIL import Image

    from attune.evaluation.report.short import description, headline_metrics

    pipeline.summary(headline_metrics(summary))
    pipeline.describe(*description(summary))
    for figure in sorted((folder / "figures").glob("*.png")):
        with Image.open(figure) as picture:
            pipeline.image(f"figures/{figure.stem}", picture, 0)
    for name in ("report.html", "report.md"):
        if (folder / name).exists():
            pipeline.artifact(folder / name)


if __name__ == "__main__":
    with stoppable("report"):
        main()
