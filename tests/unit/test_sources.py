"""Data sources: real JPEG, PNG and WebP bytes in real parquet, tar, zip, CSV and JSON files."""

import csv
import io
import json
import re
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from attune.config import plugins
from attune.config.plugins import plugin_config
from attune.config.schema import ConfigError
from attune.data.ingest.ingest import Rules
from attune.data.ingest.write import write_prepared
from attune.data.quarantine import Quarantine
from attune.data.rows import BadRow, Pair, Prompt, Quota, SourceError
from attune.data.splits import hashed_split
from attune.data.store import PreparedData


def image(seed: int, kind: str = "PNG", size: tuple[int, int] = (16, 16)) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    with io.BytesIO() as file:
        Image.fromarray(values).save(file, kind)
        return file.getvalue()


def rows_from(name: str, quota: Quota | None = None, **block) -> list[Prompt | Pair | BadRow]:
    """What a source yields for a block of params.yaml."""
    module, config = plugins.load("sources", name), plugin_config("sources", name, block, "data")
    return list(module.read(module.Config.model_validate(config.model_dump()), 0, None, quota or Quota()))


def prompts_of(rows, split: str) -> list[str]:
    return [row.prompt for row in rows if row.split == split]


# --- Pick-a-Pic -------------------------------------------------------------------------------------------


def pickapic_row(i: int, **changed) -> dict:
    """A row with the columns of Pick-a-Pic v1."""
    return {
        "are_different": True,
        "best_image_uid": f"uid {2 * i}",
        "caption": f"prompt {i}",
        "has_label": True,
        "image_0_uid": f"uid {2 * i}",
        "image_1_uid": f"uid {2 * i + 1}",
        "jpg_0": image(2 * i, "JPEG"),
        "jpg_1": image(2 * i + 1, "WEBP"),
        "label_0": 1.0,
        "label_1": 0.0,
        "ranking_id": i,
        "num_example_per_prompt": 1,
    } | changed


