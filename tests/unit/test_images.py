"""Images: which files are read, and what becomes of size, colour, rotation and transparency."""

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
