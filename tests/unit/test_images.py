"""Images: which files are read, and what becomes of size, colour, rotation and transparency."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from attune.data.images import decode, resize_center_crop
from attune.data.ingest.reader import ImageReader
from attune.data.quarantine import RejectedRow
from raw_data import bomb, encoded, pixels


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_lossless_images_come_back_to_the_bit(kind, options):
    image = decode(encoded(pixels(0, 20, 12), kind, **options))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), pixels(0, 20, 12))


def test_a_jpeg_comes_back_nearly():
    flat = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    assert np.abs(np.asarray(decode(encoded(flat, "JPEG", quality=95))).astype(int) - flat).max() <= 3


def test_rotation_in_exif_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    image = decode(encoded(pixels(0, 20, 12), "PNG", exif=exif))
    assert image.size == (12, 20)
    assert np.array_equal(np.asarray(image), np.rot90(pixels(0, 20, 12), -1))


def test_transparency_lies_over_white():
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half.paste((0, 0, 255, 128), (0, 0, 2, 4))
    shown = np.asarray(decode(encoded(half)))
    assert (shown[:, 2:] == 255).all()  # not the red that lies under full transparency
    assert np.abs(shown[:, :2].astype(int) - (127, 127, 255)).max() <= 1
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.paste(1, (0, 0, 2, 4))
    shown = np.asarray(decode(encoded(palette, transparency=0)))
    assert (shown[0, 0] == (0, 0, 255)).all()
    assert (shown[0, 3] == 255).all()


def test_other_colours_become_rgb():
    grey = np.asarray(decode(encoded(Image.new("L", (4, 4), 77))))
    assert (grey == 77).all()
    deep = Image.fromarray(np.full((4, 4), 32768, np.uint16))
    assert (np.asarray(decode(encoded(deep))) == 127).all()  # `convert` alone would clip it to white
    cmyk = np.asarray(decode(encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF")))
    assert (cmyk == (255, 0, 0)).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([9, 8, 7])
    assert (np.asarray(decode(encoded(palette))) == (9, 8, 7)).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "undecodable"),
        (b"not an image", "undecodable"),
        (encoded(pixels(0, 64, 64))[:-2000], "undecodable"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "undecodable"),  # a format that runs a program
        (bomb(), "too_large"),
    ],
    ids=["empty", "text", "cut off", "postscript", "bomb"],
)
def test_what_is_no_image_has_a_reason(data, reason):
    with pytest.raises(RejectedRow, match=f"^{reason}$"):
        decode(data)


def with_chunk(png: bytes, kind: bytes, content: bytes) -> bytes:
    """The PNG with one more chunk after its header."""
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return png[:33] + chunk + png[33:]


CHUNKS = {
    "zTXt": (b"zTXt", b"key\0\0" + zlib.compress(bytes(5_000_000))),
    "iTXt": (b"iTXt", b"key\0\1\0\0\0" + zlib.compress(b"x" * 1_600_000)),
    "iCCP": (b"iCCP", b"icc\0\0" + zlib.compress(bytes(1_500_000))),
    "cut": (b"pHYs", b"cut"),
}


@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
def test_texts_and_profiles_of_any_size_do_not_matter(chunk):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotation is kept all the same
    png = with_chunk(encoded(pixels(0, 20, 12), "PNG", exif=exif), *chunk)
    assert np.array_equal(np.asarray(decode(png + b"after its end")), np.rot90(pixels(0, 20, 12), -1))
    with pytest.raises(RejectedRow, match="too_large"):
        decode(with_chunk(bomb(), *chunk))


def tiff(values: np.ndarray, bits: int = 0, photometric: int = 1, kind: int = 1) -> bytes:
    """A grey TIFF of one row, written by hand: Pillow writes neither 12 bits nor white as zero.

    Args:
        values: (1, width) numbers, or the packed bytes of them where `bits` says how many a number has.
        bits: of a number; 0 = those of the dtype.
        photometric: 1 = black is zero, 0 = white is.
        kind: tag SampleFormat, 1 = unsigned, 2 = signed, 3 = float.
    """
    width = values.size * 8 // bits if bits else values.size
    tags = {256: width, 257: 1, 258: bits or 8 * values.itemsize, 259: 1, 262: photometric}
    tags |= {273: 0, 277: 1, 278: 1, 279: values.nbytes, 339: kind}
    tags[273] = 8 + 2 + 12 * len(tags) + 4  # where the strip begins
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + bytes(4) + values.tobytes()


@pytest.mark.parametrize(
    ("data", "levels"),
    [
        (tiff(np.array([0, 32768, 65535], np.uint16)), [0, 127, 255]),
        (tiff(np.array([0, 32768, 65535], np.uint16), photometric=0), [255, 128, 0]),
        (tiff(np.array([0, 16384, 32767], np.int16), kind=2), [0, 127, 255]),
        (tiff(np.array([0, 2**31, 2**32 - 1], np.uint32)), [0, 127, 255]),
        (tiff(np.array([0, 2**30, 2**31 - 1], np.int32), kind=2), [0, 127, 255]),
        (tiff(np.array([0, 0.5, 1], np.float32), kind=3), [0, 127, 255]),
        (tiff(np.array([0x80, 0x0F, 0xFF], np.uint8), bits=12), [127, 255]),
    ],
    ids=["16", "white is zero", "signed 16", "32", "signed 32", "float", "12"],
)
def test_numbers_of_any_range_become_their_grey(data, levels):
    image = np.asarray(decode(data))
    assert image[0].tolist() == [[level] * 3 for level in levels]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.array([0, 1, 255], np.int32), 2),
        (np.array([-5, 100, 30_000], np.int16), 2),
        (np.array([0, 0.5, 255], np.float32), 3),
        (np.array([0, 0.5, np.nan], np.float32), 3),
        (np.array([-0.5, 0.5, 1], np.float32), 3),
    ],
    ids=["8 bits in 32", "negative", "to 255", "nan", "below 0"],
)
def test_numbers_whose_black_and_white_are_not_known_are_told(values, kind):
    with pytest.raises(RejectedRow, match="pixel_range") as rejected:
        decode(tiff(values, kind=kind))
    assert "expected " in rejected.value.detail


def test_a_very_long_image_is_told():
    reader = ImageReader(min_side=1)
    for size in ((1, 10_000), (10_000, 1), (101, 1)):
        with pytest.raises(RejectedRow, match="too_narrow") as rejected:
            reader.read(encoded(pixels(0, *size)), lambda digest: True)
        assert rejected.value.detail.startswith(f"{size[0]} x {size[1]} pixels; at most 100 to 1")
    assert reader.read(encoded(pixels(0, 100, 1)), lambda digest: True).size == (100, 1)


def test_a_long_image_is_cropped_before_it_is_enlarged(monkeypatch):
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *how: sizes.append(size) or resize(self, size, *how))
    long = np.zeros((3, 300, 3), np.uint8)
    long[:, 149:152] = 255
    square = resize_center_crop(Image.fromarray(long), 100)
    assert (square[40:60, 40:60] == 255).all()
    assert sizes == [(400, 100)]  # and not 10,000 pixels wide


def test_a_square_keeps_the_centre_and_stretches_nothing():
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 255  # the middle third is white
    assert (resize_center_crop(Image.fromarray(wide), 16) == 255).all()
    tall = resize_center_crop(Image.fromarray(wide.transpose(1, 0, 2)), 8)
    assert tall.shape == (8, 8, 3)
    assert (tall[1:-1] > 240).all()
    assert np.array_equal(resize_center_crop(Image.fromarray(pixels(1)), 16), pixels(1))


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(resize_center_crop(Image.fromarray(stripes), 16).astype(int)[:, 1:-1] - 127).max() < 3


@pytest.mark.parametrize("size", [(16, 17), (33, 16), (1, 90), (7, 7)])
def test_any_size_becomes_the_square(size):
    assert resize_center_crop(Image.fromarray(pixels(0, *size)), 16).shape == (16, 16, 3)


def test_an_image_is_decoded_again_only_where_its_pixels_are_needed(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(pixels(0, 20, 12)))
    reader = ImageReader(min_side=8)
    first = reader.read(tmp_path / "a.png", lambda digest: False)
    assert (first.size, first.image.size) == ((20, 12), (20, 12))  # new, so decoded whatever is needed
    same = reader.read(encoded(pixels(0, 20, 12)), lambda digest: False)
    assert (same.digest, same.size, same.image) == (first.digest, (20, 12), None)
    assert reader.read(tmp_path / "a.png", lambda digest: digest == first.digest).image is not None
    for _ in range(2):
        with pytest.raises(RejectedRow, match=r"^too_small$"):
            reader.read(encoded(pixels(1, 20, 7)), lambda digest: True)
