"""Files of weights: the right one or none, nothing in it is run, and every tensor has its place."""

import hashlib
import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from attune.clip.model import load_tokenizer
from attune.config.plugins import plugin_config
from attune.config.schema import ConfigError
from attune.hub import (
    HubError,
    Source,
    fetch_file,
    fetch_folder,
    identity,
    is_here,
    list_files,
    parse,
)
from attune.pretrained import build_with
from attune.rewards import aesthetic, clipscore, hpsv2, pickscore
from attune.weights import check_finite, read_tensors
from tiny_scorers import aesthetic_head, hpsv2_file, imagereward_file, spm_file

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
    assert fetch_file(parse(file), digest) == file
    with pytest.raises(ValueError, match=f"has sha256 {digest}, not {ZERO}"):
        fetch_file(parse(file), ZERO)


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


# ---------------------------------------------------------------- where weights are

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    ("text", "source"),
    [
        (f"owner/name@{COMMIT}", Source("owner/name", "", COMMIT)),
        (f"owner/name/file.pt@{COMMIT}", Source("owner/name", "file.pt", COMMIT)),
        (f"owner/name/a folder/file+1.pt@{COMMIT}", Source("owner/name", "a folder/file+1.pt", COMMIT)),
        ("/disk/my loras/\u00e9t\u00e9@home.safetensors", Source("/disk/my loras/\u00e9t\u00e9@home.safetensors")),
        ("./owner/name", Source("./owner/name")),
        ("here/head.pth", Source("here/head.pth")),
        ("here/owner@name", Source("here/owner@name")),
        ("here/not/yet.pth", Source("here/not/yet.pth")),
        ("head.pth", Source("head.pth")),
    ],
)
def test_one_notation_says_where_weights_are(text, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    for name in ("head.pth", "owner@name"):
        Path("here", name).touch()
    assert parse(text) == source
    assert str(source) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("owner/name", "owner/name is not here, and on the Hub it needs its full commit: owner/name@<40 hex digits>"),
        ("owner/name/file.pt", "on the Hub it needs its full commit: owner/name/file.pt@<40 hex digits>"),
        ("owner/name@main", "'main' is no full commit (40 hex digits); a branch or a tag can move"),
        ("owner/name@v1.0", "'v1.0' is no full commit"),
        (f"owner/name@{COMMIT[:12]}", "is no full commit"),
        ("owner/name@", "'' is no full commit"),
        ("", "an empty path"),
    ],
)
def test_hub_addresses_need_their_full_commit(text, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        parse(text)


def test_addresses_that_lead_nowhere(monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no file nowhere\.pt; one on the Hub is written owner/name"):
        fetch_file(parse("nowhere.pt"))
    with pytest.raises(FileNotFoundError, match=r"no folder /no/where; one on the Hub is written owner/name"):
        fetch_folder(parse("/no/where"), ["*"])
    with pytest.raises(ValueError, match="which file of the repository"):
        fetch_file(parse(f"owner/file@{COMMIT}"))


def test_a_hub_that_cannot_be_reached_is_one_line_with_a_remedy():
    for fetch in (fetch_file, lambda source: fetch_folder(source, ["*"])):
        with pytest.raises(HubError) as error:
            fetch(parse(f"owner/name/file.pt@{COMMIT}"))
        message = str(error.value)
        assert message.startswith(f"owner/name/file.pt@{COMMIT} is not in the cache and could not be fetched (")
        assert message.endswith("the cache (HF_HOME) serves without")
        assert "\n" not in message


def test_what_is_in_the_cache_needs_no_network(on_the_hub):
    name, commit = on_the_hub(EMBEDDED / "aesthetic")
    source = parse(f"{name}@{commit}")
    assert (fetch_folder(source, ["*.json"]) / "config.json").is_file()
    assert (
        fetch_file(source / "head.safetensors").read_bytes() == (EMBEDDED / "aesthetic/head.safetensors").read_bytes()
    )
    assert is_here(source)
    assert is_here(source / "head.safetensors")
    assert not is_here(source / "body.safetensors")
    assert identity(source / "head.safetensors") == f"{commit[:12]}/head.safetensors"
    block = {"path": str(source), "head": str(source / "head.safetensors"), "hidden_act": "gelu"}
    here = block | {"path": str(EMBEDDED / "aesthetic"), "head": str(EMBEDDED / "aesthetic/head.safetensors")}
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    scores = [aesthetic.load(aesthetic.Config(**b))(images, ["", ""]) for b in (block, here)]
    assert torch.equal(*scores)


def test_a_repository_or_a_folder_of_it_is_listed(monkeypatch):
    def list_repo_tree(self, repository, repo_type, revision, recursive):
        assert (repository, revision, recursive) == ("owner/name", COMMIT, True)
        if repo_type == "model":
            raise ConnectionError("no such model")
        files = [SimpleNamespace(path="a/file.pt", size=3), SimpleNamespace(path="a.pt", size=4)]
        return [*files, SimpleNamespace(path="a")]  # a folder has no size

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_tree", list_repo_tree)
    source = Source("owner/name", "", COMMIT)
    assert list_files(source, "dataset") == {"a/file.pt": 3, "a.pt": 4}
    assert list_files(source / "a", "dataset") == {"a/file.pt": 3}
    assert list_files(source / "a.pt", "dataset") == {"a.pt": 4}
    with pytest.raises(HubError, match=r"could not be fetched \(no such model\)"):
        list_files(source)


# ---------------------------------------------------------------- sound weights


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_weights_that_are_not_finite_are_refused_where_they_are_read(tmp_path, value, dtype):
    good, bad = torch.zeros(3, dtype=dtype), torch.tensor([0, value, 0], dtype=dtype)
    save_file({"good": good, "layer.bad": bad}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors: layer\.bad holds values that are not finite"):
        read_tensors(tmp_path / "a.safetensors")
    torch.save({"state_dict": {"good": good, "bad": bad}}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b\.pt: state_dict\.bad holds values that are not finite"):
        read_tensors(tmp_path / "b.pt")
    check_finite({"steps": torch.arange(3), "good": [good]}, "here")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("not found", "is damaged, or no file of weights"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "is a pointer of git-lfs"),
        ("\n<!DOCTYPE html><html></html>", "is a web page: download the file itself"),
    ],
)
def test_a_file_that_is_no_safetensors_file_is_named(tmp_path, content, says):
    (tmp_path / "a.safetensors").write_text(content)
    with pytest.raises(ValueError, match=rf"a\.safetensors {says}"):
        read_tensors(tmp_path / "a.safetensors")
    folder = damaged(tmp_path, "pickscore")
    (folder / "model.safetensors").write_text(content)
    with pytest.raises(ValueError, match=rf"model\.safetensors {says}"):
        pickscore.load(pickscore.Config(path=str(folder)))


def damaged(folder: Path, name: str) -> Path:
    return Path(shutil.copytree(EMBEDDED / name, folder / name))


def test_a_scorer_whose_weights_are_not_finite_is_refused(tmp_path):
    folder = damaged(tmp_path, "pickscore")
    weights = load_file(folder / "model.safetensors")
    weights["logit_scale"].fill_(torch.nan)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"pickscore/model\.safetensors: logit_scale holds values that are not finite"):
        pickscore.load(pickscore.Config(path=str(folder)))


@pytest.mark.parametrize("name", ["pickscore", "hpsv2"])
def test_a_tokenizer_without_its_vocabulary_is_refused(tmp_path, name):
    """transformers would make an empty one: scores would no longer depend on the prompt."""
    folder = damaged(tmp_path, name)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}: no vocabulary; a tokenizer needs tokenizer.json, or vocab"):
        load_tokenizer(str(folder))


