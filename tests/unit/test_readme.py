"""README says what the committed report says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recipes.readme import table, with_table

from attune.evaluation.seeds import read_seeds
from attune.evaluation.summary import Summary

ROOT = Path(__file__).parents[2]


def test_readmes_table_is_made_from_the_committed_report():
    summary = Summary.from_json((ROOT / "reports/tiny/summary.json").read_text())
    seeds = read_seeds(
        ROOT / "reports/tiny/seeds", summary, json.loads((ROOT / "plan/report.json").read_text())["settings"]
    )
    assert seeds is not None
    assert len(seeds.seeds) == 3
    text = (ROOT / "README.md").read_text()
    assert with_table(text, table(summary, seeds)) == text
    assert "| dpo | +0.1" in text


def test_a_readme_without_marks_is_refused():
    with pytest.raises(ValueError, match="unpack"):
        with_table("no marks", "")
