"""What cells mean in whatever type a data set writes them, by hand and from real parquet, tar, CSV and JSON files."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attune.data.ingest.rules import clean_prompt, label
from attune.data.quarantine import RejectedRow
from attune.data.rows import BadRow, SourceError
from attune.data.sources._cells import as_flag, as_float, as_image, as_split, as_text
from raw_data import image, rows_from

NO = [False, 0, 0.0, "False", "false", " FALSE ", "0", "0.0", "no", "n", "off", b"0", b"False", np.bool_(0), np.int8(0)]
YES = [True, 1, 1.0, "True", "1", "1.0", "yes", "on", b"1", b"true", np.bool_(1), np.float32(1)]
NOTHING = [None, "", "  ", "none", "null", "nan", b"", float("nan"), np.float32("nan")]
ODD = ["perhaps", 2, -1, 0.5, b"\xff", [False], {"value": 0}, float("inf"), 10**400]


@pytest.mark.parametrize(("cells", "meaning"), [(NO, False), (YES, True), (NOTHING, None)])
def test_flags_of_any_type(cells, meaning):
    assert [as_flag(cell, "has_label") for cell in cells] == [meaning] * len(cells)


@pytest.mark.parametrize("cell", ODD, ids=repr)
def test_a_flag_that_is_neither_yes_nor_no_is_told(cell):
    with pytest.raises(RejectedRow, match="malformed_row") as rejected:
        as_flag(cell, "has_label")
    assert rejected.value.detail.startswith("column has_label: expected true or false, found ")


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        ("0.5", 0.5),
        (" 1 ", 1),
        ("True", 1),
        ("no", 0),
        (b"1.0", 1),
        (True, 1),
        (np.int64(3), 3),
        (10**400, None),
        ("9" * 5000, float("inf")),
        ("left", None),
        ("nan", None),
        ([1], None),
        (None, None),
    ],
)
def test_numbers_of_any_type(cell, number):
    assert as_float(cell) == number


def test_prompts_of_any_type():
    assert [as_text(cell, "caption") for cell in ("a cat", b"a cat", ["a cat"], None, float("nan"))] == [
        *["a cat"] * 3,
        *[None] * 2,
    ]
    for cell in (3, ["a", "b"], {"text": "a cat"}, b"\xff", True, 0.5):
        with pytest.raises(RejectedRow, match="malformed_row") as rejected:
            as_text(cell, "caption")
        assert rejected.value.detail.startswith("column caption: expected text, found ")


def test_images_of_any_type():
    png = image(0)
    wrapped = {"bytes": png, "path": "a.png"}
    assert [as_image(cell, "jpg_0") for cell in (png, list(png), wrapped, None)] == [*[png] * 3, None]
    for cell in ("a.png", 3, [256], ["a"], {"array": []}):
        with pytest.raises(RejectedRow, match="malformed_row") as rejected:
            as_image(cell, "jpg_0")
        assert rejected.value.detail.startswith("column jpg_0: expected the bytes of an encoded image, found ")


def test_splits_by_their_usual_names():
    names = {"Train": "train", "val": "validation", "valid": "validation", "DEV": "validation", "testing": "test"}
    assert {name: as_split(name) for name in names} == names
    assert [as_split(cell) for cell in (None, "", float("nan"))] == [None] * 3
    with pytest.raises(RejectedRow) as rejected:
        as_split(7)
    assert rejected.value.detail == "column split: expected train, validation (val, dev) or test, found a number, 7"


@pytest.mark.parametrize("cells", [["", "\n\t"], ["\u200b"], ["\u2060 \u00a0"], [None]], ids=repr)
def test_a_prompt_in_which_nothing_can_be_seen_is_empty(cells):
    for cell in cells:
        with pytest.raises(RejectedRow, match="empty_prompt"):
            clean_prompt(cell)
    assert clean_prompt(" \u200bcat ") == "\u200bcat"


# --- in files ---------------------------------------------------------------------------------------------


def pickapic(tmp_path, **columns):
    """The rows of a parquet shard with these columns besides good ones."""
    n = len(next(iter(columns.values())))
    good = {"caption": ["a cat"] * n, "jpg_0": [image(0)] * n, "jpg_1": [image(1)] * n, "label_0": [1.0] * n}
    pq.write_table(pa.table(good | columns), tmp_path / "a.parquet")
    return rows_from("pickapic", path=str(tmp_path / "a.parquet"))


NO = {"bool": [False], "int": [0], "float": [0.0], "word": ["False"], "digit": ["0"], "bytes": [b"no"]}
NO |= {"int8": pa.array([0], pa.int8())}


@pytest.mark.parametrize("no", NO.values(), ids=NO)
def test_flags_of_a_parquet(tmp_path, no):
    (unlabelled,) = pickapic(tmp_path, has_label=no)
    with pytest.raises(RejectedRow, match="no_label"):
        label(unlabelled)
    (tie,) = pickapic(tmp_path, are_different=no)
    assert label(tie) == 0.5
    (lost,) = pickapic(tmp_path, are_different=no, label_0=pa.array([None], pa.float64()))
    with pytest.raises(RejectedRow, match="no_label"):  # a tie needs a label all the same
        label(lost)


def test_an_odd_cell_of_a_parquet_costs_its_row(tmp_path):
    rows = pickapic(tmp_path, has_label=["yes", "perhaps", None])
    assert [isinstance(row, BadRow) for row in rows] == [False, True, False]
    assert (rows[1].row, rows[1].prompt) == (1, "a cat")
    assert rows[1].detail == "column has_label: expected true or false, found text 'perhaps'"
    rows = pickapic(tmp_path, caption=pa.array([["a cat"], ["a", "b"], None]))
    assert [row.prompt for row in rows] == ["a cat", None, None]
    assert rows[1].detail == "column caption: expected text, found a list"
    not_utf8 = pa.array([b"a cat", b"\xff", b"a dog"]).view(pa.string())
    rows = pickapic(tmp_path, caption=not_utf8)
    assert [row.prompt for row in rows] == ["a cat", None, "a dog"]
    assert rows[1].detail == "column caption: expected text in UTF-8"
    rows = pickapic(tmp_path, jpg_0=["a.png", "b.png"])
    assert [row.detail for row in rows] == [
        f"column jpg_0: expected the bytes of an encoded image, found text '{name}.png'" for name in "ab"
    ]


def test_a_column_that_is_there_twice_is_named(tmp_path):
    names = ["caption", "jpg_0", "jpg_1", "label_0", "label_0"]
    columns = [pa.array(["a cat"]), pa.array([image(0)]), pa.array([image(1)]), pa.array([1.0]), pa.array([0.0])]
    pq.write_table(pa.Table.from_arrays(columns, names=names), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"a\.parquet: column 'label_0' is there twice"):
        rows_from("pickapic", path=str(tmp_path))


def test_numbers_as_text_are_ranked_as_numbers(tmp_path):
    """As text, "10" comes before "9"."""
    entry = {"prompt": "a cat", "image_path": ["a.png", "b.png"]}
    index = [entry | {"rank": ["10", "9"]}, entry | {"human_preference": ["1", "0"]}, entry | {"rank": ["1", "first"]}]
    index.append({"prompt": ["a", "b"]})
    (tmp_path / "train.json").write_text(json.dumps(index))
    first, second, third, last = rows_from("hpdv2", path=str(tmp_path))
    assert (first.label_0, second.label_0) == (0.0, 1.0)
    assert (third.reason, third.prompt, third.row) == ("malformed_row", "a cat", 2)
    assert last.detail == "prompt: expected text, found a list"
    columns = {"prompt_id": ["1"] * 2, "prompt": ["a cat"] * 2, "image_path": ["a", "b"], "rank": ["10", "9"]}
    for split in ("train", "validation", "test"):
        pq.write_table(pa.table(columns).slice(0, 2 * (split == "train")), tmp_path / f"metadata-{split}.parquet")
    (pair,) = rows_from("imagerewarddb", path=str(tmp_path))
    assert pair.label_0 == 0.0


def test_a_train_list_gives_no_test_prompt_where_there_is_a_test_list(tmp_path):
    entry = {"image_path": ["a.png", "b.png"], "rank": [1, 2]}
    train = [entry | {"prompt": f"prompt {i}"} for i in range(40)]
    (tmp_path / "train.json").write_text(json.dumps(train))
    (tmp_path / "test.json").write_text(json.dumps([entry | {"prompt": "an owl"}]))
    rows = rows_from("hpdv2", path=str(tmp_path), test_share=0.5, validation_share=0)
    assert {row.prompt for row in rows if row.split == "test"} == {"an owl"}
    assert len(rows) == 42
