"""Files of weights: the right one or none, nothing in it is run, and every tensor has its place."""

import hashlib
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from attune.config.plugins import plugin_config
from attune.config.schema import ConfigError
from attune.hub import build_with, find_file, load_strictly, read_tensors
from attune.rewards import aesthetic, clipscore, hpsv2, imagereward, pickscore
from attune.spm import model as preference
from tiny_scorers import write_imagereward

EMBEDDED = Path(__file__).parents[2] / "models" / "embedded"
ZERO = "0" * 64


# ---------------------------------------------------------------- pickles


class Payload:
    """What an attacker puts where a tensor belongs: reading it runs a command."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch '{self.witness}'",)


def clip_with_pickle(folder: Path, source: str) -> str:
    """A copy of an embedded CLIP whose weights are `pytorch_model.bin`."""
    folder.mkdir()
    for file in (EMBEDDED / source).glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)


def pickscore_folder(folder):
    path = clip_with_pickle(folder / "clip", "pickscore")
    return folder / "clip/pytorch_model.bin", lambda: pickscore.load(pickscore.Config(path=path))


def clipscore_folder(folder):
    path = clip_with_pickle(folder / "clip", "aesthetic")
    block = {"model": "ViT-tiny/4@32", "path": path, "hidden_act": "gelu"}
    return folder / "clip/pytorch_model.bin", lambda: clipscore.load(clipscore.Config(**block))


def aesthetic_folder(folder):
    path = clip_with_pickle(folder / "clip", "aesthetic")
    block = {"path": path, "head": str(EMBEDDED / "aesthetic/head.safetensors"), "hidden_act": "gelu"}
    return folder / "clip/pytorch_model.bin", lambda: aesthetic.load(aesthetic.Config(**block))


def aesthetic_head(folder):
    block = {"path": str(EMBEDDED / "aesthetic"), "head": str(folder / "head.pth"), "hidden_act": "gelu"}
    return folder / "head.pth", lambda: aesthetic.load(aesthetic.Config(**block))


def hpsv2_file(folder):
    layout = (EMBEDDED / "hpsv2/open_clip_model.json").read_text()
    (folder / "hps.json").write_text(layout)
    block = {"version": "2.1", "path": str(folder / "hps.pt"), "tokenizer": str(EMBEDDED / "hpsv2")}
    return folder / "hps.pt", lambda: hpsv2.load(hpsv2.Config(**block))


def imagereward_file(folder):
    block = write_imagereward(folder)
    return Path(block["path"]), lambda: imagereward.load(imagereward.Config(**block))


def spm_file(folder):
    return folder / "spm.bin", lambda: preference.load(folder / "spm.bin", clip=str(EMBEDDED / "pickscore"))


SLOTS = (
    pickscore_folder,
    clipscore_folder,
    aesthetic_folder,
    aesthetic_head,
    hpsv2_file,
    imagereward_file,
    spm_file,
)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("slot", SLOTS, ids=lambda slot: slot.__name__)
def test_a_pickle_that_would_run_something_is_refused_unrun(slot, legacy, tmp_path):
    witness = tmp_path / "was_run"
    file, load = slot(tmp_path)
    contents = {"state_dict": Payload(witness), "layers.0.weight": Payload(witness)}
    torch.save(contents, file, _use_new_zipfile_serialization=not legacy)
    assert zipfile.is_zipfile(file) is not legacy
    with pytest.raises(ValueError, match="was not loaded: it holds more than tensors"):
        load()
    assert not witness.exists()


def test_the_payload_is_a_real_one(tmp_path):
    """Or the test above would prove nothing: an unsafe reader is harmed."""
    torch.save({"state_dict": Payload(tmp_path / "was_run")}, tmp_path / "bad.pt")
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert (tmp_path / "was_run").exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_an_honest_pickle_is_read(tmp_path, legacy):
    contents = {"epoch": 3, "state_dict": {"a": torch.arange(3.0)}}
    torch.save(contents, tmp_path / "good.pt", _use_new_zipfile_serialization=not legacy)
    found = read_tensors(tmp_path / "good.pt")
    assert found["epoch"] == 3
    assert found["state_dict"]["a"].tolist() == [0, 1, 2]


def test_a_clip_folder_with_honest_pickled_weights_scores_alike(tmp_path):
    path = clip_with_pickle(tmp_path / "clip", "pickscore")
    torch.save(load_file(EMBEDDED / "pickscore/model.safetensors"), tmp_path / "clip/pytorch_model.bin")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pickled, safe = (pickscore.load(pickscore.Config(path=p)) for p in (path, str(EMBEDDED / "pickscore")))
    assert torch.equal(pickled(images, ["red", "blue"]), safe(images, ["red", "blue"]))


# ---------------------------------------------------------------- the right file


def test_a_file_is_known_by_its_hash(tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert find_file(str(file), sha256=digest) == file
    with pytest.raises(ValueError, match=f"has sha256 {digest}, not {ZERO}"):
        find_file(str(file), sha256=ZERO)


@pytest.mark.parametrize(
    ("name", "block", "key"),
    [
        ("hpsv2", {"version": "2.1", "path": "hpsv2/open_clip_model.safetensors", "tokenizer": "hpsv2"}, "sha256"),
        ("aesthetic", {"path": "aesthetic", "head": "aesthetic/head.safetensors"}, "head_sha256"),
    ],
)
def test_scorers_check_hashes_before_they_load(monkeypatch, name, block, key):
    monkeypatch.chdir(EMBEDDED)
    module = {"hpsv2": hpsv2, "aesthetic": aesthetic}[name]
    with pytest.raises(ValueError, match=f"not {ZERO}"):
        module.load(module.Config(**block, **{key: ZERO}))
    with pytest.raises(ConfigError, match=f"here.{key}: String should match"):
        plugin_config("rewards", name, block | {key: "abc"}, "here")


def test_addresses_that_lead_nowhere():
    with pytest.raises(FileNotFoundError, match=r"no file nowhere\.pt; one on the Hub is written hf://"):
        find_file("nowhere.pt")
    with pytest.raises(ValueError, match="hf://owner/file should read hf://owner/repository/file"):
        find_file("hf://owner/file")


# ---------------------------------------------------------------- every tensor in its place


class Counting(nn.Module):
    """A layer, and position indices that are not saved, as transformers has them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.register_buffer("position_ids", torch.arange(5)[None], persistent=False)


