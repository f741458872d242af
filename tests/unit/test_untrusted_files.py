"""Files that never end, lead elsewhere or stand for far more bytes than they have: told, and not read."""

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attune.config import plugins
from attune.data.ingest.reader import ImageReader
from attune.data.local import MAX_IMAGE_BYTES, read_regular
from attune.data.quarantine import RejectedRow
from attune.data.rows import BadImage, BadRow, Pair, Quota
from raw_data import image, rows_from

HUGE = 40 * 10**9  # bytes


def read(ref) -> tuple[str, str]:
    """Reason and detail of an image that is rejected."""
    with pytest.raises(RejectedRow) as rejected:
        ImageReader(1).read(ref, lambda digest: True)
    return str(rejected.value), rejected.value.detail


@pytest.fixture
def table(tmp_path):
    """What becomes of an image that is named in a table."""
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "good.png").write_bytes(image(0))

    def found(name: str) -> tuple[str, str]:
        (folder / "t.csv").write_text(f"prompt,image_0,image_1,label_0\na cat,{name},good.png,1\n")
        (row,) = rows_from("table", path=str(folder / "t.csv"))
        return read(row.image_0)

    return found


def test_a_fifo_is_never_opened(table, tmp_path):
    os.mkfifo(tmp_path / "raw/pipe.png")
    reason, detail = table("pipe.png")
    assert reason == "missing_image"
    assert detail.endswith("pipe.png is a FIFO; expected a file")


def test_links_inside_the_folder_are_followed_and_others_are_not(table, tmp_path):
    raw = tmp_path / "raw"
    (tmp_path / "secret.png").write_bytes(image(1))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/b.png").write_bytes(image(1))
    (raw / "out.png").symlink_to(tmp_path / "secret.png")
    (raw / "zero.png").symlink_to("/dev/zero")
    (raw / "folder").symlink_to(tmp_path / "elsewhere")
    (raw / "circle.png").symlink_to(raw / "circle.png")
    (raw / "in.png").symlink_to("good.png")
    for name in ("out.png", "zero.png", "folder/b.png", "circle.png", "../secret.png", "/dev/zero"):
        reason, detail = table(name)
        assert reason == "missing_image"
        assert "leads out of" in detail
    (raw / "t.csv").write_text("prompt,image_0,image_1,label_0\na cat,in.png,good.png,1\n")
    (row,) = rows_from("table", path=str(raw / "t.csv"))
    assert ImageReader(1).read(row.image_0, lambda digest: True).size == (16, 16)


