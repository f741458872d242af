"""Cells of a hundred thousand characters, and JSON nested as deeply: each costs its row, and no other is lost."""

import json

import pandas as pd
import pytest

from attune.data.rows import BadRow, Pair, Prompt, SourceError
from raw_data import rows_from

HEADER = "prompt,image_0,image_1,label_0\n"
REST = ",a.png,b.png,1\n"
LONG = "x" * 140_000


@pytest.mark.parametrize("cell", [f'"first\n{LONG}"', f'"{LONG}\nlast, a.png, b.png, 1"', '"\n' + '""' * 140_000 + '"'])
def test_a_long_cell_of_several_lines_is_one_row(tmp_path, cell):
    (tmp_path / "t.csv").write_text(f"{HEADER}a hen{REST}{cell}{REST}a dog{REST}")
    hen, long, dog = rows_from("table", path=str(tmp_path / "t.csv"))
    assert (hen.prompt, dog.prompt) == ("a hen", "a dog")
    assert (long.reason, long.row) == ("malformed_row", 3)
    assert long.detail.startswith("line 3, column prompt: 1")
    assert long.detail.endswith(" characters; 131072 are read at most")


def test_a_cell_of_many_quotes_is_read(tmp_path):
    """Its middle line has twice as many characters when it is looked at by itself."""
    (tmp_path / "t.csv").write_text(f'{HEADER}"two\n' + '""' * 70_000 + f'\nend"{REST}a dog{REST}')
    quotes, dog = rows_from("table", path=str(tmp_path / "t.csv"))
    assert (quotes.prompt, dog.prompt) == ("two\n" + '"' * 70_000 + "\nend", "a dog")


@pytest.mark.parametrize("quote", ["", '"'])
def test_a_long_header_is_named(tmp_path, quote):
    (tmp_path / "t.csv").write_text(f"{quote}{LONG}{quote},{HEADER}a cat,{REST}")
    with pytest.raises(SourceError, match=r"t\.csv: a name in its header has more than 131072 characters"):
        rows_from("table", path=str(tmp_path / "t.csv"))


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "text",
    [
        f'["cat", {DEEP}, "dog"',
        f'["cat", {DEEP}, "dog"]',
        f'["cat", {DEEP + "]" * 100_000}',
        f'["cat"{"," + DEEP + "]" * 100_000}], "dog"',
        f'["cat", {DEEP + "]" * 100_000}] "dog" ["hen"]',
    ],
)
def test_what_is_left_of_a_broken_list_has_a_row(tmp_path, text):
    (tmp_path / "p.json").write_text(text)
    rows = rows_from("prompts", path=str(tmp_path / "p.json"), validation_share=0, test_share=0)
    assert [row.prompt for row in rows if isinstance(row, Prompt)] == ["cat"]
    lost = 2 if text.endswith(('"dog"', '["hen"]')) and "]" in text else 1
    assert [row.reason for row in rows if isinstance(row, BadRow)] == ["malformed_row"] * lost


def test_a_deep_list_that_is_whole_loses_its_deep_row_only(tmp_path):
    (tmp_path / "p.json").write_text(f'["cat", {DEEP + "]" * 100_000}, "dog"]')
    rows = rows_from("prompts", path=str(tmp_path / "p.json"), validation_share=0, test_share=0)
    assert [row.prompt for row in rows if isinstance(row, Prompt)] == ["cat", "dog"]
    assert len(rows) == 3


@pytest.mark.parametrize("index", ["hpdv2", "imagerewarddb"])
def test_a_prompt_of_thousands_of_images_is_one_row(tmp_path, index):
    names = [f"{i}.png" for i in range(4000)]
    (bad,) = ranked(tmp_path, index, names, ["a cat"] * 4000, ["a"] * 4000, list(range(4000)))
    assert bad.reason == "malformed_row"
    assert bad.detail == "4000 images of one prompt; 100 are read at most"


def ranked(tmp_path, source, names, prompts, ids, ranks):
    """What comes of ranked images in the train split."""
    if source == "hpdv2":
        entry = {"prompt": prompts[0], "image_path": names, "rank": ranks}
        (tmp_path / "train.json").write_text(json.dumps([entry]))
        return rows_from("hpdv2", path=str(tmp_path), validation_share=0, test_share=0)
    table = pd.DataFrame({"prompt_id": ids, "prompt": prompts, "image_path": names, "rank": ranks})
    for split, rows in (("train", table), ("validation", table[:0]), ("test", table[:0])):
        rows.to_parquet(tmp_path / f"metadata-{split}.parquet")
    return rows_from("imagerewarddb", path=str(tmp_path))


def test_an_image_at_the_top_of_the_folder_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ranked(tmp_path, "imagerewarddb", ["a.webp", "b.webp"], ["a cat"] * 2, ["a"] * 2, [1, 2])
    (pair,) = rows_from("imagerewarddb", path=".")
    assert not pair.image_0.exists()


@pytest.mark.parametrize("nothing", [None, ""])
def test_rows_without_an_id_are_no_pairs(tmp_path, nothing):
    names, prompts = ["a.webp", "b.webp", "c.webp", "d.webp"], ["a cat", "a dog", "a hen", "a hen"]
    rows = ranked(tmp_path, "imagerewarddb", names, prompts, [nothing, nothing, "h", "h"], [1, 2, 1, 2])
    assert [row.prompt for row in rows if isinstance(row, Pair)] == ["a hen"]
    details = [row.detail for row in rows if isinstance(row, BadRow)]
    assert details == ["column prompt_id: expected an id, found nothing"] * 2


def test_an_id_of_two_prompts_gives_no_pair_across_them(tmp_path):
    names, prompts = ["a.webp", "b.webp", "c.webp", "d.webp"], [None, "a cat", "a cat", "a dog"]
    rows = ranked(tmp_path, "imagerewarddb", names, prompts, ["i"] * 4, [1, 2, 3, 4])
    assert [(row.prompt, row.row) for row in rows if isinstance(row, Pair)] == [("a cat", "1-2")]
    details = [row.detail for row in rows if isinstance(row, BadRow)]
    assert details == [
        "column prompt: expected a prompt, found nothing",
        "column prompt_id: row 1 has another prompt under this id, text 'a cat'",
    ]
