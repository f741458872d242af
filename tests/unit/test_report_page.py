"""The page of the report: its first sentence, its charts as values, and that it is inert and complete by itself."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from attune.costs import Cost
from attune.evaluation.report.accuracy import accuracy
from attune.evaluation.report.axis import Axis, axis_of
from attune.evaluation.report.concord import concord
from attune.evaluation.report.curves import learned, training
from attune.evaluation.report.dots import MOST, panels
from attune.evaluation.report.forest import forest
from attune.evaluation.report.glossary import GLOSSARY
from attune.evaluation.report.page import Extras, to_html
from attune.evaluation.report.pictures import pictures
from attune.evaluation.report.sentence import first_sentence
from attune.evaluation.seeds import across_seeds
from attune.evaluation.summarise import summarise
from scores import HOSTILE, protocol_for, table


class Tags(HTMLParser):
    """Collects what a browser would see as elements, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.attributes, self.links, self.ids = set(), set(), set(), set()
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links |= {value for name, value in attrs if name in ("href", "src")}
        self.ids |= {value for name, value in attrs if name == "id"}

    def handle_data(self, data):
        self.text.append(data)


def read(page: str) -> Tags:
    found = Tags()
    found.feed(page)
    return found


def test_the_page_is_inert_and_its_links_stay_inside(summary):
    page = read(to_html(summary))
    assert page.tags.isdisjoint({"script", "b>", "iframe", "link", "form", "object"})
    assert not any(name.startswith("on") for name in page.attributes)
    inside = {link.removeprefix("#") for link in page.links if link.startswith("#")}
    assert all(link.startswith(("#", "data:image/")) for link in page.links)
    assert inside <= page.ids  # each link has a place to go to
    assert "http" not in to_html(summary).replace("http-equiv", "")


def test_hostile_prompts_and_names_show_as_themselves(summary, tables, tmp_path):
    """In pictures, dots and names of runs; without control characters and marks of direction."""
    for name in tables:
        (tmp_path / name.replace("/", "_")).mkdir()
        for file in tables[name]["file"]:
            Image.new("RGB", (8, 8)).save(tmp_path / name.replace("/", "_") / file)
    runs = ["spo", "same"]
    extras = Extras(
        profile="<script>", pictures=pictures(tables, tmp_path, runs, "base", "oracle"),
        panels=panels(tables, runs, "base", "oracle"), commit='"><img src=x>',
        origin={"base": HOSTILE[4], "base_license": None, "source": "folder", "data_path": HOSTILE[2],
                "data_license": None},
        facts={"spo": {"method": "spo", "paper": None, "starts_from": None,
                       "changed": [("a", HOSTILE[12], HOSTILE[2])]}},
    )  # fmt: skip
    html = to_html(summary, extras)
    page = read(html)
    assert page.tags.isdisjoint({"script", "iframe", "link"})
    assert not any(name.startswith("on") for name in page.attributes)
    assert all(link.startswith(("#", "data:image/webp")) for link in page.links)
    assert "\u202e" not in html
    assert "<script>alert" not in html
    shown = " ".join(page.text)
    assert "<script>alert(1)</script>" in shown  # as text
    assert "<b>evil|name" in shown


@pytest.mark.parametrize(
    ("shifts", "trained", "said"),
    [
        (
            {"dpo": (0.4, 0.4)},
            {},
            r"dpo, the only run, beats base: oracle rises from .* and the other scorer agrees; it was trained on none",
        ),
        ({"dpo": (0.4, 0.4), "spo": (0.2, 0.2)}, {}, r"dpo, the best of 2 runs, beats base: oracle rises from"),
        (
            {"dpo": (0.4, -0.4)},
            {},
            r"dpo, the only run, beats base: .*, and the other scorer does not agree; it was trained",
        ),
        (
            {"dpo": (0.0, 0.0)},
            {},
            r"No run is shown to beat base: dpo, the only run, .*they would reveal 0\.\d+ four times",
        ),
        (
            {"dpo": (-0.4, -0.4)},
            {},
            "No run beats base: dpo, the only run, changes oracle by \u22120\\.[34].*prompts\\.$",
        ),
        (
            {"alignprop": (0.9, -0.4), "dpo": (0.3, 0.3)},
            {"alignprop": ["oracle"]},
            r"alignprop gains most by oracle, \+0\.9.*, but is hacked: oracle, which it was trained on, rose while "
            r"pickscore fell\. The best of the others, dpo, beats base: \+0\.[23]",
        ),
        (
            {"dpo": (0.4, 0.4), "ap": (0.3, -0.4)},
            {"ap": ["oracle"]},
            r"trained on none of these scorers\. Hacked: ap\.$",
        ),
        (
            {"ap": (0.4, 0.0)},
            {"ap": ["oracle"]},
            r"reward hacking is suspected: oracle, which it was trained on, rose",
        ),
    ],
)
def test_the_first_sentence(shifts, trained, said):
    prompts = [f"prompt {i}" for i in range(60)]
    rng = np.random.default_rng(0)
    tables = {"base": table(prompts)}
    for run, (oracle, pickscore) in shifts.items():
        noise = rng.normal(scale=0.2, size=(2, 120))
        frame = table(prompts)
        tables[run] = frame.assign(
            oracle=frame.oracle + oracle + noise[0], pickscore=frame.pickscore + pickscore + noise[1]
        )
    summary = summarise(tables, protocol_for(prompts), trained_on=trained)
    assert re.search(said, first_sentence(summary)), first_sentence(summary)
    assert f"<h1>{first_sentence(summary)}</h1>" in to_html(summary)