def test_tensors_are_taken_over_not_copied():
    tensors = {"linear.weight": torch.ones(3, 2), "linear.bias": torch.zeros(3)}
    module = build_with(Counting, tensors, "here")
    assert module.linear.weight.data_ptr() == tensors["linear.weight"].data_ptr()
    assert module.position_ids.tolist() == [[0, 1, 2, 3, 4]]
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def fit_anew(tensors):
    build_with(Counting, tensors, "here")


def fit_into(tensors):
    load_strictly(Counting(), tensors, "here")


@pytest.mark.parametrize("fit", [fit_anew, fit_into])
def test_misfits_are_named(fit):
    with pytest.raises(ValueError, match=r"here does not fit: missing \['linear.bias'\], unexpected \['stranger'\]"):
        fit({"linear.weight": torch.ones(3, 2), "stranger": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"unexpected \['00', .*'05'\] and 94 more"):
        fit({f"{n:02}": torch.zeros(1) for n in range(100)})


def test_a_buffer_nobody_knows_is_not_made_up():
    class Other(Counting):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.ones(2), persistent=False)

    with pytest.raises(NotImplementedError, match="buffer mask of Other is not in here"):
        build_with(Other, {"linear.weight": torch.ones(3, 2), "linear.bias": torch.zeros(3)}, "here")
