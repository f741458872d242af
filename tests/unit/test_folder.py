"""The data source `folder`: every file is used or has a row, whatever it is called."""

import json
import os
import unicodedata
from pathlib import Path

import pytest

from attune.data.ingest.reader import ImageReader
from attune.data.rows import BadRow, Pair, SourceError
from raw_data import image, rows_from


@pytest.fixture
def pairs(tmp_path):
    """Writes images (and any other file) and gives the rows: pairs by name -> (prompt, files), and the bad ones."""

    def found(*names: str, **texts: str):
        for seed, name in enumerate(names):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image(seed))
        for side in ("chosen", "rejected"):
            (tmp_path / side).mkdir(exist_ok=True)
        for name, text in texts.items():
            (tmp_path / name.replace("__", "/").replace("_dot_", ".")).write_text(text)
        return read(tmp_path)

    return found


def read(root: Path):
    rows = rows_from("folder", path=str(root))
    good = {
        row.row: (row.prompt, *(str(image.relative_to(root)) for image in (row.image_0, row.image_1)))
        for row in rows
        if isinstance(row, Pair) and isinstance(row.image_0, Path) and isinstance(row.image_1, Path)
    }
    return good, [row for row in rows if isinstance(row, BadRow)]


def both(*names: str) -> list[str]:
    return [f"{side}/{name}" for side in ("chosen", "rejected") for name in names]


def test_every_ending_is_read(pairs):
    names = ["a.PNG", "b.jfif", "c.pjpeg", "d.jpe", "e", "f.v1 final.jpeg", "g.2", "h.avif", "sub/i.jp2"]
    captions = {name: name.upper() for name in names}
    good, bad = pairs(*both(*names), captions_dot_json=json.dumps(captions))
    assert not bad
    assert sorted(prompt for prompt, _, _ in good.values()) == sorted(captions.values())


def test_hidden_files_are_passed_over(pairs):
    hidden = ["._a.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".cache/x.png", "__MACOSX/a.png"]
    good, bad = pairs(*both("a.png", *hidden), "._captions.json", ".gitignore", captions_dot_json='{"a": "a cat"}')
    assert (good, bad) == ({"a": ("a cat", "chosen/a.png", "rejected/a.png")}, [])


def test_names_equal_but_for_the_ending_pair_by_their_whole_names_or_are_told(pairs):
    captions = json.dumps({"a.png": "a cat", "a.jpg": "a dog", "b": "bees"})
    files = [*both("a.png", "a.jpg"), "chosen/b.png", "chosen/b.jpg", "rejected/b.webp"]
    good, bad = pairs(*files, captions_dot_json=captions)
    assert good == {
        "a.png": ("a cat", "chosen/a.png", "rejected/a.png"),
        "a.jpg": ("a dog", "chosen/a.jpg", "rejected/a.jpg"),
    }
    assert sorted((row.reason, row.file, row.row) for row in bad) == [
        ("ambiguous_name", "chosen", "b.jpg"),
        ("ambiguous_name", "chosen", "b.png"),
        ("ambiguous_name", "rejected", "b.webp"),
    ]
    assert bad[0].detail == "several files are called b, but for their endings; give each pair a name of its own"


def test_forms_of_a_letter_are_one_name(pairs):
    composed, apart = (unicodedata.normalize(form, "möwe") for form in ("NFC", "NFD"))
    assert composed != apart
    good, bad = pairs(
        f"chosen/{apart}.png", f"rejected/{composed}.png", captions_dot_json=json.dumps({composed: "gull"})
    )
    assert ([prompt for prompt, _, _ in good.values()], bad) == (["gull"], [])
    good, bad = pairs(*both("x.png"), captions_dot_json=json.dumps({composed: "gull", "x": "an x"}))
    assert (len(good), bad) == (2, [])


@pytest.mark.parametrize(
    "name", ["photo.jpg", "photo.jpg.png", "chosen/photo.jpg.png", "./photo.jpg", "photo.jpg.webp"]
)
def test_captions_are_found_with_and_without_their_endings(pairs, name):
    good, bad = pairs(
        *both("photo.jpg.png", "sub/in.x.png"), captions_dot_json=json.dumps({name: "a", "sub\\in.x": "b"})
    )
    assert ([prompt for prompt, _, _ in good.values()], bad) == (["a", "b"], [])


LINES = [
    '{"name": "0", "prompt": "a cat"}',
    '{"name": "1", "prompt": "a dog",}',
    '{"file_name": "2.png", "text": "bees"}',
    '{"name": 3, "caption": "an owl"}',
    '{"name": "0", "prompt": "a cow"}',
    '{"name": "0.png", "prompt": ["a", "b"]}',
    '{"label": "4"}',
    '{"name": "9", "prompt": "lost"}',
]


def test_every_line_of_the_captions_is_used_or_told(pairs):
    good, bad = pairs(*both("0.png", "1.png", "2.png", "3.png"), captions_dot_jsonl="\n".join(LINES))
    assert {name: prompt for name, (prompt, _, _) in good.items()} == {"0": "a cat", "2": "bees", "3": "an owl"}
    told = {row.row: (row.reason, row.detail) for row in bad}
    assert told["1"][0] == "empty_prompt"
    assert told[2][1].startswith("line 2 is not JSON: ")
    assert told[5] == ("malformed_row", "another prompt for '0'; that of row 1 is used")
    assert told[6] == ("malformed_row", "0.png: column prompt: expected text, found a list")
    assert (
        told[7][1] == "expected name or file_name or image, and prompt or caption or text, found an object with label"
    )
    assert told[8] == ("missing_image", "there is no image '9'")
    assert len(told) == len(bad) == 6


def test_a_key_of_captions_json_that_is_there_twice_is_told(pairs):
    deep = "[" * 100_000
    good, bad = pairs(*both("0.png"), captions_dot_json=f'{{"0": "a cat", "0": "a dog", "0": {deep}{deep}}}')
    assert good["0"][0] == "a cat"
    told = "another prompt for '0'; that of row 0 is used"
    assert [row.detail for row in bad] == [told] * 2  # of the dog, and of what is left over


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("metadata.jsonl", '{"file_name": "0.png", "text": "a cat"}\n{"file_name": "1.png", "caption": "a dog"}'),
        ("metadata.csv", 'file_name,text\n0.png,a cat\n1.png,"a dog"\n'),
        ("chosen/metadata.csv", "file_name,prompt\nchosen/0.png,a cat\n1.jpg,a dog\n"),
    ],
)
def test_metadata_of_imagefolder(pairs, tmp_path, file, text):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    good, bad = pairs(*both("0.png", "1.png"))
    assert ([prompt for prompt, _, _ in good.values()], bad) == (["a cat", "a dog"], [])


