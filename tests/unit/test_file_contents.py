"""Single files of weights: what lies there instead, and what a pickle holds that is no set of tensors."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from attune.weights import count_parameters, read_json, read_tensors
from tiny_scorers import aesthetic_head, hpsv2_file, imagereward_file, spm_file

EMBEDDED = Path(__file__).parents[2] / "models" / "embedded"
INSTEAD = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "is a pointer of git-lfs"),
    "annex": (b"/annex/objects/SHA256E-s4--0\n", "is a pointer of git-annex"),
    "page": (b"\xef\xbb\xbf\r\n<HTML><body>404</body></HTML>", "is a web page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page"),
    "answer": (b'{"error": "Invalid username or password."}', "is JSON and no file of weights.*Invalid username"),
    "empty": (b"", "is empty: download it again"),
    "noise": (bytes(range(256)) * 20, "is damaged, or no file of weights"),
    "text": (b"not found", "is damaged, or no file of weights"),
}
ENDINGS = [".safetensors", ".pt", ".pth", ".bin"]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("what", INSTEAD)
def test_what_lies_there_instead_is_told(tmp_path, what, ending):
    content, says = INSTEAD[what]
    file = tmp_path / f"weights{ending}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{file} {says}"):
        read_tensors(file)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_a_download_that_broke_off_is_damaged(tmp_path, kind, share):
    file, tensors = tmp_path / f"weights.{kind}", {"a": torch.arange(3000.0), "b": torch.ones(3)}
    if kind == "safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=kind == "zip")
        assert zipfile.is_zipfile(file) == (kind == "zip")
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match=rf"^{file} (is damaged|was not loaded)"):
        read_tensors(file)


@pytest.mark.parametrize("content", [torch.ones(3), [torch.ones(3)], 7])
def test_a_pickle_of_unnamed_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt holds a \w+, not named tensors"):
        read_tensors(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[1]", "holds a list, not a JSON object"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("", "is empty"),
        ("<html></html>", "is a web page"),
    ],
)
def test_a_configuration_that_is_none_is_named(tmp_path, content, says):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.json {says}"):
        read_json(tmp_path / "config.json")


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "config.json") == {"a": 1}


def test_numbers_are_counted_of_whole_files_only(tmp_path):
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4)}, tmp_path / "a.safetensors")
    assert count_parameters(tmp_path) == 10
    (tmp_path / "b.safetensors").write_bytes(INSTEAD["pointer"][0])
    with pytest.raises(ValueError, match=r"b\.safetensors is a pointer of git-lfs"):
        count_parameters(tmp_path)


# ---------------------------------------------------------------- through every scorer that is one file


@pytest.mark.parametrize(
    "slot", [aesthetic_head, hpsv2_file, imagereward_file, spm_file], ids=lambda slot: slot.__name__
)
@pytest.mark.parametrize("what", ["pointer", "page", "answer", "empty", "noise"])
def test_a_scorer_names_its_file(tmp_path, slot, what):
    file, load = slot(tmp_path)
    content, says = INSTEAD[what]
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file.name} {says}"):
        load()


@pytest.mark.parametrize("slot", [hpsv2_file, imagereward_file], ids=lambda slot: slot.__name__)
def test_a_layout_that_is_no_layout_is_named(tmp_path, slot):
    file, load = slot(tmp_path)
    torch.save({"a": torch.ones(1)}, file)
    file.with_suffix(".json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match=rf"{file.stem}\.json holds a list, not a JSON object"):
        load()
