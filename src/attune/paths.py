"""Where things lie, relative to the checkout; and the repository they belong to."""

from __future__ import annotations

import os
from pathlib import Path

PREPARED = Path("data/prepared")
GENERATED = Path("data/generated")
MODELS = Path("models")
PREFERENCE = MODELS / "preference"
REPORTS = Path("reports")
RUNS = Path(".checkpoints/runs")  # neither in git nor in DVC: run ids mean something in one tracking store only


def project_root() -> Path:
    """Where shared state lives: the repository, also inside DVC's temporary experiment folders."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()
