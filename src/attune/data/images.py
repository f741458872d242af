"""From the bytes of an untrusted image to the square image that a model is given.

Only JPEG, PNG, WebP, BMP, GIF and TIFF are tried. EXIF rotation is applied; transparency lies over white;
palettes, grey, CMYK and other ranges than 8 bits become 8-bit RGB, without colour management; of an animation the first
frame counts. The shorter side is resized to the model's with an antialiased bicubic filter, as CLIP's own
preprocessing does, and the centre is cropped, so nothing is ever stretched.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Set

import numpy as np
from PIL import Image, ImageOps

from attune.data.quarantine import RejectedRow

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # other decoders run far more code on untrusted input
CROPPED_RATIO = 4  # beyond it, the longer side is cropped before resizing, not only after
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND"}  # the chunks that pixels and rotation depend on
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
ERRORS = (ValueError, OSError, SyntaxError)  # of Pillow, for what it cannot read
SIGNED, WHITE_IS_ZERO = 2, 0
FEWEST_LEVELS = 16  # of 256 that a TIFF of 16 bits or more must reach, or its numbers have 12 bits or 8


def decode(data: bytes) -> Image.Image:
    """An encoded image as 8-bit RGB, upright, at its own size.

    Raises:
        RejectedRow: `undecodable`; `too_large`: more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, 89 million;
            `pixel_range`: numbers whose black and white are not known.
    """
    try:
        return _decode(data)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RejectedRow("too_large", str(error)) from None
    except RejectedRow:
        raise
    except Exception as error:  # a decoder given hostile bytes can fail in any way
        kinds = ", ".join(FORMATS)
        raise RejectedRow("undecodable", f"expected a whole {kinds}, found {data[:12]!r}: {error}") from error


def _decode(data: bytes) -> Image.Image:
    """Errors are Pillow's. PNGs whose texts or profiles Pillow refuses, for their size, are read without them."""
    try:
        return _open(data)
    except ERRORS as error:
        bare = _bare_png(data, PNG_PIXELS)
        if isinstance(error, RejectedRow) or bare is None:
            raise
    try:
        return _open(bare)
    except ERRORS:
        return _open(_bare_png(bare, PNG_PIXELS - {b"eXIf"}) or bare)


def _open(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _rgb(_upright(image), dict(getattr(image, "tag_v2", {})))


def _upright(image: Image.Image) -> Image.Image:
    """The image as EXIF turns it; as it is where the EXIF cannot be read."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # of the EXIF in any way; damaged pixels fail again when they are converted
        return image


def _bare_png(data: bytes, kinds: Set[bytes]) -> bytes | None:
    """The PNG with nothing but these chunks; None for bytes that are no PNG."""
    if not data.startswith(PNG_SIGNATURE):
        return None
    kept, start = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])  # length, kind, content, checksum
        if data[start + 4 : start + 8] in kinds:
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


def _rgb(image: Image.Image, tags: dict) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # numbers, which `convert` would clip instead of scaling
        return Image.fromarray(_scaled(image, tags)).convert("RGB")
    if tags.get(SAMPLE_FORMAT, (1,))[0] == SIGNED:
        raise RejectedRow("pixel_range", "signed numbers of 8 bits; expected unsigned ones, 0 to 255")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _scaled(image: Image.Image, tags: dict) -> np.ndarray:
    """Grey numbers as uint8 (H, W): floats from 0 to 1, integers from 0 to the largest of their bits.

    Args:
        image: of mode I, I;16 or F.
        tags: of a TIFF, which say how many bits a number has; without them it has 16.
    """
    values = np.asarray(image)
    bits = int(tags.get(BITS_PER_SAMPLE, (16,))[0])
    signed = tags.get(SAMPLE_FORMAT, (1,))[0] == SIGNED
    if image.mode == "F":
        top = 1.0
    else:
        values = values.view(np.uint32) if bits == 32 and not signed else values
        top = 2 ** (bits - signed) - 1
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):  # also of NaN
        raise RejectedRow("pixel_range", f"numbers from {low} to {high}; expected 0 to {top:g}")
    levels = values // 257 if top == 65535 else values * (255 / top)
    if bits >= 16 and tags and image.mode != "F" and 0 < high * (255 / top) < FEWEST_LEVELS:
        raise RejectedRow("pixel_range", f"{bits}-bit numbers up to {high} are all but black; expected up to {top}")
    grey = levels.astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):  # the one number of a PNG that is not shown
        grey[values == transparent] = 255
    return 255 - grey if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey


def resize_center_crop(image: Image.Image, side: int) -> np.ndarray:
    """The image with its shorter side resized to `side` and the centre cropped, uint8 (side, side, 3)."""
    if image.size == (side, side):
        return np.asarray(image)
    image = _crop_length(image)
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + side, top + side)))


def _crop_length(image: Image.Image) -> Image.Image:
    """The middle of a very long image, so that resizing it takes no more memory than that of a common one."""
    longest = CROPPED_RATIO * min(image.size)
    if max(image.size) <= longest:
        return image
    width, height = (min(length, longest) for length in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
