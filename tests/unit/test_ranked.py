"""Rankings of one's own and Human Preference Dataset v3: pairs of ranked images, lists that are read one by one."""

import json

import pytest

from attune.data.rows import BadRow, Pair, SourceError
from attune.data.sources import _json
from attune.data.sources._json import stream_json_list
from attune.data.splits import hashed_split
from raw_data import asked, image, rows_from


def ranked(tmp_path, rows, kind="jsonl", **block):
    path = tmp_path / f"r.{kind}"
    if kind == "csv":
        columns = list(rows[0])
        path.write_text("\n".join([",".join(columns), *(",".join(str(row[c]) for c in columns) for row in rows)]))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    found = rows_from("ranked", path=str(path), validation_share=0, test_share=0, **block)
    pairs = [row for row in found if isinstance(row, Pair)]
    compared = [(row.prompt, row.image_0.name, row.image_1.name, row.label_0) for row in pairs]
    assert all(row.label_0 + row.label_1 == 1 for row in pairs)
    return compared, [(row.reason, row.row) for row in found if isinstance(row, BadRow)]


def flat(order, *values, prompt="a cat"):
    return [
        {"prompt": prompt, "image": f"{name}.png", order: value} for name, value in zip("abcd", values, strict=False)
    ]


EXPECTED = [("a cat", "a.png", "b.png", 1.0), ("a cat", "a.png", "c.png", 1.0), ("a cat", "b.png", "c.png", 0.5)]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize(("order", "values"), [("rank", (1, 2, 2)), ("score", (0.9, -3, -3.0))])
def test_all_images_of_a_prompt_are_compared(tmp_path, kind, order, values):
    assert ranked(tmp_path, flat(order, *values), kind) == (EXPECTED, [])


def test_rows_of_a_prompt_are_one_ranking_wherever_they_are(tmp_path):
    a, b, c = flat("rank", 1, 2, 2)
    dog = flat("rank", 2, 1, prompt="a dog")
    found, bad = ranked(tmp_path, [a, dog[0], b, dog[1], c])
    assert (found, bad) == ([*EXPECTED, ("a dog", "a.png", "b.png", 0.0)], [])


@pytest.mark.parametrize(("order", "values"), [("ranks", [1, 2, 2]), ("scores", ["5", 1, 1])])
def test_a_line_may_hold_a_ranking(tmp_path, order, values):
    line = {"prompt": "a cat", "images": ["a.png", "b.png", "c.png"], order: values}
    assert ranked(tmp_path, [line]) == (EXPECTED, [])
    again, _ = ranked(tmp_path, [line, {**line, "images": ["d.png", "e.png", "f.png"]}])
    assert len(again) == 6  # two rankings of one prompt are not compared with each other