def test_the_forest_has_one_axis_and_leaves_out_what_has_no_unit(summary, tables, protocol):
    plot = forest(summary)
    assert [row.run for row in plot.rows] == ["spo", "same", "<b>evil|name"]  # by gain
    spo = {item.scorer: item for item in plot.rows[0].intervals}
    entry, spread = summary.methods["spo"].vs_base["oracle"], summary.methods["base"].scores["oracle"].sd
    unit = {tick.label: tick.place for tick in plot.ticks}
    per_spread = (unit["+0.2"] - unit["0.0"]) / 0.2
    assert spo["oracle"].place - plot.zero == pytest.approx(per_spread * entry.difference / spread, abs=0.1)
    assert (spo["oracle"].is_trained, spo["oracle"].is_claim) == (True, True)
    assert spo["oracle"].low < spo["oracle"].place < spo["oracle"].high
    flat = {name: frame.assign(pickscore=1.0 + 0.1 * (name == "spo")) for name, frame in tables.items()}
    row = forest(summarise(flat, protocol)).rows[0]
    assert (row.left_out, [item.scorer for item in row.intervals]) == (("pickscore",), ["oracle"])
    assert "without pickscore" in to_html(summarise(flat, protocol))
    assert "nan" not in re.sub("[A-Za-z]+nan|nan[A-Za-z]+", "", to_html(summarise(flat, protocol)))


def test_axes_have_round_ticks():
    assert [t.label for t in Axis(0, 1).ticks()] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert [t.place for t in Axis(0, 2).ticks(2)] == [0, 50, 100]
    assert [t.label for t in Axis(-0.5, 0.5).ticks(2, with_sign=True)] == ["\u22120.5", "0.0", "+0.5"]
    assert axis_of([np.nan]).low < 0 < axis_of([5.0, 5.0]).low < 5 < axis_of([5.0, 5.0]).high


def test_dots_are_prompts_and_at_most_so_many(tables):
    (panel,) = panels(tables, ["spo"], "base", "oracle")
    assert (panel.better, panel.worse, panel.same) == (40, 0, 0)
    assert len(panel.dots) == 40
    assert all(dot.x + dot.y < 100 for dot in panel.dots)  # above the diagonal
    many = [f"prompt {i}" for i in range(MOST + 50)]
    (large,) = panels({"base": table(many), "a": table(many, seed=3)}, ["a"], "base", "oracle")
    assert (len(large.dots), large.better + large.worse) == (MOST, MOST + 50)


def test_scorers_agree_with_themselves_and_not_with_noise():
    prompts = [f"prompt {i}" for i in range(200)]
    base, rng = table(prompts), np.random.default_rng(0)
    moves = np.repeat(rng.normal(size=200), 2)
    run = base.assign(oracle=base.oracle + moves, pickscore=base.pickscore + np.exp(moves))
    assert concord({"base": base, "a": run}, ["a"], "base", ["oracle", "pickscore"]) == {
        ("pickscore", "oracle"): pytest.approx(1)
    }
    noise = run.assign(pickscore=base.pickscore + np.repeat(rng.normal(size=200), 2))
    assert abs(concord({"base": base, "a": noise}, ["a"], "base", ["oracle", "pickscore"])["pickscore", "oracle"]) < 0.2
    same = concord({"base": base, "a": base}, ["a"], "base", ["oracle", "pickscore"])
    assert np.isnan(same["pickscore", "oracle"])


@pytest.mark.parametrize(
    ("column", "values", "word"),
    [
        ("accuracy", np.linspace(0.5, 0.8, 30), "yes"),
        ("accuracy", np.linspace(0.5, 0.3, 30), "no"),
        ("accuracy", np.tile([0.2, 0.9], 15), "unclear"),
        ("reward", np.linspace(0, 1, 30), "yes"),
        ("reward", np.linspace(1, 0, 30), "no"),
        ("loss", np.linspace(1, 0, 30), "yes"),
        ("loss", np.tile([0.2, 0.9], 15), "unclear"),
        ("loss", np.ones(3), "unclear"),
    ],
)
def test_whether_a_training_learned(column, values, word):
    assert learned(pd.DataFrame({"step": range(len(values)), column: values}))[0] == word


