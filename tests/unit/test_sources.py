"""Data sources other than Pick-a-Pic: real images in real parquet, zip, CSV, JSON and text files."""

import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from attune.config.plugins import plugin_config
from attune.config.schema import ConfigError
from attune.data.rows import BadRow, Pair, Prompt, SourceError
from attune.data.splits import hashed_split
from raw_data import asked, image, rows_from


@pytest.fixture
def hpdv2(tmp_path) -> Path:
    for folder, n in (("train", 4), ("test", 3)):
        (tmp_path / folder).mkdir()
        for i in range(n):
            (tmp_path / folder / f"{i:03d}.jpg").write_bytes(image(i, "JPEG"))
    train = [
        {"prompt": "a cat", "file_path": ["000.jpg", "001.jpg"], "human_preference": [0, 1]},
        {"prompt": "a dog", "image_path": ["train/002.jpg", "003.jpg"], "human_preference": [1, 0]},
        {"prompt": "lost", "file_path": ["000.jpg", "999.jpg"], "human_preference": [1, 0]},
        {"prompt": "out", "file_path": ["../secret.jpg", "000.jpg"], "human_preference": [1, 0]},
        {"prompt": "short", "file_path": ["000.jpg"], "human_preference": [1, 0]},
        "nonsense",
    ]
    test = [{"prompt": "owls", "image_path": ["000.jpg", "001.jpg", "002.jpg"], "rank": [2, 1, 2]}]
    (tmp_path / "train.json").write_text(json.dumps(train))
    (tmp_path / "test.json").write_text(json.dumps(test))
    (tmp_path.parent / "secret.jpg").write_bytes(image(0))
    return tmp_path


def test_hpdv2(hpdv2):
    rows = rows_from("hpdv2", path=str(hpdv2), validation_share=0)
    assert rows[0] == Prompt("owls", "test", "test.json", 0)
    first, second, third = rows[1:4]
    assert [(r.label_0, r.label_1, r.row) for r in rows[1:4]] == [
        (0.0, 1.0, "0:0-1"),
        (0.5, 0.5, "0:0-2"),
        (1.0, 0.0, "0:1-2"),
    ]
    assert first.image_0 == second.image_0 == hpdv2 / "test/000.jpg"
    assert third.split == "test"
    cat, dog, lost, out, short, nonsense = rows[4:]
    assert (cat.label_0, cat.image_1) == (0.0, hpdv2 / "train/001.jpg")
    assert (dog.label_0, dog.image_0) == (1.0, hpdv2 / "train/002.jpg")
    assert lost.image_1 == hpdv2 / "train/999.jpg"  # not there, which is said when it is read
    assert (out.image_0.reason, out.image_0.detail[:25]) == ("missing_image", "'../secret.jpg' leads out")
    assert (short.reason, short.file, short.row, short.prompt) == ("malformed_row", "train.json", 4, "short")
    assert (nonsense.reason, nonsense.row, nonsense.detail[:25]) == ("malformed_row", 5, "expected a list of images")


def test_hpdv2_without_a_test_file_takes_test_prompts_from_train(hpdv2):
    (hpdv2 / "test.json").unlink()
    rows = rows_from("hpdv2", path=str(hpdv2), validation_share=0.3, test_share=0.3)
    pairs = [row for row in rows if isinstance(row, Pair)]
    assert [row.split for row in pairs] == [hashed_split(row.prompt, 0.3, 0.3) for row in pairs]


DEEP = '{"a":' * 10**5


@pytest.mark.parametrize(
    ("text", "says"),
    [("{}", "must be a list"), ("[", "is not JSON"), (DEEP, "must be a list")],
    ids=["object", "cut", "nested too deeply"],
)
def test_hpdv2_with_a_broken_index(hpdv2, text, says):
    (hpdv2 / "train.json").write_text(text)
    with pytest.raises(SourceError, match=rf"train\.json:? {says}"):
        rows_from("hpdv2", path=str(hpdv2))