def test_rows_of_their_own_splits_are_rankings_of_their_own(tmp_path):
    rows = [row | {"split": split} for split in ("train", "test") for row in flat("rank", 1, 2)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [row.split for row in rows_from("ranked", path=str(tmp_path / "r.jsonl"))] == ["train", "test"]


BAD = {
    "no rank": ([{"prompt": "p", "image": "a"}], ("no_label", 1)),
    "a word": ([{"prompt": "p", "image": "a", "rank": "best"}], ("no_label", 1)),
    "both": ([{"prompt": "p", "image": "a", "rank": 1, "score": 2}], ("malformed_row", 1)),
    "no image": ([{"prompt": "p", "rank": 1}], ("malformed_row", 1)),
    "unequal": ([{"prompt": "p", "images": ["a", "b"], "ranks": [1]}], ("malformed_row", 1)),
    "no list": ([{"prompt": "p", "images": "a", "ranks": [1]}], ("malformed_row", 1)),
    "alone": ([{"prompt": "p", "image": "a", "rank": 1}], ("no_other_image", 1)),
    "empty": ([{"prompt": "p", "images": [], "ranks": []}], ("malformed_row", 1)),
    "twice": (flat("rank", 1) * 2 + flat("rank", 1, 2)[1:], ("duplicate_image", 2)),
    "many": ([{"prompt": "p", "images": list(map(str, range(101))), "ranks": list(range(101))}], ("malformed_row", 1)),
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_cannot_be_ranked_has_its_reason(tmp_path, name):
    rows, expected = BAD[name]
    assert ranked(tmp_path, rows)[1] == [expected]


def test_an_image_at_two_ranks_is_not_compared_with_itself(tmp_path):
    rows = [*flat("rank", 1, 2), {"prompt": "a cat", "image": "a.png", "rank": 3}]
    found, bad = ranked(tmp_path, rows)
    assert (len(found), bad) == (2, [])
    assert {label for _, first, _, label in found if first == "a.png"} == {1.0}


def test_a_limit_keeps_the_same_pairs_whatever_the_order_of_other_prompts(tmp_path):
    rows, dog = flat("rank", 1, 2, 3, 4), flat("rank", 1, 2, prompt="a dog")
    whole, _ = ranked(tmp_path, rows)
    some, _ = ranked(tmp_path, rows, pairs_per_prompt=2)
    assert (len(whole), len(some)) == (6, 2)
    assert some == [pair for pair in whole if pair in some]
    assert [pair for pair in ranked(tmp_path, dog + rows, pairs_per_prompt=2)[0] if pair[0] == "a cat"] == some


def test_a_table_without_an_order_or_with_two(tmp_path):
    for columns, said in (("prompt,image", "neither"), ("prompt,image,rank,score", "rank and score")):
        (tmp_path / "r.csv").write_text(f"{columns}\n{'x,' * columns.count(',')}1\n")
        with pytest.raises(SourceError, match=f"expected a column rank or a column score, found {said}"):
            rows_from("ranked", path=str(tmp_path / "r.csv"))


def test_the_plan_knows_a_ranking(tmp_path):
    (tmp_path / "a.png").write_bytes(image(0))
    (tmp_path / "r.jsonl").write_text(json.dumps({"prompt": "p", "images": ["a.png", "b.png"], "ranks": [1, 2]}))
    files, sizes, prompts = asked("ranked", path=str(tmp_path / "r.jsonl"), test_share=0, validation_share=0)
    assert files == [tmp_path / "r.jsonl", tmp_path / "a.png"]
    assert (sizes["pairs/train"], sizes["choices/train"], prompts) == (1, 1, ["p"])


# --- Human Preference Dataset v3 --------------------------------------------------------------------------

V3 = {"prompt": "a cat", "path1": "images/1.jpg", "path2": "images/2.jpg", "model1": "flux", "model2": "sdxl"}
V3 |= {"choice_dist": [7, 2], "confidence": 0.97}


@pytest.fixture
def hpdv3(tmp_path):
    def found(train, test=None, **block):
        (tmp_path / "train.json").write_text(json.dumps(train))
        if test is not None:
            (tmp_path / "test.json").write_text(json.dumps(test))
        return rows_from("hpdv3", path=str(tmp_path), **({"validation_share": 0, "test_share": 0} | block))

    return found


def test_the_first_path_is_the_preferred_image_and_equal_votes_are_a_tie(hpdv3, tmp_path):
    tie, bare = V3 | {"choice_dist": [3, 3]}, {key: V3[key] for key in ("prompt", "path1", "path2")}
    test, cat, tied, plain = hpdv3([V3, tie, bare], [V3 | {"prompt": "owls"}])
    assert (test.prompt, test.split, test.file, test.row) == ("owls", "test", "test.json", 0)
    assert (cat.image_0, cat.image_1) == (tmp_path / "images/1.jpg", tmp_path / "images/2.jpg")
    assert [(row.label_0, row.label_1) for row in (cat, tied, plain)] == [(1, 0), (0.5, 0.5), (1, 0)]


def test_rows_of_little_confidence_are_told_and_not_used(hpdv3):
    low, none = V3 | {"confidence": 0.5}, V3 | {"confidence": None}
    rows = hpdv3([V3, low, none], min_confidence=0.9)
    assert [getattr(row, "reason", "pair") for row in rows] == ["pair", "low_confidence", "no_label"]
    assert [getattr(row, "reason", "pair") for row in hpdv3([V3, low, none])] == ["pair"] * 3


def test_rows_that_are_none(hpdv3):
    rows = hpdv3(["text", V3 | {"path2": "../x.jpg"}, V3 | {"choice_dist": 3}, {"prompt": "p"}, V3 | {"prompt": 7}])
    assert rows[1].image_1.reason == "missing_image"
    reasons = [row.reason for row in rows if isinstance(row, BadRow)]
    assert reasons == ["malformed_row", "no_label", "malformed_row", "malformed_row"]


def test_without_a_test_list_prompts_are_hashed(hpdv3):
    train = [V3 | {"prompt": f"p {i}"} for i in range(30)]
    rows = hpdv3(train, validation_share=0.3, test_share=0.3)
    assert [row.split for row in rows] == [hashed_split(row.prompt, 0.3, 0.3) for row in rows]
    rows = hpdv3(train, [], validation_share=0.3, test_share=0.3)
    assert {row.split for row in rows} == {"train", "validation"}


def test_a_list_is_read_only_as_far_as_it_is_needed(hpdv3, tmp_path):
    assert len(hpdv3([V3 | {"prompt": f"p {i}"} for i in range(50)])) == 50
    with (tmp_path / "train.json").open("a") as file:
        file.write("never read")
    assert len(rows_from("hpdv3", path=str(tmp_path), validation_share=0, test_share=0)) == 50


HOSTILE = ["a ] in, text", '"quoted" \\ [', {"deep": [[{"x": ["}", "]"]}]]}, [], "", None, "é\ud7ff", {"a": "b" * 300}]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 2**20])
def test_a_stream_gives_the_elements_whatever_its_pieces(tmp_path, monkeypatch, size):
    monkeypatch.setattr(_json, "CHUNK_CHARS", size)
    for indent in (None, 2):
        (tmp_path / "l.json").write_text("\ufeff \n" * (size > 9) + json.dumps(HOSTILE, indent=indent), "utf-8")
        assert list(stream_json_list(tmp_path / "l.json")) == HOSTILE


