"""Single images that people liked or disliked: read from folders and tables, checked, written, drawn in batches."""

import json

import pandas as pd
import pytest
import torch

from attune.data.quarantine import RejectedRow
from attune.data.rows import BadRow, LabelledImage, Pair, Prompt, Quota, SourceError
from attune.data.sources._cells import as_verdict
from attune.data.splits import count_rows
from attune.data.store import PreparedData
from attune.methods import kto
from raw_data import asked, encoded, image, pixels, rows_from

# --- folders ----------------------------------------------------------------------------------------------


@pytest.fixture
def thumbs(tmp_path):
    """Writes images and texts; gives (prompt, file, liked) of the good rows, and the bad ones."""

    def found(*names: str, **texts: str):
        for seed, name in enumerate(names):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image(seed))
        for side in ("liked", "disliked"):
            (tmp_path / side).mkdir(exist_ok=True)
        for name, text in texts.items():
            (tmp_path / name.replace("__", "/").replace("_dot_", ".")).write_text(text)
        rows = rows_from("thumbs", path=str(tmp_path), validation_share=0, test_share=0)
        good = [row for row in rows if isinstance(row, LabelledImage)]
        named = {(row.prompt, row.image.relative_to(tmp_path).as_posix(), row.liked) for row in good}
        assert len(named) == len(good)
        return named, {(row.reason, row.row) for row in rows if isinstance(row, BadRow)}

    return found


def test_the_names_of_the_two_folders_need_not_agree_and_a_prompt_is_shared(thumbs):
    captions = json.dumps({"a": "a cat", "disliked/b.png": "a dog", "c": "a cat"})
    found = thumbs("liked/a.png", "disliked/a.jpg", "disliked/b.png", "liked/c.webp", captions_dot_json=captions)
    assert found == (
        {
            ("a cat", "liked/a.png", True),
            ("a cat", "disliked/a.jpg", False),
            ("a dog", "disliked/b.png", False),
            ("a cat", "liked/c.webp", True),
        },
        set(),
    )


def test_each_folder_may_have_its_captions_and_one_above_wins(thumbs):
    mine, theirs = json.dumps({"a": "mine"}), "file_name,text\na.png,theirs\n"
    files = ["liked/a.png", "disliked/a.png"]
    texts = {"liked__captions_dot_json": mine, "disliked__metadata_dot_csv": theirs}
    assert thumbs(*files, **texts) == ({("mine", files[0], True), ("theirs", files[1], False)}, set())
    above = thumbs(*files, **texts, captions_dot_json=json.dumps({"a": "both"}))
    assert above[0] == {("both", files[0], True), ("both", files[1], False)}
    assert above[1] == {("unused_file", "liked/captions.json"), ("unused_file", "disliked/metadata.csv")}


def test_texts_beside_images_and_above_them_in_subfolders_too(thumbs, tmp_path):
    (tmp_path / "disliked/deep").mkdir(parents=True)
    (tmp_path / "liked").mkdir()
    files = ["liked/a.png", "disliked/a.png", "disliked/deep/b.png", "liked/b.png"]
    found = thumbs(*files, a_dot_txt="shared", liked__a_dot_txt="own", disliked__deep__b_dot_txt="deep")
    assert found[0] == {("own", files[0], True), ("shared", files[1], False), ("deep", files[2], False)}
    assert found[1] == {("empty_prompt", "b.png")}
    captioned = thumbs(*files, liked__captions_dot_json=json.dumps({"a": "first", "b": "second"}))
    assert captioned[0] >= {("first", files[0], True), ("shared", files[1], False)}
    assert captioned[1] == {("unused_file", "liked/a.txt")}


def test_every_file_is_used_or_has_a_row(thumbs):
    files = ["liked/a.png", "other/x.png", "liked/.DS_Store", "notes.md"]
    captions = json.dumps({"a": "a cat", "lost": "a dog"})
    found = thumbs(*files, captions_dot_json=captions, liked__z_dot_txt="stray")
    assert found[0] == {("a cat", "liked/a.png", True)}
    assert found[1] == {
        ("unused_file", "other/x.png"),
        ("unused_file", "notes.md"),
        ("unused_file", "liked/z.txt"),
        ("missing_image", "lost"),
    }


