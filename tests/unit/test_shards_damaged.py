"""Shards that are damaged or made to harm: what cannot be read is told, and costs neither memory nor time."""

import io
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attune.data.rows import BadRow, Pair
from raw_data import image, rows_from


def tar_bytes(first: int, n: int) -> bytes:
    """A tar of n samples, numbered from `first`."""
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for i in range(first, first + n):
                cells = {"jpg_0.png": image(i), "jpg_1.png": image(i + 9), "caption.txt": b"a cat", "label_0.txt": b"1"}
                for column, data in cells.items():
                    entry = tarfile.TarInfo(f"{i}.{column}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
        return file.getvalue()


def header(size: int, kind: bytes = tarfile.REGTYPE, name: str = "9.jpg_0.png") -> bytes:
    """A header that claims so many bytes, also fewer than none."""
    entry = tarfile.TarInfo(name)
    entry.type = kind
    block = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (b"\x80" if size >= 0 else b"\xff") + size.to_bytes(11, "big", signed=True)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def read(tmp_path: Path, content: bytes) -> tuple[list[str], list[BadRow]]:
    """Keys of the good rows of a tar, and the bad rows."""
    (tmp_path / "0.tar").write_bytes(content)
    rows = rows_from("pickapic", path=str(tmp_path / "0.tar"))
    return [row.row for row in rows if isinstance(row, Pair)], [row for row in rows if isinstance(row, BadRow)]


def test_a_damaged_header_in_the_middle_is_told(tmp_path):
    content = bytearray(tar_bytes(0, 3))
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        start = tar.getmember("1.caption.txt").offset
    content[start : start + 512] = b"?" * 512
    good, (bad,) = read(tmp_path, bytes(content))
    assert good == ["0"]
    assert (bad.reason, bad.file) == ("unreadable_file", "0.tar")
    assert bad.detail.startswith(f"byte {start}: ")


def test_tars_one_after_the_other_are_read_as_one(tmp_path):
    assert read(tmp_path, tar_bytes(0, 2) + tar_bytes(2, 2)) == (["0", "1", "2", "3"], [])


def test_what_comes_after_the_end_and_is_no_tar_is_told(tmp_path):
    good, (bad,) = read(tmp_path, tar_bytes(0, 1) + tar_bytes(1, 1) + b"<html>" * 100)
    assert good[0] == "0"
    assert bad.reason == "unreadable_file"


@pytest.mark.parametrize("size", [-512, -1024, -(2**70)])
def test_a_file_of_less_than_no_bytes_is_told(tmp_path, size):
    good, (bad,) = read(tmp_path, tar_bytes(0, 1) + header(size) + bytes(1024))
    assert good == ["0"]
    assert bad.detail.endswith(f"is {size} bytes long; expected a whole tar that is not compressed")
    for content in (header(size), tar_bytes(0, 1)[:512] + header(size)):
        assert len(read(tmp_path, content)[1]) == 1


LENGTHENING = [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE]


@pytest.mark.parametrize("kind", LENGTHENING)
@pytest.mark.parametrize("size", [2**21, 2**40])
def test_a_name_of_a_terabyte_is_not_read(tmp_path, kind, size):
    tracemalloc.start()
    good, (bad,) = read(tmp_path, header(size, kind, "././@LongLink"))
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert good == []
    assert f"a header of {size} bytes" in bad.detail
    assert held < 2**20


@pytest.mark.parametrize("kind", LENGTHENING)
def test_names_of_names_are_not_followed_for_ever(tmp_path, kind):
    endless = (header(1, kind) + b"a".ljust(512, b"\0")) * 3000
    good, (bad,) = read(tmp_path, tar_bytes(0, 1) + endless)
    assert good == ["0"]
    assert "more than 16 headers for one file" in bad.detail


def write_parquet(path: Path, **columns) -> str:
    n = len(next(iter(columns.values())))
    jpg = [image(i) for i in range(n)]
    table = {"caption": ["a cat"] * n, "jpg_0": jpg, "jpg_1": jpg[::-1], "label_0": [1.0] * n}
    pq.write_table(pa.table(table | columns), path)
    return str(path)


@pytest.mark.parametrize("column", ["label_0", "has_label", "label_1"])
@pytest.mark.parametrize("kind", [pa.date32(), pa.timestamp("ms"), pa.duration("s"), pa.time64("us")])
def test_a_time_beyond_python_costs_its_row(tmp_path, column, kind):
    whole = pa.int32() if kind == pa.date32() else pa.int64()
    beyond = pa.array([0, 2 ** (whole.bit_width - 2)], whole)
    path = write_parquet(tmp_path / "a.parquet", **{column: beyond.view(kind)})
    rows = rows_from("pickapic", path=path)
    assert [row.row for row in rows] == [0, 1]
    assert (rows[1].reason, rows[1].detail.startswith(f"column {column}: ")) == ("malformed_row", True)


def test_equal_values_of_a_list_are_counted_before_they_are_read(tmp_path):
    values = pa.array([1], pa.int64()).take(pa.array(bytes(40_000_000), pa.uint8()))
    bomb = pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)
    path = write_parquet(tmp_path / "a.parquet", label_0=bomb)
    assert Path(path).stat().st_size < 20_000
    before = pa.total_allocated_bytes()
    (bad,) = rows_from("pickapic", path=path)
    assert (bad.reason, bad.row) == ("too_large", 0)
    assert bad.detail.startswith("rows 0 to 0, column label_0.")
    assert pa.total_allocated_bytes() <= before + 2**20


def test_images_as_lists_of_numbers_are_still_read(tmp_path):
    images = pa.array([list(image(i)) for i in range(4)], pa.list_(pa.uint8()))
    rows = rows_from("pickapic", path=write_parquet(tmp_path / "a.parquet", jpg_0=images))
    assert [row.image_0 for row in rows] == [image(i) for i in range(4)]
