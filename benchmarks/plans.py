"""Plans of this checkout with some settings changed, for the benchmarks that train in this process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attune.config.plan import GeneratePlan, RunPlan
from attune.config.resolve import Settings
from attune.paths import CHECKPOINTS, project_root
from attune.planning.local_files import Digests
from attune.planning.make import make
from attune.stages.generate import image_index


def plans_of(settings: Settings) -> Mapping[Path, Any]:
    """`plan_file(stage, run)` -> what the stage `plan` would write there for these settings; nothing is written."""
    return make(settings, Digests(project_root() / CHECKPOINTS / "digests.json"))


def with_method_settings(plan: RunPlan, settings: Mapping[str, Any]) -> RunPlan:
    """A run's plan with other settings of its method."""
    return plan.model_copy(update={"method": plan.method.model_copy(update={"settings": settings})})


def prompts_of_report(plan: GeneratePlan) -> list[str]:
    """The test prompts that the profile's report is about, each once."""
    return image_index(plan).drop_duplicates("prompt").prompt.tolist()
