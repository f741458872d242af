"""The summary's shape and numbers, the words of the report, and that hostile text stays text."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from attune.evaluation.protocol import Protocol, hash_prompts
from attune.evaluation.report import figures
from attune.evaluation.report.document import Paragraph, Picture, Table, escape_html, render_html, render_markdown
from attune.evaluation.report.verdict import escape_markdown, summarise, to_html, to_markdown, verdict, write_report

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
def summary() -> dict:
    prompts = [*HOSTILE, *(f"prompt {i}" for i in range(25))]
    tables = {
        "spo": table(prompts, 0.35, seed=1),
        "base": table(prompts),
        "same": table(prompts),
        "<b>evil|name": table(prompts, -0.3, seed=2),
    }
    extras = {
        "spo": {"diversity": {"vendi": 3.5}, "drift": {"cmmd": 0.7}},
        "base": {"diversity": {"vendi": 4}},
    }
    return summarise(tables, protocol_for(prompts), trained_on={"spo": ["oracle"]}, extras=extras)


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
    result = summarise({"base": base, "m": method.sample(frac=1, random_state=0)}, protocol)["methods"]
    assert result["base"] == {"scores": {"oracle": {"mean": 2.0, "median": 2.0}}, "vs_base": {}}
    assert result["m"]["scores"]["oracle"] == {"mean": 3.0, "median": 2.0}
    entry = result["m"]["vs_base"]["oracle"]
    assert entry["difference"] == pytest.approx(1)
    assert entry["win_rate"] == pytest.approx(5 / 6)
    assert result["m"]["extremes"]["gained"][0] == {"prompt": "c", "difference": 2.0}
    assert result["m"]["extremes"]["lost"] == []


def test_summary_has_the_promised_shape(summary):
    assert {"protocol", "n_prompts", "methods"} <= set(summary)
    assert Protocol.from_dict(summary["protocol"]).n_prompts == summary["n_prompts"] == 40
    assert list(summary["methods"]) == ["base", "spo", "same", "<b>evil|name"]
    assert summary["methods"]["base"]["vs_base"] == {}
    for name, method in summary["methods"].items():
        for scorer in SCORERS:
            assert set(method["scores"][scorer]) == {"mean", "median"}
            if name != "base":
                entry = method["vs_base"][scorer]
                assert {"win_rate", "ci95", "p_value", "p_holm", "difference", "difference_ci95"} <= set(entry)
                assert entry["ci95"][0] <= entry["win_rate"] <= entry["ci95"][1]
                assert entry["p_holm"] >= entry["p_value"]
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_verdicts_follow_the_evidence(summary):
    methods = summary["methods"]
    assert verdict(methods["spo"]["vs_base"]["oracle"]) == "better"
    assert verdict(methods["spo"]["vs_base"]["pickscore"]) == "no evidence"
    assert verdict(methods["<b>evil|name"]["vs_base"]["oracle"]) == "worse"
    same = methods["same"]["vs_base"]["oracle"]
    assert (same["win_rate"], same["p_value"], same["ci95"]) == (0.5, 1.0, [0.5, 0.5])
    disagree = {"p_holm": 0.01, "difference_ci95": [-0.1, 0.3], "win_rate": 0.7}
    assert verdict(disagree) == "mixed"
    assert verdict(disagree | {"difference_ci95": [0.1, 0.3], "win_rate": 0.4}) == "mixed"
    assert verdict(disagree | {"difference_ci95": [0.1, 0.3], "p_holm": 0.2}) == "no evidence"


def test_gap_is_standardised_and_needs_both_sides(summary):
    """Trained gain ~0.35 base spreads, held-out gain ~0."""
    gap = summary["methods"]["spo"]["gap"]
    assert gap["gap"] == pytest.approx(gap["trained"] - gap["heldout"])
    assert gap["gap"] == pytest.approx(0.35, abs=0.1)
    assert summary["methods"]["same"]["gap"] is None


def test_tables_that_cannot_be_paired_are_refused():
    prompts = ["a", "b"]
    protocol, base = protocol_for(prompts), table(prompts)
    with pytest.raises(ValueError, match="no scores of the base"):
        summarise({"spo": base}, protocol)
    with pytest.raises(ValueError, match="base and spo hold different prompts"):
        summarise({"base": base, "spo": base.replace({"prompt": {"a": "c"}})}, protocol)
    with pytest.raises(ValueError, match="different score columns"):
        summarise({"base": base, "spo": base.drop(columns="oracle.appeal")}, protocol)
    with pytest.raises(ValueError, match="trained_on names scorers"):
        summarise({"base": base, "spo": base}, protocol, trained_on={"spo": ["hps"]})
    with pytest.raises(ValueError, match="trained_on names methods"):
        summarise({"base": base}, protocol, trained_on={"spo": ["oracle"]})


def test_markdown_says_it_in_words(summary):
    text = to_markdown(summary, [Picture("Win rates", "figures/win rate.png", b"")])
    line = next(line for line in text.splitlines() if line.startswith("- **spo**"))
    assert "beats base on oracle (trained on) by +0.3" in line
    assert "no evidence of a difference from base on pickscore" in line
    assert "suspect reward hacking" in line
    assert "![Win rates](figures/win%20rate.png)" in text
    protocol_sha = Protocol.from_dict(summary["protocol"]).sha
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
    assert json.loads((tmp_path / "reports" / "summary.json").read_text()) == summary


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
