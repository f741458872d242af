"""Stage report: the comparison, as JSON for tools, Markdown for git and HTML for people."""

from __future__ import annotations

from attune.config.plan import ReportPlan
from attune.paths import Paths
from attune.stages.common import planned, stage
from attune.stop import stoppable


def main() -> None:
    plan = planned(ReportPlan, "report")
    paths = Paths(plan.profile)
    with stage("report", plan, {"seed": plan.seed, "runs": plan.runs}) as run:
        from attune.evaluation.report.make import make_report
        from attune.versions import commit

        about = {
            "profile": plan.profile,
            "origin": plan.origin.model_dump(),
            "facts": {name: facts.model_dump() for name, facts in plan.facts.items()},
            "commit": commit(),
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


if __name__ == "__main__":
    with stoppable("report"):
        main()
