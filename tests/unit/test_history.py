"""The curve and the facts that a training leaves."""

import json

import pandas as pd

from attune.stages.history import write_history


def test_the_means_are_of_the_last_tenth(tmp_path):
    """Of 25 steps with losses 0 to 24 the last tenth are two: (23 + 24) / 2."""
    rows = [{"step": i + 1, "batch": i, "loss": float(i), "lr": 0.1} for i in range(25)]
    write_history(tmp_path / "x", rows, {"start": None})
    facts = json.loads((tmp_path / "x.json").read_text())
    assert facts == {"steps": 25, "start": None, "last_tenth": {"loss": 23.5}}
    assert pd.read_csv(tmp_path / "x.csv").loss.tolist() == [row["loss"] for row in rows]
