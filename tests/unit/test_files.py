"""What identifies values, files and folders."""

import json
import os
import shutil

import pytest

from attune.files import digest, values_sha, write_atomically
from attune.planning.local_files import Digests


def test_the_hash_of_values_ignores_key_order_and_nothing_else():
    values = {"a": {"x": 1, "y": [1, 2]}, "b": None}
    turned = {"b": None, "a": {"y": [1, 2], "x": 1}}
    assert values_sha(turned) == values_sha(values)
    others = [{**values, "b": 0}, {**values, "a": {"x": 1, "y": [2, 1]}}, {**values, "c": 1}]
    assert len({values_sha(value) for value in [values, *others]}) == 4


def test_the_digest_of_a_folder_is_of_names_and_content(tmp_path):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "x").write_text("1")
    (tmp_path / "a" / "deep" / "y").write_text("2")
    before = digest(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert digest(tmp_path / "b") == before
    (tmp_path / "b" / "x").rename(tmp_path / "b" / "z")
    assert digest(tmp_path / "b") != before
    (tmp_path / "a" / "x").write_text("3")
    assert digest(tmp_path / "a") != before


def test_what_a_list_has_hashes_of_is_not_read_again(tmp_path):
    """Prepared data may have hundreds of GB."""
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "a").write_text("large")
    (tmp_path / "pairs.parquet").write_text("table")
    whole = digest(tmp_path)
    (tmp_path / "shards.json").write_text("{}")
    listed = digest(tmp_path)
    (tmp_path / "latents" / "a").unlink()
    assert digest(tmp_path) == listed != whole
    (tmp_path / "pairs.parquet").write_text("another")
    assert digest(tmp_path) != listed


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data" / ".hidden").mkdir(parents=True)
    for name in ("a.png", "b.png", ".hidden/c"):
        (tmp_path / "data" / name).write_text(name)
    return tmp_path / "data"


def asked(folder, cache) -> str:
    digests = Digests(cache)
    found = digests.of([folder])[str(folder)]
    digests.save()
    return found


def test_a_file_is_hashed_once_and_again_when_it_has_changed(folder, tmp_path, monkeypatch):
    cache = tmp_path / "digests.json"
    first = asked(folder, cache)
    import hashlib

    opened: list[str] = []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: opened.append(file.name) or real(file, name))
    assert asked(folder, cache) == first
    assert opened == []
    (folder / "a.png").write_text("other")
    assert asked(folder, cache) != first
    assert opened == [str(folder / "a.png")]


def test_a_folder_is_its_names_and_contents_wherever_it_is_and_whenever_it_was_written(folder, tmp_path):
    first = asked(folder, tmp_path / "one.json")
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    os.utime(copy / "a.png", (1, 1))
    assert asked(copy, tmp_path / "two.json") == first
    (copy / "new.png").write_text("one more")
    assert asked(copy, tmp_path / "two.json") != first


def test_a_broken_cache_and_a_missing_file_are_no_errors(folder, tmp_path):
    cache = tmp_path / "digests.json"
    first = asked(folder, cache)
    cache.write_text('{"broken')
    assert asked(folder, cache) == first
    assert Digests(cache).of([tmp_path / "nothing"]) == {str(tmp_path / "nothing"): "absent"}
    assert json.loads(cache.read_text())


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "deep" / "x"
    write_atomically(file, b"one")
    write_atomically(file, b"two")
    assert file.read_bytes() == b"two"
    assert [path.name for path in file.parent.iterdir()] == ["x"]
