"""Pick-a-Pic: real JPEG, PNG and WebP bytes in parquet files and tar shards, here and on the Hub."""

import csv
import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import preparing
from attune.config import plugins
from attune.config.plugins import plugin_config
from attune.config.schema import ConfigError
from attune.data.ingest.rules import Rules
from attune.data.quarantine import Quarantine
from attune.data.rows import BadRow, Pair, Quota, SourceError
from attune.data.splits import hashed_split
from attune.data.store import PreparedData
from raw_data import asked, image, rows_from


def prompts_of(rows, split: str) -> list[str]:
    return [row.prompt for row in rows if row.split == split]


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


def test_shards_here_are_needed_and_those_of_the_hub_are_not(published):
    train = sorted((published / "data").glob("train-*.parquet"))
    assert asked("pickapic", path=str(published)) == ([published], None, None)
    assert asked("pickapic", path=str(published / "data/train-*.parquet")) == (train, None, None)
    assert asked("pickapic", path=str(train[0])) == (train[:1], None, None)
    assert asked("pickapic", path=f"owner/name@{'a' * 40}") == ([], None, None)


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
        counts = preparing.prepare(tmp_path / "prepared", source, backbone, {}, quarantine, rules)
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
        "too_narrow": [10],
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
