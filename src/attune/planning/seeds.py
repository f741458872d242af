"""What tells whether the run of a seed is still of the settings and the code as they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from attune.config.schema import StrictModel
from attune.files import values_sha

UNCOUNTED = ("report", "session", "sweep-")
"""Plans that decide no score. A change of the report's code alone is no reason to train a seed again."""


def settings_sha(plans: Mapping[Path, StrictModel]) -> str:
    """Identifies the settings of all stages up to the scores, without seed and code; and the local files they read."""
    return values_sha(_work(plans, without={"seed", "code", "parts"}))


def work_sha(plans: Mapping[Path, StrictModel]) -> str:
    """Identifies everything that the scores come from: settings, seed, local files and code."""
    return values_sha(_work(plans, without={"parts"}))


def _work(plans: Mapping[Path, StrictModel], without: set[str]) -> dict[str, object]:
    return {
        file.name: plan.model_dump(mode="json", by_alias=True, exclude=without)
        for file, plan in sorted(plans.items())
        if not file.name.startswith(UNCOUNTED)
    }