def imagereward(folder: Path, packed: bool) -> Path:
    for split in ("train", "validation", "test"):
        names = [f"images/{split}/{split}_1/{i}.webp" for i in range(4)]
        table = pd.DataFrame({"image_path": names, "rank": [1, 2, 2, 1], "overall_rating": [7, 5, 5, 6]})
        table["prompt_id"], table["prompt"] = ["a", "a", "a", "b"], [f"{split} a"] * 3 + [f"{split} b"]
        folder.mkdir(exist_ok=True)
        table.to_parquet(folder / f"metadata-{split}.parquet")
        pictures = {name: image(i, "WEBP") for i, name in enumerate(names)}
        target = folder / f"images/{split}"
        target.mkdir(parents=True)
        if packed:
            with zipfile.ZipFile(target / f"{split}_1.zip", "w") as archive:
                for name, data in pictures.items():
                    archive.writestr(Path(name).name, data)
        else:
            (target / f"{split}_1").mkdir()
            for name, data in pictures.items():
                (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("packed", [True, False], ids=["zip", "unpacked"])
def test_imagerewarddb(tmp_path, packed):
    folder = imagereward(tmp_path / "ir", packed)
    rows = rows_from("imagerewarddb", path=str(folder))
    assert [row.prompt for row in rows[:2]] == ["test a", "test b"]
    alone = [row for row in rows if isinstance(row, BadRow)]
    assert [(row.reason, row.row, row.prompt[-1]) for row in alone] == [("no_other_image", 3, "b")] * 3
    pairs = [row for row in rows if isinstance(row, Pair)]
    assert [row.split for row in pairs] == ["test"] * 3 + ["validation"] * 3 + ["train"] * 3
    assert [(row.row, row.label_0) for row in pairs[6:]] == [("0-1", 1.0), ("0-2", 1.0), ("1-2", 0.5)]
    seen = pairs[-1].image_1
    assert (seen if packed else seen.read_bytes()) == image(2, "WEBP")


def test_imagerewarddb_with_holes(tmp_path):
    folder = imagereward(tmp_path / "ir", packed=True)
    table = pd.read_parquet(folder / "metadata-train.parquet")
    table.loc[1, "rank"] = np.nan
    table.loc[2, "image_path"] = "../../etc/passwd"
    table.to_parquet(folder / "metadata-train.parquet")
    (folder / "images/validation/validation_1.zip").write_bytes(b"PK no zip")
    rows = rows_from("imagerewarddb", path=str(folder))
    assert [row for row in rows if isinstance(row, BadRow) and row.reason != "no_other_image"] == [
        BadRow("no_label", "metadata-train.parquet", 1, "train a", "column rank: expected a number")
    ]
    (train,) = (row for row in rows if isinstance(row, Pair) and row.split == "train")
    assert train.image_1.reason == "missing_image"
    (lost,) = {row.image_0 for row in rows if isinstance(row, Pair) and row.split == "validation"}
    assert (lost.reason, "validation_1.zip: File is not a zip" in lost.detail) == ("missing_image", True)
    table.drop(columns="rank").to_parquet(folder / "metadata-train.parquet")
    with pytest.raises(SourceError, match=r"metadata-train\.parquet: column 'rank' is missing"):
        rows_from("imagerewarddb", path=str(folder))


@pytest.fixture
def chosen_and_rejected(tmp_path) -> Path:
    for side, kinds in (("chosen", ("png", "jpg", "png")), ("rejected", ("webp", "jpg"))):
        (tmp_path / side / "sub").mkdir(parents=True)
        for i, kind in enumerate(kinds):
            kinds = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
            (tmp_path / side / "sub" / f"{i}.{kind}").write_bytes(image(i, kinds[kind]))
    return tmp_path


def test_a_folder_of_pairs(chosen_and_rejected):
    root = chosen_and_rejected
    (root / "chosen/sub/0.txt").write_text("a cat\n")
    (root / "sub").mkdir()
    (root / "sub/1.txt").write_text("a dog")
    first, second, third = rows_from("folder", path=str(root), validation_share=0, test_share=0)
    assert (first.prompt, first.image_0.name, first.image_1.name) == ("a cat", "0.png", "0.webp")
    assert (first.label_0, first.label_1, first.row, first.split) == (1.0, 0.0, "sub/0", "train")
    assert second.prompt == "a dog"
    assert (third.reason, third.row) == ("empty_prompt", "sub/2")
    assert third.detail == (
        "expected a prompt in captions.json or captions.jsonl or metadata.jsonl or metadata.csv, or in chosen/sub/2.txt"
    )


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_a_folder_with_captions(chosen_and_rejected, kind):
    captions = {"sub/0": "a cat", "sub/1.jpg": "a dog"}
    lines = [json.dumps({"name": name, "caption": text}) for name, text in captions.items()]
    text = json.dumps(captions) if kind == "json" else "\n".join([*lines, "broken", ""])
    (chosen_and_rejected / f"captions.{kind}").write_text(text)
    rows = rows_from("folder", path=str(chosen_and_rejected))
    assert [row.prompt for row in rows[:3]] == ["a cat", "a dog", None]
    assert [(row.reason, row.file, row.row) for row in rows[3:]] == (
        [("malformed_row", "captions.jsonl", 3)] if kind == "jsonl" else []
    )


def test_a_folder_without_one_side(tmp_path):
    (tmp_path / "chosen").mkdir()
    with pytest.raises(SourceError, match=r"data\.path: .*rejected is not there"):
        rows_from("folder", path=str(tmp_path))


def test_tables(tmp_path):
    rows = [
        {"prompt": "a cat", "image_0": "a.png", "image_1": "sub/b.png", "label_0": 1, "split": "test"},
        {"prompt": 'a "red", dog', "image_0": "a.png", "image_1": "c.png", "label_0": 0.5, "split": ""},
        {"prompt": "out", "image_0": "../a.png", "image_1": "/etc/passwd", "label_0": 0, "split": "train"},
        {"prompt": "lost", "image_0": "", "image_1": "c.png", "label_0": "left", "split": "train"},
        {"prompt": "odd", "image_0": "a.png", "image_1": "c.png", "label_0": 0, "split": "held out"},
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n[1]\n{\n")
    for name, last in (("t.csv", []), ("t.jsonl", [7, 8])):
        read = rows_from("table", path=str(tmp_path / name))
        cat, dog, out, lost, odd = read[:5]
        assert (cat.split, cat.label_0, cat.label_1) == ("test", 1.0, 0.0)
        assert cat.image_1 == tmp_path / "sub/b.png"
        assert (dog.prompt, dog.label_0, dog.split) == ('a "red", dog', 0.5, hashed_split(dog.prompt, 0.05, 0.05))
        assert [image.reason for image in (out.image_0, out.image_1, lost.image_0)] == ["missing_image"] * 3
        assert (lost.label_0, lost.label_1) == (None, None)
        assert (odd.reason, odd.prompt) == ("malformed_row", "odd")
        assert odd.detail == "column split: expected train, validation (val, dev) or test, found text 'held out'"
        assert [row.row for row in read[5:]] == last


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.csv", "prompt,image_0\na,b\n", "column 'image_1' is missing; there are prompt, image_0"),
        ("t.txt", "", "neither a .csv nor a .jsonl"),
        ("none.csv", None, "is not there"),
        ("t.csv", "", "t.csv is empty; expected a row per line"),
        ("t.jsonl", "\n\n", "t.jsonl is empty; expected a row per line"),
        ("t.csv", "prompt,image_0,image_1,label_0\n", "has a header and no row below it"),
        ("t.csv", "prompt,image_0,image_1,label_0,prompt\na,b,c,1,d\n", "t.csv: column 'prompt' is there twice"),
        ("t.csv", "prompt;image_0;image_1;label_0\n", "separated by semicolons; expected commas"),
        ("t.csv", "prompt,image_0\n".encode("utf-16"), "is not UTF-8 but perhaps UTF-16; save it as UTF-8"),
    ],
)
def test_a_table_that_is_none(tmp_path, name, text, says):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SourceError, match=re.escape(says)):
        rows_from("table", path=str(tmp_path / name))


