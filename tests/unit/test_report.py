"""The report's Markdown and files: words, tables, and that hostile text stays text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from attune.evaluation.protocol import write_scores
from attune.evaluation.report.document import Picture, Table, escape_markdown, render_markdown
from attune.evaluation.report.grid import image_grid
from attune.evaluation.report.make import make_report, write_report
from attune.evaluation.report.page import to_html
from attune.evaluation.report.render import to_markdown
from attune.evaluation.summarise import summarise
from attune.evaluation.summary import Summary
from scores import HOSTILE, protocol_for, table

COMMITTED = Path(__file__).parents[2] / "reports/tiny"


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
    pictures = [Picture(title, path.rstrip(")")) for title, _, path in titles]
    assert to_markdown(summary, pictures) == text


def test_a_scorer_that_selected_is_marked_and_not_held_out(tables, protocol):
    both = summarise(tables, protocol, trained_on={"spo": ["oracle"]}, selected_by={"spo": ["oracle", "pickscore"]})
    assert both.methods["spo"].gap is None  # no scorer is left that knows nothing of the method
    assert not both.methods["spo"].is_held_out("pickscore")
    assert both.methods["spo"].hacking.word == "none"
    text = to_markdown(both)
    assert "beats base on oracle (trained on, selected by) by +0.3" in text
    assert "pickscore (selected by) " in text
    assert "| oracle, oracle (selected by), pickscore (selected by) |" in text


def test_scorers_that_did_not_evaluate_are_text(tables, protocol, summary):
    """Training on another scorer is told; it changes no number and marks nothing in the tables."""
    told = summarise(tables, protocol, trained_on={"spo": ["hps", "oracle"], "same": ["hps"]})
    assert told.methods["spo"].gap == summary.methods["spo"].gap
    assert told.methods["same"].gap is None
    lines = to_markdown(told).splitlines()
    spo, same = (next(line for line in lines if line.startswith(f"- **{name}**")) for name in ("spo", "same"))
    assert spo.endswith("Also trained on: hps, which was not evaluated.")
    assert same.endswith(" Also trained on: hps, which was not evaluated.")
    chosen = to_markdown(summarise(tables, protocol, selected_by={"spo": ["hps", "clip"]}))
    assert "Also selected by: hps, clip, which were not evaluated." in chosen
    assert not any("Also" in line for line in to_markdown(summary).splitlines())


def test_markdown_says_it_in_words(summary):
    text = to_markdown(summary, [Picture("Win rates", "figures/win rate.png")])
    line = next(line for line in text.splitlines() if line.startswith("- **spo**"))
    assert "beats base on oracle (trained on) by +0.3" in line
    assert "no evidence of a difference from base on pickscore" in line
    assert "Reward hacking is suspected: oracle, which it was trained on, rose; pickscore did not." in line
    assert "![Win rates](figures/win%20rate.png)" in text
    assert f"> {summary.protocol.sha}: 40 prompts" in text
    assert "vendi -0.5 |" in text  # a sign whose interval excludes 0
    assert "cmmd" not in text


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


def test_write_report_leaves_its_files(summary, tmp_path):
    write_report(tmp_path / "reports", summary)
    written = {path.name for path in (tmp_path / "reports").iterdir()}
    assert written == {"summary.json", "metrics.json", "report.md", "report.html"}
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
        pd.DataFrame({"step": range(9), "loss": 0.69}).to_csv(reports / "train/spo.csv")
        pd.DataFrame({"step": [], "loss": []}).to_csv(reports / "train/base.csv")  # nothing trained, and no panel
        accuracy = {"spm": {"t": [0, 500], "accuracy": [0.8, 0.6], "ci95": [(0.7, 0.9), (0.5, 0.7)]}}
        (reports / "train/preference.json").write_text(json.dumps({"accuracy_by_t": accuracy}))
    summary = make_report(
        ["base", "spo"], reports, generated, trained_on={"spo": ["oracle"]}, selected_by={"spo": ["hps"]}, seed=0
    )
    assert Summary.from_json((reports / "summary.json").read_text()) == summary
    found = summary.methods["spo"].signs
    assert set(found) == {"saturation", "high_frequency", "cmmd", "vendi", "pairwise_distance"} | {
        f"{sign}_per_prompt" for sign in ("vendi", "pairwise_distance")
    }
    assert (found["saturation"].base, found["saturation"].value) == (1.0, 0.0)  # (40, 90, 0) has a crushed channel
    assert found["saturation"].has_moved
    assert not summary.methods["base"].signs
    assert {path.name for path in (reports / "figures").iterdir()} == {"samples.png"}
    page = (reports / "report.html").read_text()
    assert page.count("data:image/webp") == 2 * (3 + 6)  # the strip, and three kinds of examples
    assert ("did it learn?" in page) == trained
    assert ("The preference model by" in page) == trained
    assert "](figures/samples.png)" in (reports / "report.md").read_text()


def test_small_images_are_enlarged_by_whole_factors():
    """32 px -> factor 4 -> 128 px: every source pixel is a 4 x 4 block of its own colour."""
    images = np.random.default_rng(0).integers(0, 256, size=(2, 32, 32, 3), dtype=np.uint8)
    picture = np.asarray(image_grid({"base": images, "spo": images / 255}, HOSTILE[:2], {"spo": [0.1, 1]}))
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
        image_grid({"base": np.zeros((1, 8, 8, 3))}, ["a", "b"])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        image_grid({"base": np.full((1, 8, 8, 3), 2.0)}, ["a"])
    with pytest.raises(ValueError, match="at least one method"):
        image_grid({}, ["a"])