def parquet(path: Path, rows: list[dict], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def webdataset_row(i: int, **changed) -> dict[str, bytes]:
    """A row as sayakpaul/pickapic_v2_webdataset has it."""
    members = {
        "jpg_0.jpg": image(2 * i, "JPEG"),
        "jpg_1.jpg": image(2 * i + 1, "JPEG"),
        "label_0.txt": b"0.0",
        "label_1.txt": b"1.0",
        "original_prompt.txt": f"prompt {i}".encode(),
    }
    return {f"{i}.{name}": data for name, data in (members | changed).items() if data is not None}


@pytest.fixture
def published(tmp_path) -> Path:
    """A folder with the data set's own splits."""
    for n in range(2):
        parquet(tmp_path / f"data/train-{n:05d}-of-00002-ab.parquet", [pickapic_row(10 * n + i) for i in range(4)])
    parquet(tmp_path / "data/validation-00000-of-00001.parquet", [pickapic_row(40 + i) for i in range(3)])
    parquet(tmp_path / "data/validation_unique-00000-of-00001.parquet", [pickapic_row(40)])
    parquet(tmp_path / "data/test_unique-00000-of-00001.parquet", [pickapic_row(50 + i) for i in range(2)])
    return tmp_path


def test_own_splits_are_kept_and_the_unique_ones_preferred(published):
    rows = rows_from("pickapic", path=str(published))
    assert prompts_of(rows, "test") == ["prompt 50", "prompt 51"]
    assert prompts_of(rows, "validation") == ["prompt 40"]
    assert prompts_of(rows, "train") == [f"prompt {i}" for i in (0, 1, 2, 3, 10, 11, 12, 13)]
    assert rows[0].split == "test"  # held-out rows come first
    assert rows[3].image_0 == image(0, "JPEG")
    assert (rows[3].label_0, rows[3].label_1) == (1.0, 0.0)
    assert (rows[-1].file, rows[-1].row) == ("data/train-00001-of-00002-ab.parquet", 3)


def test_one_split_alone_is_divided_by_hash(published):
    for path in (str(published / "data/train-*.parquet"), str(published / "data/train-00000-of-00002-ab.parquet")):
        rows = rows_from("pickapic", path=path, validation_share=0.3, test_share=0.3)
        assert len(rows) == (8 if "*" in path else 4)
        assert [row.split for row in rows] == [hashed_split(row.prompt, 0.3, 0.3) for row in rows]
        assert len({row.split for row in rows}) > 1


def test_the_folder_may_name_the_split(tmp_path):
    for i, split in enumerate(("train", "validation_unique", "test_unique")):
        parquet(tmp_path / f"default/{split}/0000.parquet", [pickapic_row(i)])
    rows = rows_from("pickapic", path=str(tmp_path))
    assert [(row.prompt, row.split) for row in rows] == [
        ("prompt 2", "test"),
        ("prompt 1", "validation"),
        ("prompt 0", "train"),
    ]


def test_ties_and_missing_labels(tmp_path):
    rows = [
        pickapic_row(0, label_0=0.5, label_1=0.5),
        pickapic_row(1, are_different=False),
        pickapic_row(2, has_label=False),
        pickapic_row(3, label_0=None),
        pickapic_row(4, label_1=float("nan")),
    ]
    parquet(tmp_path / "a.parquet", rows)
    labels = [(row.label_0, row.label_1) for row in rows_from("pickapic", path=str(tmp_path))]
    assert labels == [(0.5, 0.5), (0.5, 0.5), (None, None), (None, 0.0), (1.0, None)]


def test_images_may_be_wrapped_as_the_datasets_library_does_and_label_1_may_be_absent(tmp_path):
    row = {"caption": "a", "jpg_0": {"bytes": image(0), "path": None}, "label_0": 0.0}
    row["jpg_1"] = {"bytes": image(1), "path": "x.jpg"}
    parquet(tmp_path / "a.parquet", [row])
    (pair,) = rows_from("pickapic", path=str(tmp_path))
    assert (pair.image_0, pair.image_1, pair.label_1) == (image(0), image(1), 1.0)


def test_webdataset_shards(tmp_path):
    shard(tmp_path / "00000.tar", webdataset_row(0) | webdataset_row(1))
    shard(tmp_path / "00001.tar", webdataset_row(2) | webdataset_row(3))
    rows = rows_from("pickapic", path=str(tmp_path))
    assert [row.prompt for row in rows] == [f"prompt {i}" for i in range(4)]
    assert (rows[2].image_0, rows[2].image_1) == (image(4, "JPEG"), image(5, "JPEG"))
    assert (rows[2].label_0, rows[2].label_1) == (0.0, 1.0)
    assert (rows[2].file, rows[2].row) == ("00001.tar", "2")


def test_webdataset_shards_with_every_column_as_a_file(tmp_path):
    names = ("caption", "jpg_0", "jpg_1", "label_0", "label_1", "has_label", "are_different")
    rows = [pickapic_row(0), pickapic_row(1, are_different=False), pickapic_row(2, has_label=False)]
    members = {
        f"d/{i}ab.{name}": row[name] if isinstance(row[name], bytes) else str(row[name]).encode()
        for i, row in enumerate(rows)
        for name in names
    }
    for split in ("train", "validation_unique", "test_unique"):
        shard(tmp_path / f"{split}_00000.tar", members)
    read = rows_from("pickapic", path=str(tmp_path))
    assert [(row.label_0, row.split) for row in read[:3]] == [(1.0, "test"), (0.5, "test"), (None, "test")]
    assert len(read) == 9


def test_a_broken_sample_or_shard_is_one_bad_row(tmp_path):
    good, lost = webdataset_row(0), webdataset_row(1, **{"original_prompt.txt": None})
    odd = webdataset_row(2, **{"label_0.txt": b"left"}) | webdataset_row(3, **{"original_prompt.txt": b"\xff"})
    blind = webdataset_row(4, **{"jpg_1.jpg": None})
    path = shard(tmp_path / "0.tar", good | lost | odd | blind)
    (tmp_path / "1.tar").write_bytes(path.read_bytes()[:1200])
    parquet(tmp_path / "2.parquet", [pickapic_row(i) for i in range(9)], row_group_size=3)
    data = bytearray((tmp_path / "2.parquet").read_bytes())
    (tmp_path / "3.parquet").write_bytes(data[:-40])
    rows = rows_from("pickapic", path=str(tmp_path))
    bad = [(row.reason, row.file, row.row) for row in rows if isinstance(row, BadRow)]
    malformed = [("malformed_row", "0.tar", key) for key in "123"]
    assert bad == [*malformed, ("unreadable_file", "1.tar", 0), ("unreadable_file", "3.parquet", 0)]
    pairs = [row for row in rows if isinstance(row, Pair)]
    assert [row.prompt for row in pairs] == ["prompt 0", "prompt 4", *(f"prompt {i}" for i in range(9))]
    assert pairs[1].image_1 is None


def test_a_missing_column_is_named_before_anything_is_read(tmp_path):
    row = pickapic_row(0)
    del row["jpg_1"]
    path = parquet(tmp_path / "a.parquet", [row])
    with pytest.raises(SourceError, match=r"a\.parquet: column 'jpg_1' is missing; there are are_different, best"):
        plugins.load("sources", "pickapic").read(
            plugins.load("sources", "pickapic").Config(path=str(path)), 0, None, Quota()
        )


def test_reading_stops_when_there_are_enough(published):
    quota = Quota({"train": 5, "validation": 500, "test": 1})
    module = plugins.load("sources", "pickapic")
    read = []
    for row in module.read(module.Config(path=str(published)), 0, None, quota):
        quota.taken[row.split] += 1
        read.append(row.prompt)
    assert read == ["prompt 50", "prompt 40", "prompt 0", "prompt 1", "prompt 2", "prompt 3", "prompt 10"]


def test_no_more_gigabytes_than_asked_for(published, caplog):
    sizes = {path.name: path.stat().st_size for path in (published / "data").iterdir()}
    held_out = sizes["test_unique-00000-of-00001.parquet"] + sizes["validation_unique-00000-of-00001.parquet"]
    enough = held_out + sizes["train-00000-of-00002-ab.parquet"]
    rows = rows_from("pickapic", path=str(published), max_gb=(enough + 1) / 1e9)
    assert prompts_of(rows, "train") == [f"prompt {i}" for i in range(4)]
    assert "max_gb" in caplog.text
    with pytest.raises(SourceError, match=r"data\.max_gb: 1e-09 is less than data/test_unique-.* alone"):
        rows_from("pickapic", path=str(published), max_gb=1e-9)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/data/raw/here/nothing", "data.path: /data/raw/here/nothing is neither here nor a data set on the Hub"),
        ("{empty}", "holds no .parquet or .tar file"),
        ("{empty}/*.tar", "holds no .parquet or .tar file"),
    ],
)
def test_data_that_is_not_there_names_the_key(path, says, tmp_path):
    with pytest.raises(SourceError, match=re.escape(says)):
        rows_from("pickapic", path=path.format(empty=tmp_path))


