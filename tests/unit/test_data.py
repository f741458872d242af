"""Arrays on disk, labels of ranks, and the splits of prompts."""

import numpy as np
import pandas as pd
import pytest
import torch

from attune.data.arrays import ArrayFile, read_array
from attune.data.rows import SourceError
from attune.data.sources._ranks import ranked_pairs
from attune.data.splits import check_splits, hashed_split, normalize_prompt

# --- arrays -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_array_grows_and_is_read_through_a_map(tmp_path, dtype):
    parts = [torch.randn(n, 3, 2).to(dtype) for n in (4, 1, 7)]
    with ArrayFile(tmp_path / "a.npy") as file:
        for part in parts:
            file.append(part)
    whole = torch.cat(parts)
    mapped = read_array(tmp_path / "a.npy")
    assert mapped.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert torch.equal(mapped, whole.to(mapped.dtype))
    rows = torch.tensor([11, 0, 5, 5])
    assert torch.equal(mapped[rows], whole[rows].to(mapped.dtype))
    assert np.array_equal(np.load(tmp_path / "a.npy", allow_pickle=False), mapped.numpy())


def test_a_mapped_array_cannot_change_the_file(tmp_path):
    with ArrayFile(tmp_path / "a.npy") as file:
        file.append(torch.ones(3, 2))
    read_array(tmp_path / "a.npy").zero_()
    assert (read_array(tmp_path / "a.npy") == 1).all()


def test_rows_of_another_shape_are_refused(tmp_path):
    with ArrayFile(tmp_path / "a.npy") as file:
        file.append(torch.ones(3, 2))
        with pytest.raises(ValueError, match=r"a\.npy: rows of .* among rows of"):
            file.append(torch.ones(3, 4))


@pytest.mark.parametrize("kept", [0, 6, 90, 140], ids=["empty", "signature", "header", "rows"])
def test_an_array_that_breaks_off_names_its_file(tmp_path, kept):
    with ArrayFile(tmp_path / "a.npy") as file:
        file.append(torch.ones(30, 2))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"a\.npy is damaged; run the prepare stage again"):
        read_array(tmp_path / "a.npy")


def test_an_array_may_have_no_rows(tmp_path):
    with ArrayFile(tmp_path / "a.npy") as file:
        file.append(torch.zeros(0, 4, 8, 8))
    assert read_array(tmp_path / "a.npy").shape == (0, 4, 8, 8)


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
