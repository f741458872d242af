"""Work cut into shards: where chunks of rows end, what is computed again and what is not, and packs of images."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import preparing
from attune.data.ingest import compute
from attune.data.ingest.chunks import MOST, chunks
from attune.data.ingest.rules import Rules
from attune.data.ingest.write import write_prepared
from attune.data.quarantine import Quarantine, RejectedRow
from attune.data.rows import BadRow, Pair, Prompt, Quota, SourceError
from attune.data.store import PreparedData
from attune.distributed import ALONE, Shard
from attune.evaluation import images
from attune.shards import Shards, compute_missing, in_order, shard_name
from raw_data import image


def pairs(n: int, split: str = "train") -> list[Pair]:
    """Two to a prompt, with 8 pictures in all."""
    return [
        Pair(f"prompt {i // 2}", image(i % 8), image((i + 1) % 8), i % 2, 1 - i % 2, split, "f", i) for i in range(n)
    ]


def prompts_of(rows) -> list[list[str]]:
    return [[row.prompt for row in chunk.rows] for chunk in chunks(rows, Quota(), 1)]


# ---------------------------------------------------------------- chunks


def test_chunks_hold_all_rows_in_their_order():
    rows = [*pairs(900), *(Prompt(f"alone {i}", "test") for i in range(2000)), BadRow("malformed_row"), *pairs(10)]
    found = list(chunks(rows, Quota(), 3))
    assert [row for chunk in found for row in chunk.rows] == rows
    assert max(sum(isinstance(row, Pair) for row in chunk.rows) for chunk in found) <= MOST
    assert len(found) > 5
    assert found[-1].merge
    assert {chunk.owner for chunk in found} == {0, 1, 2}


def test_a_row_put_in_between_changes_the_chunk_it_falls_into():
    rows = pairs(5000)
    before = prompts_of(rows)
    for place in (0, 1234, 4999):
        changed = [*rows[:place], replace(rows[0], prompt="new"), *rows[place:]]
        after = prompts_of(changed)
        assert sum(chunk not in before for chunk in after) <= 2
    longer = prompts_of(rows + [replace(row, prompt=f"more {row.prompt}") for row in pairs(300)])
    assert longer[: len(before) - 1] == before[:-1]


def test_pairs_that_nobody_wants_any_more_are_passed_over():
    """Of a source that cannot leave out a split: their images are not looked at, and they end no chunk."""
    rows = [row for i, pair in enumerate(pairs(1000)) for row in (pair, replace(pair, split="test"))]
    quota, found = Quota({"test": 50}), []
    for chunk in chunks(rows, quota, 1):
        found.append(len(chunk.rows))
        wanted = sum(row.split == "test" for row in chunk.rows)
        quota.taken["test"] = min(50, quota.taken["test"] + wanted)
    assert sum(found) == 1050
    assert len(found) < 35


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("limit", [1, 63, 64, 200])
def test_no_row_is_read_that_one_by_one_would_not_be(processes, limit):
    """Every third pair is bad, and so is every fifth row no pair at all."""
    rng = random.Random(0)
    rows = [BadRow("malformed_row", row=i) if rng.random() < 0.2 else row for i, row in enumerate(pairs(2000))]
    good = {id(row) for row in rows if isinstance(row, Pair) and rng.random() < 0.67}

    def read(chunked: bool) -> list:
        quota, seen = Quota({"train": limit}), []

        def source():
            for row in quota.take_until_full(rows, "train"):
                seen.append(row)
                yield row
            yield from pairs(5, "test")

        def judge(some) -> None:
            quota.taken.update(row.split for row in some if id(row) in good)

        if not chunked:
            for row in source():
                judge([row])
            return seen
        waiting = []
        for chunk in chunks(source(), quota, processes):
            waiting += chunk.rows
            if chunk.merge:
                judge(waiting)
                waiting = []
        assert not waiting
        return seen

    assert read(chunked=True) == read(chunked=False)


# ---------------------------------------------------------------- prepared data


@pytest.fixture
def prepare(tmp_path, backbone):
    """Prepares rows with shards that stay; returns counts and how many images were encoded."""
    encode, encoded = backbone.encode_images, []

    def run(rows, scorers=None, rules=None, folder="prepared", kept="kept", threads=1):
        encoded.clear()
        backbone.encode_images = lambda pictures: encoded.append(len(pictures)) or encode(pictures)
        shards, work = Shards(tmp_path / kept), preparing.work(backbone, scorers, threads)
        with Quarantine(tmp_path / "q.csv", "test") as quarantine:
            counts = write_prepared(tmp_path / folder, rows, work, shards, quarantine, rules or Rules())
        return counts, sum(encoded)

    return run


def content(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def many(n: int) -> list[Pair]:
    """Pairs of different pictures."""
    return [Pair(f"p {i}", image(2 * i), image(2 * i + 1), 1.0, 0.0, "train", "f", i) for i in range(n)]


def test_nothing_is_computed_again_and_threads_change_nothing(prepare, tmp_path):
    rows = many(150)
    first, encoded = prepare(rows, threads=3)
    assert encoded == 300
    assert prepare(rows, folder="again") == (first, 0)
    assert prepare(rows, kept="other", folder="third")[1] == 300
    assert content(tmp_path / "prepared") == content(tmp_path / "again") == content(tmp_path / "third")


def test_more_data_encodes_what_is_new_and_equals_a_fresh_run(prepare, tmp_path):
    rows = many(400)
    prepare(rows[:350])
    _, encoded = prepare(rows, folder="grown")
    assert 100 <= encoded < 500  # 100 are new; the last chunk of before is a longer one now
    prepare(rows, kept="other", folder="fresh")
    assert content(tmp_path / "grown") == content(tmp_path / "fresh")


def test_a_new_scorer_is_the_only_one_asked(prepare, tmp_path):
    asked = []

    def scorer(name, value):
        return lambda pictures, prompts: asked.extend([name] * len(prompts)) or torch.full((len(prompts),), value)

    rows = many(70)
    prepare(rows, {"a": scorer("a", 1.0)})
    _, encoded = prepare(rows, {"a": scorer("a", 1.0), "b": scorer("b", 2.0)})
    assert (encoded, asked.count("a"), asked.count("b")) == (0, 140, 140)
    found = PreparedData.read(tmp_path / "prepared", "train").pairs
    assert (found.a_0.unique().tolist(), found.b_1.unique().tolist()) == ([1.0], [2.0])


def test_a_rule_that_changes_encodes_nothing(prepare, tmp_path):
    """The most annoying case: all is encoded, and then too many rows turn out to be bad."""
    small = [Pair("small", image(500, size=(9, 9)), image(501), 1.0, 0.0, "train", "f", 99)]
    _, encoded = prepare([*many(20), *small])
    assert encoded == 42
    counts, encoded = prepare([*many(20), *small], rules=Rules(min_side=10))
    assert (counts["quarantined/too_small"], encoded) == (1, 0)


def test_a_file_that_cannot_be_read_again_is_no_bad_image(prepare, tmp_path, monkeypatch):
    """A network file system may fail for a moment; what a shard says must follow from bytes alone."""
    file = tmp_path / "a.png"
    file.write_bytes(image(1))
    rows = [Pair("p", file, image(2), 1.0, 0.0, "train", "f", 0)]
    decode = compute.decode_ref

    def lost(ref, data=None):
        if isinstance(ref, Path):
            raise RejectedRow("missing_image", "Stale file handle")
        return decode(ref, data)

    monkeypatch.setattr(compute, "decode_ref", lost)
    with pytest.raises(SourceError, match=r"a\.png.* could not be read again: Stale file handle; start once more"):
        prepare(rows)
    monkeypatch.undo()
    assert prepare(rows)[0]["pairs"] == 1


def test_an_image_of_two_chunks_has_one_row(prepare, tmp_path):
    rows = pairs(600)
    prepare(rows)
    data = PreparedData.read(tmp_path / "prepared", "train")
    assert set(data.pairs.image_0) | set(data.pairs.image_1) == set(range(8))


def test_shards_of_the_last_output_are_taken(prepare, tmp_path, backbone):
    """As DVC keeps them: under names of its own, and read-only."""
    prepare(many(70))
    cache = tmp_path / "cache"
    cache.mkdir()
    earlier = {}
    for i, (name, data) in enumerate(content(tmp_path / "prepared").items()):
        earlier[name] = cache / str(i)
        earlier[name].write_bytes(data)
        earlier[name].chmod(0o444)
    backbone.encode_images = None
    with Quarantine(tmp_path / "q.csv", "test") as quarantine:
        shards = Shards(tmp_path / "new", earlier)
        write_prepared(tmp_path / "second", many(70), preparing.work(backbone), shards, quarantine, Rules())
    assert content(tmp_path / "second") == content(tmp_path / "prepared")


# ---------------------------------------------------------------- shards


def test_a_damaged_shard_is_computed_again(tmp_path, caplog):
    shards, made = Shards(tmp_path), []

    def task(i):
        return lambda: (made.append(i) or {"x": torch.full((2,), float(i))}, {"i": i})

    tasks = {shard_name("x", i): task(i) for i in range(4)}
    compute_missing(tasks, shards, ALONE, "test")
    names = list(tasks)
    shards.path(names[1]).write_bytes(shards.path(names[1]).read_bytes()[:-3])
    shards.path(names[2]).unlink()
    turned = bytearray(shards.path(names[3]).read_bytes())
    turned[-1] ^= 1
    shards.path(names[3]).write_bytes(turned)
    shards = Shards(tmp_path)  # another process
    compute_missing(tasks, shards, ALONE, "test")
    assert made == [0, 1, 2, 3, 1, 2, 3]
    assert "its hash is another" in caplog.text
    tensors, facts = shards.read(names[1])
    assert (tensors["x"].tolist(), facts["i"]) == ([1.0, 1.0], 1)


def test_processes_share_what_is_missing(tmp_path, monkeypatch):
    """Two processes one after the other, in the place of their meetings."""
    monkeypatch.setattr(Shard, "broadcast_from_main", lambda self, work: ["b", "c", "d"])
    monkeypatch.setattr(Shard, "all_gather_object", lambda self, value: [value, value])
    made: dict[int, list[str]] = {0: [], 1: []}
    for rank in (0, 1):
        tasks = {name: (lambda rank=rank, name=name: (made[rank].append(name) or {}, {})) for name in "abcd"}
        compute_missing(tasks, Shards(tmp_path), Shard(rank, 2), "test")
    assert made == {0: ["b", "d"], 1: ["c"]}


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_keep_the_order_and_tell_an_error_in_its_place(threads):
    found = []

    def work(i):
        if i == 90:
            raise KeyError("ninety")
        return i * i

    def collect():
        for value in in_order(work, range(100), threads):
            found.append(value)

    with pytest.raises(KeyError, match="ninety"):
        collect()
    assert found == [i * i for i in range(90)]


# ---------------------------------------------------------------- images


def test_many_images_are_packed_and_read_alike(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (25, 8, 8, 3), dtype=np.uint8)
    encoded = [torch.frombuffer(bytearray(images.png(picture)), dtype=torch.uint8) for picture in pictures]
    batches = [{f"{row:09d}": encoded[row] for row in range(start, min(start + 4, 25))} for start in range(0, 25, 4)]
    found = {}
    for limit, per_pack in ((100, 10), (20, 10), (20, 7)):
        monkeypatch.setattr(images, "PACKED_ABOVE", limit)
        monkeypatch.setattr(images, "PER_PACK", per_pack)
        folder = tmp_path / f"{limit}-{per_pack}"
        folder.mkdir()
        files = images.write_images(folder, batches, 25)
        pd.DataFrame({"file": files}).to_parquet(folder / "index.parquet")
        assert np.array_equal(images.read_images(folder, files), pictures)
        assert np.array_equal(images.read_images(folder, files[::-3]), pictures[::-3])
        assert np.array_equal(images.image_reader(folder, 2, 10**6)(files[::-3]), pictures[::-3])
        found[folder.name] = sorted(path.name for path in folder.iterdir())
        uri = images.thumbnail_uri(folder / files[11], 10_000)
        assert uri == images.thumbnail_uri(images.Image.fromarray(pictures[11]), 10_000)
    assert len(found["100-10"]) == 26
    assert found["20-10"] == ["00000.tar", "00001.tar", "00002.tar", "index.parquet"]
    with pytest.raises(FileNotFoundError, match=r"00001\.tar has no 00000099\.png"):
        images.image_bytes(tmp_path / "20-10/00001.tar/00000099.png")


def test_latents_are_kept_in_the_autoencoders_precision(prepare, tmp_path, backbone):
    rows = many(70)
    prepare(rows)
    whole = PreparedData.read(tmp_path / "prepared", "train")
    backbone.model = backbone.model.model_copy(update={"vae_dtype": "bfloat16"})
    prepare(rows, folder="half", kept="other")
    half = PreparedData.read(tmp_path / "half", "train")
    assert (whole.latents.dtype, half.latents.dtype) == (torch.float32, torch.bfloat16)
    batch = half.pair_batch([3, 50])
    assert batch.latents_0.dtype == torch.float32
    torch.testing.assert_close(batch.latents_0, whole.pair_batch([3, 50]).latents_0, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("most_bytes", "decoded"), [(10**6, 8), (3 * 192, 8 + 5), (3 * 192 + 191, 8 + 5), (0, 16)])
def test_images_are_decoded_once_as_far_as_memory_goes(tmp_path, monkeypatch, threads, most_bytes, decoded):
    """Eight images of 8 x 8 x 3 = 192 bytes are read twice, in two batches whose order differs."""
    pictures = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    files = [f"{i}.png" for i in range(8)]
    for file, picture in zip(files, pictures, strict=True):
        (tmp_path / file).write_bytes(images.png(picture))
    count, decode = [], images.decode_rgb
    monkeypatch.setattr(images, "decode_rgb", lambda data: (count.append(1), decode(data))[1])
    read = images.image_reader(tmp_path, threads, most_bytes)
    for order in ([0, 1, 2, 3, 4], [5, 6, 7], [7, 0, 6, 1], [5, 4, 3, 2]):
        assert np.array_equal(read([files[i] for i in order]), pictures[order])
    assert len(count) == decoded
