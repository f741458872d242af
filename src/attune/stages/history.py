"""What a training leaves behind for people without MLflow: curves as CSV, a summary as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd


def write_history(stem: Path, history: list[dict[str, float]], facts: Mapping[str, Any]) -> None:
    """Writes <stem>.csv, a row per optimizer step, and <stem>.json: `facts` and the means of the last tenth.

    Without a step (a run that trains nothing, or a method that was confident of nothing) there are no means.
    """
    frame = pd.DataFrame(history, columns=None if history else ["step", "batch", "loss", "lr"])
    stem.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(stem.with_suffix(".csv"), index=False, float_format="%.6g")
    tail = frame.tail(max(1, len(frame) // 10)).drop(columns=["step", "batch", "lr"]).mean()
    last = {name: round(float(value), 6) for name, value in tail.items() if history}
    text = json.dumps({"steps": len(frame), **facts, "last_tenth": last}, indent=2, allow_nan=False)
    stem.with_suffix(".json").write_text(text + "\n")