@pytest.mark.parametrize(
    ("text", "elements"),
    [
        ("[]", []),
        ("[1, 2", [1, None]),
        ("[1, {]", [1, None]),
        ('[1, "cut', [1, None]),
        ("[1, , 2]", [1, None, 2]),
        ("[1, nonsense, 2]", [1, None, 2]),
        ("[" + "[" * 10**5 + "]" * 10**5 + ", 2]", [None, 2]),
    ],
    ids=range(7),
)
def test_what_cannot_be_read_costs_its_own_element(tmp_path, text, elements):
    (tmp_path / "l.json").write_text(text)
    assert list(stream_json_list(tmp_path / "l.json")) == elements


@pytest.mark.parametrize(
    ("data", "says"), [(b"{}", "must be a list"), (b"", "must be a list"), (b"\xff\xfe[\0", "UTF-8"), (None, "No such")]
)
def test_a_stream_of_no_list(tmp_path, data, says):
    if data is not None:
        (tmp_path / "l.json").write_bytes(data)
    with pytest.raises(SourceError, match=says):
        stream_json_list(tmp_path / "l.json")


def test_an_element_without_an_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(_json, "CHUNK_CHARS", 100)
    monkeypatch.setattr(_json, "MAX_ELEMENT_CHARS", 1000)
    (tmp_path / "l.json").write_text('["' + "x" * 5000)
    with pytest.raises(SourceError, match="is not JSON: 1000 characters without the end"):
        list(stream_json_list(tmp_path / "l.json"))
