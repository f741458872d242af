"""Shards of Pick-a-Pic's columns that are out of order or broken: rows that are whole are used."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attune.data.rows import BadRow, Pair
from raw_data import image, rows_from


def sample(i: int, **changed: bytes) -> dict[str, bytes]:
    """A row as sayakpaul/pickapic_v2_webdataset has it."""
    files = {
        "jpg_0.jpg": image(2 * i, "JPEG"),
        "jpg_1.jpg": image(2 * i + 1, "JPEG"),
        "label_0.txt": b"0.0",
        "original_prompt.txt": f"prompt {i}".encode(),
    }
    return {f"{i}.{name}": data for name, data in (files | changed).items()}


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def test_a_sample_is_whole_wherever_its_files_are_in_the_tar(tmp_path):
    interleaved = [file for files in zip(*(sample(i).items() for i in range(3)), strict=True) for file in files]
    path = write_tar(tmp_path / "0.tar", [*interleaved, ("._0.jpg_0.jpg", b"macOS")])
    read = rows_from("pickapic", path=str(path))
    assert [(row.row, row.prompt, row.image_0) for row in read] == [
        (str(i), f"prompt {i}", image(2 * i, "JPEG")) for i in range(3)
    ]


def test_a_tar_that_breaks_off_loses_its_last_sample(tmp_path):
    path = write_tar(tmp_path / "0.tar", [*sample(0).items(), *sample(1).items()])
    with tarfile.open(path) as tar:
        end = tar.getmember("1.label_0.txt").offset_data
    path.write_bytes(path.read_bytes()[:end])
    good, bad = rows_from("pickapic", path=str(path))
    assert good.prompt == "prompt 0"
    assert (bad.reason, bad.file) == ("unreadable_file", "0.tar")
    assert bad.detail.endswith("expected a whole tar that is not compressed")


def test_files_of_one_name_must_agree(tmp_path):
    """A tar may hold a name twice, and a column in two types."""
    again = [("0.jpg_1.png", sample(0)["0.jpg_1.jpg"]), ("0.original_prompt.txt", b"prompt 0")]
    odd = [("1.jpg_0.jpg", b"other"), *sample(1).items()]
    path = write_tar(tmp_path / "0.tar", [*sample(0).items(), *again, *odd])
    good, bad = rows_from("pickapic", path=str(path))
    assert (good.prompt, good.image_1) == ("prompt 0", image(1, "JPEG"))
    assert (bad.reason, bad.row, bad.detail) == ("malformed_row", "1", "column jpg_0: several files that differ")


def test_what_is_missing_of_a_sample_is_named(tmp_path):
    files = sample(0) | sample(1) | sample(2, **{"label_0.txt": b"left"})
    del files["0.original_prompt.txt"], files["1.label_0.txt"]
    details = [row.detail for row in rows_from("pickapic", path=str(write_tar(tmp_path / "0.tar", [*files.items()])))]
    assert details == [
        "column caption: 0.caption.txt is not there",
        "column label_0: 1.label_0.txt is not there",
        "column label_0: expected 1, 0, 0.5 or nan, found bytes b'left'",
    ]


@pytest.mark.parametrize("ending", ["", ".txt", ".cls"])
@pytest.mark.parametrize("no", [b"0", b"False", b"0.0\n", b"no"])
def test_flags_of_a_tar(tmp_path, ending, no):
    flags: list[dict[str, bytes]] = [{"has_label": no}, {"are_different": no}, {"has_label": b"perhaps"}]
    samples = [sample(i, **{f"{name}{ending}": text for name, text in flag.items()}) for i, flag in enumerate(flags)]
    path = write_tar(tmp_path / "0.tar", [file for files in samples for file in files.items()])
    unlabelled, tie, odd = rows_from("pickapic", path=str(path))
    assert (unlabelled.label_0, tie.label_0) == (None, 0.5)
    assert odd.detail == "column has_label: expected true or false, found bytes b'perhaps'"


def test_a_broken_group_of_rows_costs_no_other(tmp_path):
    rows = [{"caption": f"prompt {i}", "jpg_0": image(i), "jpg_1": image(i + 9), "label_0": 1.0} for i in range(9)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3, compression="zstd")
    data = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(1).column(1)
    start = column.dictionary_page_offset
    data[start : start + 200] = b"\xff" * 200
    path.write_bytes(data)
    rows = rows_from("pickapic", path=str(path))
    assert [row.prompt for row in rows if isinstance(row, Pair)] == [f"prompt {i}" for i in (0, 1, 2, 6, 7, 8)]
    (bad,) = (row for row in rows if isinstance(row, BadRow))
    assert (bad.reason, bad.row, bad.detail[:22]) == ("unreadable_file", 3, "rows 3 to 5 from 3 on:")
