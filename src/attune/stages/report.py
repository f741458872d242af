"""Stage report: the comparison, as JSON for tools, Markdown for git and HTML for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from attune.config.profile import Profile
from attune.paths import GENERATED, MODELS, REPORTS
from attune.stages.common import BASE, stage

if TYPE_CHECKING:
    from attune.evaluation.summary import Summary


def main() -> None:
    with stage("report", "generate", "scorers") as (profile, run):
        from attune.config.check import read_params

        params = read_params()
        summary = report([BASE, *params["run_methods"], *params["evaluate"]["extra"]], profile)
        for name, method in summary.methods.items():
            run.summary({f"{name}/{scorer}": location.mean for scorer, location in method.scores.items()})
        run.artifact(REPORTS / "report.md")
        run.artifact(REPORTS / "figures")


def report(names: list[str], profile: Profile) -> Summary:
    """Compares all models under one protocol and writes reports/."""
    from attune.evaluation.report.make import make_report

    return make_report(names, REPORTS, GENERATED, trained_on=trained_on(names), selected_by={}, seed=profile.seed)


def trained_on(names: list[str]) -> dict[str, list[str]]:
    """Which scorers each model has seen in training, itself or where it started: its gains there are not held out."""
    records = {name: path for name in names if (path := REPORTS / "train" / f"{name}.json").exists()}
    facts = {name: json.loads(path.read_text()) for name, path in records.items()}

    def seen(name: str) -> list[str]:
        own, start = facts[name].get("trained_on", []), Path(facts[name].get("start") or "")
        before = seen(start.name) if start.parent == MODELS and start.name in facts else []
        return [*before, *(scorer for scorer in own if scorer not in before)]

    return {name: seen(name) for name in facts}


if __name__ == "__main__":
    main()