LISTS = {
    "a.txt": "a cat\n\n  a dog \n",
    "a.json": json.dumps([{"caption": "a cat", "trainset_idx": 3}, {"prompt": "a dog"}]),
    "b.json": json.dumps(["a cat", "a dog"]),
    "a.jsonl": '"a cat"\n{"prompt": "a dog"}\n',
}


@pytest.mark.parametrize("name", LISTS)
def test_prompt_lists(tmp_path, name):
    (tmp_path / name).write_text(LISTS[name], encoding="utf-8-sig")
    rows = rows_from("prompts", path=str(tmp_path / name), validation_share=0, test_share=0)
    assert [(row.prompt, row.split, row.file) for row in rows] == [("a cat", "train", name), ("a dog", "train", name)]


def test_prompt_lists_of_their_own(tmp_path):
    prompts = [f"prompt {i}" for i in range(60)]
    (tmp_path / "all.txt").write_text("\n".join(prompts))
    (tmp_path / "test.json").write_text(json.dumps(["held out", 3, {"text": "x"}]))
    paths = {"path": str(tmp_path / "all.txt"), "test_list": str(tmp_path / "test.json")}
    rows = rows_from("prompts", **paths, validation_share=0.4)
    expected = "expected a prompt, or an object with `prompt` or `caption`, found"
    assert rows[:3] == [
        Prompt("held out", "test", "test.json", 0),
        BadRow("malformed_row", "test.json", 1, detail=f"{expected} a number, 3"),
        BadRow("malformed_row", "test.json", 2, detail=f"{expected} an object with text"),
    ]
    assert [row.split for row in rows[3:]] == [hashed_split(p, 0.4, 0) for p in prompts]
    assert {row.split for row in rows[3:]} == {"train", "validation"}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.json", "{}", "must be a list of prompts"),
        ("a.json", "[", "is not JSON"),
        ("a.csv", "a", "a .txt, .json or .jsonl file"),
        ("a.txt", None, "No such file"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8"),
    ],
)
def test_a_list_that_is_none(tmp_path, name, text, says):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SourceError, match=re.escape(says)):
        rows_from("prompts", path=str(tmp_path / name))


