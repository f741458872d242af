"""What `inspect` says of a constructed folder of data: exact numbers, inert text, bounded memory."""

import csv
import json
import re
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import stages
from attune.data.ingest.ingest import Rules
from attune.data.ingest.scorer import ImageScorer
from attune.data.quarantine import Quarantine
from attune.data.rows import Pair, Prompt
from attune.inspection import choices
from attune.inspection.bars import histogram
from attune.inspection.collect import collect, kind_of
from attune.inspection.facts import image_facts
from attune.inspection.sheets import SUSPECTS, Sheets
from raw_data import encoded, pixels

RUNS = {"base": {"after": "data"}, "dpo": {"method": "dpo", "after": "data"}}
EVIL = '<script>alert("x")</script> \' & {{ 7*7 }} </style>\u202egnp.txt'
PAGE, QUARANTINE = Path("reports/short/data.html"), Path("reports/short/data_quarantine.csv")


def row(prompt, first, second, label_0, split="train"):
    return {"prompt": prompt, "image_0": first, "image_1": second, "label_0": label_0, "split": split}


@pytest.fixture
def project(tmp_path):
    """Six images of 40 x 32 pixels, one of 16 x 16; good pairs, a contradiction, a circle, a tie, and bad rows."""
    raw = tmp_path / "raw"
    raw.mkdir()
    for i in range(6):
        Image.fromarray(pixels(i, 40, 32)).save(raw / f"{i}.png")
    Image.fromarray(pixels(6, 16, 16)).save(raw / "small.jpg")
    (raw / "broken.png").write_bytes(b"no image")
    rows = [
        row("bees", "0.png", "1.png", 1),
        row("Bees", "1.png", "0.png", 1),  # contradicts the first
        row("bees", "0.png", "1.png", 1),  # the first again
        *(row("owls", a, b, 1) for a, b in (("0.png", "1.png"), ("1.png", "2.png"), ("2.png", "0.png"))),
        row("a tie", "3.png", "4.png", 0.5),
        row("twice", "5.png", "5.png", 0),
        row(EVIL, "small.jpg", "5.png", 1),
        row("x" * 1_000_000, "3.png", "5.png", 0),
        row("leak", "0.png", "5.png", 1),
        row("LEAK", "0.png", "5.png", 1, "test"),
        *(row(f"test {i}", "1.png", "5.png", 1, "test") for i in range(4)),
        row("bad", "broken.png", "0.png", 1),
        row("gone " + EVIL, "<img src=x>.png", "0.png", 1),
    ]
    (raw / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    data = {"source": "table", "path": "raw/pairs.jsonl", "max_bad_share": 0.2}
    stages.write(tmp_path, RUNS, data=data, methods__dpo__batches=90)
    with stages.inside(tmp_path):
        yield tmp_path


def test_numbers_of_a_constructed_folder_are_exactly_right(project, capsys):
    stages.call("inspect")
    text = capsys.readouterr().out
    assert "18 rows read; 4 in the quarantine" in text
    assert re.search(r"prompts +7 +0 +5", text)
    assert re.search(r"pairs +9 +0 +5", text)
    assert re.search(r"choices +8 +0 +5", text)
    assert re.search(r"ties +1 +0 +0", text)
    assert "dpo: 8 choices, 360 presented, 45.0 times each" in text
    assert "2 pairs (15 % of the choices) contradict" in text
    assert "1 pair shows the same image twice." in text
    assert "1 image of 7 (14 %) will be enlarged: the model's side is 32 pixels." in text
    assert "1 prompt stands in several splits" in text
    assert "2 rows of 18 (11 %) cannot be used." in text
    assert "can be trained on. Look at" in text
    page = PAGE.read_text()
    assert "1 of 1 triple" in page
    assert "6 PNG, 1 JPEG" in page
    with QUARANTINE.open(newline="") as file:
        reasons = [each["reason"] for each in csv.DictReader(file)]
    assert sorted(reasons) == ["duplicate_pair", "missing_image", "prompt_in_later_split", "undecodable"]
    assert not Path("data").exists()  # what prepare writes is left alone


def test_what_prepare_would_refuse_is_said_and_does_not_end_the_look(project, capsys):
    stages.write(project, RUNS, data={"source": "table", "path": "raw/pairs.jsonl", "max_bad_share": 0.1})
    stages.call("inspect")
    text = capsys.readouterr().out
    assert "cannot be trained on yet: one thing would stop" in text
    assert "prepare stops: that is more than data.max_bad_share" in text
    stages.write(
        project, RUNS, data={"source": "table", "path": "raw/pairs.jsonl", "max_bad_share": 1}, generate__prompts=9
    )
    stages.call("inspect")
    text = capsys.readouterr().out
    assert "5 test prompts, but 9 are needed by generate.prompts" in text.replace("Data: ", "")
    assert "data.test_list" in text


class Tags(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_hostile_text_is_inert_and_the_page_refers_to_nothing_outside(project):
    stages.call("inspect", "--score", "pickscore")
    page = PAGE.read_text()
    found = Tags(page)
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "link", "iframe", "object", "form", "base"}
    assert not [attrs for _, attrs in found.tags if any(key.startswith("on") for key in attrs)]
    places = [attrs[key] for _, attrs in found.tags for key in ("src", "href") if key in attrs]
    assert places
    assert all(place.startswith("data:image/webp;base64,") for place in places)
    assert '<script>alert("x")</script>' in found.text
    assert "{{ 7*7 }}" in found.text
    assert "\u202e" not in page
    assert "<img src=x>.png" in found.text
    assert "x" * 1000 not in page
    assert len(page) < 1_000_000
    assert "url(" not in page
    assert "@import" not in page


def test_data_that_are_not_there_and_unknown_scorers_are_told_in_one_line(project, capsys):
    with pytest.raises(SystemExit, match=r"^--score taste: not in params/short.yaml:scorers; there are oracle, "):
        stages.call("inspect", "--score", "taste")
    with pytest.raises(SystemExit, match=r"^--score oracle: .*not a prompt of the embedded world"):
        stages.call("inspect", "--score", "oracle")
    stages.write(project, RUNS, data={"source": "folder", "path": "raw/nowhere"})
    with pytest.raises(SystemExit, match=r"^[^\n]*raw/nowhere[^\n]*$"):
        stages.call("inspect")
    with pytest.raises(SystemExit):
        stages.call("inspect", "--images", "100000")
    assert "a number from 0 to 200 is wanted" in capsys.readouterr().err


def test_a_part_of_the_rows_is_called_that_and_not_blamed_for_being_few(project, capsys):
    stages.call("inspect", "--max-rows", "4", "--images", "2")
    text = capsys.readouterr().out
    assert "the first 4 rows read, of about 17, 24 %" in text
    assert "are needed" not in text
    assert PAGE.read_text().count("<article") == 2 + 1  # at random, and the contradiction


@pytest.fixture
def look(tmp_path):
    """Collects rows without a project."""

    def run(rows, n=3, scorers=None, most=None):
        scorers = scorers or {}
        with Quarantine(tmp_path / "q.csv", "test") as quarantine:
            scorer = ImageScorer(scorers, torch.device("cpu"))
            return collect(rows, Rules(), scorer, quarantine, Sheets(n, 0, list(scorers)), most)

    return run


def pair(number, seed, label_0=1.0, prompt="a cat", side=16):
    images = (encoded(pixels(2 * seed, side, side)), encoded(pixels(2 * seed + 1, side, side)))
    return Pair(prompt, *images, label_0, 1 - label_0, "train", "f", number)


def mean_colour(images, prompts):
    return images.mean((1, 2, 3))


def test_a_scorer_is_held_against_the_choices(look):
    """The first image is the brighter one; one prompt of four is labelled against that, and one is a tie."""
    dark, bright = encoded(np.zeros((8, 8, 3), np.uint8)), encoded(np.full((8, 8, 3), 255, np.uint8))
    labels = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.0, "e": 0.5}
    rows = [Pair(p, bright, dark, label, 1 - label, "train", "f", p) for p, label in labels.items()]
    found = look(rows, scorers={"mine": mean_colour})
    agreement = choices.agreement(found.pairs, "mine")
    assert (agreement.accuracy.value, agreement.accuracy.choices, agreement.accuracy.prompts) == (0.75, 4, 4)
    assert agreement.margin == pytest.approx(0.5)
    assert agreement.accuracy.is_chance
    (shown,) = found.shown["mine"]
    assert (shown.prompt, shown.scores["mine"]) == ("d", (1.0, 0.0))