@pytest.mark.parametrize("path", ["owner/name", "owner/name@main"])
def test_a_data_set_on_the_hub_is_named_with_its_whole_commit(path):
    with pytest.raises(ConfigError, match=r"data\.path: owner/name.* full commit"):
        plugin_config("sources", "pickapic", {"path": path}, "data")


@dataclass
class RepoFile:
    """What HfApi.list_repo_tree says of a file."""

    path: str
    size: int


@dataclass
class RepoFolder:
    path: str


def test_hub_shards_are_downloaded_when_their_turn_comes(published, monkeypatch):
    """The Hub is a local folder here; its two calls are the only ones replaced."""
    commit, downloaded, listed = "a" * 40, [], []

    def list_repo_tree(self, repository, **options):
        listed.append((repository, options))
        files = sorted((published / "data").iterdir(), reverse=True)
        return [RepoFolder("data"), *(RepoFile(f"data/{file.name}", file.stat().st_size) for file in files)]

    def hf_hub_download(repository, name, **options):
        assert (repository, options) == ("owner/name", {"repo_type": "dataset", "revision": commit})
        downloaded.append(name.partition("/")[2].partition("-of-")[0])
        return str(published / name)

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_tree", list_repo_tree)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    quota = Quota({"train": 3})
    module = plugins.load("sources", "pickapic")
    seen = []
    for row in module.read(module.Config(path=f"owner/name@{commit}"), 0, None, quota):
        quota.taken[row.split] += 1
        seen.append((row.prompt, len(set(downloaded))))
    assert listed == [("owner/name", {"repo_type": "dataset", "revision": commit, "recursive": True})]
    assert seen == [("prompt 50", 1), ("prompt 51", 1), ("prompt 40", 2), *((f"prompt {i}", 3) for i in range(3))]
    assert "train-00001" not in downloaded
    assert "validation-00000" not in downloaded


def test_a_hub_that_cannot_be_reached_names_the_key(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"data\.path: owner/name@b{40} is not in the cache .*offline"):
        rows_from("pickapic", path=f"owner/name@{'b' * 40}")


