"""The summary's shape and numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from attune.evaluation.protocol import Protocol
from attune.evaluation.report.render import to_markdown
from attune.evaluation.summarise import summarise
from attune.evaluation.summary import ComparisonEntry, Extreme, Location, MethodSummary, Summary
from scores import SCORERS, protocol_for, table


def test_six_row_table_by_hand():
    """Three prompts, two images each. Base means 1, 2, 3; method 2, 2, 5: differences 1, 0, 2.

    The means are 2 and 3, the medians 2 and 2, the difference 1, the win rate (1 + 0.5 + 1) / 3 = 5 / 6.
    """
    prompts = ["a", "b", "c"]
    base = pd.DataFrame(
        {
            "prompt": np.repeat(prompts, 2),
            "ordinal": [0, 1] * 3,
            "file": "x.png",
            "oracle": [0, 2, 1, 3, 3, 3],
        }
    )
    method = base.assign(oracle=[2.0, 2, 4, 0, 4, 6])
    protocol = Protocol("0", 3, 2, "ddim", 1, 0, 1, 8, "float32", 0, (("oracle", "r", "p"),), "v")
    result = summarise({"base": base, "m": method.sample(frac=1, random_state=0)}, protocol).methods
    assert result["base"] == MethodSummary({"oracle": Location(2.0, 2.0, 1.0)}, vs_base={})
    assert result["m"].scores["oracle"] == Location(3.0, 2.0, np.sqrt(3))
    entry = result["m"].vs_base["oracle"]
    assert entry.difference == pytest.approx(1)
    assert entry.win_rate == pytest.approx(5 / 6)
    assert result["m"].extremes.gained[0] == Extreme("c", 2.0)
    assert result["m"].extremes.lost == ()


def test_summary_is_complete(summary):
    assert summary.protocol.n_prompts == 40
    assert list(summary.methods) == ["base", "spo", "same", "<b>evil|name"]
    assert list(summary.tuned) == ["spo", "same", "<b>evil|name"]
    assert summary.scorers == tuple(SCORERS)
    assert summary.methods["base"].vs_base == {}
    for method in summary.tuned.values():
        assert set(method.vs_base) == set(method.scores) == {*SCORERS, "oracle.appeal"}
        for scorer in SCORERS:
            entry = method.vs_base[scorer]
            assert entry.ci95[0] <= entry.win_rate <= entry.ci95[1]
            assert entry.p_holm >= entry.p_value
        assert method.vs_base["oracle.appeal"].p_holm is None
        assert method.vs_base["oracle.appeal"].evidence == "no evidence"


def test_json_holds_everything_and_nothing_that_is_not_there(summary, tables, protocol):
    assert Summary.from_json(summary.to_json()) == summary
    values = json.loads(summary.to_json())
    assert list(values) == ["protocol", "n_prompts", "base", "scorers", "best", "made_with", "methods", "pairs"]
    assert values["n_prompts"] == 40
    assert list(values["methods"]["base"]) == ["scores", "vs_base"]
    keys = ["scores", "vs_base", "trained_on", "gap", "extremes", "hacking", "signs"]
    assert list(values["methods"]["same"]) == keys
    assert values["methods"]["spo"]["signs"]["vendi"] == {"base": 4.0, "value": 3.5, "ci95": [-0.8, -0.2]}
    assert values["methods"]["same"]["gap"] is None
    assert "p_holm" not in values["methods"]["same"]["vs_base"]["oracle.appeal"]
    selected = summarise(tables, protocol, selected_by={"spo": ["oracle"]})
    assert Summary.from_json(selected.to_json()) == selected
    methods = json.loads(selected.to_json())["methods"]
    assert methods["spo"]["selected_by"] == ["oracle"]
    assert "selected_by" not in methods["same"]


def test_undefined_numbers_are_null_in_json():
    """One prompt: no spread, so no detectable effect and no standardised gain."""
    protocol = replace(protocol_for(["a"]), n_prompts=1)
    summary = summarise({"base": table(["a"]), "m": table(["a"], 1.0)}, protocol, trained_on={"m": ["oracle"]})
    method = json.loads(summary.to_json())["methods"]["m"]
    assert method["vs_base"]["oracle"]["minimum_detectable_effect"] is None
    assert method["gap"] == {"trained": None, "heldout": None, "gap": None, "ci95": [None, None]}
    again = Summary.from_json(summary.to_json())
    assert math.isnan(again.methods["m"].vs_base["oracle"].minimum_detectable_effect)
    assert math.isnan(again.methods["m"].gap.gap)
    assert to_markdown(again) == to_markdown(summary)
    assert "nan" not in to_markdown(summary)


def test_evidence_needs_p_interval_and_win_rate(summary):
    methods = summary.methods
    assert methods["spo"].vs_base["oracle"].evidence == "better"
    assert methods["spo"].vs_base["pickscore"].evidence == "no evidence"
    assert methods["<b>evil|name"].vs_base["oracle"].evidence == "worse"
    same = methods["same"].vs_base["oracle"]
    assert (same.win_rate, same.p_value, same.ci95) == (0.5, 1.0, (0.5, 0.5))
    disagree = ComparisonEntry(0.7, (0.6, 0.8), 0.001, 0.1, (-0.1, 0.3), 0.2, p_holm=0.01)
    assert disagree.evidence == "mixed"
    assert replace(disagree, difference_ci95=(0.1, 0.3), win_rate=0.4).evidence == "mixed"
    assert replace(disagree, difference_ci95=(0.1, 0.3), p_holm=0.2).evidence == "no evidence"


def test_gap_is_standardised_and_needs_both_sides(summary):
    """Trained gain ~0.35 base spreads, held-out gain ~0."""
    gap = summary.methods["spo"].gap
    assert gap.gap == pytest.approx(gap.trained - gap.heldout)
    assert gap.gap == pytest.approx(0.35, abs=0.1)
    low, high = gap.ci95
    assert low - 1e-12 <= gap.gap <= high + 1e-12
    assert gap.is_open
    assert summary.methods["same"].gap is None


def test_tables_that_cannot_be_paired_are_refused():
    prompts = ["a", "b"]
    protocol, base = protocol_for(prompts), table(prompts)
    with pytest.raises(ValueError, match="no scores of the base"):
        summarise({"spo": base}, protocol)
    with pytest.raises(ValueError, match="base and spo hold different prompts"):
        summarise({"base": base, "spo": base.replace({"prompt": {"a": "c"}})}, protocol)
    with pytest.raises(ValueError, match="different score columns"):
        summarise({"base": base, "spo": base.drop(columns="oracle.appeal")}, protocol)
    with pytest.raises(ValueError, match="trained_on names methods"):
        summarise({"base": base}, protocol, trained_on={"spo": ["oracle"]})
    with pytest.raises(ValueError, match="selected_by names methods"):
        summarise({"base": base}, protocol, selected_by={"spo": ["oracle"]})
