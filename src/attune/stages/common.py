"""What every stage shares: checked parameters and an MLflow run."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from attune import tracking
from attune.blocks import Profile
from attune.config import ConfigError, load
from attune.places import RUNS

BASE = "base"


@contextmanager
def stage(name: str, *sections: str, **tags: str) -> Iterator[tuple[Profile, tracking.Run]]:
    """Opens a stage: reads params.yaml, sets threads, and starts its run.

    Args:
        sections: the parts of the profile this stage depends on, as in dvc.yaml; logged as its parameters.
        tags: what its run is to be found by, besides the profile.

    Mistakes in params.yaml end the process with one message and no traceback, before torch is imported.
    """
    try:
        params, profile = load()
    except ConfigError as error:
        sys.exit(f"params.yaml: {error}")
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    os.environ.setdefault("OMP_NUM_THREADS", str(profile.threads))
    values = {section: _lookup(profile.model_dump(), section) for section in ("seed", *sections)}
    with tracking.run(name, values, tags={"profile": params.profile, **tags}, uri=params.tracking) as run:
        yield profile, run


def remember_run(name: str, run_id: str | None) -> None:
    """Notes which tracking run trained a method, so that evaluation can put its scores on the same row."""
    if run_id:
        RUNS.mkdir(parents=True, exist_ok=True)
        (RUNS / name).write_text(run_id + "\n")


def _lookup(values: Mapping[str, Any], dotted: str) -> Any:
    for part in dotted.split("."):
        values = values[part]
    return values