# --- the torture file -------------------------------------------------------------------------------------


def test_every_malformation_in_one_file_is_named_and_the_run_goes_on(tmp_path, new_policy):
    rows = [
        pickapic_row(0, caption="held out"),
        pickapic_row(1, jpg_0=b"\xff\xd8\xff\xe0 cut"),
        pickapic_row(2, jpg_1=b""),
        pickapic_row(3, jpg_0=None),
        pickapic_row(4, has_label=False),
        pickapic_row(5, label_0=float("nan")),
        pickapic_row(6, label_0=1.0, label_1=1.0),
        pickapic_row(7, label_0=0.3, label_1=0.7),
        pickapic_row(8, caption="\n \t"),
        pickapic_row(9, caption=None),
        pickapic_row(10, jpg_0=image(1, size=(600, 5))),
        pickapic_row(11, label_0=0.5, label_1=0.5),
        pickapic_row(12, are_different=False),
        pickapic_row(13, jpg_0=image(2, size=(40, 30))),
        pickapic_row(13, jpg_0=image(2, size=(40, 30))),
        pickapic_row(15, caption="=HYPERLINK(1)", jpg_0=b"x"),
        pickapic_row(16, jpg_1=image(3, "GIF")),
    ]
    parquet(tmp_path / "raw/a.parquet", rows, row_group_size=5)
    (tmp_path / "list.txt").write_text("HELD  out\nanother\n\n")
    module = plugins.load("sources", "pickapic")
    block = {"path": str(tmp_path / "raw"), "test_list": str(tmp_path / "list.txt"), "test_share": 0}
    config = module.Config.model_validate(block | {"validation_share": 0})
    backbone = new_policy(adapter=False).backbone
    with Quarantine(tmp_path / "quarantine.csv", "pickapic") as quarantine:
        source = module.read(config, 0, None, Quota())
        rules = Rules(min_side=8, max_bad_share=0.75)
        counts = write_prepared(tmp_path / "prepared", source, backbone, {}, quarantine, rules)
    with (tmp_path / "quarantine.csv").open(newline="") as file:
        noted = list(csv.DictReader(file))
    reasons = {
        "prompt_in_later_split": [0],
        "undecodable": [1, 2, 15],
        "missing_image": [3],
        "no_label": [4, 5],
        "label_sum": [6],
        "label_value": [7],
        "empty_prompt": [8, 9],
        "too_small": [10],
        "duplicate_pair": [14],
    }
    assert {int(row["row"]): row["reason"] for row in noted} == {
        row: reason for reason, rows in reasons.items() for row in rows
    }
    assert {(row["source"], row["file"]) for row in noted} == {("pickapic", "a.parquet")}
    assert next(row["prompt"] for row in noted if row["row"] == "15") == "'=HYPERLINK(1)"
    assert {key: counts[f"quarantined/{key}"] for key in reasons} == {key: len(rows) for key, rows in reasons.items()}
    assert counts["quarantined"] == 13
    assert counts["mixed_sizes"] == 1
    assert counts["tie_share"] == 0.5
    data = PreparedData.read(tmp_path / "prepared", "train", keep_ties=True)
    assert data.prompts == ["prompt 11", "prompt 12", "prompt 13", "prompt 16"]
    assert data.pairs.label_0.tolist() == [0.5, 0.5, 1, 1]
    assert PreparedData.read(tmp_path / "prepared", "test").prompts == ["HELD  out", "another"]


# --- other data sets --------------------------------------------------------------------------------------


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
    assert (lost.image_1, out.image_0) == (None, None)
    assert short == BadRow("malformed_row", "train.json", 4, "short")
    assert nonsense == BadRow("malformed_row", "train.json", 5)


def test_hpdv2_without_a_test_file_takes_test_prompts_from_train(hpdv2):
    (hpdv2 / "test.json").unlink()
    rows = rows_from("hpdv2", path=str(hpdv2), validation_share=0.3, test_share=0.3)
    pairs = [row for row in rows if isinstance(row, Pair)]
    assert [row.split for row in pairs] == [hashed_split(row.prompt, 0.3, 0.3) for row in pairs]