def test_too_many_pair_prompts_name_the_key():
    block = {"train_prompts": 5, "validation_prompts": 2, "test_prompts": 2, "pair_prompts": 6}
    block |= {"images_per_prompt": 2, "temperature": 0.1}
    with pytest.raises(ConfigError, match=r"^data\.pair_prompts: .*more than train_prompts, 5 \(given 6\)"):
        plugin_config("sources", "world", block, "data")


# --- what the plan asks -----------------------------------------------------------------------------------


def counted(**sizes) -> dict[str, int]:
    zero = {f"{kind}/{split}": 0 for kind in ("prompts", "pairs") for split in ("train", "validation", "test")}
    zero["choices/train"] = sizes.get("pairs_train", 0)
    return zero | {name.replace("_", "/"): n for name, n in sizes.items()}


def test_a_table_is_known_with_its_images(tmp_path, monkeypatch):
    rows = ["prompt,image_0,image_1,label_0,split", "a cat,a.png,sub/b.png,1,train", "a dog,a.png,../c.png,0,test"]
    path = tmp_path / "t.csv"
    path.write_text("\n".join([*rows, "A Cat,a.png,d.png,1,train", "lost,a.png,lost.png,1,test"]))
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png", "d.png", "c.png"):
        (tmp_path / name).write_bytes(image(0))
    files, sizes, prompts = asked("table", path=str(path))
    assert files == [path, *(tmp_path / name for name in ("a.png", "d.png", "sub/b.png"))]  # a lost one stops no plan
    assert sizes == counted(prompts_train=2, prompts_test=2, pairs_train=2, pairs_test=2)
    assert prompts == ["a cat", "a dog", "A Cat", "lost"]
    assert asked("table", path=str(path), pairs=1)[1] == counted(
        prompts_train=1, prompts_test=2, pairs_train=1, pairs_test=2
    )
    monkeypatch.setattr("attune.data.sources._files.SMALL_BYTES", 10)  # a table of gigabytes
    folders = [path, *(tmp_path / name for name in ("a.png", "d.png", "sub"))]
    assert asked("table", path=str(path)) == (folders, None, None)
    with pytest.raises(SourceError, match="is not there"):
        asked("table", path=str(tmp_path / "none.csv"))


def test_a_folder_is_known(chosen_and_rejected):
    (chosen_and_rejected / "captions.json").write_text(json.dumps({"sub/0": "a cat", "sub/1": "a dog"}))
    files, sizes, prompts = asked("folder", path=str(chosen_and_rejected), validation_share=0, test_share=0)
    assert files == [chosen_and_rejected]
    assert sizes == counted(prompts_train=2, pairs_train=2)
    assert prompts == ["a cat", "a dog"]


def test_prompt_lists_are_known(tmp_path, monkeypatch):
    paths = {name: tmp_path / f"{name}.txt" for name in ("path", "validation_list", "test_list")}
    for i, path in enumerate(paths.values()):
        path.write_text("\n".join(f"prompt {j}" for j in range(i, 5)))
    files, sizes, prompts = asked("prompts", **{name: str(path) for name, path in paths.items()})
    assert set(files) == set(paths.values())
    assert sizes == counted(prompts_train=1, prompts_validation=1, prompts_test=3)
    assert set(prompts) == {f"prompt {j}" for j in range(5)}
    monkeypatch.setattr("attune.data.sources._files.SMALL_BYTES", 10)
    assert asked("prompts", path=str(paths["path"])) == ([paths["path"]], None, None)


def test_data_sets_know_their_test_prompts(hpdv2, tmp_path):
    assert asked("hpdv2", path=str(hpdv2)) == ([hpdv2], {"prompts/test": 1}, None)
    (hpdv2 / "test.json").unlink()
    assert asked("hpdv2", path=str(hpdv2))[1] is None
    folder = imagereward(tmp_path / "ir", packed=True)
    assert asked("imagerewarddb", path=str(folder)) == ([folder], {"prompts/test": 2}, None)
