"""Rows on disk, labels of ranks, and the splits of prompts."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from attune.data import manifest
from attune.data.rows import SourceError
from attune.data.sources._ranks import ranked_pairs
from attune.data.splits import check_splits, hashed_split, normalize_prompt
from attune.shards import Shards

ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}

# --- rows on disk -----------------------------------------------------------------------------------------------


def mapped(folder, parts, name="x"):
    shards = Shards(folder)
    for i, part in enumerate(parts):
        shards.write(f"{i}", {name: part}, {})
    manifest.write(folder, {"rows": [f"{i}.safetensors" for i in range(len(parts))]})
    return manifest.rows_of(folder, manifest.read(folder)["rows"], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_many_files_are_read_through_maps_in_the_dtype_they_have(tmp_path, dtype):
    parts = [torch.randn(n, 3, 2).to(dtype) for n in (4, 1, 7)]
    rows, whole = mapped(tmp_path, parts), torch.cat(parts)
    assert (rows.dtype, rows.shape, len(rows)) == (dtype, (12, 3, 2), 12)
    for index in (torch.tensor([11, 0, 5, 5, 4]), [3], torch.tensor([], dtype=torch.int64)):
        assert torch.equal(rows[index], whole[index])
    part = rows[3:9]
    assert torch.equal(part[[0, 5]], whole[[3, 8]])
    assert torch.equal(part[1:4].tensor(), whole[4:7])
    assert len(rows[5:5]) == 0
    for wrong in ([12], [-1]):
        with pytest.raises(IndexError, match="of 12"):
            rows[wrong]


def test_mapped_rows_cannot_change_the_file(tmp_path):
    rows = mapped(tmp_path, [torch.ones(3, 2)])
    rows[[0, 1, 2]].zero_()
    assert (manifest.rows_of(tmp_path, manifest.read(tmp_path)["rows"], "x").tensor() == 1).all()


def test_only_the_rows_that_are_asked_for_come_into_memory(tmp_path):
    """Of 200 MB, ten rows of 40 kB are read; the peak is that of this process, measured in one of its own."""
    shards = Shards(tmp_path)
    for i in range(5):
        shards.write(f"{i}", {"x": torch.randn(1000, 10_000)}, {})
    manifest.write(tmp_path, {"rows": [f"{i}.safetensors" for i in range(5)]})
    program = (
        "import resource, sys; from pathlib import Path; from attune.data import manifest\n"
        "f = Path(sys.argv[1]); rows = manifest.rows_of(f, manifest.read(f)['rows'], 'x')\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); rows[list(range(0, 5000, 500))]; print(peak() - before)"
    )
    said = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True, env=ENV
    )
    assert int(said.stdout) < 20_000  # kB


@pytest.mark.parametrize("kept", [0, 6, 90, 300], ids=["empty", "length", "header", "rows"])
def test_a_file_that_breaks_off_is_named(tmp_path, kept):
    rows = mapped(tmp_path, [torch.ones(30, 2), torch.ones(30, 2)])
    file = tmp_path / "1.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert (rows[[0]] == 1).all()
    with pytest.raises(ValueError, match=r"1\.safetensors is damaged; run the prepare stage again"):
        rows[[30]]
    with pytest.raises(ValueError, match=r"1\.safetensors is damaged or lost"):
        manifest.check(tmp_path)


def test_a_bit_that_has_turned_is_noticed(tmp_path):
    mapped(tmp_path, [torch.ones(30, 2)])
    manifest.check(tmp_path)
    data = bytearray((tmp_path / "0.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "0.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"0\.safetensors is damaged or lost"):
        manifest.check(tmp_path)


def test_there_may_be_no_rows(tmp_path):
    assert mapped(tmp_path, [torch.zeros(0, 4, 8, 8)]).shape == (0, 4, 8, 8)


# --- prompts, labels, splits ------------------------------------------------------------------------------


def test_the_split_of_a_prompt_is_its_own():
    prompts = [f"prompt {i}" for i in range(4000)]
    splits = pd.Series([hashed_split(p, 0.1, 0.2) for p in prompts])
    shares = splits.value_counts(normalize=True)
    assert shares["test"] == pytest.approx(0.2, abs=0.02)
    assert shares["validation"] == pytest.approx(0.1, abs=0.02)
    assert [hashed_split(p.upper() + "  ", 0.1, 0.2) for p in prompts] == splits.tolist()
    assert {hashed_split(p, 0, 0) for p in prompts} == {"train"}
    # a larger test share only adds to the test split
    assert all(hashed_split(p, 0.1, 0.3) == "test" for p, s in zip(prompts, splits, strict=True) if s == "test")


def test_ranks_make_every_pair_once():
    assert ranked_pairs([2, 1, 2]) == [(0, 1, 0.0), (0, 2, 0.5), (1, 2, 1.0)]
    assert normalize_prompt("  A   Cat ") == normalize_prompt("a cat")


def test_too_few_of_a_split_name_what_asks_and_what_to_set():
    counts = {"prompts/test": 12, "prompts/validation": 3, "pairs/train": 0}
    check_splits(counts, {"prompts/test": 12, "prompts/validation": 3})
    check_splits(counts, {"prompts/train": 1000})  # not known yet
    with pytest.raises(SourceError) as error:
        check_splits(counts, {"prompts/test": 240, "prompts/validation": 3, "pairs/train": 1})
    first, second = str(error.value).split("; ")
    assert first.startswith("data: 12 test prompts, but 240 are needed by generate.prompts: set data.test_list, ")
    assert "data.test_share" in first
    assert "lower generate.prompts" in first
    assert second.startswith("data: 0 train pairs, but 1 are needed by the runs that learn from pairs: choose a data.s")