def test_the_pairs_that_a_scorer_disagrees_with_most_are_shown_worst_first(look):
    rows = [
        Pair(
            "a cat",
            encoded(np.zeros((8, 8, 3), np.uint8)),
            encoded(np.full((8, 8, 3), 10 * i, np.uint8)),
            1.0,
            0.0,
            "train",
            "f",
            i,
        )
        for i in range(1, 21)
    ]
    shown = look(rows, scorers={"mine": mean_colour}).shown["mine"]
    assert [each.place for each in shown] == [f"f row {i}" for i in range(20, 20 - SUSPECTS, -1)]


def test_images_are_not_held(look):
    """Of 60 pairs of 300 x 300 pixels, 32 MB decoded, memory grows by less than a fifth."""
    look([pair(0, 0)])
    tracemalloc.start()
    found = look((pair(i, i, side=300) for i in range(60)), n=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.pairs) == 60
    assert peak < 0.2 * 60 * 2 * 300 * 300 * 3
    assert sum(map(len, found.shown)) > 0
    assert [len(sheet) for sheet in found.shown.values()] == [2]


def test_prompts_alone_do_not_count_among_the_rows_that_are_read(look):
    rows = [*(Prompt(f"p{i}", "test") for i in range(5)), *(pair(i, i) for i in range(4))]
    found = look(rows, most=2)
    assert (len(found.prompts), len(found.pairs), found.is_whole) == (6, 2, False)
    assert look(rows, most=4).is_whole


