"""What a saved model's files say of themselves, who may read them, and that the same model gives the same bytes."""

import os
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from attune.clip.open_clip import load_open_clip, save_open_clip
from attune.diffusion.lora_files import ADAPTER_FILE
from attune.files import replaced_folder
from attune.spm import model as spm_model
from attune.weights import read_header, read_tensors, save_tensors
from drawing import same_weights

ROOT = Path(__file__).parents[2]
HEADER = {"base_model": "models/base", "run": "dpo", "profile": "tiny", "method": "dpo", "trained_with": "attune"}


@contextmanager
def umask(value):
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_the_umask_says_who_reads_a_model(new_policy, spm, tmp_path, mask, mode):
    """Adapters, whole denoisers, preference models and scorers: safetensors alone would leave each at 0600."""
    adapter, whole = new_policy(moved=0.1), new_policy(adapter=False)
    whole.unfreeze()
    folder = ROOT / "models/embedded/hpsv2"
    scorer = load_open_clip(folder / "open_clip_model.safetensors", CLIPTokenizer.from_pretrained(folder))
    with umask(mask):
        adapter.save(tmp_path / "adapter")
        whole.save(tmp_path / "whole")
        spm_model.save(*spm, tmp_path / "preference")
        save_open_clip(scorer, tmp_path / "scorer.safetensors")
    found = {file: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.rglob("*") if file.is_file()}
    assert sum(file.suffix == ".safetensors" for file in found) == 4
    assert set(found.values()) == {mode}


def test_an_adapter_says_what_it_is(new, tmp_path):
    policy = new(moved=0.1, rank=3)
    policy.save(tmp_path, HEADER)
    expected = HEADER | {"format": "pt", "lora_rank": "3", "lora_alpha": "3"}
    assert read_header(tmp_path / ADAPTER_FILE) == expected
    loaded = new(adapter=False)
    loaded.load(tmp_path)
    assert same_weights(loaded, policy)


def test_an_adapter_of_several_ranks_is_read_as_it_was_written(new_policy, tmp_path):
    """One alpha in its header would be the wrong one for some of its modules."""
    policy = new_policy(moved=0.1, rank=4)
    policy.save(tmp_path)
    weights = load_file(tmp_path / ADAPTER_FILE)
    name = next(iter(weights)).partition(".lora_")[0]
    weights[f"{name}.lora_A.weight"] = weights[f"{name}.lora_A.weight"][:1].clone()
    weights[f"{name}.lora_B.weight"] = weights[f"{name}.lora_B.weight"][:, :1].clone()
    save_tensors(weights, tmp_path / ADAPTER_FILE)
    mixed, again = new_policy(adapter=False), new_policy(adapter=False)
    mixed.load(tmp_path)
    mixed.save(tmp_path / "again", HEADER)
    assert read_header(tmp_path / "again" / ADAPTER_FILE)["lora_rank"] == "dynamic"
    again.load(tmp_path / "again")
    assert same_weights(again, mixed)


def test_the_same_tensors_and_header_are_the_same_bytes_in_every_process(tmp_path):
    """safetensors orders a header's texts by hashes that every process draws anew."""
    script = (
        "import sys, torch; from pathlib import Path; from attune.weights import save_tensors\n"
        "header = {name: 'ä\"\\\\' + name for name in 'abcdefgh'}\n"
        "save_tensors({'x': torch.ones(3), 'y': torch.zeros(2, 2)}, Path(sys.argv[1]), header)"
    )
    files = [tmp_path / f"{name}.safetensors" for name in ("one", "two")]
    for file in files:
        subprocess.run([sys.executable, "-c", script, file], check=True, env={"PYTHONPATH": ROOT / "src"})
    assert files[0].read_bytes() == files[1].read_bytes()
    header = read_header(files[0])
    assert header["a"] == 'ä"\\a'
    assert list(header) == [*"abcdef", "format", "g", "h"]
    tensors = read_tensors(files[0])
    assert torch.equal(tensors["x"], torch.ones(3))
    assert torch.equal(tensors["y"], torch.zeros(2, 2))


def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path):
    file = tmp_path / "x.safetensors"
    save_tensors({"x": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="sparse"):
        save_tensors({"x": torch.ones(4).to_sparse()}, file)
    assert torch.equal(read_tensors(file)["x"], torch.ones(1))
    assert list(tmp_path.iterdir()) == [file]


def filled(folder, name, then=lambda: None):
    with replaced_folder(folder) as beside:
        (beside / name).write_text(name)
        then()


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "deep" / "package"
    filled(folder, "one")
    with pytest.raises(ZeroDivisionError):
        filled(folder, "two", lambda: 1 / 0)
    assert [file.name for file in folder.iterdir()] == ["one"]
    filled(folder, "two")
    assert [file.name for file in folder.iterdir()] == ["two"]
    assert list(folder.parent.iterdir()) == [folder]
