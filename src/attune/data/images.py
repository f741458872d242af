"""From the bytes of an untrusted image to the square image that a model is given.

Only JPEG, PNG, WebP, BMP, GIF and TIFF are tried. EXIF rotation is applied; transparency lies over white;
palettes, grey, CMYK and 16 bits per channel become 8-bit RGB, without colour management; of an animation the first
frame counts. The shorter side is resized to the model's with an antialiased bicubic filter, as CLIP's own
preprocessing does, and the centre is cropped, so nothing is ever stretched.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from attune.data.quarantine import RejectedRow

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # other decoders run far more code on untrusted input


def decode(data: bytes) -> Image.Image:
    """An encoded image as 8-bit RGB, upright, at its own size.

    Raises:
        Rejected: `undecodable`, or `too_large`: more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, 89 million.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return _rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RejectedRow("too_large") from None
    except Exception as error:  # a decoder given hostile bytes can fail in any way
        raise RejectedRow("undecodable") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which `convert` would clip instead of scaling
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((grey // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def resize_center_crop(image: Image.Image, side: int) -> np.ndarray:
    """The image with its shorter side resized to `side` and the centre cropped, uint8 (side, side, 3)."""
    if image.size == (side, side):
        return np.asarray(image)
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + side, top + side)))