def test_curves_have_points_and_the_healthy_range_where_one_is_known():
    frame = pd.DataFrame({"step": range(1, 501), "loss": np.linspace(np.log(2), 0.5, 500), "grad_norm": np.nan})
    found = training("dpo", frame)
    (loss,) = found.curves  # grad_norm was never logged
    assert len(loss.smooth.split()) == 120
    assert loss.healthy is not None
    assert loss.steps == 500
    assert training("sft", frame.assign(loss=0.05)).curves[0].healthy is None  # it does not start at ln 2
    assert training("base", frame.iloc[:0]) is None


def test_accuracy_is_sorted_by_timestep_and_refuses_lists_of_other_lengths():
    values = {"t": [900, 100], "accuracy": [0.5, 0.8], "ci95": [(0.4, 0.6), (0.7, 0.9)]}
    (line,) = accuracy({"spm": values}).lines
    assert [t for t, *_ in line.values] == [100, 900]
    assert line.places[0][1] < line.places[1][1]  # higher accuracy is further up
    assert accuracy({}) is None
    with pytest.raises(ValueError, match="2 timesteps but 1 accuracies"):
        accuracy({"spm": values | {"accuracy": [0.5]}})


def test_the_strip_is_chosen_by_its_rule(tmp_path):
    prompts = [f"prompt {i}" for i in range(9)]
    base = table(prompts)
    run = base.assign(oracle=base.oracle + np.repeat([0.0, 5, 1, 2, -3, 3, 4, -1, -2], 2))
    for name in ("base", "a"):
        (tmp_path / name).mkdir()
        for file in base["file"]:
            Image.effect_noise((600, 600), 80).convert("RGB").save(tmp_path / name / file)
    found = pictures({"base": base, "a": run}, tmp_path, ["a"], "base", "oracle")
    assert [(shown.why, shown.prompt) for shown in found.strip] == [
        ("largest gain", "prompt 1"), ("median", "prompt 2"), ("largest loss", "prompt 4")
    ]  # fmt: skip
    assert [side.run for side in found.strip[0].sides] == ["base", "a"]
    gained = [shown.prompt for shown in found.extremes["a"] if shown.why == "largest gain"]
    assert gained == ["prompt 1", "prompt 6"]
    assert sum(len(side.uri) for shown in (*found.strip, *found.extremes["a"]) for side in shown.sides) < 3_000_000


def test_every_term_of_the_page_is_explained(summary):
    html = to_html(replace(summary, best=None))
    assert all(f"<dt>{term}</dt>" in html for term in GLOSSARY)


def test_seeds_and_costs_are_shown(summary):
    cost = Cost(75.0, 140.0, "a <b>GPU", 2, 3_400_000_000, 1200, None)
    seeds = across_seeds(
        {0: summary, 1: replace(summary, protocol=replace(summary.protocol, seed=1))}, ["seed2 is stale"]
    )
    extras = Extras(costs={"align@spo": cost, "evaluate@spo": replace(cost, energy_wh=1.5, denoiser_samples=None)})
    page = " ".join(" ".join(read(to_html(summary, replace(extras, seeds=seeds))).text).split())
    assert "Across seeds" in page
    assert "2 of 2" in page  # spo is above base with both
    assert "seed2 is stale" in page
    assert "align@spo 75 s 2 min 1,200 3.4 GB" in page
    assert "2 x a <b>GPU" in page
    assert "1.5 Wh" in page


def test_a_run_that_is_shown_to_be_better_comes_before_a_larger_mean_that_is_not(summary):
    entry = summary.methods["spo"].vs_base["oracle"]
    noisy = replace(entry, difference=0.9, difference_ci95=(-0.1, 1.9), p_holm=0.4)
    same = replace(summary.methods["same"], vs_base=summary.methods["same"].vs_base | {"oracle": noisy})
    told = replace(summary, methods=summary.methods | {"same": same})
    assert first_sentence(told).startswith("spo, the best of 3 runs, beats base: ")
    assert "(same has a larger mean without such evidence)" in first_sentence(told)
    assert [row.run for row in forest(told).rows][:2] == ["spo", "same"]


def test_the_smallest_gain_is_no_loss(tables, tmp_path):
    for name in ("base", "spo"):
        (tmp_path / name).mkdir()
        for file in tables[name]["file"]:
            Image.new("RGB", (8, 8)).save(tmp_path / name / file)
    found = pictures(tables, tmp_path, ["spo"], "base", "oracle")  # every prompt gained
    assert [shown.why for shown in found.strip] == ["largest gain", "median", "smallest gain"]
    prompts = [shown.prompt for shown in found.extremes["spo"]]
    assert len(set(prompts)) == len(prompts)