def test_a_folder_without_one_side_or_nothing_at_all(tmp_path):
    (tmp_path / "liked").mkdir()
    with pytest.raises(SourceError, match=r"data\.path: .*disliked is not there"):
        rows_from("thumbs", path=str(tmp_path))
    with pytest.raises(SourceError, match="neither a folder nor a"):
        rows_from("thumbs", path=str(tmp_path / "none"))


# --- tables -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", [1, 1.0, True, "1", "true", "Yes", "up", "thumbs_up", "Thumbs Up", "like", "👍", "+1"])
def test_words_for_a_liked_image(word):
    assert as_verdict(word) is True


@pytest.mark.parametrize("word", [0, -1, False, "0", "no", "DOWN", "thumb-down", "disliked", "👎", "-1"])
def test_words_for_a_disliked_image(word):
    assert as_verdict(word) is False


@pytest.mark.parametrize("word", [None, "", " ", "nan", float("nan")])
def test_no_verdict(word):
    assert as_verdict(word) is None


@pytest.mark.parametrize("word", [0.5, 5, "maybe", "thumbs", [1]])
def test_what_is_no_verdict_is_told(word):
    with pytest.raises(RejectedRow, match="label_value") as error:
        as_verdict(word)
    assert error.value.detail.startswith("column liked: expected 1, true, yes, up or liked")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_of_thumbs(tmp_path, kind):
    rows = [
        {"prompt": "a cat", "image": "a.png", "liked": "up", "split": "test"},
        {"prompt": "a dog", "image": "sub/b.png", "liked": "no", "split": ""},
        {"prompt": "bees", "image": "../c.png", "liked": "", "split": "train"},
        {"prompt": "hens", "image": "a.png", "liked": "perhaps", "split": "train"},
        {"prompt": "owls", "image": "a.png", "liked": "1", "split": "held out"},
    ]
    path = tmp_path / f"t.{kind}"
    if kind == "csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.png").write_bytes(image(0))
    cat, dog, bees, hens, owls = rows_from("thumbs", path=str(path), validation_share=0, test_share=0)
    assert (cat.liked, cat.split, cat.image) == (True, "test", tmp_path / "a.png")
    assert (dog.liked, dog.split, dog.image) == (False, "train", tmp_path / "sub/b.png")
    assert (bees.liked, bees.image.reason) == (None, "missing_image")
    assert (hens.reason, hens.prompt, owls.reason) == ("label_value", "hens", "malformed_row")
    files, sizes, _ = asked("thumbs", path=str(path))
    assert files == [path, tmp_path / "a.png"]
    assert (sizes["images/test"], sizes["liked/train"], sizes["pairs/train"]) == (1, 0, 0)


def test_a_table_without_a_column(tmp_path):
    (tmp_path / "t.csv").write_text("prompt,image\na,b\n")
    with pytest.raises(SourceError, match="column 'liked' is missing; there are prompt, image"):
        rows_from("thumbs", path=str(tmp_path / "t.csv"))


# --- what is written --------------------------------------------------------------------------------------


def one(row, prompt="a cat", seed=None, liked: bool | None = True, split="train", ref=None):
    ref = ref or encoded(pixels(row if seed is None else seed))
    return LabelledImage(prompt, ref, liked, split, "f", row)


ROWS = [
    one(0),
    one(1, liked=False),
    one(2, seed=0, liked=False),  # people disagree about the first
    one(3, seed=0),  # the first again
    one(4, liked=None),
    one(5, ref=b"no image"),
    one(6, prompt="a dog"),
    one(7, prompt="a dog", split="test"),
    one(8, prompt=" "),
    Prompt("a hen", "validation"),
]


def test_verdicts_are_checked_counted_and_written(write, tmp_path):
    counts, bad = write(ROWS)
    assert {row: found["reason"] for row, found in bad.items()} == {
        "3": "duplicate_image",
        "4": "no_label",
        "5": "undecodable",
        "6": "prompt_in_later_split",
        "8": "empty_prompt",
    }
    named = {name: counts[name] for name in ("images", "images/train", "images/test", "liked/train", "disliked/train")}
    assert list(named.values()) == [4, 3, 1, 1, 2]
    table = pd.read_parquet(tmp_path / "prepared/images.parquet")
    assert table.to_dict("list") == {
        "prompt": ["a cat", "a cat", "a cat", "a dog"],
        "image": [0, 1, 0, 3],
        "liked": [True, False, False, True],
        "split": ["train", "train", "train", "test"],
    }
    assert pd.read_parquet(tmp_path / "prepared/pairs.parquet").empty


