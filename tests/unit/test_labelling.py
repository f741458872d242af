"""The labelling page by its requests: blinding, undoing, going on, strangers, and what is found to label."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import labelled
from attune.labelling import store
from attune.labelling.order import questions
from attune.labelling.pairs import LabelError, LabelPair, Side, find_pairs, find_side
from attune.labelling.server import listen
from attune.paths import Paths

PROMPTS = [f"prompt {i}" for i in range(6)]
PAIRS = [LabelPair(f"prompt {i}", 0, ("a", "b"), ("0", "1")) for i in range(400)]


def is_red(png: bytes) -> bool:
    red, _, blue = np.asarray(Image.open(io.BytesIO(png)))[0, 0]
    return red > blue


def order_of(pairs=PAIRS, who="anna", **changes):
    return questions(pairs, who, **{"seed": 0, "repeats": 0.1, "secret": "s", **changes})


def test_sides_and_order_are_drawn_for_each_annotator_and_stay():
    """Of 400 fair coins 160 to 240 fall on one side in all but one of 10,000 draws."""
    anna, bob = order_of(), order_of(who="bob")
    assert 160 < sum(question.swapped for question in anna if not question.repeat) < 240
    assert order_of(list(reversed(PAIRS))) == anna
    swapped = [{q.pair.prompt: q.swapped for q in asked if not q.repeat} for asked in (anna, bob, order_of(seed=1))]
    assert [160 < sum(swapped[0][p] == other[p] for p in other) < 240 for other in swapped[1:]] == [True, True]
    assert [q.pair for q in anna] != [q.pair for q in bob]
    known = {q.key: q.swapped for q in anna}
    assert all(known[q.key] == q.swapped for q in order_of(PAIRS[:50]) if q.key in known)  # more pairs change no side


def test_repeats_come_half_a_round_later_with_sides_drawn_anew():
    asked = order_of(repeats=0.5)
    again = [(i, q) for i, q in enumerate(asked) if q.repeat]
    first = {q.pair: (i, q) for i, q in enumerate(asked) if not q.repeat}
    assert len(again) == 200
    assert len({q.id for q in asked}) == 600
    assert min(i - first[q.pair][0] for i, q in again) >= 200
    assert 65 < sum(first[q.pair][1].swapped == q.swapped for _, q in again) < 135
    assert len([q for q in order_of() if q.repeat]) == 40
    assert not [q for q in order_of(PAIRS[:1], repeats=0.5) if q.repeat]


@pytest.mark.parametrize(("colour", "side"), [("red", "a"), ("blue", "b")])
def test_what_is_shown_is_what_is_saved_and_the_page_is_not_told_whose_it_is(tmp_path, colour, side):
    """An annotator who always chooses red has always chosen side a, wherever it was; of blue side b."""
    asked, left = labelled.session(tmp_path, PROMPTS, repeats=0.5), []
    with labelled.served(asked) as page:
        for _ in range(9):
            state = page.state("anna")
            shown = [page.image("anna", state["question"]["id"], side) for side in ("left", "right")]
            left.append(is_red(shown[0]))
            assert is_red(shown[0]) != is_red(shown[1])
            told = json.dumps(state).encode() + b"".join(shown) + page.ask("/")[2]
            assert not re.search(rb"\b(red|blue|swapped|repeat)\b|\.png", told)
            page.answer("anna", "left" if left[-1] == (colour == "red") else "right")
        done = page.state("anna")
    assert len(set(left)) == 2
    assert done["question"] is None
    assert f"{colour} 6" in done["results"][0]
    assert "100.0 % of 3 pairs" in done["results"][2]
    assert {each.answer for each in store.read(asked.database)} == {side}


def test_ties_both_bad_and_undo_are_saved_as_rows(tmp_path):
    asked, done = labelled.session(tmp_path, PROMPTS[:2]), []
    with labelled.served(asked, lambda: done.append(True)) as page:
        first = page.state("anna")["question"]
        page.answer("anna", "tie")
        assert page.undo("anna")["question"] == first
        assert page.undo("anna")["answered"] == 0  # nothing is left to undo
        page.answer("anna", "bad")
        assert not done
        page.answer("anna", "tie")
        assert done == [True]
        assert page.undo("anna")["answered"] == 1  # also after the last
        assert page.state("bob")["answered"] == 0
        page.answer("bob", "left")
        assert page.state("anna")["answered"] == 1
    answers = store.read(asked.database)
    assert [(each.annotator, each.answer in ("a", "b") or each.answer) for each in answers] == [
        ("anna", "bad"),
        ("bob", True),
    ]
    with store.opened(asked.database) as connection:
        assert connection.execute("SELECT count(*) FROM answers").fetchone() == (6,)


def test_an_answer_to_another_question_is_refused(tmp_path):
    """Also one of a page that an earlier server showed, with other sides."""
    asked = labelled.session(tmp_path, PROMPTS)
    with labelled.served(asked) as page:
        old = page.state("anna")["question"]["id"]
        page.answer("anna", "left")
        for body in ({"question": old, "choice": "left"}, {"question": "0" * 24, "choice": "tie"}):
            assert page.ask("/answer", {"annotator": "anna", **body})[0] == 409
        assert page.ask("/undo", {"annotator": "anna", "question": old})[0] == 409
        assert page.state("anna")["answered"] == 1
    with labelled.served(replace(asked, seed=5)) as page:
        ids = {question.id for question in replace(asked, seed=5).asked_of("anna")}
        swapped = [question.id for question in asked.asked_of("anna") if question.id not in ids]
        assert swapped
        assert page.ask(f"/image/{swapped[0]}/left?annotator=anna")[0] == 404


def test_answers_about_images_that_changed_are_asked_again(tmp_path):
    asked = labelled.session(tmp_path, PROMPTS)
    with labelled.served(asked) as page:
        shown = page.state("anna")["question"]
        page.answer("anna", "left")
        pair = next(pair for pair in asked.pairs if pair.prompt == shown["prompt"])
        Image.new("RGB", (8, 8)).save(pair.files[0])
        page.undo("anna")
        status, _, said = page.ask(f"/image/{shown['id']}/left?annotator=anna")
        other, _, _ = page.ask(f"/image/{shown['id']}/right?annotator=anna")
        assert sorted([status, other]) == [200, 404]
        assert b".png" not in said
        page.answer("anna", "left")
    sides = [Side(name, tmp_path / name, is_run=True) for name in ("red", "blue")]
    with labelled.served(replace(asked, pairs=find_pairs(sides).pairs)) as page:
        assert page.state("anna")["answered"] == 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "evil.example:{port}"}, 403),
        ({"Host": "127.0.0.1:1"}, 403),
        ({"Host": "127.0.0.1"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": ""}, 403),  # left out
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": ""}, 415),
        ({"Content_Length": "1000000"}, 413),
    ],
)
def test_strangers_write_nothing(tmp_path, headers, status):
    asked = labelled.session(tmp_path, PROMPTS[:1])
    with labelled.served(asked) as page:
        headers = {name: value.format(port=page.port) for name, value in headers.items()}
        body = {"annotator": "anna", "question": page.state("anna")["question"]["id"], "choice": "left"}
        assert page.ask("/answer", body, **headers)[0] == status
        assert page.state("anna")["answered"] == (status == 200)
        if status == 403 and headers.get("Origin", "x"):
            assert page.ask("/state?annotator=anna", **headers)[0] == 403
            assert page.ask("/static/label.js", **headers)[0] == 403


def test_every_answer_forbids_what_the_page_does_not_need(tmp_path):
    asked = labelled.session(tmp_path, PROMPTS[:1], annotator='"><script>alert(1)</script>')
    with labelled.served(asked) as page:
        for path in ("/", "/static/label.css", "/state?annotator=a", "/nothing"):
            _, headers, _ = page.ask(path)
            assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
            assert headers["cache-control"] == "no-store"
        assert b"<script>alert" not in page.ask("/")[2]
        ways_out = ("/image/../../red/000_0.png/left", "/static/../app.py", "/static/%2e%2e/app.py")
        for path in ("/docs", "/openapi.json", *ways_out):
            assert page.ask(path)[0] in (404, 422)
        for name in ("", "%20", "a" * 61, "%00", "%E2%80%AE"):
            assert page.ask(f"/state?annotator={name}")[0] == 422


def test_a_side_is_a_run_or_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labelled.write_run(tmp_path / "data/short/generated/base", labelled.RED, PROMPTS)
    (tmp_path / "pictures").mkdir()
    assert find_side("base", Paths("short")).is_run
    assert not find_side("pictures", Paths("short")).is_run
    with pytest.raises(LabelError, match=r"'dpo' is no run .* runs with images are base; `dvc repro generate@<run>`"):
        find_side("dpo", Paths("short"))


def test_images_of_one_run_are_paired_in_order(tmp_path):
    side = labelled.write_run(tmp_path / "base", labelled.RED, ["p", "q"], images=5)
    found = find_pairs([side])
    assert [(pair.prompt, pair.ordinal, [file.name[4] for file in pair.files]) for pair in found.pairs] == [
        ("p", 0, ["0", "1"]),
        ("p", 2, ["2", "3"]),
        ("q", 0, ["0", "1"]),
        ("q", 2, ["2", "3"]),
    ]
    assert "2 images have no second one" in found.notes[0]
    assert len(find_pairs([side], prompts=1).pairs) == 2


def plain(folder, names, **texts):
    folder.mkdir()
    for name in names:
        Image.new("RGB", (4, 4), "red").save(folder / name)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return Side(folder.name, folder, is_run=False)


def test_plain_folders_are_paired_by_name(tmp_path):
    a = plain(tmp_path / "a", ["x.png", "y.png", "z.png", "w.png"], x="a cat", y="a cat")
    b = plain(tmp_path / "b", ["x.jpg", "y.png", "z.png", "v.png"])
    (tmp_path / "b/captions.json").write_text(json.dumps({"z.png": "=a dog", "v": "none"}))
    found = find_pairs([a, b])
    assert [(pair.prompt, pair.ordinal, pair.files[1].name) for pair in found.pairs] == [
        ("a cat", 0, "x.jpg"),
        ("a cat", 1, "y.png"),
        ("=a dog", 0, "z.png"),
    ]
    assert [note.partition(":")[0] for note in found.notes] == ["a", "b"]
    (tmp_path / "b/x.txt").write_text("a mouse")
    with pytest.raises(LabelError, match="x: a and b have different prompts"):
        find_pairs([a, b])


def test_images_that_cannot_be_shown_are_told_before_anything_is_asked(tmp_path):
    a = plain(tmp_path / "a", ["w.png", "x.png", "y.png", "z.png"], x="p", y="q", z="r")
    (tmp_path / "a/captions.json").write_text('{"w": "half a \\ud83d"}')
    b = plain(tmp_path / "b", ["w.png", "x.png", "y.png", "z.png"])
    (tmp_path / "b/x.png").write_text("<svg onload=alert(1)>")
    (tmp_path / "b/y.png").unlink()
    (tmp_path / "b/y.png").symlink_to(tmp_path / "a/y.png")
    found = find_pairs([a, b])
    assert [pair.prompt for pair in found.pairs] == ["r"]
    expected = zip(["1 pairs have a prompt that is no UTF-8", "x.png", "leads out"], found.notes, strict=True)
    assert all(words in note for words, note in expected)
    (tmp_path / "b/z.png").unlink()
    with pytest.raises(LabelError, match="there is no pair of images of one prompt in a and b"):
        find_pairs([a, b])


def test_a_run_index_that_leads_out_is_refused(tmp_path):
    import pandas as pd

    side = labelled.write_run(tmp_path / "base", labelled.RED, ["p"])
    pd.DataFrame({"prompt": ["p"], "ordinal": [0], "file": ["../secret.png"]}).to_parquet(side.folder / "index.parquet")
    with pytest.raises(LabelError, match="leads out"):
        find_pairs([side])
    packed = pd.DataFrame({"prompt": ["p"], "ordinal": [0], "file": ["00000.tar/00000000.png"]})
    packed.to_parquet(side.folder / "index.parquet")
    with pytest.raises(LabelError, match=r"base: more than 10,000 images, .*: lower generate\.prompts, or give a fo"):
        find_pairs([side])


def test_a_port_that_is_taken_and_a_database_of_others_are_told(tmp_path):
    with listen(0) as taken, pytest.raises(LabelError, match=r"--port \d+: Address already in use; choose another"):
        listen(taken.getsockname()[1])
    store.create(tmp_path / "x.db", ["a", "b"])
    with pytest.raises(LabelError, match=r"has answers about a \| b, not a \| c"):
        store.create(tmp_path / "x.db", ["a", "c"])
    (tmp_path / "y.db").write_text("no database, but long enough to be looked at" * 20)
    with pytest.raises(LabelError, match=r"y\.db: the answers cannot be read or written"):
        store.create(tmp_path / "y.db", ["a"])
