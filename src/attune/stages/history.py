"""What a training leaves behind for people without MLflow: curves as CSV, a summary as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from attune.files import write_atomically


def write_history(stem: Path, history: list[dict[str, float]], facts: Mapping[str, Any]) -> None:
    """Writes <stem>.csv, a row per optimizer step, and <stem>.json: `facts` and the means of the last tenth.

    Without a step (a run that trains nothing, or a method that was confident of nothing) there are no means.
    """
    frame = pd.DataFrame(history, columns=None if history else ["step", "batch", "loss", "lr"])
    curve = frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    write_atomically(stem.with_suffix(".csv"), curve.encode())
    tail = frame.tail(max(1, len(frame) // 10)).drop(columns=["step", "batch", "lr"]).mean()
    last = {name: round(float(value), 6) for name, value in tail.items() if history}
    text = json.dumps({"steps": len(frame), **facts, "last_tenth": last}, indent=2, allow_nan=False)
    write_atomically(stem.with_suffix(".json"), (text + "\n").encode())