def test_metadata_of_other_columns_names_those_that_are_read(pairs):
    with pytest.raises(
        SourceError, match=r"metadata\.csv: expected the columns one of name, file_name.* there are a, b"
    ):
        pairs(*both("0.png"), metadata_dot_csv="a,b\n1,2\n")


def test_a_quote_that_is_never_closed_costs_its_own_line_of_metadata(pairs):
    text = 'file_name,text\n0.png,"a cat\n1.png,a dog\n2.png,"bees, and\nmore"\n'
    good, bad = pairs(*both("0.png", "1.png", "2.png"), metadata_dot_csv=text)
    assert {name: prompt for name, (prompt, _, _) in good.items()} == {"1": "a dog", "2": "bees, and\nmore"}
    assert {(row.file, row.row) for row in bad} == {("metadata.csv", 2), ("chosen", "0")}


def test_what_belongs_to_no_image_is_told(pairs, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root/chosen").mkdir(parents=True)
    (tmp_path / "root/chosen/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/rejected").mkdir()
    for name in ("chosen/a.png", "rejected/a.png", "chosen/alone.png", "stray.png", "README.md"):
        (tmp_path / "root" / name).write_bytes(image(0))
    for name in ("chosen/a.txt", "chosen/alone.txt", "rejected/a.txt", "rejected/lost.txt", "b.txt"):
        (tmp_path / "root" / name).write_text("a cat")
    os.mkfifo(tmp_path / "root/chosen/c.txt")
    rows = rows_from("folder", path=str(tmp_path / "root"))
    named = {(getattr(row, "reason", "pair"), row.row) for row in rows}
    assert named == {
        ("pair", "a"),
        ("pair", "alone"),  # its other image is missing, which is said when it is read
        ("empty_prompt", "link"),
        *(("unused_file", name) for name in ("README.md", "b.txt", "chosen/c.txt", "rejected/lost.txt", "stray.png")),
    }
    alone = next(row for row in rows if row.row == "alone")
    assert (alone.image_1.reason, alone.image_1.detail) == ("missing_image", "rejected has no image alone")
    fifo = tmp_path / "root/rejected/a.png"
    fifo.unlink()
    os.mkfifo(fifo)
    pair = next(row for row in rows_from("folder", path=str(tmp_path / "root")) if row.row == "a")
    with pytest.raises(ValueError, match="missing_image"):
        ImageReader(1).read(pair.image_1, lambda digest: True)
