"""The command line of the labelling page: what it refuses, and an export that the source `table` reads as it is."""

from __future__ import annotations

import csv
import json

import pytest
from PIL import Image

import labelled
import stages
from attune.data.rows import Pair, Quota
from attune.data.sources import table
from attune.labelling import store
from attune.labelling.export import export
from attune.labelling.pairs import LabelError

PROMPTS = ['=HYPERLINK("x")', 'two\nlines, "quoted"', "plain", "<b>bold</b>", "a fox", "a hen"]


@pytest.fixture
def project(tmp_path):
    """A project without any data, in the working directory."""
    runs = {"base": {"after": "data"}, "dpo": {"method": "dpo", "after": "data"}}
    with stages.inside(stages.write(tmp_path, runs)):
        yield tmp_path


@pytest.fixture
def answered(tmp_path):
    """A session in which anna and bob have answered, one answer was taken back, and one pair was shown again."""
    asked = labelled.session(tmp_path, PROMPTS, repeats=1 / 6)
    words = dict(zip(PROMPTS, ["a", "b", "tie", "bad", "a", "b"], strict=True))
    with store.opened(asked.database) as connection:
        for question in asked.asked_of("anna"):
            store.add(connection, "anna", question, words[question.pair.prompt])
        store.add(connection, "bob", asked.asked_of("bob")[0], "a")
        store.take_back(connection, store.standing(connection)[-1])
        store.add(connection, "bob", asked.asked_of("bob")[0], "b")
    return asked


def test_an_export_is_read_by_the_source_table(answered, tmp_path):
    done = export(tmp_path / "labels", "x", store.read(answered.database), answered.pairs)
    bobs = answered.asked_of("bob")[0].pair.prompt
    assert (done.rows, done.both_bad, done.repeats, done.changed) == (6, 1, 1, 0)
    assert done.escaped == 1 + (bobs == PROMPTS[0])
    rows = list(table.read(table.Config(path=str(tmp_path / "labels/pairs.csv")), 0, None, Quota()))
    assert all(isinstance(row, Pair) and row.image_0.is_file() and row.image_1.is_file() for row in rows)
    labels = {row.prompt: row.label_0 for row in rows[:5]}
    assert labels == {"'" + PROMPTS[0]: 1.0, PROMPTS[1]: 0.0, PROMPTS[2]: 0.5, PROMPTS[4]: 1.0, PROMPTS[5]: 0.0}
    assert (rows[5].prompt.lstrip("'"), rows[5].label_0) == (bobs, 0.0)
    with Image.open(rows[0].image_0) as first, Image.open(rows[0].image_1) as second:
        assert (first.getpixel((0, 0))[0] > 100, second.getpixel((0, 0))[2] > 100) == (True, True)
    with (tmp_path / "labels/pairs.csv").open(newline="") as file:
        assert [row["annotator"] for row in csv.DictReader(file)] == ["anna"] * 5 + ["bob"]


def test_an_export_keeps_its_images_and_leaves_out_answers_about_changed_ones(answered, tmp_path):
    export(tmp_path / "labels", "x", store.read(answered.database), answered.pairs)
    copies = {file.name: file.read_bytes() for file in (tmp_path / "labels/images").iterdir()}
    done = export(tmp_path / "labels", "x", store.read(answered.database), answered.pairs[1:])
    assert done.changed >= 1
    assert "have changed since are left out" in str(done)
    assert json.loads((tmp_path / "labels/labels.json").read_text())["changed"] == done.changed
    for pair in answered.pairs:
        for file in pair.files:
            file.unlink()
    assert {file.name: file.read_bytes() for file in (tmp_path / "labels/images").iterdir()} == copies


def test_an_export_does_not_replace_pairs_of_something_else(answered, tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/pairs.csv").write_text("mine\n")
    with pytest.raises(LabelError, match=r"its pairs\.csv is not of this session \(x\); name another folder"):
        export(tmp_path / "labels", "x", store.read(answered.database), answered.pairs)
    assert (tmp_path / "labels/pairs.csv").read_text() == "mine\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--a", "base"], "'base' is no run with images and no folder; no run has images"),
        (["--a", "params", "--annotator", "x\u202ey"], "a name has 1 to 60 visible characters"),
        (["--a", "params"], "there is no pair of images of one prompt in params"),
        (["--a", "images", "--port", "99999"], "--port 99999"),
    ],
)
def test_what_stands_in_the_way_is_one_line(project, words, said):
    labelled.write_run(project / "images", labelled.RED, ["a", "b"], images=2)
    with pytest.raises(SystemExit) as stopped:
        stages.call("label", *words)
    assert said in str(stopped.value.code)
    assert "\n" not in str(stopped.value.code)


@pytest.mark.parametrize(
    "words", [["--repeats", "0.6"], ["--repeats", "nan"], ["--prompts", "0"], ["--b", "base"], ["--port", "x"]]
)
def test_words_that_mean_nothing_are_refused(project, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        stages.call("label", "--a", "base", *words)
    assert stopped.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_answers_about_folders_are_none_of_the_report(project, capsys):
    sides = [labelled.write_run(project / name, labelled.RED, ["a"]) for name in ("x", "y")]
    stages.call("label", "--a", str(sides[0].folder), "--b", str(sides[1].folder), "--export", "labels")
    assert "No answers yet." in capsys.readouterr().out
    assert len(list((project / "data/short/labels").glob("x@*-vs-y@*.db"))) == 1
    assert not (project / "reports").exists()
