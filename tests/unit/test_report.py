"""The summary's shape and numbers, the words of the report, and that hostile text stays text."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from attune.evaluation.protocol import Protocol, hash_prompts, write_scores
from attune.evaluation.report import figures
from attune.evaluation.report.document import (
    Paragraph,
    Picture,
    Table,
    escape_html,
    escape_markdown,
    render_html,
    render_markdown,
)
from attune.evaluation.report.make import make_report, write_report
from attune.evaluation.report.render import to_html, to_markdown
from attune.evaluation.summarise import summarise
from attune.evaluation.summary import ComparisonEntry, Diagnostics, Extreme, Location, MethodSummary, Summary

COMMITTED = Path(__file__).parents[2] / "reports/tiny"

HOSTILE = [
    "a | b",
    "`code` ``` fence",
    "<script>alert(1)</script>",
    "line one\nline two\r\n\n# heading",
    "[click](javascript:alert(1)) ![x](http://evil.example/p.png)",
    "https://evil.example www.evil.example a@evil.example",
    "**bold** _it_ ~~no~~ \\ back \\| slash",
    "- item",
    "1. item",
    "---",
    "=== under",
    "&lt;b&gt; &amp; <!-- hidden",
    '" onmouseover="alert(1)',
    "$x^2$ # @user",
    "\x00\x1b[31m\u202egnp.exe",
]
SCORERS = ["oracle", "pickscore"]


def protocol_for(prompts: list[str]) -> Protocol:
    scorers = tuple((name, "rev", "raw") for name in SCORERS)
    n = len(prompts)
    return Protocol(hash_prompts(prompts), n, 2, "ddim", 20, 1, 5, 32, "float32", 0, scorers)


def table(prompts: list[str], shift: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """Two images per prompt; scores leave the base's by `shift` and noise drawn from `seed` (0: none)."""
    level = np.random.default_rng(99).normal(size=len(prompts))
    noise = np.random.default_rng(seed).normal(scale=0.1 if seed else 0, size=(len(prompts), 2))
    rows = [
        (prompt, k, f"{i}_{k}.png", level[i] + shift + noise[i, k], 20 + level[i] + noise[i, k], level[i])
        for i, prompt in enumerate(prompts)
        for k in range(2)
    ]
    return pd.DataFrame(rows, columns=["prompt", "ordinal", "file", *SCORERS, "oracle.appeal"])


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    prompts = [*HOSTILE, *(f"prompt {i}" for i in range(25))]
    return {
        "spo": table(prompts, 0.35, seed=1),
        "base": table(prompts),
        "same": table(prompts),
        "<b>evil|name": table(prompts, -0.3, seed=2),
    }


@pytest.fixture(scope="module")
def protocol(tables) -> Protocol:
    return protocol_for(sorted(set(tables["base"]["prompt"])))


@pytest.fixture(scope="module")
def summary(tables, protocol) -> Summary:
    diagnostics = {
        "spo": Diagnostics(diversity={"vendi": 3.5}, drift={"cmmd": 0.7}),
        "base": Diagnostics(diversity={"vendi": 4.0}),
    }
    return summarise(tables, protocol, trained_on={"spo": ["oracle"]}, diagnostics=diagnostics)


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
    protocol = Protocol("0", 3, 2, "ddim", 1, 0, 1, 8, "float32", 0, (("oracle", "r", "p"),))
    result = summarise({"base": base, "m": method.sample(frac=1, random_state=0)}, protocol).methods
    assert result["base"] == MethodSummary({"oracle": Location(2.0, 2.0)}, vs_base={})
    assert result["m"].scores["oracle"] == Location(3.0, 2.0)
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


def test_the_committed_summary_is_read_and_written_byte_for_byte():
    text = (COMMITTED / "summary.json").read_text()
    summary = Summary.from_json(text)
    assert summary.to_json() == text
    assert summary.methods["spo"].vs_base["oracle"].evidence == "better"


def test_the_committed_report_is_the_committed_summarys():
    """report.md holds no number that is not in summary.json, and links its pictures."""
    summary = Summary.from_json((COMMITTED / "summary.json").read_text())
    text = (COMMITTED / "report.md").read_text()
    titles = [line[2:].partition("](") for line in text.splitlines() if line.startswith("![")]
    pictures = [Picture(title, path.rstrip(")"), b"") for title, _, path in titles]
    assert to_markdown(summary, pictures) == text