@pytest.mark.parametrize(("text", "says"), [("{}", "must be a list"), ("[", "is not JSON")])
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
    pairs = rows[2:]
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
    assert [row for row in rows if isinstance(row, BadRow)] == [
        BadRow("no_label", "metadata-train.parquet", 1, "train a")
    ]
    (train,) = (row for row in rows if isinstance(row, Pair) and row.split == "train")
    assert train.image_1 is None
    assert not any(row.image_0.exists() for row in rows if isinstance(row, Pair) and row.split == "validation")
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
    assert (third.prompt, third.image_1) == (None, None)


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_a_folder_with_captions(chosen_and_rejected, kind):
    captions = {"sub/0": "a cat", "sub/1.jpg": "a dog"}
    lines = [json.dumps({"name": name, "caption": text}) for name, text in captions.items()]
    text = json.dumps(captions) if kind == "json" else "\n".join([*lines, "broken", ""])
    (chosen_and_rejected / f"captions.{kind}").write_text(text)
    rows = rows_from("folder", path=str(chosen_and_rejected))
    assert [row.prompt for row in rows] == ["a cat", "a dog", None]


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
        {"prompt": "odd", "image_0": "a.png", "image_1": "c.png", "label_0": 0, "split": "dev"},
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n[1]\n{\n")
    for name, last in (("t.csv", []), ("t.jsonl", [7, 8])):
        read = rows_from("table", path=str(tmp_path / name))
        cat, dog, out, lost, odd = read[:5]
        assert (cat.split, cat.label_0, cat.label_1) == ("test", 1.0, 0.0)
        assert cat.image_1 == tmp_path / "sub/b.png"
        assert (dog.prompt, dog.label_0, dog.split) == ('a "red", dog', 0.5, hashed_split(dog.prompt, 0.05, 0.05))
        assert (out.image_0, out.image_1) == (None, None)
        assert (lost.image_0, lost.label_0, lost.label_1) == (None, None, None)
        assert (odd.reason, odd.prompt) == ("malformed_row", "odd")
        assert [row.row for row in read[5:]] == last


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.csv", "prompt,image_0\na,b\n", "column 'image_1' is missing; there are prompt, image_0"),
        ("t.txt", "", "neither a .csv nor a .jsonl"),
        ("none.csv", None, "is not there"),
        ("t.csv", f"prompt,image_0,image_1,label_0\na,b,c,{'x' * 200_000}\n", "after line 1: field larger than"),
    ],
)
def test_a_table_that_is_none(tmp_path, name, text, says):
    if text is not None:
        (tmp_path / name).write_text(text)
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
    assert rows[:3] == [
        Prompt("held out", "test", "test.json", 0),
        BadRow("malformed_row", "test.json", 1),
        BadRow("malformed_row", "test.json", 2),
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


def asked(name: str, **block):
    """(needs_files, split_sizes, listed_prompts) of a source."""
    module = plugins.load("sources", name)
    config = module.Config.model_validate(block)
    listed = module.listed_prompts(config)
    return module.needs_files(config), module.split_sizes(config), None if listed is None else list(listed)


def counted(**sizes) -> dict[str, int]:
    zero = {f"{kind}/{split}": 0 for kind in ("prompts", "pairs") for split in ("train", "validation", "test")}
    return zero | {name.replace("_", "/"): n for name, n in sizes.items()}


def test_a_table_is_known_with_its_images(tmp_path, monkeypatch):
    rows = ["prompt,image_0,image_1,label_0,split", "a cat,a.png,sub/b.png,1,train", "a dog,a.png,../c.png,0,test"]
    path = tmp_path / "t.csv"
    path.write_text("\n".join([*rows, "A Cat,a.png,d.png,1,train"]))
    files, sizes, prompts = asked("table", path=str(path))
    assert files == [path, *(tmp_path / name for name in ("a.png", "d.png", "sub/b.png"))]
    assert sizes == counted(prompts_train=2, prompts_test=1, pairs_train=2, pairs_test=1)
    assert prompts == ["a cat", "a dog", "A Cat"]
    assert asked("table", path=str(path), pairs=1)[1] == counted(
        prompts_train=1, prompts_test=1, pairs_train=1, pairs_test=1
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


def test_shards_here_are_needed_and_those_of_the_hub_are_not(published):
    train = sorted((published / "data").glob("train-*.parquet"))
    assert asked("pickapic", path=str(published)) == ([published], None, None)
    assert asked("pickapic", path=str(published / "data/train-*.parquet")) == (train, None, None)
    assert asked("pickapic", path=str(train[0])) == (train[:1], None, None)
    assert asked("pickapic", path=f"owner/name@{'a' * 40}") == ([], None, None)
