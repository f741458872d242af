"""What DVC shows of a report: the figures of metrics.json and the tables and templates of its plots."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from ruamel.yaml import YAML

from attune.evaluation.hacking import Hacking
from attune.evaluation.report import metrics, plots
from attune.evaluation.summary import Summary
from attune.stages.repro import table as final_table

ROOT = Path(__file__).parents[2]
PUBLISHED = Summary.from_json((ROOT / "reports/tiny/summary.json").read_text())
ANCHORS = re.compile(r"<DVC_METRIC_\w+>")


def judged(summary: Summary, **words: str) -> Summary:
    """A summary in which runs are judged as to reward hacking."""
    methods = dict(summary.methods)
    for name, word in words.items():
        methods[name] = replace(methods[name], hacking=Hacking(word, "as it happens"))
    return replace(summary, methods=methods)


def test_the_figures_of_the_published_runs():
    found = metrics.metrics(PUBLISHED)
    headline = {name: method.vs_base["oracle"] for name, method in PUBLISHED.tuned.items()}
    assert found["base"] == round(PUBLISHED.methods["base"].scores["oracle"].mean, 3)
    for name, entry in headline.items():
        assert found[name] == round(entry.difference, 3)
        low, high = map(float, found[f"{name} 95%"].split(".."))
        assert (low, high) == pytest.approx(entry.difference_ci95, abs=0.0005)
    assert json.loads(metrics.to_json(PUBLISHED)) == {key: value for key, value in found.items()}


def test_the_figures_name_who_is_hacked():
    assert metrics.metrics(judged(PUBLISHED, sft="none", dpo="none", spo="none"))["hacked"] == "none"
    assert metrics.metrics(judged(PUBLISHED, sft="hacked", dpo="none", spo="suspect"))["hacked"] == "sft, spo?"


@pytest.mark.parametrize(
    ("widths", "digits"), [([0.058, 0.032], 3), ([0.0058], 4), ([12.0, 3.0], 3), ([0.0], 3), ([], 3), ([1e-9], 6)]
)
def test_the_narrowest_interval_keeps_two_digits(widths, digits):
    assert metrics.decimals(widths) == digits


def test_the_last_words_of_a_run_fit_100_columns():
    text = final_table(judged(PUBLISHED, sft="hacked", dpo="none", spo="suspect").to_json())
    assert max(map(len, text.splitlines())) <= 100


def curve(steps: int) -> pd.DataFrame:
    return pd.DataFrame({"step": range(1, steps + 1), "batch": range(steps), "loss": [float(i) for i in range(steps)]})


def test_a_long_curve_is_averaged_over_stretches():
    found = plots.loss({"base": curve(0), "dpo": curve(3), "spo": curve(1000)})
    assert found[found.run == "dpo"].values.tolist() == [["dpo", 1, 0.0], ["dpo", 2, 1.0], ["dpo", 3, 2.0]]
    long = found[found.run == "spo"]
    assert len(long) == plots.POINTS
    assert long.iloc[0].tolist() == ["spo", 5, 2.0]
    assert (long.step.iloc[-1], long.loss.mean()) == (1000, pytest.approx(499.5))
    assert "base" not in set(found.run)


def test_held_out_scores_are_those_of_trainings_that_were_validated():
    scores = [{"batch": 0, "step": 0, "score": 0.2}, {"batch": 9, "step": 9, "score": 0.3}]
    found = plots.held_out({"sft": {"steps": 9}, "dpo": {"validation": {"scorer": "hpsv2", "scores": scores}}})
    assert found.values.tolist() == [["dpo", "hpsv2", 0, 0.2], ["dpo", "hpsv2", 9, 0.3]]


def test_the_forest_has_every_scorer_of_every_run():
    found = plots.forest(PUBLISHED)
    assert len(found) == len(PUBLISHED.scorers) * len(PUBLISHED.tuned)
    row = found[(found.run == "dpo") & (found.scorer == "hpsv2")].iloc[0]
    assert row.difference == PUBLISHED.methods["dpo"].vs_base["hpsv2"].difference
    assert row.low < row.difference < row.high


def test_accuracy_is_a_row_per_model_and_timestep():
    spm = {"t": [0, 501], "accuracy": [0.8, 0.6], "ci95": [[0.7, 0.9], [0.5, 0.7]]}
    found = plots.accuracy({"spm": spm, "untimed": spm})
    assert found.iloc[1].tolist() == ["spm", 501, 0.6, 0.5, 0.7]
    assert len(found) == 4


def test_what_was_not_trained_is_a_table_of_no_rows(tmp_path):
    only = replace(PUBLISHED, methods={"base": PUBLISHED.methods["base"]}, best=None, pairs=())
    plots.write_plots(tmp_path / "plots", only, tmp_path / "train")
    columns = {file.stem: file.read_text() for file in (tmp_path / "plots").iterdir()}
    assert columns == {
        "loss": "run,step,loss\n",
        "held_out": "run,scorer,step,score\n",
        "forest": "scorer,run,difference,low,high\n",
        "accuracy": "model,t,accuracy,low,high\n",
    }


def test_every_plot_of_dvc_yaml_has_a_template_whose_fields_its_table_has():
    """Also those written out in the template, besides what DVC fills in; and no more than six plots are shown."""
    declared = [next(iter(entry.items())) for entry in YAML(typ="safe").load(ROOT / "dvc.yaml")["plots"]]
    empty = {
        "loss": plots.loss({}),
        "held_out": plots.held_out({}),
        "forest": plots.forest(replace(PUBLISHED, methods={"base": PUBLISHED.methods["base"]})),
        "accuracy": plots.accuracy(None),
    }
    assert 0 < len(declared) <= 6
    for title, plot in declared:
        (file, y), *others = plot["y"].items()
        assert not others
        columns = set(pd.read_csv(StringIO(empty[Path(file).stem].to_csv(index=False))).columns)
        text = (ROOT / ".dvc/plots" / f"{plot['template']}.json").read_text()
        fields = {found for found in re.findall(r'"field": "(\w+)"', text)}
        assert {plot["x"], y} | fields - {"rev"} <= columns, title
        known = {f"<DVC_METRIC_{name}>" for name in ("TITLE", "DATA", "X", "Y", "X_LABEL", "Y_LABEL")}
        assert set(ANCHORS.findall(text)) <= known
        assert "<DVC_METRIC_DATA>" in text
