"""run.json beside every model: what it is and how it was made."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from attune.config.plan import RunPlan, Session, read
from attune.files import write_atomically
from attune.versions import versions


def write_run_json(plan: RunPlan, folder: Path) -> None:
    """Writes run.json: method, every setting, base model, what it starts from, seed, commit and versions."""
    known: dict[str, Any] = {
        "run": plan.run,
        "profile": plan.profile,
        "method": plan.method.name if plan.method else None,
        "settings": dict(plan.method.settings) if plan.method else None,
        "base": plan.model.model_dump(mode="json"),
        "from": plan.released,
        "starts_from": plan.after,
        "trained_on": read(Session, "session").trained_on.get(plan.run, []),
        "seed": plan.seed,
        "files": dict(plan.files),
        "commit": commit(),
        "versions": versions(),
    }
    write_atomically(folder / "run.json", (json.dumps(known, indent=2, ensure_ascii=False) + "\n").encode())


def commit() -> str | None:
    """The checked-out commit, with `+` behind it where src has uncommitted changes; None without git."""
    with suppress(OSError, subprocess.SubprocessError):
        return _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain", "--", "src") else "")
    return None


def _git(*words: str) -> str:
    command = ["git", "--no-optional-locks", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
