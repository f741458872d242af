"""run.json beside every model: what it is and how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attune.config import plugins
from attune.config.plan import RunPlan, Session, read
from attune.files import write_atomically
from attune.versions import versions


def write_run_json(plan: RunPlan, folder: Path) -> dict[str, Any]:
    """Writes run.json and returns it: method, every setting, base model, what it starts from, seed and versions.

    No commit and no date: the same training leaves the same folder, so what comes after it need not run again. MLflow
    has both.
    """
    known: dict[str, Any] = {
        "run": plan.run,
        "profile": plan.profile,
        "method": plan.method.name if plan.method else None,
        "settings": dict(plan.method.settings) if plan.method else None,
        "base": plan.model.model_dump(mode="json"),
        "from": plan.released,
        "starts_from": plan.after,
        **_times(plan),
        "trained_on": read(Session, "session").trained_on.get(plan.run, []),
        "seed": plan.seed,
        "files": dict(plan.files),
        "versions": versions(),
    }
    write_atomically(folder / "run.json", (json.dumps(known, indent=2, ensure_ascii=False) + "\n").encode())
    return known


def _times(plan: RunPlan) -> dict[str, Any]:
    """Of a flow model, the times of a training; nothing where none was, or of other models, which draw any.

    Methods that begin with prompts draw none: they train on the times that they sample at.
    """
    describe = getattr(plugins.load("backbones", plan.model.backbone), "times", None)
    if plan.method is None or describe is None:
        return {}
    draws = plugins.load("methods", plan.method.name).Method.consumes != "prompts"
    return {"times": describe(plan.model) | ({} if draws else {"density": None})}