def test_a_file_is_measured_before_it_is_read(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(HUGE)  # a hole: no block of the disk
    reason, detail = read(tmp_path / "a.png")
    assert reason == "too_large"
    assert str(HUGE) in detail
    with pytest.raises(RejectedRow, match="too_large"):
        read_regular(tmp_path / "a.png")
    (tmp_path / "sub").mkdir()
    assert read(tmp_path / "sub") == ("missing_image", f"{tmp_path / 'sub'} is a folder; expected a file")


def sparse_member(name: str, size: int) -> bytes:
    """The header of a GNU sparse file of that size with no data."""
    entry = tarfile.TarInfo(name)
    entry.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"\x80" + size.to_bytes(11, "big")  # its real size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def test_a_sparse_member_of_a_tar_is_measured_before_it_is_read(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(2):
            for column, data in (("caption.txt", b"a cat"), ("label_0.txt", b"1"), ("jpg_1.png", image(1))):
                entry = tarfile.TarInfo(f"{i}.{column}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        tar.fileobj.write(sparse_member("1.jpg_0.png", HUGE))
        tar.offset += 512
    assert path.stat().st_size < 20_000
    good, huge = rows_from("pickapic", path=str(path))
    assert (type(good), good.prompt) == (Pair, "a cat")
    assert (huge.reason, huge.file, huge.row) == ("too_large", "0.tar", "1")
    assert huge.detail == f"column jpg_0: {HUGE} bytes; {MAX_IMAGE_BYTES} are read at most"


def first_pickapic_row(path: Path) -> tuple[Pair | BadRow, int]:
    """The first row of a shard, and how many bytes Arrow holds when it is there."""
    module, before = plugins.load("sources", "pickapic"), pa.total_allocated_bytes()
    rows = module.read(module.Config(path=str(path)), 0, None, Quota())
    return next(rows), pa.total_allocated_bytes() - before


def test_rows_of_a_parquet_that_share_a_value_do_not_all_come_at_once(tmp_path):
    columns = {"caption": ["a cat"] * 256, "label_0": [1.0] * 256} | dict.fromkeys(
        ("jpg_0", "jpg_1"), [bytes(10**6)] * 256
    )
    pq.write_table(pa.table(columns), tmp_path / "same.parquet", compression="zstd")
    assert (tmp_path / "same.parquet").stat().st_size < 10_000
    row, held = first_pickapic_row(tmp_path / "same.parquet")  # of 512 MB
    assert row.image_0 == bytes(10**6)
    assert held < 200_000_000


def test_a_group_of_rows_that_is_packed_a_thousand_times_is_not_unpacked(tmp_path):
    unlike = [i.to_bytes() * 10_000_000 for i in range(27)]
    columns = {"caption": ["a cat"] * 27, "label_0": [1.0] * 27, "jpg_0": unlike, "jpg_1": [image(1)] * 27}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    bomb, held = first_pickapic_row(tmp_path / "a.parquet")
    assert (bomb.reason, bomb.file, bomb.row) == ("too_large", "a.parquet", 0)
    assert bomb.detail.startswith("rows 0 to 26, column jpg_0: ")
    assert held < 1_000_000


def write_zip(path: Path, offset: int, value: bytes) -> None:
    """A zip of two images, with other bytes in what its directory says of the first one."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("0.png", image(0))
        archive.writestr("1.png", image(1))
    data = bytearray(path.read_bytes())
    start = data.index(b"PK\x01\x02") + offset
    data[start : start + len(value)] = value
    path.write_bytes(data)


@pytest.fixture
def imagereward(tmp_path):
    """A metadata table of two images, and what becomes of them; the zip is for the test to write."""
    names = [f"images/train/train_1/{i}.png" for i in range(2)]
    columns = {"prompt_id": [1, 1], "prompt": ["a cat", "a cat"], "image_path": names, "rank": [1, 2]}
    for split in ("train", "validation", "test"):
        rows = pa.table(columns) if split == "train" else pa.table(columns).slice(0, 0)
        pq.write_table(rows, tmp_path / f"metadata-{split}.parquet")
    (tmp_path / "images/train").mkdir(parents=True)

    def found() -> list[BadImage | bytes | Path]:
        (pair,) = rows_from("imagerewarddb", path=str(tmp_path))
        return [pair.image_0, pair.image_1]

    return tmp_path / "images/train/train_1.zip", found


def test_a_member_of_a_zip_is_measured_before_it_is_read(imagereward):
    path, found = imagereward
    write_zip(path, 24, (2**32 - 2).to_bytes(4, "little"))
    huge, good = found()
    assert (huge.reason, good) == ("too_large", image(1))
    assert huge.detail == f"0.png in {path}: {2**32 - 2} bytes; {MAX_IMAGE_BYTES} are read at most"


@pytest.mark.parametrize(("offset", "value"), [(10, b"\x63\0"), (8, b"\x01\0")], ids=["unknown", "encrypted"])
def test_a_zip_that_cannot_be_unpacked_is_a_reason(imagereward, offset, value):
    path, found = imagereward
    write_zip(path, offset, value)
    bad, good = found()
    assert (bad.reason, good) == ("undecodable", image(1))
    assert f"0.png in {path}: " in bad.detail


def test_a_folder_in_place_of_a_zip_is_a_reason(imagereward):
    path, found = imagereward
    path.mkdir()
    assert found() == [BadImage("missing_image", f"{path} is no file; expected a zip")] * 2


def test_what_is_no_shard_is_one_bad_row(tmp_path):
    os.mkfifo(tmp_path / "a.parquet")
    (tmp_path / "b.tar").symlink_to(tmp_path / "nothing")
    (tmp_path / "._c.parquet").write_bytes(b"macOS")
    rows = {"caption": ["a cat"], "jpg_0": [image(0)], "jpg_1": [image(1)], "label_0": [1.0]}
    pq.write_table(pa.table(rows), tmp_path / "c.PARQUET")
    del rows["label_0"]
    pq.write_table(pa.table(rows), tmp_path / "d.parquet")
    first, second, good, last = rows_from("pickapic", path=str(tmp_path))
    assert [row.reason for row in (first, second, last)] == ["unreadable_file"] * 3
    assert [row.file for row in (first, second, good, last)] == ["a.parquet", "b.tar", "c.PARQUET", "d.parquet"]
    assert last.detail == "d.parquet: column 'label_0' is missing; there are caption, jpg_0, jpg_1"
    assert isinstance(good, Pair)
    assert isinstance(last, BadRow)
