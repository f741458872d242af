"""Files, cells and images of a data set that are passed over or taken for something else: each has its row."""

import json

import numpy as np
import pytest
from PIL import Image
from test_images import tiff, with_chunk

from attune.data.images import decode
from attune.data.local import inside
from attune.data.quarantine import RejectedRow
from attune.data.rows import BadRow, Pair, SourceError
from attune.data.sources._cells import as_float, as_image
from attune.data.sources._files import DataFile
from attune.data.sources.pickapic import _without_split, by_split
from raw_data import encoded, image, pixels, rows_from


@pytest.fixture
def folder(tmp_path):
    """Reads a folder of one pair, a.png, with these texts: the prompts of pairs, and (file, reason) of the rest."""
    for seed, side in enumerate(("chosen", "rejected")):
        (tmp_path / "set" / side).mkdir(parents=True)
        (tmp_path / "set" / side / "a.png").write_bytes(image(seed))

    def read(**texts: str):
        for name, text in texts.items():
            (tmp_path / "set" / name.replace("__", "/").replace("_dot_", ".")).write_text(text)
        rows = rows_from("folder", path=str(tmp_path / "set"))
        bad = [(row.row, row.reason) for row in rows if isinstance(row, BadRow)]
        return [row.prompt for row in rows if isinstance(row, Pair)], bad

    return read


def test_prompts_beside_those_that_are_used_are_told(folder):
    captions = json.dumps({"a": "a cat"})
    good, bad = folder(captions_dot_json=captions, rejected__captions_dot_json=captions, chosen__a_dot_txt="a dog")
    assert good == ["a cat"]
    assert bad == [("chosen/a.txt", "unused_file"), ("rejected/captions.json", "unused_file")]


def test_several_texts_of_a_pair_are_told_where_they_differ(folder):
    good, bad = folder(chosen__a_dot_txt="a cat", a_dot_txt="a dog", rejected__a_dot_txt="a cat\n")
    assert (good, bad) == (["a cat"], [("a.txt", "unused_file")])


def test_a_prompt_that_is_none_is_one_row(folder):
    assert folder(captions_dot_json='{"a": 7}') == ([], [("a", "malformed_row")])
    assert folder(captions_dot_json='{"a": 7, "a": "a cat"}') == (["a cat"], [("a", "malformed_row")])


def test_captions_that_are_a_link_out_of_the_folder_are_not_read(folder, tmp_path):
    (tmp_path / "secret.json").write_text('{"a": "secret"}')
    (tmp_path / "set/captions.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(SourceError, match=r"'captions\.json' leads out of"):
        folder()


def test_a_shard_whose_name_gives_no_split_is_told():
    names = ["train-0.tar", "validation-0.tar", "validation_unique-0.tar", "test-0.tar", "extra-0.tar"]
    files = [DataFile(name, 1, None) for name in names]
    (row,) = _without_split(files, by_split(files))
    assert (row.reason, row.file) == ("unused_file", "extra-0.tar")
    assert list(_without_split(files[3:], by_split(files[3:]))) == []


@pytest.mark.parametrize("text", ["1_0", "\u0661", "\uff11", b"1_0"])
def test_numbers_of_python_alone_are_none(text):
    assert as_float(text) is None


def test_a_name_too_long_for_a_file_is_told_as_such(tmp_path):
    for name in ("x" * 256, "a/" + "é" * 128):
        with pytest.raises(RejectedRow) as rejected:
            inside(tmp_path, name)
        assert rejected.value.detail.endswith("... is longer than a file's name, 255 bytes")


def test_an_image_that_is_only_a_path_is_named():
    with pytest.raises(RejectedRow, match="missing_image") as rejected:
        as_image({"bytes": None, "path": "x.jpg"}, "jpg_0")
    assert rejected.value.detail.startswith("column jpg_0: only the path 'x.jpg'")


@pytest.mark.parametrize(
    "exif", [b"", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x07\0\0\0\x02ab\0\0", b"II*\0\xff\xff\xff\xff"]
)
def test_an_odd_exif_costs_the_rotation_only(exif):
    odd = with_chunk(encoded(pixels(0, 20, 12)), b"eXIf", exif)
    assert np.array_equal(np.asarray(decode(odd)), pixels(0, 20, 12))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.array([0, 1, 100], np.int8), 2),
        (np.array([0, 100, 200], np.uint16), 1),
        (np.array([0, 100, 4095], np.uint16), 1),
    ],
)
def test_numbers_of_fewer_bits_than_they_take_are_told(values, kind):
    with pytest.raises(RejectedRow, match="pixel_range"):
        decode(tiff(values, kind=kind))


def test_a_transparent_grey_of_16_bits_lies_over_white():
    grey = Image.fromarray(np.array([[0, 65535, 0, 32768]], np.uint16))
    shown = np.asarray(decode(with_chunk(encoded(grey), b"tRNS", b"\0\0")))
    assert shown[0, :, 0].tolist() == [255, 255, 255, 127]