def test_json_holds_everything_and_nothing_that_is_not_there(summary, tables, protocol):
    assert Summary.from_json(summary.to_json()) == summary
    values = json.loads(summary.to_json())
    assert list(values) == ["protocol", "n_prompts", "base", "scorers", "methods", "pairs"]
    assert values["n_prompts"] == 40
    assert list(values["methods"]["base"]) == ["scores", "vs_base", "diversity"]
    assert list(values["methods"]["same"]) == ["scores", "vs_base", "trained_on", "gap", "extremes"]
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
    assert method["gap"] == {"trained": None, "heldout": None, "gap": None}
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
    assert gap.gap == gap.trained - gap.heldout
    assert gap.gap == pytest.approx(0.35, abs=0.1)
    assert summary.methods["same"].gap is None


def test_a_scorer_that_selected_is_marked_and_not_held_out(tables, protocol):
    both = summarise(tables, protocol, trained_on={"spo": ["oracle"]}, selected_by={"spo": ["oracle", "pickscore"]})
    assert both.methods["spo"].gap is None  # no scorer is left that knows nothing of the method
    assert not both.methods["spo"].is_held_out("pickscore")
    text = to_markdown(both)
    assert "beats base on oracle (trained on, selected by) by +0.3" in text
    assert "pickscore (selected by) " in text
    assert "suspect reward hacking" not in text
    assert "(selected by) marks a scorer that early stopping or a search chose the method by" in text
    assert "| method | trained on | selected by | gain, trained |" in text
    assert r"| spo | oracle | oracle, pickscore | \- |" in text
    assert r"| same | \- | \- | \- |" in text


def test_scorers_that_did_not_evaluate_are_text(tables, protocol, summary):
    """Training on another scorer is told; it changes no number and marks nothing in the tables."""
    told = summarise(tables, protocol, trained_on={"spo": ["hps", "oracle"], "same": ["hps"]})
    assert told.methods["spo"].gap == summary.methods["spo"].gap
    assert told.methods["same"].gap is None
    lines = to_markdown(told).splitlines()
    spo, same = (next(line for line in lines if line.startswith(f"- **{name}**")) for name in ("spo", "same"))
    assert spo.endswith("suspect reward hacking. Also trained on: hps, which was not evaluated.")
    assert same.endswith(" Also trained on: hps, which was not evaluated.")
    chosen = to_markdown(summarise(tables, protocol, selected_by={"spo": ["hps", "clip"]}))
    assert "Also selected by: hps, clip, which were not evaluated." in chosen
    assert not any("Also" in line for line in to_markdown(summary).splitlines())


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


def test_markdown_says_it_in_words(summary):
    text = to_markdown(summary, [Picture("Win rates", "figures/win rate.png", b"")])
    line = next(line for line in text.splitlines() if line.startswith("- **spo**"))
    assert "beats base on oracle (trained on) by +0.3" in line
    assert "no evidence of a difference from base on pickscore" in line
    assert "suspect reward hacking" in line
    assert "![Win rates](figures/win%20rate.png)" in text
    protocol_sha = summary.protocol.sha
    lines = text.splitlines()
    headers = [i for i, line in enumerate(lines) if line.startswith("| ---")]
    assert len(headers) == 7
    for start in headers:
        after = next(line for line in lines[start:] if not line.startswith("|") and line)
        assert after.startswith(f"> Protocol {protocol_sha}")


def test_base_alone_still_makes_a_report():
    alone = summarise({"base": table(["a", "b"])}, protocol_for(["a", "b"]))
    assert "nothing to compare" in to_markdown(alone)
    assert "nothing to compare" in to_html(alone)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_shows_as_itself_in_markdown(text):
    """A CommonMark parser with tables finds one paragraph, or one cell, of plain text: the prompt's own."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    shown = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    tokens = parser.parse(escape_markdown(text))
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    assert {child.type for child in tokens[1].children} <= {"text", "text_special"}
    assert "".join(child.content for child in tokens[1].children) == shown
    page = render_markdown("t", [Table(("method", "prompt"), (("spo", text),))])
    cells = [token.content for token in parser.parse(page) if token.type == "inline"]
    assert len(cells) == 5  # title, two headers, two cells


def test_bare_links_are_defused():
    escaped = escape_markdown("https://evil.example www.evil.example me@evil.example")
    assert "://" not in escaped.replace(r"\://", "")
    assert "www." not in escaped
    assert r"\@" in escaped


def test_numbers_stay_readable():
    for text in ("-0.0123", "+0.3 (95 % CI +0.1 to +0.5)", "21.43", "Scorer: oracle", "12 px"):
        assert escape_markdown(text) == text


class Tags(HTMLParser):
    """Collects what a browser would see as elements, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text.append(data)


def test_html_is_self_contained_and_inert(summary):
    page = Tags()
    html = to_html(summary, [Picture('"><script>', "x.png", b"\x89PNG")])
    page.feed(html)
    assert page.tags.isdisjoint({"script", "a", "b>", "iframe", "link"})
    assert not any(name.startswith("on") or name == "href" for name in page.attributes)
    assert "data:image/png;base64,iVBORw==" in html
    assert "http://" not in html.replace("http://evil.example/p.png", "")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_shows_as_itself_in_html(text):
    page = Tags()
    page.feed(render_html("t", [Paragraph(text)]))
    shown = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    assert shown in page.text
    assert '"' not in escape_html(text)