def test_images_of_pairs_that_are_left_out_in_the_end_are_not_counted(look):
    """The first pair's prompt is a test prompt too, and its images are in no other pair."""
    rows = [pair(0, 0, prompt="leak"), Prompt("leak", "test"), pair(1, 1, side=24)]
    found = image_facts(look(rows), 16)
    assert (found.images, found.kinds, found.enlarged, found.smallest) == (2, [("PNG", 2)], 0, (24, 24))


def test_without_pairs_there_is_still_a_page(project, capsys):
    Path("raw/list.txt").write_text("bees\n" + "owls " * 400 + "\n")
    source = {"source": "prompts", "path": "raw/list.txt", "validation_share": 0, "test_list": "raw/list.txt"}
    stages.write(project, {"base": {"after": "data"}}, data=source, generate__prompts=2, preference=None, methods={})
    stages.call("inspect")
    assert "1 prompt of 2 will be cut" in capsys.readouterr().out
    assert "<h2>Choices" not in PAGE.read_text()


@pytest.mark.parametrize(
    ("wins", "expected"), [("ab bc ca", (1, 1)), ("ab bc ac", (0, 1)), ("ab bc ca ca ac ac", (0, 0)), ("ab bc", (0, 0))]
)
def test_choices_that_go_in_a_circle_are_counted(wins, expected):
    """Of two images compared several times the more frequent choice counts, and of equals neither."""
    table = pd.DataFrame(
        [("p", 1.0, a.encode(), b.encode()) for a, b in wins.split()],
        columns=["prompt", "label_0", "content_0", "content_1"],
    )
    found = choices.circles(table)
    assert (found.circles, found.triples) == expected


@pytest.mark.parametrize(("kind", "name"), [("PNG", "PNG"), ("JPEG", "JPEG"), ("WEBP", "WebP"), ("TIFF", "TIFF")])
def test_types_of_files_are_told_by_their_bytes(kind, name, tmp_path):
    data = encoded(pixels(0), kind)
    (tmp_path / "a.png").write_bytes(data)
    assert kind_of(data) == kind_of(tmp_path / "a.png") == name


def test_bars_begin_at_the_mark_and_hold_every_value():
    bars = histogram([16, 30, 31, 32, 40, 900], 32, lambda side: side < 32)
    assert sum(bar.count for bar in bars) == 6
    assert sum(bar.count for bar in bars if bar.is_bad) == 3
    assert max(bar.length for bar in bars) == 1