def test_counts_before_reading_are_what_is_written_of_good_rows(write):
    rows = [row for row in ROWS if row.row not in (3, 4, 5, 8)]
    counts, _ = write(rows)
    expected = count_rows(rows, Quota())
    assert {name: counts[name] for name in expected} == expected


def test_pairs_alone_have_no_table_and_no_counts_of_images(write, tmp_path):
    counts, _ = write([Pair("a cat", encoded(pixels(0)), encoded(pixels(1)), 1.0, 0.0, "train")])
    assert not [name for name in counts if "image" in name and name != "identical_images"]
    assert not (tmp_path / "prepared/images.parquet").exists()


def test_latents_that_are_not_finite_cost_their_image(write, backbone, monkeypatch):
    encode = backbone.encode_images
    monkeypatch.setattr(
        backbone, "encode_images", lambda x: encode(x).index_fill(0, torch.tensor([1]), torch.nan), raising=False
    )
    counts, bad = write([one(0), one(1, liked=False), one(2, liked=False)])
    assert (counts["images"], bad["1"]["reason"], bad["1"]["detail"]) == (2, "not_finite", "the latents of image")


class Bright:
    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))


def test_a_scorers_column_is_of_the_image(write, tmp_path):
    write([one(0), one(1, liked=False)], {"bright": Bright()})
    table = pd.read_parquet(tmp_path / "prepared/images.parquet")
    assert table.bright.tolist() == pytest.approx([pixels(i).mean() / 255 for i in (0, 1)], abs=1e-6)


def test_verdicts_that_are_missing_stop_prepare_and_name_them(write):
    with pytest.raises(
        SourceError, match=r"0 train disliked images, but 1 are needed by the runs that learn from"
    ) as e:
        write([one(0), one(1)], wanted={"liked/train": 1, "disliked/train": 1})
    assert "2 train images" in str(e.value)
    assert "2 of them liked and 0 disliked" in str(e.value)
    with pytest.raises(SourceError, match="0 train liked images"):
        write([Prompt("a cat", "train")], wanted={"liked/train": 1})


# --- batches ----------------------------------------------------------------------------------------------


def test_batches_of_single_images(write, tmp_path, backbone):
    write([one(i, prompt=f"p {i % 2}", liked=i % 3 == 0) for i in range(6)])
    data = PreparedData.read(tmp_path / "prepared", "train")
    (n, draw), (n_liked, draw_liked) = data.rows_for("images"), data.rows_for("liked images")
    assert (n, n_liked) == (6, 2)
    batch = draw([4, 3])
    assert (batch.prompts, batch.liked.tolist()) == (["p 0", "p 1"], [False, True])
    own = backbone.encode_images(torch.from_numpy(pixels(4).copy()).permute(2, 0, 1)[None].float() / 255)
    torch.testing.assert_close(batch.latents[:1], own, atol=1e-4, rtol=1e-4)
    known = backbone.encode_prompts(["p 0", "p 1"])
    assert all(torch.equal(batch.cond.tensors[key], value) for key, value in known.tensors.items())
    assert torch.equal(draw_liked([1]).latents, draw([3]).latents)
    assert draw_liked([0, 1]).liked.all()


@pytest.mark.parametrize(("liked", "consumes"), [(True, "images"), (False, "images"), (False, "liked images")])
def test_a_kind_that_is_missing_is_told_before_training(write, tmp_path, liked, consumes):
    write([one(i, liked=liked) for i in range(3)])
    data = PreparedData.read(tmp_path / "prepared", "train")
    kind = "disliked" if liked else "liked"
    with pytest.raises(SourceError, match=f"0 train {kind} images, but 1 are needed"):
        data.rows_for(consumes)


@pytest.mark.parametrize(
    ("liked", "disliked", "weights", "said"),
    [(50, 50, (1, 1), None), (50, 50, (1.6, 0.4), None), (90, 10, (1, 1), "9 to 1"), (10, 90, (1, 1), "0.111 to 1")],
)
def test_weights_far_from_balance_are_told(liked, disliked, weights, said):
    config = kto.Config(lambda_desirable=weights[0], lambda_undesirable=weights[1])
    found = kto.advice(config, liked, disliked)
    assert (found is None) if said is None else (said in found and "1 to 1.33" in found)