def test_write_report_leaves_three_files(summary, tmp_path):
    write_report(tmp_path / "reports", summary)
    written = {path.name for path in (tmp_path / "reports").iterdir()}
    assert written == {"summary.json", "report.md", "report.html"}
    assert Summary.from_json((tmp_path / "reports" / "summary.json").read_text()) == summary


@pytest.mark.parametrize("trained", [True, False])
def test_a_report_is_made_of_what_finished_stages_left(tmp_path, trained):
    """A base and a run; where nothing was trained here, no curves and no accuracy, as of released models alone."""
    prompts = [f"prompt {i}" for i in range(12)]
    reports, generated = tmp_path / "reports", tmp_path / "generated"
    (reports / "train").mkdir(parents=True)
    (reports / "features").mkdir()
    for seed, name in enumerate(("base", "spo")):
        frame = table(prompts, 0.3 * seed, seed)
        write_scores(reports / "scores" / f"{name}.parquet", frame, protocol_for(prompts))
        np.save(reports / "features" / f"{name}.npy", np.random.default_rng(seed).normal(size=(24, 4)))
        (generated / name).mkdir(parents=True)
        for file in frame["file"]:
            Image.new("RGB", (8, 8), (40, 90, 200 * seed)).save(generated / name / file)
    if trained:
        pd.DataFrame({"step": range(5), "loss": 0.69}).to_csv(reports / "train/spo.csv")
        accuracy = {"spm": {"t": [0, 500], "accuracy": [0.8, 0.6]}}
        (reports / "train/preference.json").write_text(json.dumps({"accuracy_by_t": accuracy}))
    summary = make_report(
        ["base", "spo"], reports, generated, trained_on={"spo": ["oracle"]}, selected_by={"spo": ["hps"]}, seed=0
    )
    assert Summary.from_json((reports / "summary.json").read_text()) == summary
    assert set(summary.methods["spo"].diagnostics.drift) == {"cmmd"}
    assert summary.methods["base"].diagnostics.drift is None
    assert summary.methods["spo"].diagnostics.indices["saturation"] == 0
    drawn = {path.stem for path in (reports / "figures").iterdir()}
    assert drawn == {"samples", "win_rate", "difference"} | ({"curves", "accuracy_by_t"} if trained else set())
    text = (reports / "report.md").read_text()
    assert all(f"](figures/{name}.png)" in text for name in drawn)


def test_small_images_are_enlarged_by_whole_factors():
    """32 px -> factor 4 -> 128 px: every source pixel is a 4 x 4 block of its own colour."""
    images = np.random.default_rng(0).integers(0, 256, size=(2, 32, 32, 3), dtype=np.uint8)
    picture = np.asarray(figures.image_grid({"base": images, "spo": images / 255}, HOSTILE[:2], {"spo": [0.1, 1]}))
    block = np.kron(images[0], np.ones((4, 4, 1), dtype=np.uint8))
    found = [
        (picture[y : y + 128, x : x + 128] == block).all()
        for y in range(30, 80)
        for x in range(200, 400)
        if (picture[y, x] == block[0, 0]).all() and x + 128 <= picture.shape[1]
    ]
    assert sum(found) == 2


def test_image_grid_refuses_what_it_cannot_show():
    with pytest.raises(ValueError, match="expected 2 RGB images"):
        figures.image_grid({"base": np.zeros((1, 8, 8, 3))}, ["a", "b"])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        figures.image_grid({"base": np.full((1, 8, 8, 3), 2.0)}, ["a"])
    with pytest.raises(ValueError, match="at least one method"):
        figures.image_grid({}, ["a"])


def test_plots_render_any_name_and_leave_no_global_state(summary):
    import matplotlib.pyplot as plt

    frame = pd.DataFrame({"step": range(30), "loss": 0.69, "grad_norm": 1.0})
    curves = {"$\\bad{": frame, "dpo": frame.assign(margin=0.1)}
    accuracy = {"untimed": {"t": [900, 100], "accuracy": [0.5, 0.8], "ci95": [(0.4, 0.6), (0.7, 0.9)]}}
    pictures = [
        figures.win_rate_plot(summary),
        figures.score_difference_plot(summary),
        figures.accuracy_by_t_plot(accuracy),
        figures.training_curves(curves),
    ]
    assert all(picture.mode == "RGB" and min(picture.size) > 200 for picture in pictures)
    assert plt.get_fignums() == []
    with pytest.raises(ValueError, match="at least one of loss"):
        figures.training_curves({"a": frame[["step"]]})