def test_a_tokenizer_of_special_tokens_alone_is_refused(tmp_path):
    folder = damaged(tmp_path, "pickscore")
    values = json.loads((folder / "tokenizer.json").read_text())
    kept = {token["content"] for token in values["added_tokens"]}
    values["model"]["vocab"] = {word: n for word, n in values["model"]["vocab"].items() if word in kept}
    values["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(FileNotFoundError, match="pickscore: no vocabulary"):
        load_tokenizer(str(folder))


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


def test_misfits_are_named():
    with pytest.raises(ValueError, match=r"here does not fit: missing \['linear.bias'\], unexpected \['stranger'\]"):
        build_with(Counting, {"linear.weight": torch.ones(3, 2), "stranger": torch.zeros(1)}, "here")
    with pytest.raises(ValueError, match=r"unexpected \['00', .*'05'\] and 94 more"):
        build_with(Counting, {f"{n:02}": torch.zeros(1) for n in range(100)}, "here")


def test_a_buffer_nobody_knows_is_not_made_up():
    class Other(Counting):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.ones(2), persistent=False)

    with pytest.raises(NotImplementedError, match="buffer mask of Other is not in here"):
        build_with(Other, {"linear.weight": torch.ones(3, 2), "linear.bias": torch.zeros(3)}, "here")
